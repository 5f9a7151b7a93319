"""sheets.py: images stand where their words say, and a file plays what it was given."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting import image_grid, labelled_grid
from diffusion.plotting.animation import save_animation


def coloured(rows, columns, h=64, w=64):
    """Images of one colour each, no two alike, none of them white or grey."""
    images = np.zeros([rows, columns, h, w, 3], np.uint8)
    images[..., 0] = 200
    images[..., 1] = 20 * np.arange(rows)[:, None, None, None]
    images[..., 2] = 15 * np.arange(columns)[None, :, None, None]
    return images


def boxes(page, images):
    """(top, left, bottom, right) of each image's colour on the page: int[R, C, 4]."""
    out = np.zeros([*images.shape[:2], 4], int)
    for index in np.ndindex(images.shape[:2]):
        hit = (page == images[index][0, 0]).all(-1)
        y, x = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        out[index] = y[0], x[0], y[-1] + 1, x[-1] + 1
        assert hit.sum() == np.prod(images.shape[2:4])  # all of it, and nothing written over it
    return out


WORDS = {"columns": ("one", "two", "three", "four"), "rows": ("first", "second", "last")}


@pytest.mark.parametrize("words", [{}, WORDS, WORDS | {"title": "A title", "note": "and a note"}])
@pytest.mark.parametrize("size", [(64, 64), (80, 130), (256, 256)])
def test_sheet_has_every_image_whole_in_its_place(size, words):
    images = coloured(3, 4, *size)
    box = boxes(labelled_grid.labelled_grid(images, **words, breaks=[1]), images)
    assert np.ptp(box[..., 0], 1).max() == 0 and np.ptp(box[..., 1], 0).max() == 0
    np.testing.assert_array_equal(box[..., 2:] - box[..., :2], np.broadcast_to(size, (3, 4, 2)))
    across = box[0, 1:, 1] - box[0, :-1, 3]  # what is between columns
    assert across[0] > 3 * across[1] >= 6 and across[1] == across[2]
    down = box[1:, 0, 0] - box[:-1, 0, 2]
    assert len({*down, *across[1:]}) == 1


def ink(page):
    """Where the words are: darker than the white of the page, and grey."""
    return (page.max(-1) < 200) & (np.ptp(page.astype(int), axis=-1) < 40)


def test_words_stand_over_their_columns_and_beside_their_rows():
    images = coloured(3, 4)
    page = labelled_grid.labelled_grid(images, **WORDS)
    box, hit = boxes(page, images), ink(page)
    top, left = box[0, 0, :2]
    for j in range(4):  # in the middle over the column, up to the shape of the letters
        x = np.flatnonzero(hit[:top, box[0, j, 1] : box[0, j, 3]].any(0))
        assert abs((x[0] + x[-1]) / 2 - 32) <= 2
    for i in range(3):
        y = np.flatnonzero(hit[box[i, 0, 0] : box[i, 0, 2], :left].any(1))
        assert abs((y[0] + y[-1]) / 2 - 32) <= 4  # a g or p goes below the line
    assert not hit[top:, left:].any() and hit[:, :2].sum() == 0
    bare = labelled_grid.labelled_grid(images)
    assert not ink(bare).any() and bare.shape[1] < page.shape[1]


def test_a_long_word_is_made_smaller_and_stays_over_its_column():
    images = coloured(1, 3)
    page = labelled_grid.labelled_grid(images, ("", "completions", ""))
    box = boxes(page, images)
    x = np.flatnonzero(ink(page)[: box[0, 0, 0]].any(0))
    assert box[0, 1, 1] <= x[0] and x[-1] < box[0, 1, 3]


def test_a_sheet_is_as_wide_as_its_title():
    page = labelled_grid.labelled_grid(coloured(1, 1), title="A title that is wider than the only image")
    assert page.shape[1] > 200 and not ink(page)[:, -1].any()


def test_sheet_enlarges_small_and_grey_images_as_grids_do():
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(1, 2, 8, 8, 1)
    page = labelled_grid.labelled_grid(images)
    wanted = np.broadcast_to(image_grid.enlarge(images[0, 1], 8), (64, 64, 3))
    where = [
        (y, x)
        for y in range(page.shape[0] - 63)
        for x in range(page.shape[1] - 63)
        if (page[y : y + 64, x : x + 64] == wanted).all()
    ]
    assert len(where) == 1 and where[0][1] > 64


def test_sheet_says_what_it_expected():
    with pytest.raises(
        ValueError, match=r"sheet: expected uint8\[rows, .*float64\[1, 1, 8, 8, 1\]"
    ):
        labelled_grid.labelled_grid(np.zeros([1, 1, 8, 8, 1]))
    for name, words in (("columns", "abc"), ("rows", "ab")):
        with pytest.raises(ValueError, match=rf"expected \d words for the {name}, found"):
            labelled_grid.labelled_grid(coloured(3, 4), **{name: tuple(words)})


def test_titled_and_beside_keep_their_pages():
    pages = [np.full([20, w, 3], w, np.uint8) for w in (30, 50)]
    both = labelled_grid.side_by_side(pages, gap=7)
    assert both.shape == (20, 87, 3) and (both[:, 30:37] == 255).all()
    np.testing.assert_array_equal(both[:, 37:], pages[1])
    page = labelled_grid.add_title(both, "Title", "note")
    np.testing.assert_array_equal(page[-20:, :87], both)
    assert ink(page[:-20]).any()
    np.testing.assert_array_equal(labelled_grid.add_title(both, ""), both)




def moving(n=6):
    """A box that goes to the right."""
    frames = np.full([n, 40, 60, 3], 255, np.uint8)
    for i in range(n):
        frames[i, 10:30, 8 * i : 8 * i + 16] = (31, 95, 168)
    return frames


@pytest.mark.parametrize(("kind", "tolerance"), [("gif", 8), ("webp", 40)])
def test_an_animation_plays_its_frames_in_order(tmp_path, kind, tolerance):
    frames = moving()
    save_animation(tmp_path / f"a.{kind}", frames, seconds=0.6, hold=1.5)
    assert os.listdir(tmp_path) == [f"a.{kind}"]
    with Image.open(tmp_path / f"a.{kind}") as picture:
        assert picture.format == kind.upper() and picture.n_frames == 6
        assert picture.info["loop"] == 0  # without end
        durations = []
        for i, frame in enumerate(frames):
            picture.seek(i)
            shown = np.asarray(picture.convert("RGB")).astype(int)
            durations.append(picture.info["duration"])
            # A GIF has colours near these; WebP loses some at edges, but not in the mean.
            assert np.abs(shown - frame).mean() < tolerance / 4
            assert (
                np.abs(shown[14:26, 8 * i + 4 : 8 * i + 12] - frame[20, 8 * i + 8]).max()
                < tolerance
            )
    assert durations == [100] * 5 + [1600]


def test_an_animation_of_noise_is_small(tmp_path):
    """Noise does not compress: of 256 grey levels, a GIF has more than a byte for each pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 1)).astype(np.uint8)
    frames = noise.repeat(3, -1)
    save_animation(tmp_path / "a.gif", frames)
    assert (tmp_path / "a.gif").stat().st_size < 8 * 64 * 64


def test_an_animation_names_what_it_expected(tmp_path):
    for frames in (moving().astype(float), moving()[0], moving()[:0]):
        with pytest.raises(ValueError, match=r"expected uint8\[n, H, W, 3\], not empty, found"):
            save_animation(tmp_path / "a.gif", frames)
    with pytest.raises(ValueError, match=r"expected a name that ends in \.gif or \.webp, found"):
        save_animation(tmp_path / "a.mp4", moving())
    assert os.listdir(tmp_path) == []


def test_load_mask_keeps_what_is_light(tmp_path):
    picture = np.zeros([4, 6], np.uint8)
    picture[:, :3], picture[0, 5] = 255, 127
    for name, shown in (("grey.png", picture), ("rgb.png", picture[..., None].repeat(3, -1))):
        image_grid.save_png(tmp_path / name, shown)
        np.testing.assert_array_equal(labelled_grid.load_mask(tmp_path / name, 4, 6), picture == 255)
    with pytest.raises(ValueError, match=r"expected a picture of 6x4 \(high x wide\), found 4x6"):
        labelled_grid.load_mask(tmp_path / "grey.png", 6, 4)
    (tmp_path / "text").write_text("no picture")
    for name in ("text", "missing"):
        with pytest.raises(ValueError, match=rf"{name}: expected a picture of 4x6, found none: "):
            labelled_grid.load_mask(tmp_path / name, 4, 6)
