"""sample."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.experiment import Experiment
from diffusion.modes._sampling import (
    SampleStore,
    compile_sampler,
    delete,
    describe,
    is_partial,
    keep,
    setting_of,
)
from diffusion.plotting import image_grid
from diffusion.utils.io import save_text


def run(
    config: ConfigDict,
    x: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: Any,
    say: Callable[[str], None],
) -> None:
    """sample.num images from the averaged weights: npz, a grid and how they were made.

    A set that was begun goes on; any other that is there is drawn anew. Raises Fatal.
    """
    c, first = config.sample, jax.process_index() == 0
    chain = compile_sampler(config, x, min(c.num, c.batch_size))
    setting = setting_of(config, step, "ema", c.seed)
    name = f"{step:08d}_seed{c.seed}"
    if config.sampler.name != "ancestral":
        name += f"_{config.sampler.name}{len(chain.ts) - 1}"
    if c.label >= 0:
        name += f"_label{c.label}"
    kept = SampleStore(workdir / "samples" / name, setting, x.image_shape)
    if first and not is_partial(kept):
        delete(kept)
    say(f"sampling   {c.num:,} images of step {step:,}, {describe(config)}")
    keep(kept, chain, params, c.num)
    if first:
        with np.load(kept.npz) as file:
            image_grid.save_png(kept.folder / "grid.png", image_grid.image_grid(file["arr_0"][:100]))
        how = {"step": step, "weights": "ema", "config": config.to_dict()}
        save_text(kept.folder / "how.json", json.dumps(how, indent=2) + "\n")
    shape = f"uint8 {[c.num, *x.image_shape]} in arr_0"
    say(f"done       {kept.folder}/samples.npz ({shape}), grid.png, how.json")
