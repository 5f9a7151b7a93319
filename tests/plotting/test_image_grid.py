"""diffusion.plotting.image_grid: every pixel of a grid, and PNG files that are read back."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting.image_grid import enlarge, image_grid, save_png


def blank(n, h, w, c=3):
    return np.zeros([n, h, w, c], np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_pixel_by_pixel(channels):
    images = np.random.default_rng(0).integers(0, 255, (3, 64, 70, channels), np.uint8)
    page = image_grid(images, columns=2)
    expected = np.full([2 + 64 + 2 + 64 + 2, 2 + 70 + 2 + 70 + 2, 3], 255)
    expected[2:66, 2:72] = images[0]
    expected[2:66, 74:144] = images[1]
    expected[68:132, 2:72] = images[2]
    assert page.dtype == np.uint8
    np.testing.assert_array_equal(page, expected)


def test_enlarge_is_smooth():
    """Bicubic interpolation reproduces a ramp, apart from its ends, up to rounding."""
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[:, None, None] * 30, (8, 8, 3))
    for image in (ramp, ramp.swapaxes(0, 1)):
        page = enlarge(image, 4)[..., 0].astype(float)
        page = page if image is ramp else page.T
        np.testing.assert_array_equal(page, page[:, :1].repeat(32, 1))
        centres = (np.arange(32) + 0.5) / 4 - 0.5  # of the new pixels, in units of the old ones
        np.testing.assert_allclose(page[8:-8, 0], 30 * centres[8:-8], atol=0.5 + 1e-9)


def test_grid_enlarges_small_images():
    images = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(image_grid(images)[2:-2, 2:-2], enlarge(images[0], 8))


def test_grid_does_not_alias_its_input():
    images = blank(1, 64, 64)
    image_grid(images)[:] = 7
    assert images.max() == 0


@pytest.mark.parametrize(
    "n, rows, columns",
    [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (6, 2, 3), (7, 3, 3), (8, 2, 4), (10, 2, 5),
     (12, 3, 4), (16, 4, 4), (17, 4, 5), (64, 8, 8), (100, 10, 10)],
)  # fmt: skip
def test_grid_is_near_square_and_without_gaps_if_possible(n, rows, columns):
    assert image_grid(blank(n, 64, 64)).shape == (66 * rows + 2, 66 * columns + 2, 3)


@pytest.mark.parametrize("h, w, scale", [(8, 8, 8), (28, 28, 3), (32, 32, 2), (64, 64, 1),
                                         (63, 90, 2), (256, 256, 1), (1, 100, 64)])  # fmt: skip
def test_grid_makes_the_shorter_side_at_least_64_pixels(h, w, scale):
    assert image_grid(blank(1, h, w)).shape == (h * scale + 4, w * scale + 4, 3)


@pytest.mark.parametrize(
    "images",
    [np.zeros([1, 8, 8, 3], np.float32), blank(1, 8, 8, 2), blank(1, 8, 8)[0], blank(0, 8, 8),
     blank(1, 0, 8), np.zeros([1, 8, 8, 3], np.int64)],
)  # fmt: skip
def test_grid_names_what_it_expected_and_found(images):
    found = f"{images.dtype}{list(images.shape)}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"grid: expected uint8\[n, h, w, 1 or 3\].*{found}"):
        image_grid(images)


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png_reads_back_the_same(tmp_path, channels):
    image = np.arange(4 * 5 * channels, dtype=np.uint8).reshape(4, 5, channels)
    path = tmp_path / "new" / "folder" / "a.png"
    save_png(path, image)
    with Image.open(path) as back:
        assert back.format == "PNG" and back.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(back), image.repeat(3 // channels, -1))
    assert os.listdir(path.parent) == ["a.png"]


def test_save_png_refuses_other_arrays_before_it_touches_a_file(tmp_path):
    for image in [np.zeros([4, 4, 3], np.float32), np.zeros([4, 4, 4], np.uint8)]:
        with pytest.raises(ValueError, match="save_png: expected uint8"):
            save_png(tmp_path / "a", image)
    assert os.listdir(tmp_path) == []
