"""Readings and pictures during a training: what they are, and when they would take too long."""

from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion.experiment import Experiment
from diffusion.modes import _sampling, _scores, _split_pass
from diffusion.modes._common import Trained
from diffusion.plotting.image_grid import image_grid, save_png
from diffusion.runtime.config import Run
from diffusion.train_step import TrainState
from diffusion.utils import logging
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import Progress, human_time

MAX_SHARE = 0.1  # of the training time so far that pictures may take
FORWARD_SHARE = 1 / 3  # of a training step's time per image that one network evaluation takes


def make_evaluate(run: Run, exp: Experiment) -> Callable[[Any], dict[str, float]] | None:
    """Builds params -> {bpd, bpd_error, fd_random, ...}; None where train.eval_every is 0.

    Raises ConfigError, DataError.
    """
    config = run.config
    if not config.train.eval_every:
        return None
    trained = Trained(config, exp, run.workdir, 0, None)
    bits_per_dim = _split_pass.make_bpd_fn(trained)
    distances = _scores.make_quick_distances(trained) if config.eval.quick else None

    def evaluate(params):
        bits = bits_per_dim(params)
        near = distances(params) if distances else {}
        logging.info(f"bits/dim   {bits.mean:.3f} +- {bits.error:.3f} on {config.bpd.split}")
        if near:
            logging.info(f"distance   {', '.join(f'{k} {v:.4g}' for k, v in near.items())}")
        return {"bpd": float(bits.mean), "bpd_error": float(bits.error), **near}

    return evaluate


def draw(
    run: Run, exp: Experiment, state: TrainState, step: int, trained_s: float, done: int
) -> dict[str, np.ndarray]:
    """Draws samples of the raw and of the averaged weights from the same noise as image grids.

    They come from the sampler of train.preview and are saved in workdir/samples/. Where they would
    take more than a tenth of the training so far, none are drawn, and a line says so.

    Args:
      trained_s: seconds of training so far; done: the steps that took them.

    Returns: {"raw": uint8[H, W, 3], "ema": ...}, or nothing.
    """
    config = _sampling.preview_config(run.config, exp)
    n, batch = run.config.train.preview.num, run.config.train.batch_size
    sampler = _sampling.compile_sampler(config, exp, n)
    evaluations = 2 * sampler.size * sampler.evaluations
    seconds = evaluations * FORWARD_SHARE * trained_s / max(done * batch, 1)
    what = f"{n} samples with raw and with averaged weights, {_sampling.describe_sampler(config)}"
    if seconds > MAX_SHARE * trained_s:
        logging.info(f"no preview {what}: about {human_time(seconds)}; see train.preview")
        return {}
    logging.info(f"drawing    {what}")
    total, grids = _sampling.num_steps(sampler, n), {}
    with Progress(2 * total, unit="sampling step") as progress:
        for i, (name, params) in enumerate((("raw", state.params), ("ema", state.ema))):

            def report(steps, before=i * total):
                progress(before + steps)

            seed = config.sample.seed
            images = list(_sampling.draw(sampler, params, seed, n, report))
            grids[name] = image_grid(np.concatenate(images))
            if is_primary():
                path = run.workdir / "samples" / f"{step:08d}_{name}.png"
                save_png(path, grids[name])
    return grids
