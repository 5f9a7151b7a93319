"""Grids of images with column labels, row labels and a title; masks read from pictures."""

import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion.plotting.image_grid import as_rgb, enlarge, visible_scale

TEXT, FAINT_TEXT = (32, 36, 43), (90, 98, 112)
PAGE_GAP = 12  # pixels, between pages side by side
HIDDEN = (214, 222, 232)  # colour of the pixels that inpainting does not know


def labelled_grid(
    images: np.ndarray,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    note: str = "",
    breaks: Sequence[int] = (),
) -> np.ndarray:
    """Returns images in rows and columns with their labels on a white page, uint8[H, W, 3].

    Args:
      images: uint8[R, C, h, w, 1 or 3]; enlarged by `visible_scale(h, w)`.
      columns: C labels above the columns, or none.
      rows: R labels beside the rows, or none.
      title: a line in bold above everything.
      note: a line below the title.
      breaks: indices of the columns that are preceded by a wider gap.
    """
    images = as_rgb("labelled_grid", images, "rows, columns, h, w")
    R, C, h, w, _ = images.shape
    for name, labels, n in (("columns", columns, C), ("rows", rows, R)):
        if len(labels) not in (0, n):
            raise ValueError(f"labelled_grid: expected {n} labels of {name}, found {len(labels)}")
    scale = visible_scale(h, w)
    h, w = h * scale, w * scale
    size, pad, gap = max(13, w // 12), max(2, w // 32), max(12, w // 6)

    left = pad + max((_text_width(text, size) + gap for text in rows), default=0)
    top = round(1.7 * size) if len(columns) else pad
    breaks_before = np.searchsorted(sorted(breaks), np.arange(C), "right")
    x = left + np.arange(C) * (w + pad) + breaks_before * gap
    y = top + np.arange(R) * (h + pad)
    page = np.full([y[-1] + h + pad, x[-1] + w + pad, 3], 255, np.uint8)
    for i in range(R):
        for j in range(C):
            page[y[i] : y[i] + h, x[j] : x[j] + w] = enlarge(images[i, j], scale)
    picture = Image.fromarray(page)
    draw = ImageDraw.Draw(picture)
    for text, x_j in zip(columns, x, strict=False):
        fitting = size
        while fitting > 9 and _text_width(text, fitting) > w:
            fitting -= 1
        draw.text((x_j + w / 2, top - 0.45 * size), text, FAINT_TEXT, _font(fitting), "ms")
    for text, y_i in zip(rows, y, strict=False):
        draw.text((left - gap / 2, y_i + h / 2), text, FAINT_TEXT, _font(size), "rm")
    return add_title(np.asarray(picture), title, note, size, left)


def add_title(
    page: np.ndarray, title: str, note: str = "", size: int = 13, left: int = 2
) -> np.ndarray:
    """Returns the page uint8[H, W, 3] with a title in bold and a note above it.

    size, in pixels, is that of the note's font; both lines begin `left` pixels from the edge.
    """
    lines = [(title, round(1.3 * size), "-Bold", TEXT), (note, size, "", FAINT_TEXT)]
    lines = [line for line in lines if line[0]]
    if not lines:
        return page
    height = sum(round(1.6 * size) for _, size, _, _ in lines) + size // 2
    width = left + max(_text_width(text, size, style) for text, size, style, _ in lines) + size
    H, W, _ = page.shape
    picture = Image.new("RGB", (max(W, width), height + H), "white")
    picture.paste(Image.fromarray(page), (0, height))
    draw, y = ImageDraw.Draw(picture), 0
    for text, size, style, colour in lines:
        y += round(1.6 * size)
        draw.text((left, y - 0.2 * size), text, colour, _font(size, style), "ls")
    return np.array(picture)


def side_by_side(pages: Sequence[np.ndarray]) -> np.ndarray:
    """Joins pages uint8[H, W_i, 3] from left to right, with a white gap between them."""
    gap = np.full([len(pages[0]), PAGE_GAP, 3], 255, np.uint8)
    return np.concatenate([part for page in pages for part in (gap, page)][1:], axis=1)


def _text_width(text: str, size: int, style: str = "") -> int:
    return int(np.ceil(_font(size, style).getlength(text)))


@functools.cache
def _font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    """Loads DejaVu Sans from matplotlib's files, the font of the curves."""
    import matplotlib  # slow to import

    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{style}.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def load_mask(path: str | os.PathLike, h: int, w: int) -> np.ndarray:
    """Reads a picture of h x w as bool[h, w]: True, a known pixel, where it is light (>= 128).

    Raises:
      ValueError: the file is not a picture, or has another size.
    """
    try:
        with Image.open(path) as picture:
            known = np.asarray(picture.convert("L")) >= 128
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a picture of {h}x{w}, found none: {error}") from error
    if known.shape != (h, w):
        found = "x".join(map(str, known.shape))
        raise ValueError(f"{path}: expected a picture of {h}x{w} (high x wide), found {found}")
    return known
