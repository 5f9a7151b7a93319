"""parallel_map: order, bounds, and processes that die. The workers import this file by name."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from diffusion.data.prepare import parallel
from diffusion.data.prepare.parallel import parallel_map
from diffusion.utils.errors import DataError


def square(x):
    return x * x


def die_at_7(x):
    if x == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def surroundings(x):
    deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return deaf, "jax" in sys.modules


def die_in_a_worker(x):
    """Ends the process that runs it beside others, and not one that runs it alone."""
    if multiprocessing.parent_process() and not os.path.exists(x):
        open(x, "w").close()
        os._exit(4)
    return x


def weigh(nbytes):
    return lambda item: nbytes


@pytest.mark.parametrize("workers", [1, 2])
def test_everything_once_and_in_order(workers):
    results = list(parallel_map(square, range(1000), workers, nbytes=weigh(1)))
    assert results == [(x, x * x) for x in range(1000)]
    assert list(parallel_map(square, [], workers, nbytes=weigh(1))) == []
    assert not multiprocessing.active_children()


def test_chunks_are_bounded_in_number_and_in_bytes():
    def lengths(sizes):
        return [len(chunk) for chunk, _ in parallel._chunks(sizes, int)]

    mib = 2**20
    assert lengths([1] * 600) == [256, 256, 88]
    assert lengths([mib] * 9) == [4, 4, 1]
    assert lengths([1, 9 * mib, 1, 4 * mib, 2]) == [1, 1, 1, 1, 1]
    assert lengths([]) == []


def test_items_under_way_are_bounded_in_bytes():
    """16 MiB for 2 processes; besides, there are the next chunk and the item after it."""
    drawn, taken, ahead = 0, 0, set()

    def items():
        nonlocal drawn
        for x in range(160):
            drawn += 1
            yield x

    results = parallel_map(square, items(), 2, nbytes=weigh(2**20))
    for taken, _ in enumerate(results):
        if drawn < 160 and taken % 4 == 0:
            ahead.add(drawn - taken)
    assert drawn == 160 and taken == 159 and ahead == {16 + 4 + 1}  # no less: processes would wait


def test_an_item_that_kills_its_process_is_named():
    def name(x):
        return f"item {x}"

    with pytest.raises(DataError, match=r"^item 7: it ends the process .*; leave it out$"):
        list(parallel_map(die_at_7, range(20), 2, nbytes=weigh(2**20), name=name))
    assert not multiprocessing.active_children()


def test_a_process_that_dies_once_is_one_line(tmp_path):
    """As the system's killer of processes does when memory is short: no item is to blame."""
    item = str(tmp_path / "died")
    with pytest.raises(DataError, match=r"memory may be short: use fewer data\.workers") as error:
        list(parallel_map(die_in_a_worker, [item], 2, nbytes=weigh(1)))
    assert "\n" not in str(error.value) and not multiprocessing.active_children()


def test_an_error_of_the_items_ends_the_processes():
    def items():
        yield from range(300)
        raise KeyError("the source")

    with pytest.raises(KeyError, match="the source"):
        list(parallel_map(square, items(), 2, nbytes=weigh(1)))
    assert not multiprocessing.active_children()


def test_closing_ends_the_processes():
    results = parallel_map(square, iter(int, 1), 2, nbytes=weigh(2**20))
    next(results)
    assert len(multiprocessing.active_children()) == 2
    results.close()
    assert not multiprocessing.active_children()


SCRIPT = """
import signal, sys
from diffusion.data.prepare.parallel import parallel_map
from tests.data.prepare.test_parallel import surroundings, weigh

if __name__ != "__main__":
    sys.exit("imported again")
results = parallel_map(surroundings, range(60), 2, nbytes=weigh(2**21))
print({result for _, result in results}, sys.modules["__main__"].__file__ == __file__)
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""


def test_processes_start_bare(tmp_path):
    """Without the main file, and deaf to Ctrl-C; the parent is what it was."""
    from tests.conftest import ROOT  # not above: the workers would import JAX

    (tmp_path / "main.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.stdout == "{(True, False)} True\n"


def test_a_signal_waits_until_the_processes_have_started():
    """Both for its handler and for who reads the wakeup pipe: the parent lives on meanwhile."""
    heard, (receiver, sender) = [], os.pipe()
    for end in (receiver, sender):
        os.set_blocking(end, False)
    wakeup = signal.set_wakeup_fd(sender)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("handled"))
    try:
        with parallel._bare_start():
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(BlockingIOError):
                os.read(receiver, 9)
            assert not heard
        assert heard == ["handled"] and os.read(receiver, 9) == bytes([signal.SIGTERM])
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(receiver)
        os.close(sender)


def test_as_many_processes_as_cores(monkeypatch):
    started = []
    monkeypatch.setattr(parallel, "_make_pool", lambda n: started.append(n) or 1 / 0)
    for cores, workers in ((3, 3), (64, parallel.MAX_WORKERS)):
        monkeypatch.setattr(parallel, "_usable_cores", lambda cores=cores: cores)
        with pytest.raises(ZeroDivisionError):
            next(parallel_map(square, [1], 0, nbytes=weigh(1)))
        assert started.pop() == workers
