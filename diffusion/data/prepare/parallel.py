"""Maps a function over items in a pool of processes, in order and in bounded memory."""

import collections
import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from diffusion.utils.errors import DataError

CHUNK_ITEMS, CHUNK_BYTES = 256, 4 * 2**20  # sent to a process at a time, at most
WINDOW_BYTES = 8 * 2**20  # under way, at most, for each process
MAX_WORKERS = 16  # by default: more would wait for this process, which reads and writes

Item, Result = TypeVar("Item"), TypeVar("Result")


def parallel_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int = 0,
    *,
    nbytes: Callable[[Item], int],
    name: Callable[[Item], str] = str,
) -> Iterator[tuple[Item, Result]]:
    """Yields (item, function(item)) in order. Closing the iterator ends the processes.

    Args:
      function: Picklable; called in the worker processes.
      items: Read ahead by a bounded number of bytes.
      workers: Processes; 1 for this one alone, 0 for one a core.
      nbytes: Bytes that an item takes, its result included.
      name: Names an item in an error.

    Raises:
      DataError: A worker process died: out of memory, or a library crashed on an item.
    """
    if workers == 1:
        yield from ((item, function(item)) for item in items)
        return
    workers = workers or min(MAX_WORKERS, _usable_cores())
    window, total = collections.deque(), 0
    pool = _make_pool(workers)
    try:
        end = [], math.inf  # makes room for itself by emptying the window
        for chunk, size in itertools.chain(_chunks(items, nbytes), [end]):
            while window and total + size > WINDOW_BYTES * workers:
                done, done_size, results = window[0]
                yield from zip(done, results.result(), strict=True)
                window.popleft()
                total -= done_size
            if chunk:
                with _bare_start():
                    window.append((chunk, size, pool.submit(_map_chunk, function, chunk)))
                total += size
    except BrokenProcessPool as error:
        raise _death(function, [item for chunk, *_ in window for item in chunk], name) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _map_chunk(function: Callable, chunk: list) -> list:
    return [function(item) for item in chunk]


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _chunks(items: Iterable[Item], nbytes: Callable[[Item], int]) -> Iterator[tuple[list, int]]:
    chunk, total = [], 0
    for item in items:
        size = nbytes(item)
        if chunk and (len(chunk) == CHUNK_ITEMS or total + size > CHUNK_BYTES):
            yield chunk, total
            chunk, total = [], 0
        chunk.append(item)
        total += size
    if chunk:
        yield chunk, total


def _make_pool(workers: int) -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # a fork copies the locks of threads as they are
    # The process that removes the semaphores of a killed one, started with them, would warn of it.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        return ProcessPoolExecutor(workers, spawn, initializer=_end_with_parent)
    finally:
        sys.warnoptions.pop()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone, even if that was killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _bare_start() -> Iterator[None]:
    """Lets processes start deaf to Ctrl-C, which this one handles, and without the main file.

    Signals are handled afterwards: a process whose parent ends meanwhile writes a traceback.
    """
    main, waiting = sys.modules["__main__"], []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
    wakeup = signal.set_wakeup_fd(-1)
    both = signal.SIGINT, signal.SIGTERM
    handlers = {s: signal.signal(s, lambda s, _: waiting.append(s)) for s in both}
    sys.modules["__main__"] = types.ModuleType("__main__")  # spawn would import its file: JAX
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for signum in waiting:
            signal.raise_signal(signum)


def _death(function: Callable, items: list, name: Callable[[Item], str]) -> DataError:
    """Finds the item that ends a process, by trying each once more in a process of its own."""
    with _make_pool(1) as pool:
        for item in items:
            try:
                with _bare_start():
                    result = pool.submit(_map_chunk, function, [item])
                result.result()
            except BrokenProcessPool:
                return DataError(f"{name(item)}: it ends the process that reads it; leave it out")
    return DataError("a worker process ended; memory may be short: use fewer data.workers")
