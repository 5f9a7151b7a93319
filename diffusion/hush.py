"""Keeps off the console what orbax and its threads print, in pages, of errors they raise as well.

checkpoint.py turns these errors into one line each; a second telling would bury it.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from absl.logging import get_absl_logger

ORBAX = f"{os.sep}orbax{os.sep}"  # in the path of all its files


def orbax() -> None:
    """For the rest of the process; to be called as often as one likes."""
    get_absl_logger().addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_abandoned)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return ORBAX not in record.pathname


def _not_abandoned(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in str(record.msg)


class _Hook(NamedTuple):
    """A sys.unraisablehook that passes over what orbax abandons when one of its reads fails."""

    hook: Callable[[Any], None]

    def __call__(self, unraisable: Any) -> None:
        frame = getattr(unraisable.exc_traceback, "tb_frame", None)
        codes = getattr(frame, "f_code", None), getattr(unraisable.object, "cr_code", None)
        of_orbax = any(code and ORBAX in code.co_filename for code in codes)
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)
