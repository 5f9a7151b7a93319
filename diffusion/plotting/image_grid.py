"""Grids of images, and PNG files."""

import math
import os

import numpy as np
from PIL import Image

from diffusion.utils.io import atomic_write

MIN_VISIBLE_SIDE = 64  # pixels: smaller images are enlarged until their shorter side has these
PAD = 2  # white pixels around and between the images of a grid


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Returns the images row by row on a white page, uint8[H, W, 3].

    Args:
      images: uint8[n, h, w, 1 or 3]; enlarged by `visible_scale(h, w)`.
      columns: images per row; None: near-square, without a gap in the last row where possible.
    """
    images = as_rgb("image_grid", images, "n, h, w")
    n, h, w, _ = images.shape
    columns = _near_square_columns(n) if columns is None else columns
    scale = visible_scale(h, w)
    h, w, rows = h * scale, w * scale, -(-n // columns)
    page = np.full([rows * (h + PAD) + PAD, columns * (w + PAD) + PAD, 3], 255, np.uint8)
    for i, image in enumerate(images):
        y, x = PAD + i // columns * (h + PAD), PAD + i % columns * (w + PAD)
        page[y : y + h, x : x + w] = enlarge(image, scale)
    return page


def visible_scale(h: int, w: int) -> int:
    """Returns the least integer factor that makes the shorter side of an h x w image 64 pixels."""
    return math.ceil(MIN_VISIBLE_SIDE / min(h, w))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """Resizes uint8[h, w, 3] to uint8[scale h, scale w, 3] by bicubic interpolation.

    Nearest-neighbour interpolation would show the edges of 8x8 large squares instead of a digit.
    """
    h, w, _ = image.shape
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((w * scale, h * scale), Image.Resampling.BICUBIC))


def as_rgb(name: str, images: np.ndarray, dims: str) -> np.ndarray:
    """Returns uint8[dims, 3]; raises ValueError unless images are uint8[dims, 1 or 3]."""
    images = np.asarray(images)
    valid = images.dtype == np.uint8 and images.ndim == len(dims.split(",")) + 1 and images.size
    if not valid or images.shape[-1] not in (1, 3):
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"{name}: expected uint8[{dims}, 1 or 3], not empty, found {found}")
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _near_square_columns(n: int) -> int:
    """Prefers a divisor of n, which leaves no gap, if the grid is not much wider than high."""
    root = math.ceil(math.sqrt(n))
    return next((c for c in range(root, int(1.6 * math.sqrt(n)) + 1) if n % c == 0), root)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8[h, w, 1 or 3] as an RGB file atomically, and makes missing folders."""
    image = as_rgb("save_png", image, "h, w")
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, "png")
