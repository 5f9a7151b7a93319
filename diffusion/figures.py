"""Pictures: grids and strips of samples; and saving them, or anything, whole or not at all."""

import contextlib
import math
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

VISIBLE = 64  # pixels: small images are enlarged until their shorter side has these


def grid(
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
        page[y : y + h, x : x + w] = enlarged(image, scale)
    return page


def visible_scale(h: int, w: int) -> int:
    """How many times enlarged, at the least, an image of h x w has a shorter side of 64 pixels."""
    return math.ceil(VISIBLE / min(h, w))


def enlarged(image: np.ndarray, scale: int) -> np.ndarray:
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
    return grid(images.reshape(-1, *images.shape[2:]), images.shape[1], scale, pad)


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


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when it is complete; an error leaves `path` as it was."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: the same file system
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive a power cut that its bytes did not
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8[h, w, 3], [h, w, 1] or [h, w] as PNG, atomically; folders are made.

    Raises ValueError for another image, OSError for a path that cannot be written.
    """
    image = np.asarray(image)
    three = image[..., None] if image.ndim == 2 else image
    three = _checked("save_png", three, 3, "uint8[h, w, 1 or 3]")
    with replacing(path) as file:
        Image.fromarray(three[..., 0] if three.shape[-1] == 1 else three).save(file, "png")


def save_npz(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes a sample set as evaluators read it: `arr_0` the images, `arr_1` the labels if given.

    images: uint8[n, h, w, 1 or 3]; labels: int[n]. Atomic; folders are made. Raises ValueError for
    other arrays, OSError for a path that cannot be written.
    """
    arrays = [_checked("save_npz", images, 4, "uint8[n, h, w, 1 or 3]")]
    if labels is not None:
        arrays.append(np.asarray(labels))
        if arrays[1].shape != arrays[0].shape[:1] or arrays[1].dtype.kind not in "iu":
            found = f"{arrays[1].dtype}{list(arrays[1].shape)}"
            raise ValueError(f"save_npz: expected labels int[{len(arrays[0])}], found {found}")
    with replacing(path) as file:
        np.savez(file, *arrays)


def save_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, atomically; folders are made. Raises OSError."""
    with replacing(path) as file:
        file.write(content)


def save_text(path: str | os.PathLike, text: str) -> None:
    """The same for a text, in UTF-8."""
    save_bytes(path, text.encode("utf-8", "backslashreplace"))
