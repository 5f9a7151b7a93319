"""Large pages of memory for a processor's arrays.

XLA takes gigabytes for a step and gives them back after it. Linux hands them out 4 KiB at a time,
which costs the large networks a sixth of a step; in pages of 2 MiB it costs next to nothing. Where
the system gives those to programs that ask (`madvise`), glibc asks if it is told to, and that
only before a program starts.
"""

import contextlib
import os
import pathlib
import sys

ENABLED = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, ASK = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def ask(enabled: pathlib.Path = ENABLED) -> None:
    """Starts `python script.py …` once more, as the same process, so that its pages are large.

    To be called by the script before anything is loaded or written; what it starts inherits it.
    Nothing happens where the system gives large pages to all or to none, where GLIBC_TUNABLES is
    set, and under all that starts scripts otherwise: debuggers, notebooks, `-m`, a pipe.
    """
    try:
        on_request = "[madvise]" in enabled.read_text()
    except OSError:  # not Linux
        return
    again = [option for option in sys.orig_argv[1:] if option != "-u"]  # as batch systems start it
    plain = again == sys.argv and os.path.isfile(sys.argv[0])
    if on_request and plain and sys.executable and TUNABLES not in os.environ:
        os.environ[TUNABLES] = ASK
        with contextlib.suppress(OSError):  # then pages stay small
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
