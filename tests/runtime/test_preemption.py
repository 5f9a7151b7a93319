"""preemption.py: SIGINT and SIGTERM end a process at once or after the work in progress."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# The main thread is in C and runs no Python handler, as while XLA compiles.
AT_ONCE = """
from diffusion.runtime import preemption
preemption.install()
import hashlib
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""

DEFERRED = """
from diffusion.runtime import preemption
preemption.install()
import time
import jax
jax.config.update("jax_platforms", "cpu")
with preemption.defer():
    with preemption.defer():
        pass
    print("ready", flush=True)
    while not preemption.should_stop():
        time.sleep(0.02)
    print("stop requested", flush=True)
    {}
try:
    preemption.raise_if_requested()
except preemption.Stopped as stopped:
    raise SystemExit(stopped.code)
"""

TOGETHER = """
import sys, time
from diffusion.runtime import preemption
preemption.install()
import jax
jax.config.update("jax_platforms", "cpu")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with preemption.defer():
    print("ready", flush=True)
    step = 1
    while not preemption.should_stop():
        time.sleep(0.01 * (1 + jax.process_index()))
        step += 1
assert preemption.should_stop()
print("stopped at", step, flush=True)
"""


def start(script, *args):
    command = [sys.executable, "-c", script, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **pipes)


def wait_for(process, line):
    while (found := process.stdout.readline()) != f"{line}\n":
        assert found, process.stderr.read()


@contextlib.contextmanager
def started(script, *args):
    with start(script, *args) as process:
        try:
            wait_for(process, "ready")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ends_at_once_while_the_main_thread_is_in_c(signum):
    with started(AT_ONCE) as process:
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (75, "")
    assert err == "ddpm: stopped; the same command resumes\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_is_followed_where_the_work_asks(signum):
    with started(DEFERRED.format("time.sleep(1)")) as process:
        process.send_signal(signum)
        wait_for(process, "stopping   after the step in progress; again to exit at once")
        wait_for(process, "stop requested")
        process.send_signal(signum)  # a supervisor's repetition
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (75, "", "")


def test_a_later_second_signal_ends_at_once():
    with started(DEFERRED.format("time.sleep(60)")) as process:
        process.send_signal(signal.SIGTERM)
        wait_for(process, "stopping   after the step in progress; again to exit at once")
        time.sleep(2.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 128 + signal.SIGINT


def test_two_processes_stop_at_the_same_call():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with start(TOGETHER, address, "0") as first, started(TOGETHER, address, "1") as second:
        wait_for(first, "ready")
        second.send_signal(signal.SIGINT)  # of which SIGTERM is made for JAX
        ends = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], ends
    steps = [out.splitlines()[-1] for out, _ in ends]
    assert steps[0] == steps[1] and steps[0].startswith("stopped at ")


def test_installing_imports_nothing_large():
    script = "import sys; from diffusion.runtime import preemption; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert not {"jax", "numpy", "absl", "tqdm"} & set(done.stdout.split())
