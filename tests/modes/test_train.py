"""--mode=train: what a run leaves behind, and that resuming and devices change nothing."""

import collections
import contextlib
import gzip
import json
import re
import shutil
import signal
import tempfile
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.modes import _profile, _readings, _sampling
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils import io
from tests.runs import (
    TINY,
    assert_same,
    latest_state,
    logged,
    run,
    run_process,
    run_two_processes,
    start,
    stop_after,
)
from tests.test_configs import config_of

NO_PREVIEW = "--config.train.sample_every=0"
PARTS = ("input", "device", "host")  # of a step's time
FEW_STEPS = ("--config.train.preview.steps=1",)  # a preview that no slow machine leaves out


def profiled(workdir, devices):
    """Returns {folder: [step numbers of its annotations, for each file]} of all profiles.

    Asserts that each of these steps is there as a whole, once on each of a process's devices.
    """
    found = {}
    for path in sorted(workdir.glob("plugins/profile/*/*.xplane.pb")):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        steps = sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")
        of_step = [e.name for e in events if dict(e.stats).get("hlo_module") == "jit_guarded"]
        times = collections.Counter(of_step)
        assert times and all(n % (devices * len(steps)) == 0 for n in times.values()), times
        assert min(times.values()) == devices * len(steps)
        with gzip.open(str(path).replace(".xplane.pb", ".trace.json.gz")) as trace:
            assert json.load(trace)["traceEvents"]
        found.setdefault(path.parent.name, []).append(steps)
    return found


def test_a_run_leaves_what_it_promises(trained):
    workdir, out, err = trained
    assert err == ""
    for word in ("images of 8x8x1", "parameters", "compiling", "done", "steps/s", "ms input, "):
        assert word in out, out
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 8
    losses = logged(workdir)
    assert list(losses) == [2, 4, 6, 8] and all(np.isfinite(list(losses.values())))
    assert all(list(logged(workdir, f"train/{part}_ms")) == [2, 4, 6, 8] for part in PARTS)
    assert (workdir / "checkpoints" / "4").is_dir() and (workdir / "checkpoints" / "8").is_dir()
    assert list(workdir.glob("events.out.tfevents.*"))
    for kind in ("raw", "ema"):
        with Image.open(workdir / "samples" / f"00000008_{kind}.png") as image:
            assert min(image.size) >= 2 * 64  # four digits, two by two, enlarged
    assert (workdir / "figures" / "loss.png").exists()


def test_the_first_learning_rate_is_zero_and_the_step_counts_from_one(trained):
    """Warm-up of 2 steps: rates 0, lr/2, lr, ...; the line of step 2 has the rate of its update."""
    rates = logged(trained[0], "train/lr")
    lr = config_of("digits").optim.lr
    np.testing.assert_allclose([rates[2], rates[4]], [lr / 2, lr], rtol=1e-6)


def test_steps_in_one_dispatch_are_logged_one_by_one(trained, tmp_path):
    """Up to 3 at a time, to rounding; two dispatches of the 8 steps end at the save of step 4."""
    args = TINY, f"--workdir={tmp_path}", "--config.train.steps_per_dispatch=3", NO_PREVIEW
    out, err = run(*args, "--config.train.profile=(5,3)")
    assert "expected 1 on a CPU, found 3" in err and err.count("\n") == 1
    assert "up to 3 training steps" in out
    for name in ("train/loss", "train/grad_norm", "train/lr"):
        expected, found = logged(trained[0], name), logged(tmp_path, name)
        assert list(found) == list(expected) == [2, 4, 6, 8]
        np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=1e-4)
    assert "profile    steps 5 to 7; see it with: tensorboard --logdir=" in out
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_profile_has_the_steps_that_were_asked_for(trained):
    assert "profile    steps 5 to 7; see it with: tensorboard --logdir=" in trained[1]
    assert "% profile" in trained[1].split("time ")[1]  # which is no training
    assert profiled(trained[0], jax.device_count()) == {"step_00000005": [[5, 6, 7]]}


def test_a_training_logs_its_bits_per_dimension_and_distances(trained):
    bits, errors = (logged(trained[0], f"eval/{name}") for name in ("bpd", "bpd_error"))
    assert list(bits) == [4, 8] and all(errors[step] > 0 for step in bits)
    assert list(logged(trained[0], "eval/fd_random")) == [4, 8]


def test_a_finished_run_says_so_and_remembers_its_config(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")  # the other worker may hold its lock
    for args in ([TINY], []):  # the default would be another config: an error
        out, _ = run(*args, f"--workdir={workdir}")
        assert "nothing to do" in out and "train.steps" in out


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """SIGKILL somewhere in a long run, then on to step n; against n steps without a break.

    On as many devices in every process: programs of other numbers of devices round differently.
    """
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    args = (TINY, "--config.train.save_every=20", NO_PREVIEW)

    def saved():
        return [int(p.name) for p in killed.glob("checkpoints/*") if p.name.isdigit()]

    long = (*args, f"--workdir={killed}", "--config.train.steps=100000")
    with start(*long, JAX_NUM_CPU_DEVICES=jax.device_count()) as process:
        for line in process.stdout:
            rate = re.match(
                r"step [\d,]+/100,000  0%  ETA \S+  loss \S+ .* steps/s  .* images/s", line
            )
            if rate and saved():
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    n = max(saved()) + 7
    out, _ = run(*args, f"--workdir={killed}", f"--config.train.steps={n}")
    resumed_from = int(re.search(r"from step ([\d,]+)", out)[1].replace(",", ""))
    assert 0 < resumed_from < n
    run(*args, f"--workdir={straight}", f"--config.train.steps={n}")
    assert_same(latest_state(killed), latest_state(straight))
    # The mean of the interval that was cut short by the kill is of fewer steps, all others agree.
    ours, theirs = logged(killed), logged(straight)
    assert ours.keys() == theirs.keys()
    assert sum(ours[step] != theirs[step] for step in ours) <= 1


def test_stopped_saves_and_goes_on(tmp_path):
    """By Ctrl-C; and what goes on from there, by SIGTERM."""
    args = (TINY, f"--workdir={tmp_path}", NO_PREVIEW, "--config.train.steps=100000")
    before = "0"
    for with_signal in (signal.SIGINT, signal.SIGTERM):
        process = start(*args, "--config.train.save_every=100000")
        out, err = stop_after(process, r"step ", with_signal)
        assert process.returncode == 75 and err == "", out + err
        assert re.search(rf"from step {before}$", out, re.M), out
        step = re.search(r"stopped +at step ([\d,]+), saved", out)[1]
        assert int(step.replace(",", "")) > int(before.replace(",", ""))
        before = step


def test_stopped_while_it_reads_or_draws_saves_this_step_and_does_both_later(tmp_path, monkeypatch):
    """After step 3 of 4 distances are broken off, and with them a profile; then the preview."""
    draw, calls = _sampling.draw, []

    def stopped(*args):
        calls.append(args)
        if len(calls) in (1, 3):  # 2 and 3 are the second run's
            monkeypatch.setattr(preemption, "_requested", True)
        return draw(*args)

    args = (TINY, f"--workdir={tmp_path}", "--config.train.save_every=100", *FEW_STEPS)
    args = (*args, "--config.train.sample_every=3", "--config.train.eval_every=3")
    args = (*args, "--config.train.steps=4", "--config.train.profile=(3,5)")
    with monkeypatch.context() as patch:
        patch.setattr(_sampling, "draw", stopped)
        out, err = run(*args, code=75)
        assert err == "" and re.search(r"stopped +at step 3, saved", out), out
        assert "profile    steps 3 to 3; see it with: " in out
        monkeypatch.setattr(_readings, "QUIET_S", -1.0)  # whatever it takes is announced
        out, err = run(*args, code=75)
        assert err == "" and re.search(r"stopped +at step 3, saved", out), out
    assert len(calls) == 3
    assert not list(tmp_path.glob("samples/*.png")) and not logged(tmp_path, "eval/fd_random")
    out, _ = run(*args)
    assert re.search(r"^reading +bits/dim and distances, at most about ", out, re.M), out
    assert "from step 3" in out and re.search(r"^done ", out, re.M)
    assert int(latest_state(tmp_path)[".step"]) == 4
    expected = {"step_00000003": [[3]], "step_00000004": [[4]]}
    assert profiled(tmp_path, jax.device_count()) == expected
    drawn = {p.name for p in tmp_path.glob("samples/*")}
    assert drawn == {f"{step:08d}_{kind}.png" for step in (3, 4) for kind in ("raw", "ema")}
    assert list(logged(tmp_path, "eval/fd_random")) == [3]
    mark = tmp_path / "samples" / "00000004.unfinished"  # as of one killed after the last step
    mark.write_text("")
    (tmp_path / "samples" / "00000004_raw.png").unlink()
    out, _ = run(*args)
    assert not re.search("^compil|^step", out, re.M) and re.search(r"^done ", out, re.M), out
    assert not mark.exists() and (tmp_path / "samples" / "00000004_raw.png").exists()


@pytest.mark.parametrize("last, ready", [(5, ["block_until_ready"]), (2, [])])
def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, capsys, monkeypatch, last, ready):
    """It begins and ends in pauses of the training, when the devices are ready.

    A file is in the way of the first, whose training ends after step `last`; another profile is in
    the way of the second.
    """
    calls, profile = mock.Mock(), jax.profiler

    @contextlib.contextmanager
    def paused():
        calls.paused()
        yield
        calls.resumed()

    spied = (jax, "block_until_ready"), (profile, "start_trace"), (profile, "stop_trace")
    for module, name in spied:
        calls.attach_mock(mock.Mock(wraps=getattr(module, name)), name)
        monkeypatch.setattr(module, name, getattr(calls, name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "plugins").write_text("")
    config = with_overrides(config_of("digits", "tiny"), {"train.profile": (2, 2)})
    profiler = _profile.Profiler(Run("train", config, tmp_path, None), paused)
    for step in range(1, last + 1):
        profiler.before(range(step, step + 1), np.zeros(1))
        profiler.after(range(step, step + 1), np.zeros(1))
    profiler.close()
    assert [name for name, *_ in calls.mock_calls] == [
        *("paused", "block_until_ready", "start_trace", "resumed"),
        *("paused", *ready, "stop_trace", "resumed"),
    ]
    assert "ddpm: warning: train.profile: " in capsys.readouterr().err
    profiler = _profile.Profiler(Run("train", config, tmp_path, None), contextlib.nullcontext)
    with profile.trace(tmp_path / "other"):
        profiler.before(range(2, 3), np.zeros(1))
    profiler.after(range(3, 4), np.zeros(1))
    assert "ddpm: warning: train.profile: " in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"plugins", "other"}


GRIDS = {"00000008_raw.png", "00000008_ema.png"}
STREAMED = ("--config.data.on_device_gib=0", "--config.data.workers=1")


@pytest.fixture(scope="module")
def by_devices(tmp_path_factory, trained, bucket):
    """The same run on one device, on four, and on two processes of two devices each.

    The last works in a bucket and stops half-way; copied to a local disk it goes on, and reads its
    data in the other way; it draws a preview and reads bits/dim and distances at the end.
    """
    folder = tmp_path_factory.mktemp("devices")
    run_process(TINY, NO_PREVIEW, f"--workdir={folder / '1'}", JAX_NUM_CPU_DEVICES=1)
    said = run_two_processes(
        TINY, NO_PREVIEW, f"--workdir={bucket / '2x2'}", "--config.train.steps=4"
    )
    assert "on every device" in said
    shutil.copytree(io.local_copy(bucket / "2x2"), folder / "2x2")
    two = (TINY, f"--workdir={folder / '2x2'}", *STREAMED, *FEW_STEPS)
    two = (*two, "--config.train.profile=(6,2)")
    said = run_two_processes(*two, "--config.train.eval_every=8")
    assert ", streamed" in said and "from step 4" in said and "bits/dim   " in said
    assert {p.name for p in (folder / "2x2" / "samples").iterdir()} == GRIDS
    assert profiled(folder / "2x2", 2) == {"step_00000006": [[6, 7]] * 2}
    return {"1": folder / "1", "4": trained[0], "2x2": folder / "2x2"}


@pytest.mark.parametrize("other", ["4", "2x2"])
def test_devices_and_processes_change_nothing_but_rounding(by_devices, other):
    """Eight Adam steps at 2e-3 amplify the rounding of a sum of gradients in another order.

    Adam divides by the gradient's own size: where that is near 0, a rounding error becomes a step
    of a size up to the learning rate, for single weights. So the bulk is held tight, the worst
    loosely.
    """
    one, many = latest_state(by_devices["1"]), latest_state(by_devices[other])
    assert one.keys() == many.keys()
    difference = np.concatenate([np.ravel(np.abs(one[k] - many[k])) for k in one if "params" in k])
    assert np.median(difference) < 1e-6
    assert difference.max() < 2 * 8 * 2e-3
    losses = [list(logged(by_devices[w]).values()) for w in ("1", other)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_second_start_compiles_nothing(tmp_path):
    cache = tmp_path / "cache"
    # A config that no other test has compiled into memory or cache.
    args = (TINY, "--config.train.batch_size=24", "--config.model.ch_mult=(1,)", *FEW_STEPS)
    entries = []
    for name in ("first", "second"):
        run_process(*args, f"--workdir={tmp_path / name}", JAX_COMPILATION_CACHE_DIR=cache)
        entries.append({p.name for p in cache.iterdir() if not p.name.endswith("-atime")})
    assert len(entries[0]) > 3
    assert entries[0] == entries[1]
