"""diffusion.plotting.animation: a file plays the frames that it was given."""

import os

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting.animation import save_animation


def moving_box(n=6):
    """Returns frames of a box that moves to the right, uint8[n, 40, 60, 3]."""
    frames = np.full([n, 40, 60, 3], 255, np.uint8)
    for i in range(n):
        frames[i, 10:30, 8 * i : 8 * i + 16] = (31, 95, 168)
    return frames


@pytest.mark.parametrize(("kind", "tolerance"), [("gif", 8), ("webp", 40)])
def test_an_animation_plays_its_frames_in_order(tmp_path, kind, tolerance):
    frames = moving_box()
    save_animation(tmp_path / f"a.{kind}", frames)
    assert os.listdir(tmp_path) == [f"a.{kind}"]
    with Image.open(tmp_path / f"a.{kind}") as picture:
        assert picture.format == kind.upper() and picture.n_frames == 6
        assert picture.info["loop"] == 0  # without end
        durations = []
        for i, frame in enumerate(frames):
            picture.seek(i)
            shown = np.asarray(picture.convert("RGB")).astype(int)
            durations.append(picture.info["duration"])
            # A GIF has colours near these; WebP loses some at edges, but not in the mean.
            assert np.abs(shown - frame).mean() < tolerance / 4
            inside = shown[14:26, 8 * i + 4 : 8 * i + 12]
            assert np.abs(inside - frame[20, 8 * i + 8]).max() < tolerance
    assert durations == [670] * 5 + [2670]  # ms: 4 s / 6 in steps of 10 ms, and 2 s more


def test_an_animation_of_noise_is_small(tmp_path):
    """Noise does not compress: of 256 grey levels, a GIF has more than a byte for each pixel."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 1)).astype(np.uint8)
    frames = noise.repeat(3, -1)
    save_animation(tmp_path / "a.gif", frames)
    assert (tmp_path / "a.gif").stat().st_size < 8 * 64 * 64


def test_an_animation_names_what_it_expected(tmp_path):
    for frames in (moving_box().astype(float), moving_box()[0], moving_box()[:0]):
        with pytest.raises(
            ValueError, match=r"expected uint8\[n, H, W, 1 or 3\], not empty, found"
        ):
            save_animation(tmp_path / "a.gif", frames)
    with pytest.raises(ValueError, match=r"expected a name in \.gif or \.webp, found"):
        save_animation(tmp_path / "a.mp4", moving_box())
    assert os.listdir(tmp_path) == []
