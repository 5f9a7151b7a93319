"""Pages with words: labelled sheets of images, animations, curves over the reverse process.

Words are set in the typeface of the curves, in sizes that follow the images. An animation is one
file that every browser plays.
"""

import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion.plotting import image_grid

INK, GREY = (32, 36, 43), (90, 98, 112)


HIDDEN = (214, 222, 232)  # what is not known of an image


def labelled_grid(
    images: np.ndarray,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    title: str = "",
    note: str = "",
    breaks: Sequence[int] = (),
    scale: int | None = None,
) -> np.ndarray:
    """Images in rows and columns on white, a word over each column and one beside each row.

    images: uint8[R, C, h, w, 1 or 3]. columns, rows: C and R words, or none. title, note: a line
    each, above all. breaks: the columns that a wider gap comes before. scale: as in figures.grid.
    Returns uint8[H, W, 3]. Raises ValueError for other images, and for words of another number.
    """
    images = np.asarray(images)
    if images.ndim != 5 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"sheet: expected uint8[rows, columns, h, w, 1 or 3], found {found}")
    R, C, h, w, _ = images.shape
    for name, words, n in (("columns", columns, C), ("rows", rows, R)):
        if len(words) not in (0, n):
            raise ValueError(f"sheet: expected {n} words for the {name}, found {len(words)}")
    scale = scale or image_grid.visible_scale(h, w)
    h, w = h * scale, w * scale
    word, pad, gap = max(13, w // 12), max(2, w // 32), max(12, w // 6)

    beside = max(map(functools.partial(_width, size=word), rows), default=-gap) + gap
    over = round(1.7 * word) if len(columns) else pad
    wider = np.searchsorted(sorted(breaks), np.arange(C), "right")
    x = pad + beside + np.arange(C) * (w + pad) + gap * wider
    y = over + np.arange(R) * (h + pad)
    page = np.full([y[-1] + h + pad, x[-1] + w + pad, 3], 255, np.uint8)
    for i in range(R):
        for j in range(C):
            page[y[i] : y[i] + h, x[j] : x[j] + w] = image_grid.enlarge(images[i, j], scale)
    picture = Image.fromarray(page)
    draw = ImageDraw.Draw(picture)
    for text, left in zip(columns, x, strict=False):
        _write(draw, (left + w / 2, over - 0.45 * word), text, word, "ms", w)
    for text, top in zip(rows, y, strict=False):
        _write(draw, (x[0] - gap / 2, top + h / 2), text, word, "rm")
    return add_title(np.asarray(picture), title, note, word, int(x[0]))


def add_title(
    page: np.ndarray, title: str, note: str = "", word: int = 13, left: int = 2
) -> np.ndarray:
    """A page uint8[H, W, 3] under a title and a note; `word` pixels high the note, `left` from."""
    lines = [(title, round(1.3 * word), "-Bold", INK), (note, word, "", GREY)]
    lines = [line for line in lines if line[0]]
    widest = max((_width(text, size, bold) for text, size, bold, _ in lines), default=0)
    high = sum(round(1.6 * size) for _, size, _, _ in lines) + word // 2 * bool(lines)
    H, W, _ = page.shape
    picture = Image.new("RGB", (max(W, left + widest + word), high + H), "white")
    picture.paste(Image.fromarray(page), (0, high))
    draw, y = ImageDraw.Draw(picture), 0
    for text, size, bold, colour in lines:
        y += round(1.6 * size)
        draw.text((left, y - 0.2 * size), text, colour, _font(size, bold), "ls")
    return np.array(picture)


def side_by_side(pages: Sequence[np.ndarray], gap: int = 12) -> np.ndarray:
    """Pages uint8[H, W_i, 3] of one height, from left to right."""
    space = np.full([len(pages[0]), gap, 3], 255, np.uint8)
    between = [part for page in pages for part in (space, page)]
    return np.concatenate(between[1:], axis=1)


def _write(draw, xy, text: str, size: int, anchor: str, room: float = np.inf) -> None:
    """A word in grey, made smaller where there is less room, but not unreadable."""
    while size > 9 and _width(text, size) > room:
        size -= 1
    draw.text(xy, text, GREY, _font(size), anchor)


def _width(text: str, size: int, bold: str = "") -> int:
    return int(np.ceil(_font(size, bold).getlength(text)))


@functools.cache
def _font(size: int, bold: str = "") -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, so that all pictures are of one hand."""
    import matplotlib  # slow to import, and only needed here

    path = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{bold}.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def load_mask(path: str | os.PathLike, h: int, w: int) -> np.ndarray:
    """A picture of h x w as bool[h, w]: True, to be kept, where it is lighter than mid-grey.

    Raises ValueError for a picture of another size, and for a file that is none.
    """
    try:
        with Image.open(path) as picture:
            light = np.asarray(picture.convert("L")) >= 128
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path}: expected a picture of {h}x{w}, found none: {what}") from error
    if light.shape != (h, w):
        found = "x".join(map(str, light.shape))
        raise ValueError(f"{path}: expected a picture of {h}x{w} (high x wide), found {found}")
    return light
