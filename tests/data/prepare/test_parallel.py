"""crew.py: order, bounds, and deaths. What processes are to do stands in this file, by name."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from diffusion.data.prepare import parallel

ROOT = pathlib.Path(__file__).parent.parent  # not conftest's: that would import JAX


def squares(offset):
    return lambda x: x * x + offset


def mortal(how):
    def live(x):
        if x == 7:
            os.kill(os.getpid(), how)
        return x

    return live


def stillborn():
    os._exit(3)


def surroundings():
    deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return lambda x: (deaf, "jax" in sys.modules)


class Bomb:
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (4,)


def flat(chunks):
    items, results = [], []
    for some, theirs in chunks:
        items += some
        results += theirs
    return items, results


@pytest.mark.parametrize("n", [1, 2])
def test_everything_once_and_in_order(n):
    items, results = flat(parallel.parallel_map(squares, (3,), range(1000), lambda x: 1, n))
    assert items == list(range(1000)) and results == [x * x + 3 for x in items]
    assert not multiprocessing.active_children()


def test_chunks_are_bounded_in_number_and_in_bytes():
    def lengths(sizes):
        return [len(chunk) for chunk, _ in parallel.parallel_map(squares, (0,), sizes, int, 1)]

    mib = 2**20
    assert lengths([1] * 600) == [256, 256, 88]
    assert lengths([mib] * 9) == [4, 4, 1]
    assert lengths([1, 9 * mib, 1, 4 * mib, 2]) == [1, 1, 1, 1, 1]
    assert lengths([]) == []


@pytest.mark.parametrize("size, under_way, chunk", [(2**20, 16, 4), (1, 8 * 256, 256)])
def test_what_is_under_way_is_bounded(size, under_way, chunk):
    """Of 2 processes: 16 MiB, 8 chunks; besides, there are the next chunk and the item after it."""
    drawn, given, ahead = 0, 0, set()

    def items():
        nonlocal drawn
        for x in range(10 * under_way):
            drawn += 1
            yield x

    for some, _ in parallel.parallel_map(squares, (0,), items(), lambda x: size, 2):
        if drawn < 10 * under_way:
            ahead.add(drawn - given)
        given += len(some)
    assert given == drawn and ahead == {under_way + chunk + 1}  # no less: processes would wait


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_death_is_told_with_the_item(how):
    with pytest.raises(parallel.WorkerError, match=f"ended with {how.name}") as error:
        flat(parallel.parallel_map(mortal, (how,), range(20), lambda x: 2**20, 2))
    assert error.value.item == 7 and "\n" not in str(error.value)
    assert ("memory" in str(error.value)) == (how == signal.SIGKILL)
    assert not multiprocessing.active_children()


def test_a_death_before_the_first_item():
    with pytest.raises(parallel.WorkerError, match="exit code 3") as error:
        flat(parallel.parallel_map(stillborn, (), range(20), lambda x: 1, 2))
    assert error.value.item is None


def test_a_death_between_two_chunks_is_of_no_item():
    with pytest.raises(parallel.WorkerError, match="exit code 4") as error:
        flat(parallel.parallel_map(squares, (0,), [*range(9), Bomb()], lambda x: 2**22, 2))
    assert error.value.item is None


def test_an_error_of_the_items_ends_the_processes():
    def items():
        yield from range(300)
        raise KeyError("the source")

    with pytest.raises(KeyError, match="the source"):
        flat(parallel.parallel_map(squares, (0,), items(), lambda x: 1, 2))
    assert not multiprocessing.active_children()


def test_closing_ends_the_processes():
    chunks = parallel.parallel_map(squares, (0,), iter(int, 1), lambda x: 1, 2)
    next(chunks)
    assert len(multiprocessing.active_children()) == 2
    chunks.close()
    assert not multiprocessing.active_children()


BARE = """
import signal, sys
from diffusion.ingest import crew
from tests.test_crew import flat, surroundings

if __name__ != "__main__":
    sys.exit("run again")
_, results = flat(crew.in_order(surroundings, (), range(60), lambda x: 2**21, 2))
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
print(sorted(set(results)), sys.modules["__main__"].__file__ == __file__)
"""


def test_processes_start_bare(tmp_path):
    """Without the main file; deaf to Ctrl-C, the first one too; the parent is what it was."""
    (tmp_path / "main.py").write_text(BARE)
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.stdout == "[(True, False)] True\n"


def test_cores():
    assert 1 <= parallel.cores() <= parallel.MOST
