"""Animated GIF and WebP files."""

import io
import os

import numpy as np
from PIL import Image

from diffusion.plotting.image_grid import as_rgb
from diffusion.utils.io import save_bytes

GIF_COLOURS = 32  # a GIF has at most 256, and its size grows with their number
DURATION_S = 4.0
PAUSE_MS = 2000  # on the last frame


def save_animation(path: str | os.PathLike, frames: np.ndarray) -> None:
    """Writes frames uint8[n, H, W, 1 or 3] atomically as an endless animation of about six seconds.

    The file format follows the name, which ends in .gif or .webp.
    """
    frames = as_rgb("save_animation", frames, "n, H, W")
    suffix = os.path.splitext(path)[1]
    if suffix not in (".gif", ".webp"):
        raise ValueError(f"save_animation: expected a name in .gif or .webp, found {path}")
    pictures = [Image.fromarray(frame) for frame in frames]
    if suffix == ".gif":  # one palette for all frames and no dithering, so that nothing flickers
        palette = Image.fromarray(np.concatenate([frames[len(frames) // 2], frames[-1]]))
        palette, no_dither = palette.quantize(GIF_COLOURS), Image.Dither.NONE
        pictures = [p.quantize(palette=palette, dither=no_dither) for p in pictures]
    duration_ms = max(20, round(100 * DURATION_S / len(frames)) * 10)  # GIF counts in 10 ms
    content = io.BytesIO()
    pictures[0].save(
        content,
        suffix[1:],
        save_all=True,
        append_images=pictures[1:],
        duration=[duration_ms] * (len(frames) - 1) + [duration_ms + PAUSE_MS],
        loop=0,
        optimize=False,
    )
    save_bytes(path, content.getvalue())
