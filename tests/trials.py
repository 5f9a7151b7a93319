"""Trials of the promises in docs/reliability.md: a few in the suite, all of them in `make soak`.

Runs are main.py's in processes of their own, judged by their exit codes, output and files. A trial
asserts its promise and returns figures for the table that `make soak` prints.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import threading
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion.checkpoint import Checkpoints
from diffusion.utils.errors import WorkdirError
from diffusion.utils.io import files_in, to_path
from tests.conftest import ROOT
from tests.runs import logged, start
from tests.runs import run_process as run
from tests.test_checkpoint import abstract, make_state

TINY = (
    f"--config={ROOT}/configs/digits.py:tiny",
    "--config.train.eval_every=0",
    "--config.train.sample_every=0",
)
ENDLESS = ("--config.train.steps=1000000", "--config.train.save_every=1000000")
HEARTBEAT_S = 10
# 127.0.0.1, ::1 and ::ffff:127.0.0.1, as in /proc/net.
LOOPBACK = "0100007F"
LOOPBACKS = {LOOPBACK, f"{'0' * 24}01000000", f"{'0' * 16}FFFF0000{LOOPBACK}"}


def wait_for(process, pattern):
    """Reads the console up to the first line that matches."""
    for line in process.stdout:
        if re.match(pattern, line):
            return line
    raise AssertionError(f"no line {pattern!r}: {process.stderr.read()}")


def ended(process):
    """(exit code, seconds until then, the rest of stdout, stderr)."""
    began = time.monotonic()
    out, err = process.communicate(timeout=240)
    return process.returncode, time.monotonic() - began, out, said(err)


def said(err):
    """Returns the lines of stderr, but for TensorStore's about the token of an emulator."""
    return "".join(x for x in err.splitlines(True) if "google_auth_provider" not in x)


def steps_of(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


def digest(workdir, step=None):
    """Returns {array: SHA-256} of a checkpoint's manifest."""
    folder = workdir / "checkpoints" / str(step or steps_of(workdir)[-1])
    return json.loads((folder / "manifest" / "metadata").read_text())["sha256"]


def temporaries(workdir):
    return [name for name in files_in(workdir) if re.search(r"tmp|\.deleted|probe", name)]


def killed_again_and_again(folder, kills, rng, steps=200, every=10):
    """R1, R2, R24: SIGKILL at random instants; the final states against that of a straight run.

    Where a kill lets a run end, the next one begins anew.
    """
    args = (*TINY, f"--config.train.steps={steps}", f"--config.train.save_every={every}")
    args += ("--config.train.log_every=1",)
    straight = folder / "straight"
    run(*args, f"--workdir={straight}")
    expected, runs, most, done = digest(straight), 0, 0, 0
    while done < kills or not runs:
        workdir = folder / f"run{runs}"
        last = False
        while not last:
            before = max(logged(workdir), default=0) if (workdir / "metrics.jsonl").exists() else 0
            line = ""
            with start(*args, f"--workdir={workdir}") as process:
                if done < kills:
                    timer = threading.Timer(rng.uniform(0, 8), process.kill)
                    if rng.random() < 0.8:  # most in the training, some before it
                        line = wait_for(process, "training|nothing to do")
                        timer = threading.Timer(rng.uniform(0, 1.5), process.kill)
                    timer.start()
                out, err = process.communicate()
                if done < kills:
                    timer.cancel()
                    timer.join()
            if process.returncode == -signal.SIGKILL:
                done += 1
            else:
                assert process.returncode == 0 and said(err) == "", err
                last = True
            if found := re.search(r"from step ([\d,]+)", line + out):
                most = max(most, before - int(found[1].replace(",", "")))
        assert digest(workdir) == expected
        assert temporaries(workdir) == []
        assert most <= 2 * every
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
        losses = EventAccumulator(str(workdir)).Reload().Scalars("train/loss")
        assert [event.step for event in losses] == list(range(1, steps + 1))
        to_path(workdir).rmtree()
        runs += 1
    return {"kills": done, "runs": runs, "most steps lost": most}


def flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def truncate(path, rng):
    os.truncate(path, rng.integers(path.stat().st_size))


def delete(path, rng):
    path.unlink()


def swap(path, rng):
    """With another file of the same step."""
    step = next(p for p in path.parents if p.name.isdecimal())
    others = sorted(p for p in step.rglob("*") if p.is_file() and p != path)
    other = others[rng.integers(len(others))]
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


HARM = (flip, truncate, delete, swap)


def damaged(folder, times, rng, restore):
    """R3: one random file of the steps 4 and 8 harmed at a time; what restore(folder) gives.

    Returns {"right": times, "older": ..., "refused": ..., "wrong": ...}.
    """
    whole = folder / "whole"
    with contextlib.closing(Checkpoints(whole)) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, make_state(step))
            checkpoints.wait()
    count = dict.fromkeys(("right", "older", "refused", "wrong"), 0)
    for i in range(times):
        run_ = folder / "run"
        shutil.rmtree(run_, ignore_errors=True)
        shutil.copytree(whole, run_)
        files = sorted(p for p in (run_ / "8").rglob("*") if p.is_file() and p.stat().st_size)
        # By size, as bits rot: most of the bytes are arrays.
        sizes = np.array([p.stat().st_size for p in files], float)
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        HARM[i % len(HARM)](path, rng)
        count[restore(run_)] += 1
    return count


def ours(folder):
    """What Checkpoints restores; with at most five lines of warning."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.closing(Checkpoints(folder)) as checkpoints:
        try:
            state = checkpoints.restore(abstract())
        except WorkdirError:
            return "refused"
    assert err.getvalue().count("\n") <= 5
    for step, name in ((8, "right"), (4, "older")):
        if same(state, make_state(step)):
            return name
    return "wrong"


def bare_orbax(folder):
    """What orbax alone restores, as its newest step."""
    with contextlib.closing(ocp.CheckpointManager(folder)) as manager:
        args = ocp.args.Composite(ema=ocp.args.StandardRestore(abstract().ema))
        try:
            ema = manager.restore(manager.latest_step(), args=args)["ema"]
        except Exception:
            return "refused"
    for step, name in ((8, "right"), (4, "older")):
        if same(ema, make_state(step).ema):
            return name
    return "wrong"


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def started_twice(folder, times):
    """R13, R26: two starts at once in one work directory; exactly one trains."""
    for i in range(times):
        workdir = folder / f"twice{i}"
        args = (*TINY, f"--workdir={workdir}", "--config.train.steps=20")
        both = [start(*args) for _ in range(2)]
        ends = sorted(ended(process)[::3] for process in both)
        assert [code for code, _ in ends] == [0, 4], ends
        assert ends[1][1].count("\n") == 1 and "is trained in by process" in ends[1][1]
        assert steps_of(workdir)[-1] == 20 and ends[0][1] == ""
    return {"double starts": times, "one ran": times}


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start_pair(*args, before=("", ""), **extra):
    """Starts two processes of two devices each."""
    cluster = {"JAX_NUM_CPU_DEVICES": 2, "JAX_NUM_PROCESSES": 2} | extra
    cluster["JAX_COORDINATOR_ADDRESS"] = free_address()
    return [start(*args, before=before[i], JAX_PROCESS_ID=i, **cluster) for i in (0, 1)]


def coordinator_addresses(process):
    """Returns the addresses, as in /proc/net, on which the coordinator's port is listened to."""
    environ = pathlib.Path(f"/proc/{process.pid}/environ").read_text()
    port = int(re.search(r"JAX_COORDINATOR_ADDRESS=[^:\0]+:(\d+)", environ)[1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and int(local.partition(":")[2], 16) == port:
                found.add(local.partition(":")[0])
    return found


@contextlib.contextmanager
def pair(workdir, *more):
    """Two processes that train without end; ready when they do."""
    both = start_pair(*TINY, *ENDLESS, f"--workdir={workdir}", *more)
    try:
        wait_for(both[0], "step ")
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def stopped_together(workdir):
    """R6: SIGTERM to the second of two processes; both save the same step and say so."""
    with pair(workdir) as (first, second):
        listens_on = coordinator_addresses(first)
        assert listens_on and listens_on <= LOOPBACKS
        second.send_signal(signal.SIGTERM)
        code, seconds, out, err = ended(first)
        assert (code, err) == (75, "")
        assert ended(second)[0] == 75
    step = int(re.search(r"at step ([\d,]+), saved", out)[1].replace(",", ""))
    assert steps_of(workdir) == [step]
    return {"s": round(seconds, 1)}


PROGRESS = r".* ETA "
# {mode: (what makes its work last some seconds, the line before it compiles)}
WORK = {
    "train": (("--config.train.steps=400", "--config.train.save_every=1000"), "compiling "),
    "sample": (("--config.sample.num=400",), "sampling "),
    "eval": (("--config.eval.num=400",), "drawing "),
    "bpd": (("--config.bpd.split=train", "--config.bpd.batch_size=2"), "reading "),
    "figures": (("--config.figures.names=('quality',)", "--config.figures.scored=400"), "drawing "),
    "frontier": (("--config.frontier.num=100",), "drawing "),
}
PHASES = ("importing", "compiling", "working")
SIGNALS = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "two SIGTERM 50 ms apart": (signal.SIGTERM, signal.SIGTERM),
}


def stopped_in(folder, mode, processes, phase, how):
    """R27: a mode is asked to stop in a phase, and the same command goes on.

    Of two processes that work SIGTERM is sent to the second alone, everything else to both.

    Returns the exit codes, and the seconds to the line that says so and to the end of all.
    """
    work, before = WORK[mode]
    cache = {"JAX_COMPILATION_CACHE_DIR": folder / "cache"} if phase == "compiling" else {}
    args = (*TINY, f"--mode={mode}", f"--workdir={folder / 'run'}", *work)

    def begin():
        return start_pair(*args, **cache) if processes == 2 else [start(*args, **cache)]

    running = begin()
    if phase == "importing":
        for process in running:
            while "jaxlib" not in pathlib.Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.01)
    else:
        wait_for(running[0], before if phase == "compiling" else PROGRESS)
    alone = processes == 2 and phase == "working" and how == "SIGTERM"
    began, heard = time.monotonic(), None
    for i, signum in enumerate(SIGNALS[how]):
        time.sleep(0.05 * bool(i))
        for process in running[alone:]:
            process.send_signal(signum)
    for line in running[0].stdout:
        if heard is None and line.startswith("stopp"):
            heard = time.monotonic() - began
    found = [ended(process) for process in running]
    seconds, codes = time.monotonic() - began, [code for code, *_ in found]
    assert codes[0] == 75 and not any("Traceback" in err for *_, err in found), found
    assert heard is not None or "ddpm: stopped; " in found[0][3], found
    if phase == "working":
        again = begin()
        outputs = [process.communicate(timeout=300) for process in again]
        assert [process.returncode for process in again] == [0] * processes, outputs
        if mode in ("train", "sample"):
            assert re.search(r"from step [1-9]|resuming ", outputs[0][0]), outputs
    return codes, round(seconds if heard is None else heard, 1), round(seconds, 1)


def peer_lost(workdir, how, which):
    """R7: one of two is killed or frozen; JAX's heartbeat ends the other; the command resumes."""
    more = (f"--config.train.heartbeat_s={HEARTBEAT_S}", "--config.train.save_every=20")
    with pair(workdir, *more) as both:
        while not (workdir / "checkpoints" / "20").is_dir():
            assert both[0].poll() is None
            time.sleep(0.1)
        both[which].send_signal(how)
        code, seconds, _, _ = ended(both[1 - which])
    assert code in (-signal.SIGABRT, 7), code
    assert seconds < HEARTBEAT_S + 10
    steps = f"--config.train.steps={steps_of(workdir)[-1] + 2}"
    both = start_pair(*TINY, *more, steps, f"--workdir={workdir}")
    (out, err), _ = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], err
    assert re.search(r"from step [1-9]", out)
    return {"s": round(seconds, 1), "exit code": code}


def limit(process, size):
    """No file of the process may be larger: what stands in for a full disk."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


def disk_full(workdir, mended):
    """R11: from step 20 on nothing of size can be written; mended: until the first warning."""
    args = (*TINY, f"--workdir={workdir}", "--config.train.save_every=20")
    with start(*args, "--config.train.steps=1000000", "--config.train.log_every=1000000") as run_:
        whole = workdir / "checkpoints" / "20" / "manifest" / "metadata"
        while not whole.exists():
            assert run_.poll() is None, run_.stderr.read()
        limit(run_, 50_000)
        warned = next(line for line in run_.stderr if "was not saved" in line)
        assert warned.startswith("ddpm: warning: ") and "training goes on" in warned
        at = int(re.search(r"step (\d+) was not saved", warned)[1])
        assert steps_of(workdir)[-1] < at
        if mended:
            limit(run_, resource.RLIM_INFINITY)
            while steps_of(workdir)[-1] <= at:
                assert run_.poll() is None
            run_.kill()
            return {"saved again at step": steps_of(workdir)[-1]}
        code, _, _, err = ended(run_)
    assert code == 4 and "failure 3 in a row" in err.splitlines()[-1], err
    good = steps_of(workdir)[-1]
    assert digest(workdir, good)
    return {"exit code at the third failure": code, "older step": good}


# Step 5 has a loss of NaN and makes the weights NaN.
POISON = """
import jax, jax.numpy as jnp
from diffusion import experiment
make_input_pipeline = experiment.make_input_pipeline
def poisoned(*args):
    update, inputs = make_input_pipeline(*args)
    def worse(state, *batch):
        new, metrics = update(state, *batch)
        bad = jnp.where(state.step == 4, jnp.nan, 0.0)
        params = jax.tree.map(lambda x: x + bad, new.params)
        return new._replace(params=params), metrics | {"loss": metrics["loss"] + bad}
    return worse, inputs
experiment.make_input_pipeline = poisoned
"""


def accident(workdir, how):
    """R10: a step of NaN in the middle of a training that is to go on."""
    more = (f"--config.train.on_nonfinite={how}", "--config.train.save_every=2")
    _, err = run(*TINY, *more, f"--workdir={workdir}", before=POISON)
    lines = {"skip": 1, "rollback": 2}[how]  # what happened; what is gone on with
    assert "loss is nan at step 5" in err and err.count("\n") == lines, err
    assert steps_of(workdir)[-1] == 8
    assert logged(workdir, "train/not_finite")[8] == 1
    return {how: "went on to the last step"}


# The wall clock jumps by a day, forth and back, all the time.
JUMPS = """
import itertools, time
real, days = time.time, itertools.cycle([0, 86400, -86400])
time.time = lambda: real() + next(days)
"""


def clock_jumps(folder):
    """R17: of a training that is stopped and resumed meanwhile, against a straight one."""
    args = (*TINY, "--config.train.save_every=2")
    run(*args, f"--workdir={folder / 'straight'}", "--config.train.steps=4")
    for steps in (2, 4):
        more = f"--workdir={folder / 'jumping'}", f"--config.train.steps={steps}"
        run(*args, *more, before=JUMPS)
    assert digest(folder / "jumping") == digest(folder / "straight")
    assert temporaries(folder) == []
    return {"final state": "identical"}


# An error of the user's data, before the first step.
FAILS = """
from diffusion import experiment
from diffusion.utils.errors import DataError
def fails(*args):
    raise DataError("data: of its own")
experiment.load_split = fails
"""


def end_of_both(folder, *before):
    """Returns (exit codes, stderr) of two processes in which `before` is executed, one each."""
    more = (f"--config.train.heartbeat_s={HEARTBEAT_S}", f"--workdir={folder}")
    both = start_pair(*TINY, *more, before=before)
    errors = [process.communicate(timeout=120)[1] for process in both]
    return [process.returncode for process in both], errors
