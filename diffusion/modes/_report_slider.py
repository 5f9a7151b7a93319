"""The slider of a report: x_t and the predicted x_0 of a few samples at times from T to 0."""

import io
import json
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained
from diffusion.modes._trajectories import first_samples, make_context
from diffusion.plotting.image_grid import image_grid
from diffusion.plotting.report_page import Picture, Slider
from diffusion.runtime.config import Run
from diffusion.samplers import editing
from diffusion.utils import checkpoint_files, logging
from diffusion.utils.errors import ConfigError, DataError, WorkdirError
from diffusion.utils.io import read_bytes, save_bytes, save_json
from diffusion.utils.multihost import broadcast_from_primary, is_primary

MAX_SHOWN_SIDE = 128  # pixels of a sample on the page, larger ones are averaged over blocks
SPRITE = "slider.png"


class Frames(NamedTuple):
    """Samples at the times t int[f], falling: x_t and the x_0 predicted from it, uint8[f, n, ...].

    At t = 0 both are the sample.
    """

    t: np.ndarray
    x: np.ndarray
    x_0: np.ndarray


def draw_frames(trained: Trained, samples: int, frames: int) -> Frames:
    """Draws the first samples of figures.seed by the config's sampler; all processes take part."""
    context = make_context(trained)
    steps = context.sampler.steps
    shown = editing.evenly_spaced(steps, frames)
    after = np.minimum(shown + 1, steps)  # a step from t is what predicts x_0 from x_t
    recorded = np.union1d(shown, after)
    x, x_0 = first_samples(context, samples, recorded.tolist())
    at, then = np.searchsorted(recorded, shown), np.searchsorted(recorded, after)
    x, x_0 = x[at], x_0[then]
    x_0[-1] = x[-1]
    return Frames(context.sampler.ts[shown], x, x_0)


def make_slider(run: Run) -> Slider | str:
    """Returns the slider, or why there is none. One that was drawn with this setting is kept.

    All processes take part.
    """
    c, folder = run.config.report, run.workdir / "report"
    if not c.samples:
        return "No slider over t: report.samples is 0."
    if not checkpoint_files.step_folders(run.workdir / "checkpoints"):
        return "No slider over t: there is no checkpoint."
    try:
        trained = _sampling.load_for_sampling(run, experiment.build(run.config))
    except (ConfigError, DataError, WorkdirError) as error:
        return f"No slider over t: {error}."
    seed = run.config.figures.seed
    setting = _sampling.sample_setting(run.config, trained.step, trained.weights, seed)
    setting |= {"samples": c.samples, "frames": c.frames}
    kept = broadcast_from_primary(is_primary() and is_kept(folder, setting))
    if not kept:
        what = f"{c.samples} samples at {c.frames} times, {_sampling.describe_sampler(run.config)}"
        logging.info(f"drawing    {what}")
        frames = draw_frames(trained, c.samples, c.frames)
        if is_primary():
            save_bytes(folder / SPRITE, sprite_png(frames))
            save_json(folder / "slider.json", {"setting": setting, "t": frames.t.tolist()})
    return read_slider(folder, trained.step) if is_primary() else ""


def is_kept(folder: epath.Path, setting: dict[str, Any]) -> bool:
    """Returns whether a report of the same setting has left its slider."""
    try:
        with Image.open(io.BytesIO(read_bytes(folder / SPRITE))) as image:
            image.load()
        return json.loads((folder / "slider.json").read_text())["setting"] == setting
    except Exception:  # Pillow raises anything for a damaged file
        return False


def sprite_png(frames: Frames) -> bytes:
    """Returns a PNG of all frames, one below the other: x_t above the predicted x_0."""
    n, k = frames.x.shape[1], -(-max(frames.x.shape[2:4]) // MAX_SHOWN_SIDE)
    pages = [
        image_grid(reduced(np.concatenate(pair), k), n)
        for pair in zip(frames.x, frames.x_0, strict=True)
    ]
    return png_bytes(np.concatenate(pages))


def reduced(images: np.ndarray, k: int) -> np.ndarray:
    """Returns uint8[n, h, w, c] averaged over blocks of k x k pixels; what is left over is cut."""
    n, h, w, c = images.shape
    blocks = images[:, : h // k * k, : w // k * k].reshape(n, h // k, k, w // k, k, c)
    return blocks.mean((2, 4)).round().astype(np.uint8)


def png_bytes(image: np.ndarray) -> bytes:
    """Returns an image uint8[h, w, 3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png", optimize=True)
    return file.getvalue()


def read_slider(folder: epath.Path, step: int) -> Slider:
    """Returns the slider that is kept in a folder."""
    sprite, note = read_bytes(folder / SPRITE), json.loads((folder / "slider.json").read_text())
    t, setting = note["t"], note["setting"]
    with Image.open(io.BytesIO(sprite)) as image:
        pixels = np.asarray(image.convert("RGB"))
    h = len(pixels) // len(t)
    title = f"The reverse process of {setting['samples']} samples, step {step:,}"
    words = "Above xₜ, below the image predicted from it"
    sampler = f"{setting['sampler.name']}, seed {setting['sample.seed']}"
    made = Picture(SPRITE, sprite, title, "the newest checkpoint", f"{words}; by {sampler}")
    last = made._replace(name="slider_last.png", content=png_bytes(pixels[-h:]))
    return Slider(made, last, (h, pixels.shape[1]), [f"t = {x:,}" for x in t])
