"""Ends the process on SIGINT or SIGTERM: at once, or after the work in progress.

A thread reads the signals from a pipe, because the main thread runs no Python handler while it is
in XLA, for minutes at times. Nothing large is imported here: main.py installs it first.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from diffusion.utils.errors import STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 2.0  # later signals within this time are the same request: some tools send several


class Stopped(BaseException):
    """A request to stop was followed; the same command resumes. No Exception: it is no defect."""

    code = STOPPED


_installed = False
_deferred = False
_requested = False
_calls = 0  # of should_stop, equal in all processes


def install() -> None:
    """Makes SIGINT and SIGTERM end the process with one line and code 75, until `defer` is entered.

    Called in the main thread, before large imports, and once more after jax.distributed.initialize
    has joined a single process, since it takes SIGTERM for itself.
    """
    global _installed
    if not _installed:
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        threading.Thread(target=_listen, args=(receiver,), daemon=True).start()
        _installed = True
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)  # the number goes to the pipe all the same


@contextlib.contextmanager
def defer() -> Iterator[None]:
    """Remembers a signal for `should_stop` instead of ending; a later second one ends at once.

    Entered by all processes of a run, around work that asks `should_stop`. Among several processes
    SIGTERM is JAX's, which makes them agree on when to stop, and SIGINT is turned into it.
    """
    global _deferred
    import jax

    if _installed and jax.process_count() == 1:
        install()
    before, _deferred = _deferred, True
    try:
        yield
    finally:
        _deferred = before


def should_stop() -> bool:
    """Returns whether a stop was requested; asked by all processes at the same places.

    Several processes get True at the same call, whichever of them received the signal.
    """
    global _requested, _calls
    import jax

    if jax.process_count() > 1 and not _requested:
        from jax.experimental import multihost_utils

        _calls += 1
        _requested = bool(multihost_utils.reached_preemption_sync_point(_calls))
    return _requested


def raise_if_requested() -> None:
    """Raises Stopped where `should_stop`: for work that resumes from what it has written."""
    if should_stop():
        raise Stopped("after the work in progress")


def _listen(receiver: int) -> None:
    """Acts upon signals, in a thread."""
    global _requested
    first_s = None
    while True:
        signum = os.read(receiver, 1)[0]
        if signum not in SIGNALS:
            continue
        if first_s is not None:
            if time.monotonic() - first_s > REPEAT_S:
                os._exit(128 + signum)
            continue
        if not _deferred:
            os.write(2, b"ddpm: stopped; the same command resumes\n")
            os._exit(STOPPED)
        import jax

        from diffusion.utils import logging

        first_s = time.monotonic()
        with contextlib.suppress(OSError):  # a closed console must not end this thread
            logging.info("stopping   after the step in progress; again to exit at once")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            _requested = True
