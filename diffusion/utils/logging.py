"""Console output: one line at a time, on process 0 only; and libraries kept quiet."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import absl.logging
from tqdm import tqdm

ORBAX = f"{os.sep}orbax{os.sep}"  # in the path of all of its files

_silent = False


def silence(silent: bool) -> None:
    """Turns `info` and `warning` off, in the processes other than 0, or on again."""
    global _silent
    _silent = silent


def is_silent() -> bool:
    """Returns whether this process prints nothing."""
    return _silent


def info(message: str, stream: TextIO | None = None) -> None:
    """Prints one line to `stream` (None: stdout) at once, above a live progress bar."""
    if not _silent:
        stream = sys.stdout if stream is None else stream
        tqdm.write(message, file=stream)
        stream.flush()  # a file or a pipe would get it kilobytes later


def warning(message: str) -> None:
    """Prints one line to stderr, marked as a warning of this program."""
    info(f"ddpm: warning: {message}", sys.stderr)


def quiet_libraries(verbosity: int = -1) -> None:
    """Keeps the INFO lines of libraries, and what orbax prints of errors it also raises, away.

    verbosity: of absl's log: -1 warnings, 0 info, 1 debug.
    """
    absl.logging.set_verbosity(verbosity)
    quiet_orbax()


def quiet_orbax() -> None:
    """Drops orbax's log records and its abandoned coroutines; may be called repeatedly.

    checkpoint.py turns these errors into one line each.
    """
    absl.logging.get_absl_logger().addFilter(_is_not_orbax)
    logging.getLogger("asyncio").addFilter(_is_retrieved)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _UnraisableHook):
        sys.unraisablehook = _UnraisableHook(sys.unraisablehook)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return ORBAX not in record.pathname


def _is_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in str(record.msg)


class _UnraisableHook(NamedTuple):
    """A sys.unraisablehook that ignores what orbax abandons when one of its reads fails."""

    hook: Callable[[Any], None]

    def __call__(self, unraisable: Any) -> None:
        frame = getattr(unraisable.exc_traceback, "tb_frame", None)
        codes = getattr(frame, "f_code", None), getattr(unraisable.object, "cr_code", None)
        of_orbax = any(code and ORBAX in code.co_filename for code in codes)
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)
