"""The promises about work directories in a bucket, R24 to R26, with an emulator and a proxy."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from gcsfs.core import GCSFileSystem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion.utils import io
from tests import tiny_tfds, trials
from tests.buckets import BUCKET, Emulator, Proxy, free_port
from tests.conftest import ROOT
from tests.runs import environment, logged, run_process, start
from tests.trials import TINY, digest, ended, wait_for

pytestmark = pytest.mark.soak


def test_kills_in_a_bucket(bucket, figures):
    found = trials.killed_again_and_again(bucket / "kills", 20, np.random.default_rng(0))
    figures("R24", found | {"final states": "bit-identical", "events and lines": "each step once"})


def test_double_starts_in_a_bucket(bucket, figures):
    figures("R26", trials.started_twice(bucket / "twice", 20))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of its own behind a proxy; the tests' own clients use the other one's files."""
    port = free_port()
    proxy = Proxy(port)
    emulator = Emulator(tmp_path / "server", port, proxy.port)
    yield emulator, proxy
    emulator.stop()
    proxy.stop()


def files_of(emulator):
    """The work directory as the server's own files."""
    return io.to_path(emulator.root / BUCKET / "run")


def assert_complete(workdir, straight):
    """State, lines and events are those of an undisturbed run."""
    steps = list(logged(straight))
    assert digest(workdir) == digest(straight)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "train/loss" in line] == steps
    losses = EventAccumulator(str(workdir)).Reload().Scalars("train/loss")
    assert [event.step for event in losses] == steps


def test_server_gone_for_half_a_minute(server, tmp_path, figures):
    """Saves are due every few seconds, and the run ends long after the server is back."""
    emulator, _ = server
    args = (*TINY, "--config.train.steps=9000", "--config.train.save_every=1500")
    with start(*args, f"--workdir=gs://{BUCKET}/run", **emulator.environment()) as process:
        wait_for(process, r"step \d,\d\d\d/")
        emulator.stop()
        time.sleep(30)
        emulator.start()
        code, _, out, err = ended(process)
    assert code == 0, out + err
    saves = [
        line for line in err.splitlines() if "was not saved" in line or "not written a" in line
    ]
    assert all(line.startswith("ddpm: warning: ") for line in saves) and len(saves) <= 2
    run_process(*args, f"--workdir={tmp_path / 'straight'}")
    assert_complete(files_of(emulator), tmp_path / "straight")
    figures("R25", {"gone for 30 s: exit": code, "saves with a warning": len(saves)})


def test_server_gone_for_good(server, figures):
    emulator, _ = server
    args = (*TINY, "--config.train.steps=1000000", "--config.train.save_every=1500")
    with start(*args, f"--workdir=gs://{BUCKET}/run", **emulator.environment()) as process:
        wait_for(process, r"step \d,\d\d\d/")
        emulator.stop()
        began = time.monotonic()
        process.wait(1200)
        code, _, _, err = ended(process)
    seconds = time.monotonic() - began
    last = err.splitlines()[-1]
    assert code == 4 and "failure 3 in a row" in last, err
    assert len(re.findall(r"failure [12] of 3", err)) == 2
    figures("R25", {"gone for good: exit": code, "after seconds": round(seconds)})


@pytest.mark.parametrize("status", [503, 429])
def test_some_requests_fail(server, tmp_path, figures, status):
    """One of ten is answered with an error, and one of ten comes half a second late."""
    emulator, proxy = server
    rng = np.random.default_rng(status)
    proxy.fails = lambda number: status if rng.random() < 0.1 else 0
    proxy.delay = lambda number: 0.5 if rng.random() < 0.1 else 0.0
    args = (*TINY, "--config.train.steps=3000", "--config.train.save_every=500")
    _, err = run_process(*args, f"--workdir=gs://{BUCKET}/run", **emulator.environment())
    run_process(*args, f"--workdir={tmp_path / 'straight'}")
    assert_complete(files_of(emulator), tmp_path / "straight")
    warnings = err.count("ddpm: warning")
    share = f"{proxy.failed} of {proxy.requests} requests, {warnings} warnings, exit 0"
    figures("R25", {f"{status}": share})


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:Sending a large body")  # aiohttp's, of gcsfs
def test_streaming_hides_the_latency_of_a_bucket(server, tmp_path, figures):
    """A training step of ch = 32 on CIFAR-10's shape, batch 64, with 0 and with 50 ms a request."""
    emulator, proxy = server
    tiny_tfds.write(tmp_path, "cifar10", (32, 32, 3), n=512)
    store = GCSFileSystem(token="anon", endpoint_url=emulator.url, skip_instance_cache=True)
    for name in io.files_in(tmp_path / "cifar10"):
        content = io.read_bytes(tmp_path / "cifar10" / name)
        store.pipe_file(f"{BUCKET}/data/cifar10/{name}", content)
    script = f"""
import statistics, sys, time
import jax
sys.path.insert(0, {str(ROOT)!r})
from configs import cifar10
from diffusion import experiment
from diffusion.runtime.config import with_overrides
jax.config.update("jax_compilation_cache_dir", {str(ROOT / ".cache" / "jax")!r})
keys = {{"data.data_dir": "gs://{BUCKET}/data", "data.on_device_gib": 0.0, "model.ch": 32}}
config = with_overrides(cifar10.get_config(), keys | {{"train.batch_size": 64}})
exp = experiment.build(config)
images = experiment.load_split(config, exp)
update, make_inputs = experiment.make_input_pipeline(config, exp, images)
state, inputs = experiment.make_initial_state(config, exp), make_inputs(0)
print("ready", flush=True)
for line in sys.stdin:
    times = []
    for _ in range(16):
        began = time.monotonic()
        state, _ = jax.block_until_ready(update(state, *next(inputs)))
        times.append(time.monotonic() - began)
    print(statistics.median(times[4:]), flush=True)
"""
    command, pipes = [sys.executable, "-c", script], {"stdin": -1, "stdout": -1, "text": True}
    variables = environment(XLA_FLAGS="", **emulator.environment())  # compiled as for users
    seconds = {0.0: [], 0.05: []}
    with subprocess.Popen(command, env=variables, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        for delay in (0.0, *(0.0, 0.05) * 3):
            proxy.delay = lambda number, delay=delay: delay
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[delay].append(float(process.stdout.readline()))
        process.kill()
    without, with_delay = (np.median(times[-3:]) for times in seconds.values())
    grown = f"{with_delay / without:.3f} times as long with 50 ms a read"
    figures("R25 streaming", {"step, ms": round(1e3 * without), "step": grown})
    assert with_delay < 1.05 * without
