"""Ends a run that makes no progress, so that nobody pays for a machine that waits for nothing."""

import contextlib
import faulthandler
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax
from etils import epath

from diffusion.utils import io
from diffusion.utils.errors import LOST

TICK_S = 0.25


class Watchdog:
    """Aborts the process if `beat` is not called for `limit_s` seconds; 0 means never.

    A collective that waits for a dead switch, or a file server that does not answer, raises
    nothing. The thread counts its own ticks instead of reading a clock, so that a machine that was
    suspended has missed nothing. It starts to count at the first beat: compilation takes its time.
    """

    def __init__(self, workdir: epath.Path, limit_s: float):
        self._workdir, self._limit_s = workdir, limit_s
        self._waited_s, self._step, self._active = 0.0, 0, False
        self._closed = threading.Event()
        if limit_s:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, step: int) -> None:
        """Says that a step is done."""
        self._waited_s, self._step, self._active = 0.0, step, True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops counting during work that is no training step."""
        self._active = False
        try:
            yield
        finally:
            self._active, self._waited_s = True, 0.0

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while self._waited_s <= self._limit_s:
            if self._closed.wait(TICK_S):
                return
            self._waited_s += TICK_S if self._active else 0.0
        what = f"no step for {self._limit_s:g} s after step {self._step} (train.hang_s)"
        abort(self._workdir, "hang", f"{what}; the same command resumes from the last save")


def abort(workdir: epath.Path, name: str, message: str) -> NoReturn:
    """Prints one line and exits with code 7 from any thread; the stacks of all go to crash/NAME."""
    console = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # JAX, in C++, may be about to dump its registers
    path = workdir / "crash" / f"{name}_process{jax.process_index()}.txt"
    message = f"{message}; the stacks: {path}"
    os.write(console, f"ddpm: error[{LOST}]: {message}\n".encode())
    with contextlib.suppress(OSError):
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            io.save_bytes(path, file.read())
    os._exit(LOST)
