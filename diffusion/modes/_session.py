"""What the steps of a training are recorded with: log, progress, watchdog, bad steps."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from diffusion import data
from diffusion.experiment import Experiment, make_lr_schedule
from diffusion.modes._nonfinite import NonFiniteHandler
from diffusion.modes._profile import Profiler
from diffusion.runtime.config import Run
from diffusion.runtime.watchdog import Watchdog
from diffusion.train_step import TrainState
from diffusion.utils import logging, metric_writer
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import GoodputTimer, Progress

READINGS = "readings and pictures"  # their share of the time is reported under this name


class Session:
    """Records the steps of one process's training; a context manager.

    Metrics are read one dispatch late, so that the device has work meanwhile.
    """

    def __init__(
        self, run: Run, exp: Experiment, images: data.ImageDataset, start: int, timer: GoodputTimer
    ):
        self.run, self.exp, self.timer = run, exp, timer
        self.bad_steps = NonFiniteHandler(run, exp, images)
        self.writer = metric_writer.open_writer(run.workdir if is_primary() else None, start or -1)
        c = run.config.train
        self._progress = Progress(c.steps, start, c.batch_size)
        self._watchdog = Watchdog(run.workdir, c.hang_s)
        self._lr: Callable = make_lr_schedule(run.config)
        self._profiler = Profiler(run, lambda: self.paused("profile"))
        self._split = start, timer.split()  # at the last logged step: when, seconds of each part
        self._step = start
        self._pending: deque[tuple[range, dict]] = deque()
        self._window: list[dict[str, float]] = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: Any) -> None:
        self._watchdog.close()
        self._profiler.close()
        self._progress.close()
        self.writer.close()

    @contextlib.contextmanager
    def dispatch(self, steps: range, state: TrainState) -> Iterator[None]:
        """Surrounds a dispatch, whose time is the device's and which a profile may show.

        steps: its steps; state: before them.
        """
        self._profiler.before(steps, state)
        note = jax.profiler.StepTraceAnnotation("train", step_num=steps[0])
        with self.timer.part("device"), note:
            yield

    def record(self, steps: range, metrics: dict, state: TrainState, wait: bool) -> None:
        """Takes a dispatch's metrics and logs the previous one's; with `wait` this one's too.

        metrics: {name: numbers [len(steps) or more]}. Raises NonFiniteError as train.on_nonfinite
        says.
        """
        self._step = steps[-1]
        self._pending.append((steps, metrics))
        while len(self._pending) > (0 if wait else 1) and not self.bad_steps.rolling_back:
            self._log(*self._pending.popleft(), state)
        self._profiler.after(steps, state)

    def discard(self) -> None:
        """Forgets the steps that are not logged yet."""
        self._pending.clear()

    def _log(self, steps: range, metrics: dict, state: TrainState) -> None:
        c = self.run.config.train
        with self.timer.part("device"):
            metrics = jax.device_get(metrics)
        self._watchdog.beat(steps[-1])
        for i, step in enumerate(steps):
            values = {name: float(rows[i]) for name, rows in metrics.items()}
            values = {"loss": values.pop("loss"), **values}
            if not all(map(np.isfinite, values.values())):
                logging.warning(self.bad_steps.handle(step, values, state))
                if self.bad_steps.rolling_back:
                    return
                continue
            if c.on_nonfinite == "skip":
                self.bad_steps.reset()
            self._window.append(values)
            if step == steps[-1]:
                self._progress(step, values)
            if step % c.log_every == 0 or step == c.steps:
                self._write_means(step)

    def _write_means(self, step: int) -> None:
        window = self._window
        scalars = {f"train/{k}": np.mean([v[k] for v in window]) for k in window[-1]}
        scalars["train/lr"] = float(self._lr(step - 1))
        scalars["train/steps_per_s"] = self._progress.rate()
        scalars["train/goodput"] = self.timer.goodput()
        scalars["train/not_finite"] = self.bad_steps.count
        scalars |= self._step_times()
        self.writer.write_scalars(step, {k: v for k, v in scalars.items() if v is not None})
        window.clear()

    def _step_times(self) -> dict[str, float]:
        """Returns the milliseconds of a step since the last call; {} where no step was taken."""
        step, before = self._split
        if not (steps := self._step - step):  # two steps are logged at once where one is waited for
            return {}
        after = self.timer.split()
        self._split = self._step, after
        return {f"train/{name}_ms": 1e3 * (after[name] - before[name]) / steps for name in after}

    @contextlib.contextmanager
    def paused(self, name: str = READINGS) -> Iterator[None]:
        """Keeps what is no training step out of the rate, the watchdog and the goodput."""
        with self._progress.paused(), self._watchdog.paused(), self.timer(name):
            yield
