"""A crew of processes: one function of many items, its results in order, in bounded memory.

The pools of the standard library take in all items at once, run the program's main file again in
every process, and know of a process that died only that one did. Here a few chunks are under way,
counted in bytes; nothing of the program is imported but what the function needs; and a death is
told with the item that was in work.
"""

import collections
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

CHUNK_ITEMS = 256  # what a process is given at a time: enough of small ones to be worth the way,
CHUNK_BYTES = 4 * 2**20  # and little of large ones
AHEAD = 4  # chunks per process that are under way, if they take no more than AHEAD_BYTES
AHEAD_BYTES = 8 * 2**20
MOST = 16  # processes, by default; more would wait for the one that hands out and collects


class WorkerError(Exception):
    """A process that ended by itself, or could not be started. One line.

    item: the one that was in work; None if none was.
    """

    def __init__(self, message: str, item: Any = None):
        super().__init__(message)
        self.item = item


class _Worker(NamedTuple):
    """at: the place, in the chunk that it was given, of the item in work; -1: it has not begun."""

    process: multiprocessing.Process
    pipe: Any
    at: Any


def parallel_map(
    make: Callable[..., Callable[[Any], Any]],
    args: tuple,
    items: Iterable[Any],
    size: Callable[[Any], int],
    n: int,
) -> Iterator[tuple[list, list]]:
    """Chunks of the items, in order, each with what make(*args) makes of every one of its items.

    make: a function of a module, called once in each process. size: bytes that an item takes, its
    result included: what is under way takes up to 8 MiB per process, or is one item. n: processes;
    1: only this one. Close the iterator to end them early. Raises CrewError.
    """
    chunks = _chunks(items, size)
    if n == 1:
        function = make(*args)
        yield from ((chunk, list(map(function, chunk))) for chunk, _ in chunks)
        return
    waiting, under_way = collections.deque(), 0
    with ThreadPoolExecutor(n) as threads, _crew(n, make, args) as ask:
        for chunk, weight in chunks:
            while waiting and (len(waiting) == AHEAD * n or under_way + weight > AHEAD_BYTES * n):
                done, its_weight, results = waiting.popleft()
                yield done, results.result()
                under_way -= its_weight
            waiting.append((chunk, weight, threads.submit(ask, chunk)))
            under_way += weight
        for done, _, results in waiting:
            yield done, results.result()


def cores() -> int:
    """How many processes are worth while: the cores that this one may use, up to MOST."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(MOST, len(usable(0)))


def _chunks(items: Iterable[Any], size: Callable[[Any], int]) -> Iterator[tuple[list, int]]:
    """(some items, their bytes)"""
    chunk, total = [], 0
    for item in items:
        more = size(item)
        if chunk and (len(chunk) == CHUNK_ITEMS or total + more > CHUNK_BYTES):
            yield chunk, total
            chunk, total = [], 0
        chunk.append(item)
        total += more
    if chunk:
        yield chunk, total


@contextlib.contextmanager
def _crew(n: int, make: Callable, args: tuple) -> Iterator[Callable[[list], list]]:
    """ask(chunk) -> its results, from whichever process is idle; n threads may ask at a time."""
    idle, crew = queue.SimpleQueue(), []

    def ask(chunk: list) -> list:
        worker = idle.get()
        try:
            worker.at.value = -1
            worker.pipe.send(chunk)
            return worker.pipe.recv()
        except (EOFError, OSError):
            raise _death(worker, chunk) from None
        finally:
            idle.put(worker)

    try:
        for _ in range(n):
            crew.append(_start(make, args))
            idle.put(crew[-1])
        yield ask
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            worker.process.join()


def _start(make: Callable, args: tuple) -> _Worker:
    """A new process, without the program's main file, and deaf to Ctrl-C.

    multiprocessing runs the file of `__main__` in every process: JAX and all, for nothing. Signals
    that are blocked stay so in what is started: Ctrl-C is heard by the parent, which ends all.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork has the locks of threads, not the threads
    resource_tracker.ensure_running()  # a helper of multiprocessing's, whose start unblocks Ctrl-C
    main, blocked = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        (ours, theirs), at = spawn.Pipe(), spawn.RawValue("q", -1)
        process = spawn.Process(target=_work, args=(theirs, at, make, args), daemon=True)
        process.start()
        theirs.close()  # now `ours` comes to an end when the process does
        return _Worker(process, ours, at)
    except OSError as error:
        found = error.strerror or type(error).__name__
        raise WorkerError(f"one more worker cannot be started: {found}; use fewer") from error
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _work(pipe, at, make: Callable, args: tuple) -> None:
    """The life of a process: until it is killed, or the parent is gone."""
    function = make(*args)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            results = []
            for at.value, item in enumerate(pipe.recv()):
                results.append(function(item))
            pipe.send(results)


def _death(worker: _Worker, chunk: list) -> WorkerError:
    worker.process.join()
    code, at = worker.process.exitcode, worker.at.value
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if at < 0:
        return WorkerError(f"a worker ended with {how}, idle; try with one worker")
    out_of_memory = code == -signal.SIGKILL
    advice = "memory may be short: use fewer workers" if out_of_memory else "leave it out"
    return WorkerError(f"the worker that had it ended with {how}; {advice}", chunk[at])
