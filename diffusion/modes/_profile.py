"""A profile of some steps of a training, for TensorBoard's profile plugin (the package xprof)."""

import contextlib
import pathlib
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from diffusion.runtime.config import Run
from diffusion.utils import io, logging
from diffusion.utils.errors import one_line

KINDS = ("xplane.pb", "trace.json.gz")  # for the plugin; in the format of Chrome


class Profiler:
    """Records the dispatches with steps of train.profile in every process; what fails is a warning.

    The files are workdir/plugins/profile/step_FIRST/HOST_PROCESS.xplane.pb and .trace.json.gz.
    """

    def __init__(self, run: Run, paused: Callable[[], contextlib.AbstractContextManager]):
        """paused: keeps the time inside out of the rate, the watchdog and the goodput."""
        first, number = run.config.train.profile or (0, 0)
        self._steps = range(first, min(first + number, run.config.train.steps + 1))
        self._workdir, self._paused = run.workdir, paused
        self._open = contextlib.ExitStack()  # holds the local folder
        self._first = self._last = 0
        self._folder = ""  # jax.profiler writes to local folders only

    def before(self, steps: range, state: Any) -> None:
        """Begins before the first dispatch to record, once the device has finished with `state`."""
        if not self._folder and self._overlaps(steps):
            self._first = steps[0]
            with self._paused():
                jax.block_until_ready(state)
                self._attempt(self._start)

    def after(self, steps: range, state: Any) -> None:
        """Ends after the last dispatch to record, once the device has finished it."""
        self._last = steps[-1]
        if self._folder and self._last >= self._steps[-1]:
            with self._paused():
                jax.block_until_ready(state)
                self._attempt(self._write)

    def close(self) -> None:
        """Writes the steps recorded so far, if there are any."""
        if self._folder:
            with self._paused():
                self._attempt(self._write)

    def _overlaps(self, steps: range) -> bool:
        return bool(self._steps) and steps[0] <= self._steps[-1] and self._steps[0] <= steps[-1]

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a profile is not worth a training
            logging.warning(f"train.profile: {one_line(error)}; the profile is lost")
            self._steps, self._folder = range(0), ""
            self._open.close()

    def _start(self) -> None:
        folder = tempfile.TemporaryDirectory(prefix="profile_", ignore_cleanup_errors=True)
        folder = self._open.enter_context(folder)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # recording every call of Python would slow the steps
        jax.profiler.start_trace(folder, profiler_options=options)
        self._folder = folder

    def _write(self) -> None:
        local, self._folder = pathlib.Path(self._folder), ""
        with self._open:
            jax.profiler.stop_trace()
            # The same name in every process, so that the plugin shows them as one run.
            folder = self._workdir / "plugins" / "profile" / f"step_{self._first:08d}"
            name = f"{socket.gethostname()}_{jax.process_index()}"
            for kind in KINDS:
                for path in local.rglob(f"*.{kind}"):
                    io.save_bytes(folder / f"{name}.{kind}", path.read_bytes())
        how = f"tensorboard --logdir={self._workdir} (pip install xprof)"
        logging.info(f"profile    steps {self._first:,} to {self._last:,}; see it with: {how}")
