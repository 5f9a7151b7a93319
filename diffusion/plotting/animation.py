"""animation."""

import io
import os
import pathlib

import numpy as np
from PIL import Image

from diffusion.utils.io import save_bytes

COLOURS = 32  # of a GIF: it has 256 at most, and grows with every one that is used


def save_animation(
    path: str | os.PathLike, frames: np.ndarray, seconds: float = 4.0, hold: float = 2.0
) -> None:
    """Writes frames as an animation without end, atomically: a GIF or a WebP, as the name says.

    frames: uint8[n, H, W, 3], shown for `seconds` in all, the last one for `hold` more. A GIF has
    32 colours, those of the last frame and of one halfway. Raises ValueError for other frames or
    another name, OSError for a path that cannot be written.
    """
    frames, kind = np.asarray(frames), pathlib.Path(path).suffix[1:]
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[-1] != 3 or not frames.size:
        found = f"{frames.dtype}{list(frames.shape)}"
        raise ValueError(f"save_animation: expected uint8[n, H, W, 3], not empty, found {found}")
    if kind not in ANIMATIONS:
        wanted = " or ".join(f".{name}" for name in ANIMATIONS)
        raise ValueError(f"save_animation: expected a name that ends in {wanted}, found {path}")
    each = round(1000 * seconds / len(frames) / 10) * 10  # GIFs count hundredths of a second
    durations = [max(each, 20)] * len(frames)
    durations[-1] += round(1000 * hold)
    prepare, options = ANIMATIONS[kind]
    first, *rest = prepare(frames)
    content = io.BytesIO()
    first.save(
        content, kind, save_all=True, append_images=rest, duration=durations, loop=0, **options
    )
    save_bytes(path, content.getvalue())


def _true_colours(frames: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


def _few_colours(frames: np.ndarray) -> list[Image.Image]:
    """All frames in the same colours: nothing flickers."""
    both = np.concatenate([frames[len(frames) // 2], frames[-1]])
    palette = Image.fromarray(both).quantize(COLOURS)
    none = Image.Dither.NONE
    return [picture.quantize(palette=palette, dither=none) for picture in _true_colours(frames)]


# What each kind of file takes: frames -> pictures, and how they are written.
ANIMATIONS = {
    "gif": (_few_colours, {"optimize": False}),
    "webp": (_true_colours, {"quality": 80, "method": 4}),
}
