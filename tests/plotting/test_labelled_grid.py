"""diffusion.plotting.labelled_grid: images and their labels are in their places; masks."""

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting.image_grid import enlarge
from diffusion.plotting.labelled_grid import add_title, labelled_grid, load_mask, side_by_side


def coloured(rows, columns, h=64, w=64):
    """Images of one colour each, no two alike, none of them white or grey."""
    images = np.zeros([rows, columns, h, w, 3], np.uint8)
    images[..., 0] = 200
    images[..., 1] = 20 * np.arange(rows)[:, None, None, None]
    images[..., 2] = 15 * np.arange(columns)[None, :, None, None]
    return images


def boxes(page, images):
    """Returns (top, left, bottom, right) of each image's colour on the page, int[R, C, 4]."""
    out = np.zeros([*images.shape[:2], 4], int)
    for index in np.ndindex(images.shape[:2]):
        hit = (page == images[index][0, 0]).all(-1)
        y, x = np.flatnonzero(hit.any(1)), np.flatnonzero(hit.any(0))
        out[index] = y[0], x[0], y[-1] + 1, x[-1] + 1
        assert hit.sum() == np.prod(images.shape[2:4])  # all of it, and no text on it
    return out


LABELS = {"columns": ("one", "two", "three", "four"), "rows": ("first", "second", "last")}


@pytest.mark.parametrize(
    "labels", [{}, LABELS, LABELS | {"title": "A title", "note": "and a note"}]
)
@pytest.mark.parametrize("size", [(64, 64), (80, 130), (256, 256)])
def test_every_image_is_complete_and_in_its_place(size, labels):
    images = coloured(3, 4, *size)
    box = boxes(labelled_grid(images, **labels, breaks=[1]), images)
    assert np.ptp(box[..., 0], 1).max() == 0 and np.ptp(box[..., 1], 0).max() == 0
    np.testing.assert_array_equal(box[..., 2:] - box[..., :2], np.broadcast_to(size, (3, 4, 2)))
    across = box[0, 1:, 1] - box[0, :-1, 3]  # what is between columns
    assert across[0] > 3 * across[1] >= 6 and across[1] == across[2]
    down = box[1:, 0, 0] - box[:-1, 0, 2]
    assert len({*down, *across[1:]}) == 1


def ink(page):
    """Returns where the text is: grey, and darker than the page, bool[H, W]."""
    return (page.max(-1) < 200) & (np.ptp(page.astype(int), axis=-1) < 40)


def test_labels_are_above_their_columns_and_beside_their_rows():
    images = coloured(3, 4)
    page = labelled_grid(images, **LABELS)
    box, hit = boxes(page, images), ink(page)
    top, left = box[0, 0, :2]
    for j in range(4):  # centred above the column, up to the shape of the letters
        x = np.flatnonzero(hit[:top, box[0, j, 1] : box[0, j, 3]].any(0))
        assert abs((x[0] + x[-1]) / 2 - 32) <= 2
    for i in range(3):
        y = np.flatnonzero(hit[box[i, 0, 0] : box[i, 0, 2], :left].any(1))
        assert abs((y[0] + y[-1]) / 2 - 32) <= 4  # a g or p goes below the line
    assert not hit[top:, left:].any() and hit[:, :2].sum() == 0
    bare = labelled_grid(images)
    assert not ink(bare).any() and bare.shape[1] < page.shape[1]


def test_a_long_label_is_set_smaller_and_stays_above_its_column():
    images = coloured(1, 3)
    page = labelled_grid(images, ("", "completions", ""))
    box = boxes(page, images)
    x = np.flatnonzero(ink(page)[: box[0, 0, 0]].any(0))
    assert box[0, 1, 1] <= x[0] and x[-1] < box[0, 1, 3]


def test_a_page_is_as_wide_as_its_title():
    page = labelled_grid(coloured(1, 1), title="A title that is wider than the only image")
    assert page.shape[1] > 200 and not ink(page)[:, -1].any()


def test_small_and_grey_images_are_enlarged_as_in_image_grid():
    images = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(1, 2, 8, 8, 1)
    page = labelled_grid(images)
    wanted = enlarge(images[0, 1].repeat(3, -1), 8)
    where = [
        (y, x)
        for y in range(page.shape[0] - 63)
        for x in range(page.shape[1] - 63)
        if (page[y : y + 64, x : x + 64] == wanted).all()
    ]
    assert len(where) == 1 and where[0][1] > 64


def test_errors_name_what_was_expected_and_found():
    with pytest.raises(
        ValueError, match=r"labelled_grid: expected uint8\[rows, .*float64\[1, 1, 8, 8, 1\]"
    ):
        labelled_grid(np.zeros([1, 1, 8, 8, 1]))
    for name, labels in (("columns", "abc"), ("rows", "ab")):
        with pytest.raises(ValueError, match=rf"expected \d labels of {name}, found"):
            labelled_grid(coloured(3, 4), **{name: tuple(labels)})


def test_add_title_and_side_by_side_keep_their_pages():
    pages = [np.full([20, w, 3], w, np.uint8) for w in (30, 50)]
    both = side_by_side(pages)
    assert both.shape == (20, 92, 3) and (both[:, 30:42] == 255).all()
    np.testing.assert_array_equal(both[:, :30], pages[0])
    np.testing.assert_array_equal(both[:, 42:], pages[1])
    page = add_title(both, "Title", "note")
    np.testing.assert_array_equal(page[-20:, :92], both)
    assert ink(page[:-20]).any()
    np.testing.assert_array_equal(add_title(both, ""), both)


def test_load_mask_is_true_where_the_picture_is_light(tmp_path):
    picture = np.zeros([4, 6], np.uint8)
    picture[:, :3], picture[0, 5] = 255, 127
    for name, shown in (("grey.png", picture), ("rgb.png", picture[..., None].repeat(3, -1))):
        Image.fromarray(shown).save(tmp_path / name)
        np.testing.assert_array_equal(load_mask(tmp_path / name, 4, 6), picture == 255)
    with pytest.raises(ValueError, match=r"expected a picture of 6x4 \(high x wide\), found 4x6"):
        load_mask(tmp_path / "grey.png", 6, 4)
    (tmp_path / "text").write_text("no picture")
    for name in ("text", "missing"):
        with pytest.raises(ValueError, match=rf"{name}: expected a picture of 4x6, found none: "):
            load_mask(tmp_path / name, 4, 6)
