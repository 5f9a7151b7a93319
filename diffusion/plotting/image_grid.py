"""Pictures: grids and strips of samples; and saving them, or anything, whole or not at all."""

import math
import os

import numpy as np
from PIL import Image

from diffusion.utils.io import atomic_write

VISIBLE = 64  # pixels: small images are enlarged until their shorter side has these


def image_grid(
    images: np.ndarray, columns: int | None = None, scale: int | None = None, pad: int = 2
) -> np.ndarray:
    """Images row by row on white, with `pad` white pixels between and around them.

    images: uint8[n, h, w, 1 or 3], n >= 1. columns: None: near-square, and full where that can be.
    scale: how many times enlarged; None: the least that makes the shorter side 64 pixels. Returns
    uint8[H, W, 3] with H = rows (scale h + pad) + pad, and W alike. Raises ValueError for other
    images, and for columns, scale < 1 or pad < 0.
    """
    images = _checked("grid", images, 4, "uint8[n, h, w, 1 or 3]")
    n, h, w, _ = images.shape
    columns = _near_square(n) if columns is None else columns
    scale = visible_scale(h, w) if scale is None else scale
    for name, value, least in [("columns", columns, 1), ("scale", scale, 1), ("pad", pad, 0)]:
        if value != int(value) or value < least:
            raise ValueError(f"grid: expected {name} of at least {least}, found {value}")
    h, w, rows = h * scale, w * scale, -(-n // columns)
    page = np.full([rows * (h + pad) + pad, columns * (w + pad) + pad, 3], 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (pad + j * (size + pad) for j, size in zip(divmod(i, columns), (h, w), strict=True))
        page[y : y + h, x : x + w] = enlarge(image, scale)
    return page


def visible_scale(h: int, w: int) -> int:
    """How many times enlarged, at the least, an image of h x w has a shorter side of 64 pixels."""
    return math.ceil(VISIBLE / min(h, w))


def enlarge(image: np.ndarray, scale: int) -> np.ndarray:
    """uint8[h, w, 1 or 3] -> uint8[scale h, scale w, same], by bicubic interpolation.

    Not as squares: an eye that sees their edges does not see the digit in 8x8 of them.
    """
    if scale == 1:
        return image
    h, w, c = image.shape
    picture = Image.fromarray(image[..., 0] if c == 1 else image)
    size = w * scale, h * scale
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC)).reshape(*size[::-1], c)


def strip(images: np.ndarray, scale: int | None = None, pad: int = 2) -> np.ndarray:
    """Sequences, such as x_T ... x_0 or an interpolation, one per row: a grid of known columns.

    images: uint8[rows, columns, h, w, 1 or 3]. Returns uint8[H, W, 3]. Raises ValueError as `grid`.
    """
    images = _checked("strip", images, 5, "uint8[rows, columns, h, w, 1 or 3]")
    return image_grid(images.reshape(-1, *images.shape[2:]), images.shape[1], scale, pad)


def _checked(who: str, images: np.ndarray, ndim: int, expected: str) -> np.ndarray:
    images = np.asarray(images)
    right = images.dtype == np.uint8 and images.ndim == ndim and images.shape[-1] in (1, 3)
    if not right or not images.size:
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"{who}: expected {expected}, not empty, found {found}")
    return images


def _near_square(n: int) -> int:
    """Columns for n images: without a gap if the grid is then not much wider than high."""
    root = math.ceil(math.sqrt(n))
    return next((c for c in range(root, int(1.6 * math.sqrt(n)) + 1) if n % c == 0), root)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8[h, w, 3], [h, w, 1] or [h, w] as PNG, atomically; folders are made.

    Raises ValueError for another image, OSError for a path that cannot be written.
    """
    image = np.asarray(image)
    three = image[..., None] if image.ndim == 2 else image
    three = _checked("save_png", three, 3, "uint8[h, w, 1 or 3]")
    with atomic_write(path) as file:
        Image.fromarray(three[..., 0] if three.shape[-1] == 1 else three).save(file, "png")
