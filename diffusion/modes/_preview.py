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
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import Progress, human_time

MAX_SHARE = 0.1  # of the training time so far that pictures may take
FREE_S = 2.0  # seconds that pictures may take in any case
FORWARD_SHARE = 1 / 3  # of a training step's time per image that one network evaluation takes


def make_evaluate(run: Run, exp: Experiment) -> Callable[[Any], dict[str, float]] | None:
    """Builds params -> {bpd, bpd_error, fd_random, ...}; None where train.eval_every is 0.

    Raises ConfigError, DataError; what is built raises preemption.Stopped.
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


class Preview:
    """Draws samples during a training, by the sampler of train.preview.

    Pictures that would take more than FREE_S and a tenth of the training so far are left out.
    """

    def __init__(self, run: Run, exp: Experiment):
        self._run, self._n = run, run.config.train.preview.num
        config = _sampling.preview_config(run.config, exp)
        self._sampler = _sampling.compile_sampler(config, exp, self._n)
        self._about = f"{self._n} samples with raw and with averaged weights, "
        self._about += _sampling.describe_sampler(config)

    def draw(
        self, state: TrainState, step: int, trained_s: float, done: int
    ) -> dict[str, np.ndarray]:
        """Draws with the raw and with the averaged weights, from the same noise.

        Args:
          state, step: what the samples are drawn from; the step names the files in samples/.
          trained_s: seconds of training so far; done: the steps that took them.

        Returns {"raw": grid uint8[H, W, 3], "ema": ...}, or {} where the pictures are left out.
        Raises preemption.Stopped.
        """
        evaluations = 2 * self._sampler.size * self._sampler.evaluations
        images = max(done * self._run.config.train.batch_size, 1)
        seconds = evaluations * FORWARD_SHARE * trained_s / images
        # One process decides for all: their clocks differ, and drawing takes all of them.
        if broadcast_from_primary(seconds > max(FREE_S, MAX_SHARE * trained_s)):
            about = f"{self._about}: about {human_time(seconds)}"
            logging.info(f"no preview {about}; see train.preview")
            return {}
        logging.info(f"drawing    {self._about}")
        total, grids = _sampling.num_steps(self._sampler, self._n), {}
        with Progress(2 * total, unit="sampling step") as progress:
            for i, (name, params) in enumerate((("raw", state.params), ("ema", state.ema))):

                def report(steps, before=i * total):
                    progress(before + steps)

                seed = self._run.config.sample.seed
                drawn = _sampling.draw(self._sampler, params, seed, self._n, report)
                grids[name] = image_grid(np.concatenate(list(drawn)))
                if is_primary():
                    path = self._run.workdir / "samples" / f"{step:08d}_{name}.png"
                    save_png(path, grids[name])
        return grids
