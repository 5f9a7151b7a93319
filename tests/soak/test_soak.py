"""Tries every promise of docs/reliability.md as often as it says: `make soak`.

Two processes of pytest run on two cores. Each test records figures for the table at the end.
"""

import contextlib
import itertools
import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from diffusion.checkpoint import Checkpoints
from diffusion.convert import files, safetensors_file
from diffusion.data.prepare import image_decoding
from diffusion.utils.errors import IntegrityError
from tests import tiny_tfds, trials
from tests.conftest import ROOT
from tests.data.prepare.test_image_decoding import MALFORMED
from tests.runs import environment
from tests.runtime.test_cli import WRONG
from tests.test_checkpoint import DAMAGES, make_state
from tests.trials import ENDLESS, TINY, ended, run, start, wait_for

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("part", [0, 1])
def test_kills(tmp_path, figures, part):
    """In two halves, one for each core."""
    found = trials.killed_again_and_again(tmp_path, 25, np.random.default_rng(part))
    figures("R1", found | {"final states": "bit-identical"})
    figures("R2", {"resumed runs with the digest of the straight one": found["runs"]})


def test_damage(tmp_path, figures):
    found = trials.damaged(tmp_path, 200, np.random.default_rng(1), trials.ours)
    assert found["wrong"] == 0
    figures("R3", {"damages": 200} | found)


def test_damage_to_bare_orbax(tmp_path, figures):
    """The control: seen to fail."""
    found = trials.damaged(tmp_path, 80, np.random.default_rng(1), trials.bare_orbax)
    assert found["wrong"] > 0 and found["older"] == 0
    figures("R3 bare orbax", {"damages": 80} | found)


def test_double_starts(tmp_path, figures):
    figures("R13", trials.started_twice(tmp_path, 20))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stops(tmp_path, figures, how):
    with start(*TINY, *ENDLESS, f"--workdir={tmp_path}") as process:
        wait_for(process, "step ")
        process.send_signal(how)
        code, seconds, _, err = ended(process)
    assert (code, err) == (75, "") and seconds < 10
    figures("R5", {f"{how.name} to exit 75, seconds": round(seconds, 1)})


def test_the_paper_s_network_stops(tmp_path, figures):
    """35.7M parameters, saved within 30 s of SIGTERM; batches of four: a CPU is slow."""
    tiny_tfds.write(tmp_path, "cifar10", (32, 32, 3), n=16)
    args = (f"--config={ROOT}/configs/cifar10.py", f"--config.data.data_dir={tmp_path}")
    args += ("--config.train.batch_size=4", "--config.train.eval_every=0")
    with start(*args, f"--workdir={tmp_path / 'run'}", XLA_FLAGS="") as process:
        wait_for(process, "step 1/")
        process.send_signal(signal.SIGTERM)
        code, seconds, _, err = ended(process)
    assert (code, err) == (75, "") and len(trials.steps_of(tmp_path / "run")) == 1
    assert seconds < 30
    figures("R5", {"35.7M parameters, seconds": round(seconds, 1)})


def test_two_processes_stop_together(tmp_path, figures):
    figures(
        "R6", {"SIGTERM to one of two, both at the same step": trials.stopped_together(tmp_path)}
    )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mode", trials.WORK)
def test_every_mode_stops(tmp_path, figures, mode, processes):
    """In every phase, however it is asked; and the same command goes on."""
    run(*TINY, f"--workdir={tmp_path / 'trained'}")
    for phase, how in itertools.product(trials.PHASES, trials.SIGNALS):
        folder = tmp_path / f"{phase}_{how.replace(' ', '_')}"
        if mode != "train":
            shutil.copytree(tmp_path / "trained", folder / "run")
        codes, heard, end = trials.stopped_in(folder, mode, processes, phase, how)
        figures("R27", {f"{mode}, {processes}, {phase}, {how}": f"{codes}, {heard} s, {end} s"})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("which", [0, 1])
def test_lost_processes(tmp_path, figures, how, which):
    found = trials.peer_lost(tmp_path, how, which)
    figures("R7", {f"{how.name} of process {which}, heartbeat {trials.HEARTBEAT_S} s": found})


def test_errors_of_one_process_and_of_both(tmp_path, figures):
    """An error of one is printed by it alone and ends the other; one of both, by both."""
    codes, errors = trials.end_of_both(tmp_path / "one", "", trials.FAILS)
    assert codes[0] != 0 and codes[1] == 3 and errors[1].count("\n") == 1
    figures("R7", {"an error of one ends the other with": codes[0]})
    codes, errors = trials.end_of_both(tmp_path / "both", trials.FAILS, trials.FAILS)
    assert codes == [3, 3] and errors == ["ddpm: error[3]: data: of its own\n"] * 2


def test_two_processes_check_the_pod(tmp_path):
    """Together; and one with another learning rate, which both name."""
    args = (*TINY, "--mode=check", f"--workdir={tmp_path}")
    (code, _, out, err), (other, *_) = map(ended, trials.start_pair(*args))
    assert (code, other, err) == (0, 0, "") and "nothing stands" in out
    assert "pod        2 processes of 2 devices, same config and data; " in out
    files = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert files == ["figures/check.png"]
    faster = "import sys; sys.argv.append('--config.optim.lr=0.5')"
    for code, _, _, err in map(ended, trials.start_pair(*args, before=("", faster))):
        assert code == 2 and "optim.lr: expected 0.002 as in process 0, found 0.5 in proc" in err


def test_a_hang(tmp_path, figures):
    """One of two processes is frozen, and the heartbeat is too slow to notice."""
    more = ("--config.train.hang_s=5", "--config.train.heartbeat_s=600")
    with trials.pair(tmp_path, *more) as both:
        both[1].send_signal(signal.SIGSTOP)
        code, seconds, _, err = ended(both[0])
    assert code == 7 and "no step for 5 s" in err and err.count("\n") == 1
    assert "train.py" in (tmp_path / "crash" / "hang_process0.txt").read_text()
    figures("R8", {"limit 5 s, ended after": f"{seconds:.1f} s", "stacks": "on disk"})


def test_devices(tmp_path, figures):
    """R9: 1 -> 4, 4 -> 1, 4 -> 2 devices half-way, against one device all the way."""
    args = (*TINY, "--config.train.log_every=1")
    run(*args, f"--workdir={tmp_path / 'one'}", "--config.train.steps=50", JAX_NUM_CPU_DEVICES=1)
    one = trials.logged(tmp_path / "one")
    for before, after in ((1, 4), (4, 1), (4, 2)):
        workdir = tmp_path / f"{before}{after}"
        for devices, steps in ((before, 25), (after, 50)):
            more = f"--workdir={workdir}", f"--config.train.steps={steps}"
            run(*args, *more, JAX_NUM_CPU_DEVICES=devices)
        losses = trials.logged(workdir)
        assert losses.keys() == one.keys()
        worst = max(abs(losses[k] / one[k] - 1) for k in one)
        figures("R9", {f"{before} to {after} devices, relative difference": f"{worst:.1e}"})
        assert worst < 1e-5


@pytest.mark.parametrize("how", ["skip", "rollback"])
def test_accidents(tmp_path, figures, how):
    figures("R10", trials.accident(tmp_path, how))


@pytest.mark.parametrize("mended", [True, False])
def test_full_disks(tmp_path, figures, mended):
    figures("R11", trials.disk_full(tmp_path, mended))


def test_unusable_places(tmp_path, figures):
    (tmp_path / "file").write_text("")
    out, err = run(*TINY, f"--workdir={tmp_path}/file/run", code=4)
    assert "compiling" not in out and err.count("\n") == 1
    figures("R12", {"exit code before compilation": 4})


def test_wrong_configs(tmp_path, figures):
    began = time.monotonic()
    imports = "import main; from diffusion import experiment; from diffusion.runtime import workdir"
    subprocess.run([sys.executable, "-c", imports], cwd=ROOT, env=environment(), check=True)
    imports, most, count = time.monotonic() - began, 0.0, 0
    for args, code, words in WRONG.values():
        if code != 2 or not args[0].startswith("--config."):
            continue
        began = time.monotonic()
        _, err = run(TINY[0], *args, f"--workdir={tmp_path}", code=2, JAX_NUM_CPU_DEVICES=4)
        assert err.count("\n") == 1 and all(word in err for word in words)
        most, count = max(most, time.monotonic() - began - imports), count + 1
    figures("R15", {"configs": count, "slowest after imports": f"{most:.1f} s"})


def test_stray_steps(tmp_path, figures):
    """R16: empty, half-copied, renamed, uncommitted and other bad steps, one kind at a time."""
    found = {"older": 0, "right": 0}
    for name, (inflict, bad, _) in DAMAGES.items():
        run_ = tmp_path / name.replace(" ", "_")
        with contextlib.closing(Checkpoints(run_)) as checkpoints:
            for step in (4, 8):
                checkpoints.save(step, make_state(step))
                checkpoints.wait()
        inflict(run_)
        found[trials.ours(run_)] += 1
        assert f"{bad}.bad1" in [p.name for p in run_.iterdir()]
    figures("R16", {"kinds": len(DAMAGES)} | found | {"bad ones restored": 0})


def test_clock_jumps(tmp_path, figures):
    figures("R17", trials.clock_jumps(tmp_path))


def test_hostile_images(figures):
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    rule = image_decoding.ImageSpec(32, 32, 3, (255, 255, 255))
    for content, _ in MALFORMED.values():
        began = time.monotonic()
        with pytest.raises(image_decoding.ImageError):
            image_decoding.normalize_image(content, rule)
        slowest = max(slowest, time.monotonic() - began)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert more < 300 and slowest < 1
    found = {"images": len(MALFORMED), "slowest": f"{slowest:.2f} s", "memory": f"{more:.0f} MB"}
    figures("R18", found)


def test_mutated_safetensors(tmp_path, figures):
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    truth = {"x": np.array([1.5, -2, 3e5], "<f4"), "y": np.arange(4)}
    safetensors_file.write(path, truth)
    whole, count = path.read_bytes(), {"read": 0, "refused": 0}
    for _ in range(100_000):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        path.write_bytes(
            content[: rng.integers(1, len(content) + 1)] if rng.random() < 0.3 else content
        )
        try:
            found = files.read(path)
        except IntegrityError as error:
            count["refused"] += 1
            assert "\n" not in str(error)
        else:
            count["read"] += 1
            assert all(np.isfinite(x).all() for x in found.values())
            assert sum(x.nbytes for x in found.values()) <= len(whole)
    figures("R19", {"mutated safetensors": 100_000} | count)


def test_killed_evaluations(tmp_path, figures):
    """R20: ten kills, and the scores and samples of an uninterrupted one."""
    workdir = tmp_path / "run"
    run(*TINY, f"--workdir={workdir}", "--config.train.steps=2")
    args = ("--mode=eval", f"--workdir={workdir}", "--config.eval.num=4000")
    args += ("--config.eval.batch_size=20",)
    folder, rng = workdir / "eval" / "00000002", np.random.default_rng(0)
    for _ in range(10):
        with start(*args) as process:
            wait_for(process, "drawing ")
            with pytest.raises(subprocess.TimeoutExpired):  # it is not done by then
                process.wait(rng.uniform(0.2, 2))
            process.kill()
            process.communicate()

    def outcome():
        run(*args)
        scores = json.loads((folder / "metrics.json").read_text())["scores"]
        (path,) = folder.glob("*/samples.npz")
        return scores, np.load(path)["arr_0"]

    scores, images = outcome()
    shutil.rmtree(folder)
    again, same = outcome()
    assert np.array_equal(images, same) and scores == again
    figures("R20", {"kills": 10, "samples": len(images), "difference": 0})


@pytest.mark.alone
def test_goodput(tmp_path, figures):
    """R22: the demo, ten intervals of 40 s, killed in the middle of the seventh.

    That is what a random instant costs on the average. What counts is the time that the steps of
    the final state take at the median pace, of all the time from the first step to the last. Lost
    are a start, half an interval, and saves.
    """
    args = (f"--config={ROOT}/configs/digits.py", "--config.train.eval_every=0")
    args += ("--config.train.sample_every=0", "--config.train.log_every=50")
    whole = {"XLA_FLAGS": ""}  # compiled as users' runs are

    def train(workdir, *more):
        """Returns (when the first step began, when the last was saved, the goodput's line)."""
        with start(*args, f"--workdir={workdir}", *more, **whole) as process:
            wait_for(process, "training ")
            began = time.monotonic()
            shares = wait_for(process, "time ")
            end = time.monotonic()
            process.communicate()
        assert process.returncode == 0
        return began, end, shares

    def pace(workdir):
        return np.median(list(trials.logged(workdir, "train/steps_per_s").values()))

    train(tmp_path / "pace", "--config.train.steps=500")
    every, workdir = round(40 * pace(tmp_path / "pace")), tmp_path / "run"
    more = f"--config.train.steps={10 * every}", f"--config.train.save_every={every}"
    with start(*args, f"--workdir={workdir}", *more, **whole) as process:
        wait_for(process, "training ")
        began = time.monotonic()
        while not (workdir / "checkpoints" / str(6 * every)).is_dir():
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(20)
        process.kill()
        process.communicate()
    again = time.monotonic()
    _, end, shares = train(workdir, *more)
    goodput = 10 * every / pace(workdir) / (end - began)
    stall = re.search(r"([\d.]+)% saving", shares)[1]
    found = {"killed after": f"{again - began:.0f} s", "all": f"{end - began:.0f} s"}
    figures("R22", found | {"goodput": f"{goodput:.1%}", "saves stall": f"{stall}%"})
    assert goodput > 0.9 and float(stall) < 1


def test_constancy(tmp_path, figures):
    """R23: memory, files and threads of a training, between step 500 and step 2,500.

    The least of twenty readings: what a save needs for a moment is no growth.
    """
    args = (*TINY, f"--workdir={tmp_path}", "--config.train.save_every=100")
    checkpoints = tmp_path / "checkpoints"
    with start(*args, "--config.train.steps=1000000", "--config.train.log_every=10") as process:
        proc = pathlib.Path(f"/proc/{process.pid}")

        def reading():
            time.sleep(0.2)
            status = (proc / "status").read_text()
            memory, threads = (re.search(rf"{k}:\s+(\d+)", status) for k in ("VmRSS", "Threads"))
            return int(memory[1]), int(threads[1]), len(list((proc / "fd").iterdir()))

        seen = []
        for step in (500, 2500):
            while not checkpoints.is_dir() or max(trials.steps_of(tmp_path), default=0) < step:
                assert process.poll() is None
                time.sleep(0.2)
            seen.append(
                [min(values) for values in zip(*(reading() for _ in range(20)), strict=True)]
            )
        process.kill()
        process.communicate()
    (kb, threads, files_), (kb_, threads_, files__) = seen
    found = {"memory": f"{kb_ / kb - 1:+.1%}", "threads": f"{threads} to {threads_}"}
    figures("R23", found | {"files": f"{files_} to {files__}"})
    assert kb_ < 1.05 * kb and threads_ <= threads + 1 and files__ <= files_ + 1


def test_overhead(tmp_path, figures):
    """Digests, verification and checks of the CIFAR-10 network's state, in seconds a save."""
    command = [sys.executable, "-c", OVERHEAD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    figures("R22", {"35.7M parameters, a save stops training for": f"{found['stall']:.1f} s"})
    figures("R22", {"of which digests and checks": f"{found['digests']:.1f} s"})


OVERHEAD = """
import json, sys, time
import jax
from configs import cifar10
from diffusion import checkpoint, experiment
from diffusion.nonfinite import first_non_finite
from diffusion.utils import digests
x = experiment.build(cifar10.get_config())
state = x.abstract_state
state = jax.jit(lambda: jax.tree.map(lambda a: jax.numpy.ones(a.shape, a.dtype), state))()
state = jax.block_until_ready(state)._replace(step=jax.numpy.int32(4))
first_non_finite(state)
began = time.monotonic()
first_non_finite(state); digests.sha256(state)
checked = time.monotonic() - began
checkpoints = checkpoint.Checkpoints(sys.argv[1])
began = time.monotonic()
first_non_finite(state); checkpoints.save(4, state)
stall = time.monotonic() - began
checkpoints.close()
print(json.dumps({"stall": stall, "digests": checked}))
"""
