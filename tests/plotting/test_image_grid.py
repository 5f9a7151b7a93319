"""figures.py: every pixel of small pictures is known; a file is the old one or the new one."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting import image_grid
from diffusion.utils.io import save_npz

ROOT = pathlib.Path(__file__).parent.parent


def blank(n, h, w, c=3):
    return np.zeros([n, h, w, c], np.uint8)




def test_grid_pixel_by_pixel():
    images = np.array([[[1, 2]], [[3, 4]], [[5, 6]]], np.uint8)[..., None]  # three, 1 x 2
    page = image_grid.image_grid(images, columns=2, scale=1, pad=1)
    _ = 255
    expected = [
        [_, _, _, _, _, _, _],
        [_, 1, 2, _, 3, 4, _],
        [_, _, _, _, _, _, _],
        [_, 5, 6, _, _, _, _],
        [_, _, _, _, _, _, _],
    ]
    assert page.dtype == np.uint8 and page.shape == (5, 7, 3)
    for channel in range(3):
        np.testing.assert_array_equal(page[..., channel], expected)


def test_grid_enlarges_smoothly():
    """Bicubic interpolation keeps what is linear: a ramp stays one, but for the ends, rounded."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None] * 30, (8, 8))[None, ..., None]
    for images in (ramp, ramp.swapaxes(1, 2)):
        page = image_grid.image_grid(images, scale=4, pad=0)[..., 0].astype(float)
        page = page if images is ramp else page.T
        np.testing.assert_array_equal(page, page[:, :1].repeat(32, 1))
        centres = (np.arange(32) + 0.5) / 4 - 0.5  # of the new pixels, in the old ones
        np.testing.assert_allclose(page[8:-8, 0], 30 * centres[8:-8], atol=0.5 + 1e-9)


def test_grid_keeps_colours_and_order():
    images = np.arange(6 * 2 * 3 * 3, dtype=np.uint8).reshape(6, 2, 3, 3)
    page = image_grid.image_grid(images, columns=3, scale=1, pad=2)
    assert page.shape == (2 * (2 + 2) + 2, 3 * (3 + 2) + 2, 3)
    for i, image in enumerate(images):
        y, x = 2 + i // 3 * 4, 2 + i % 3 * 5
        np.testing.assert_array_equal(page[y : y + 2, x : x + 3], image)


def test_grid_does_not_change_or_alias_its_input():
    images = blank(1, 64, 64)
    page = image_grid.image_grid(images, pad=0)
    page[:] = 7
    assert images.max() == 0


@pytest.mark.parametrize(
    "n, rows, columns",
    [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (6, 2, 3), (7, 3, 3), (8, 2, 4), (10, 2, 5),
     (12, 3, 4), (16, 4, 4), (17, 4, 5), (64, 8, 8), (100, 10, 10)],
)  # fmt: skip
def test_grid_is_near_square_and_full_where_it_can_be(n, rows, columns):
    assert image_grid.image_grid(blank(n, 1, 1), scale=1, pad=0).shape == (rows, columns, 3)


@pytest.mark.parametrize("h, w, scale", [(8, 8, 8), (28, 28, 3), (32, 32, 2), (64, 64, 1),
                                         (63, 90, 2), (256, 256, 1), (1, 100, 64)])  # fmt: skip
def test_grid_makes_small_images_visible(h, w, scale):
    assert image_grid.image_grid(blank(1, h, w), pad=0).shape == (h * scale, w * scale, 3)


@pytest.mark.parametrize(
    "images",
    [np.zeros([1, 8, 8, 3], np.float32), blank(1, 8, 8, 2), blank(1, 8, 8)[0], blank(0, 8, 8),
     blank(1, 0, 8), np.zeros([1, 8, 8, 3], np.int64)],
)  # fmt: skip
def test_grid_names_what_it_expected_and_found(images):
    found = f"{images.dtype}{list(images.shape)}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"grid: expected uint8\[n, h, w, 1 or 3\].*{found}"):
        image_grid.image_grid(images)


@pytest.mark.parametrize(
    "argument, value", [("columns", 0), ("scale", 0), ("pad", -1), ("scale", 1.5)]
)
def test_grid_refuses_impossible_layouts(argument, value):
    with pytest.raises(ValueError, match=f"expected {argument} of at least ., found {value}"):
        image_grid.image_grid(blank(2, 8, 8), **{argument: value})


def test_strip_is_a_row_per_sequence():
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 2, 2, 1)
    page = image_grid.strip(images, scale=1, pad=0)
    expected = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11], [12, 13, 16, 17, 20, 21],
                [14, 15, 18, 19, 22, 23]]  # fmt: skip
    np.testing.assert_array_equal(page[..., 2], expected)
    assert image_grid.strip(images).shape == (2 * 66 + 2, 3 * 66 + 2, 3)
    with pytest.raises(ValueError, match=r"strip: expected uint8\[rows, columns, h, w, 1 or 3\]"):
        image_grid.strip(images[0])




@pytest.mark.parametrize("shape", [(4, 5, 3), (4, 5, 1), (4, 5)])
def test_save_png_reads_back_the_same(tmp_path, shape):
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path / "new" / "folder" / "a.png"
    image_grid.save_png(path, image)
    with Image.open(path) as back:
        assert back.format == "PNG" and back.mode == ("RGB" if shape[-1] == 3 else "L")
        np.testing.assert_array_equal(np.asarray(back).reshape(shape), image)
    assert os.listdir(path.parent) == ["a.png"]


def test_save_npz_reads_back_the_same(tmp_path):
    images, labels = np.arange(60, dtype=np.uint8).reshape(5, 2, 2, 3), np.arange(5)
    save_npz(tmp_path / "a.npz", images)
    save_npz(tmp_path / "b.npz", images, labels)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a.files == ["arr_0"] and b.files == ["arr_0", "arr_1"]
        assert a["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(a["arr_0"], images)
        np.testing.assert_array_equal(b["arr_1"], labels)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


def test_save_refuses_other_arrays_before_it_touches_a_file(tmp_path):
    path = tmp_path / "a"
    for image in [np.zeros([4, 4, 3], np.float32), np.zeros([4, 4, 4], np.uint8)]:
        with pytest.raises(ValueError, match="save_png: expected uint8"):
            image_grid.save_png(path, image)
    with pytest.raises(ValueError, match="save_npz: expected uint8"):
        save_npz(path, np.zeros([2, 4, 4, 3]))
    for labels in [np.arange(3), np.zeros(2), np.zeros([2, 1], int)]:
        with pytest.raises(ValueError, match=r"save_npz: expected labels int\[2\], found"):
            save_npz(path, blank(2, 4, 4), labels)
    assert os.listdir(tmp_path) == []


def broken(*args, **kwargs):
    file = next(x for x in args if isinstance(x, io.BufferedIOBase))
    file.write(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["png", "npz"])
def test_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, kind):
    path = tmp_path / "a"
    path.write_text("old")
    if kind == "png":
        monkeypatch.setattr(Image.Image, "save", broken)
    else:
        monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="No space"):
        if kind == "png":
            image_grid.save_png(path, blank(1, 2, 2)[0])
        else:
            save_npz(path, blank(1, 2, 2))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_save_has_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, seen, save = tmp_path / "a.png", [], np.savez
    path.write_text("old")

    def watched(*args):
        save(*args)
        seen.append(path.read_text())

    monkeypatch.setattr(np, "savez", watched)
    save_npz(path, blank(1, 2, 2))
    assert seen == ["old"] and path.read_bytes()[:2] == b"PK"


# ----------------------------------------------------------------------------------------- curves
