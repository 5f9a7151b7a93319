"""--mode=sample: images from the averaged weights, as samples.npz and as a picture."""

import numpy as np

from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained
from diffusion.plotting import image_grid
from diffusion.runtime.config import Run
from diffusion.utils import io, logging
from diffusion.utils.multihost import is_primary

GRID_IMAGES = 100  # in the picture


def run(run: Run) -> None:
    """Draws sample.num images into workdir/samples/STEP_WEIGHTS_SEED_SAMPLER_DIGEST/."""
    save_samples(_sampling.load_for_sampling(run, experiment.build(run.config)))


def save_samples(trained: Trained) -> None:
    """Writes samples.npz, grid.png and how.json.

    A set of the same setting is resumed or extended; a larger one is kept. Raises WorkdirError.
    """
    config, c, exp = trained.config, trained.config.sample, trained.exp
    setting = _sampling.sample_setting(config, trained.step, trained.weights, c.seed)
    folder = trained.workdir / "samples" / f"{trained.step:08d}_{_sampling.sample_name(setting)}"
    store = _sampling.SampleStore(folder, setting, exp.image_shape)
    sampler = _sampling.compile_sampler(config, exp, min(c.num, c.batch_size))
    what = f"{c.num:,} images of step {trained.step:,}, {_sampling.describe_sampler(config)}"
    logging.info(f"sampling   {what}")
    _sampling.fill(store, sampler, trained.params, c.num)
    if not is_primary():
        return
    with np.load(store.npz) as file:
        images = file["arr_0"]
    image_grid.save_png(folder / "grid.png", image_grid.image_grid(images[:GRID_IMAGES]))
    how = {"step": trained.step, "weights": trained.weights, "images": len(images)}
    io.save_json(folder / "how.json", how | {"config": config})
    shape = f"uint8 {list(images.shape)} in arr_0"
    logging.info(f"done       {folder}/samples.npz ({shape}), grid.png, how.json")
