"""Readings and pictures during a training: what they are, and when they would take too long."""

from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion.checkpoint import Checkpoints
from diffusion.experiment import Experiment
from diffusion.modes import _sampling, _scores, _split_pass
from diffusion.modes._baselines import load_baselines, worse_than
from diffusion.modes._common import Trained
from diffusion.modes._session import Session
from diffusion.plotting import curves
from diffusion.plotting.image_grid import image_grid, save_png
from diffusion.runtime import preemption
from diffusion.runtime.config import Run
from diffusion.train_step import TrainState
from diffusion.utils import io, logging
from diffusion.utils.errors import error_text
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import QUIET_S, Progress, human_time

MAX_SHARE = 0.1  # of the training time so far that pictures may take
FREE_S = 2.0  # seconds that pictures may take in any case
FORWARD_SHARE = 1 / 3  # of a training step's time per image that one network evaluation takes


class Readings:
    """Takes the readings and draws the pictures of a training's steps.

    The file samples/STEP.unfinished is there from the beginning to the end of a step's, so that a
    run that goes on from that step takes them again if they were broken off.
    """

    def __init__(self, run: Run, exp: Experiment):
        """Raises ConfigError for a sampler that train.preview cannot have."""
        self._run, self._exp = run, exp
        self._preview = Preview(run, exp)
        self._evaluate: Callable[[Any], dict[str, float]] | None = None
        config, T = run.config, exp.process.T
        self._most_evaluations = config.bpd.quick * T // _split_pass.READ_FRACTION
        self._most_evaluations += config.eval.quick * min(_scores.QUICK_STEPS, T)

    def prepare(self) -> None:
        """Opens the data that are read. Raises ConfigError, DataError."""
        if self._run.config.train.eval_every:
            self._evaluate = make_evaluate(self._run, self._exp)

    def evaluates(self, step: int) -> bool:
        """Returns whether scores follow this step: every train.eval_every steps."""
        every = self._run.config.train.eval_every
        return bool(every) and step % every == 0

    def draws(self, step: int) -> bool:
        """Returns whether pictures follow it: every train.sample_every steps and at the end."""
        c = self._run.config.train
        return bool(c.sample_every) and (step % c.sample_every == 0 or step == c.steps)

    def due(self, step: int) -> bool:
        """Returns whether scores or pictures follow this step."""
        return self.evaluates(step) or self.draws(step)

    def broken_off(self, step: int) -> bool:
        """Returns whether an earlier run ended between the beginning and the end of a step's."""
        return self.due(step) and bool(
            broadcast_from_primary(is_primary() and self._mark(step).exists())
        )

    def take(
        self,
        session: Session,
        checkpoints: Checkpoints,
        step: int,
        state: TrainState,
        done: int = 0,
    ) -> bool:
        """Evaluates and draws where the step asks for it; returns False if a stop broke it off.

        Args:
          state: after the step. It has to be saved where False is returned.
          done: steps of this run, which tell how long readings will take.
        """
        if not self.due(step):
            return True
        unfinished = "The readings of this step are not complete.\n"
        _write(io.save_text, self._mark(step), unfinished)
        c, trained_s = self._run.config.train, session.timer.productive_seconds()
        try:
            with session.paused():
                scores = self._read(state, trained_s, done) if self.evaluates(step) else {}
                if self.draws(step):
                    self._draw(session, step, state, trained_s, done)
        except preemption.Stopped:
            return False
        if scores:  # only now, so that no step has them twice
            session.writer.write_scalars(step, {f"eval/{k}": v for k, v in scores.items()})
            session.writer.flush()
            if c.keep_best and step % c.save_every == 0:
                checkpoints.score(step, scores["bpd"])
        _write(lambda path: path.unlink(missing_ok=True), self._mark(step))
        return True

    def _mark(self, step: int) -> epath.Path:
        return self._run.workdir / "samples" / f"{step:08d}.unfinished"

    def _read(self, state: TrainState, trained_s: float, done: int) -> dict[str, float]:
        """Reads bits/dim and distances of the averaged weights; announces what takes long."""
        most = self._most_evaluations
        seconds = estimate_from_training(self._run.config, most, trained_s, done)
        if seconds > QUIET_S:
            about = human_time(seconds)
            logging.info(f"reading    bits/dim and distances, at most about {about}")
        return self._evaluate(state.ema)

    def _draw(
        self, session: Session, step: int, state: TrainState, trained_s: float, done: int
    ) -> None:
        """Draws sample grids and the loss curve."""
        if grids := self._preview.draw(state, step, trained_s, done):
            session.writer.write_images(step, {f"samples/{k}": v[None] for k, v in grids.items()})
        session.writer.flush()
        if step >= self._run.config.train.log_every:
            log = self._run.workdir / "metrics.jsonl"
            picture = self._run.workdir / "figures" / "loss.png"
            _write(lambda path: curves.plot_loss(log, path, "train/loss"), picture)


def _write(save: Callable, path: epath.Path, *content: Any) -> None:
    """Calls save(path, *content) on process 0; a full disk costs the file, not the training."""
    try:
        if is_primary():
            save(path, *content)
    except OSError as error:
        logging.warning(f"{path}: not written: {error_text(error)}")


def make_evaluate(run: Run, exp: Experiment) -> Callable[[Any], dict[str, float]]:
    """Builds params -> {bpd, bpd_error, fd_random, ...}.

    Raises ConfigError, DataError; what is built raises preemption.Stopped.
    """
    config, split = run.config, run.config.bpd.split
    trained = Trained(config, exp, run.workdir, 0, None)
    bits_per_dim = _split_pass.make_bpd_fn(trained)
    rows = load_baselines(config, exp, split, config.bpd.quick)
    distances = _scores.make_quick_distances(trained) if config.eval.quick else None

    def evaluate(params):
        bits = _split_pass.mean_and_stderr(bits_per_dim(params))
        near = distances(params) if distances else {}
        reading = f"{bits.mean:.3f} +- {bits.error:.3f} on {split}"
        logging.info(f"bits/dim   {reading}{worse_than(bits.mean, bits.error, rows)}")
        if near:
            logging.info(f"distance   {', '.join(f'{k} {v:.4g}' for k, v in near.items())}")
        return {"bpd": float(bits.mean), "bpd_error": float(bits.error), **near}

    return evaluate


def estimate_from_training(
    config: ConfigDict, evaluations: int, trained_s: float, done: int
) -> float:
    """Estimates the seconds of network evaluations of one image each.

    trained_s: seconds that `done` steps took. The estimate is 0 where there was none.
    """
    images = max(done * config.train.batch_size, 1)
    return evaluations * FORWARD_SHARE * trained_s / images


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
        seconds = estimate_from_training(self._run.config, evaluations, trained_s, done)
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
                path = self._run.workdir / "samples" / f"{step:08d}_{name}.png"
                _write(save_png, path, grids[name])
        return grids
