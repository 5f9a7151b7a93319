"""The promises R1-R23 of docs/reliability.md, a few times each; `make soak` does them often.

What other files test already is not repeated: the table names where.
"""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from diffusion import data, experiment, nonfinite
from diffusion.checkpoint import Checkpoints
from diffusion.modes import check, replay
from diffusion.runtime import workdir
from diffusion.runtime.workdir import _boot, _start, check_dataset, check_disk_space, take_lock
from diffusion.utils.errors import DDPMError, WorkdirError
from diffusion.utils.progress import GoodputTimer
from tests import trials
from tests.conftest import ROOT
from tests.test_checkpoint import State, abstract, assert_same, make_state, names
from tests.test_configs import config_of
from tests.trials import TINY, run


@pytest.fixture
def opened(tmp_path):
    """opened(...) -> Checkpoints of tmp_path/run; closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_(**options):
            checkpoints = Checkpoints(tmp_path / "run", **options)
            stack.callback(checkpoints.close)
            return checkpoints

        yield open_


def test_damage_is_never_restored(tmp_path):
    count = trials.damaged(tmp_path, 24, np.random.default_rng(0), trials.ours)
    assert count["wrong"] == 0 and count["older"] > 8


def test_bare_orbax_restores_a_flipped_bit(opened, tmp_path):
    """The control of R3: where this fails, digests are needed no more."""
    checkpoints = opened()
    checkpoints.save(8, make_state(8))
    checkpoints.wait()
    path = max((tmp_path / "run/8/ema").glob("**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert trials.bare_orbax(tmp_path / "run") == "wrong"
    with pytest.raises(WorkdirError, match=r"step 8 is damaged: ema/.* is not what was saved"):
        opened().restore_ema(abstract().ema)


def test_bare_orbax_declines_to_save_below_the_newest_step(tmp_path):
    """The control of R4: after a fall-back it would save nothing."""
    with contextlib.closing(ocp.CheckpointManager(tmp_path)) as manager:
        tree = {"a": np.ones(3)}
        assert manager.save(8, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        assert manager.save(6, args=ocp.args.StandardSave(tree)) is False


def test_bare_orbax_restores_a_renamed_step(opened, tmp_path):
    """The control of R16: with another step inside."""
    checkpoints = opened()
    checkpoints.save(8, make_state(8))
    checkpoints.wait()
    (tmp_path / "run/8").rename(tmp_path / "run/50")
    with contextlib.closing(ocp.CheckpointManager(tmp_path / "run")) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        assert manager.latest_step() == 50
        assert int(manager.restore(50, args=args)["state"]["step"]) == 8


def test_bare_orbax_lets_two_write_in_one_directory(tmp_path):
    """The control of R13: both "succeed", and one of them is not there."""
    one, other = (ocp.CheckpointManager(tmp_path) for _ in range(2))
    with contextlib.closing(one), contextlib.closing(other):
        for manager, value in ((one, 1.0), (other, 2.0)):
            saved = manager.save(4, args=ocp.args.StandardSave({"a": np.full(3, value)}))
            with contextlib.suppress(Exception):
                manager.wait_until_finished()
                assert saved
        found = one.restore(4, args=ocp.args.StandardRestore())["a"]
    assert len(set(np.asarray(found).tolist())) == 1  # of two that were saved




def test_nothing_is_deleted_before_its_successor_is_verified(opened, tmp_path, monkeypatch):
    checkpoints = opened(keep=1)
    checkpoints.save(4, make_state(4))
    checkpoints.wait()
    wrong = "diffusion.checkpoint._read_alone"
    monkeypatch.setattr(wrong, lambda folder, shapes: {"ema": {"kernel": np.zeros(1)}})
    checkpoints.save(8, make_state(8))
    with pytest.raises(WorkdirError, match=r"step 8 was not saved: .* otherwise than it was"):
        checkpoints.wait()
    monkeypatch.undo()
    assert names(tmp_path / "run") == ["4", "8.bad1"]
    checkpoints.save(8, make_state(8))
    checkpoints.wait()
    assert names(tmp_path / "run") == ["8", "8.bad1"]
    assert_same(checkpoints.restore(abstract()), make_state(8))


def test_the_best_stay(opened, tmp_path):
    checkpoints = opened(keep=1, keep_best=2)
    for step, score in ((1, 3.0), (2, 1.0), (3, 5.0), (4, 2.0), (5, 4.0)):
        checkpoints.save(step, make_state(step))
        checkpoints.score(step, score)
        checkpoints.wait()
    checkpoints = opened(keep=1, keep_best=2)  # what was scored before is remembered
    checkpoints.save(6, make_state(6))
    checkpoints.wait()
    assert names(tmp_path / "run") == ["2", "4", "6", "scores.json"]


def test_what_a_kill_left_is_swept(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save(4, make_state(4))
    checkpoints.wait()
    for name in ("8.orbax-checkpoint-tmp", "2.deleted"):
        (tmp_path / "run" / name / "d").mkdir(parents=True)
    opened(read_only=True)
    assert len(names(tmp_path / "run")) == 3
    opened()
    assert names(tmp_path / "run") == ["4"]


def test_of_failures_in_a_row_the_third_is_an_error(opened, monkeypatch):
    lines = []
    checkpoints = opened(warn=lines.append)
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    checkpoints.save_or_warn(4, make_state(4))
    assert len(lines) == 2 and "step 4 was not saved" in lines[0] and "1 more" in lines[1]
    monkeypatch.undo()
    checkpoints.save_or_warn(8, make_state(8))
    checkpoints.wait()  # a success: the count begins anew
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    checkpoints.save_or_warn(12, make_state(12))
    with pytest.raises(WorkdirError, match="the 3rd failure in a row"):
        checkpoints.save_or_warn(16, make_state(16))
    assert checkpoints.latest() == 8


def test_a_checkpoint_without_digests_is_not_whole(opened, tmp_path):
    checkpoints = opened()
    for step in (4, 8):
        checkpoints.save(step, make_state(step))
        checkpoints.wait()
    path = tmp_path / "run/8/_CHECKPOINT_METADATA"
    about = json.loads(path.read_text())
    del about["custom_metadata"]["sha256"]
    path.write_text(json.dumps(about))
    lines = []
    assert_same(opened(warn=lines.append).restore(abstract()), make_state(4))
    assert len(lines) == 1 and "step 8 has no digests" in lines[0]



HOLD = """
import pathlib, sys
import claim, settings
try:
    claim.hold(pathlib.Path(sys.argv[1]), beat_s=0.1)
except settings.DDPMError as fatal:
    print(fatal.code, fatal)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(workdir):
    command = [sys.executable, "-c", HOLD, str(workdir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **pipes)


def test_a_work_directory_has_one_trainer_at_a_time(tmp_path):
    """Held; refused; taken over after SIGKILL; left empty at the end."""
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        with holder(tmp_path) as second:
            said, _ = second.communicate()
        assert said.startswith(f"4 {tmp_path}: is trained in by process {first.pid} on ")
        first.kill()
        first.wait()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid
    with holder(tmp_path) as third:
        assert third.stdout.readline() == "held\n"
        third.communicate("")
    assert (tmp_path / "lock").read_text() == ""


def found(path, **changes):
    """What a start says to a lock of this very process, changed; '' where it takes it."""
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
    mine |= {"start": _start(os.getpid()), "beat": 3}
    path.write_text(json.dumps(mine | changes))
    trouble, release = take_lock(path, 0.01)
    release()
    assert trouble or path.read_text() == ""
    return trouble


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without kernel locks."""

    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", unsupported)


def test_without_kernel_locks_a_living_process_holds_it_and_a_dead_one_does_not(tmp_path, no_flock):
    assert "is trained in by" in found(tmp_path / "lock")
    assert found(tmp_path / "lock", boot="another") == ""
    assert found(tmp_path / "lock", start=1) == ""  # the number went to another process


def test_of_another_machine_only_a_growing_count_is_a_sign_of_life(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lock"
    assert found(path, host="elsewhere") == ""
    assert "waiting    for a sign of life of elsewhere" in capsys.readouterr().out
    beats = iter(range(10, 20))

    def lives(seconds):
        path.write_text(json.dumps({"host": "elsewhere", "beat": next(beats)}))

    monkeypatch.setattr(workdir.time, "sleep", lives)
    assert "on elsewhere" in found(path, host="elsewhere")


def test_too_little_room_is_told_before(tmp_path, monkeypatch, capsys):
    state = {"a": jax.ShapeDtypeStruct((250_000,), "float32")}
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(DDPMError, match=r"1\.0 MB free, a checkpoint takes") as error:
        check_disk_space(tmp_path, state, 3)
    assert error.value.code == 4
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage(10**9, 0, 5 * 10**6))
    check_disk_space(tmp_path, state, 3)  # of four checkpoints of 2.05 MB
    assert "train.keep=3 needs more" in capsys.readouterr().err
    check_disk_space(tmp_path, state, 1)
    assert capsys.readouterr().err == ""


def test_a_full_disk_ends_the_run_at_the_third_failure(tmp_path):
    trials.disk_full(tmp_path, mended=False)


def test_another_data_set_is_refused(tmp_path):
    images = data.open_dataset("digits", "train")
    check_dataset(tmp_path, images)
    check_dataset(tmp_path, images)
    fewer = images._replace(n=1000)
    with pytest.raises(DDPMError, match=r"images: was 1501, now 1000; mark: was .*, now") as e:
        check_dataset(tmp_path, fewer)
    assert e.value.code == 3

    def altered(i):
        image, label = images.read(i)
        return image + (np.asarray(i) == 700).astype(np.uint8)[:, None, None, None], label

    with pytest.raises(DDPMError, match=r"other data: mark: was \w+, now \w+; choose"):
        check_dataset(tmp_path, images._replace(read=altered))
    (tmp_path / "data.json").unlink()  # as before there was one
    check_dataset(tmp_path, fewer)




def toy(params, bad=()):
    """An update that adds the step's number to the weights, and NaN where it is bad."""

    def update(state, x):
        wrong = jnp.isin(state.step, jnp.array([*bad, -99]))
        change = jnp.where(wrong, jnp.nan, state.step.astype(jnp.float32))
        new = jax.tree.map(lambda p: p + change + x, state.params)
        metrics = {"loss": change, "grad_norm": change}
        return State(state.step + 1, new, state.ema, state.opt_state), metrics

    return update, State(jnp.int32(0), {"a": jnp.full(3, params), "b": jnp.float32(0)}, {}, ())


@pytest.mark.parametrize("how", ["halt", "rollback"])
def test_a_bad_step_stops_the_state_before_it(how):
    update, state = toy(10.0, bad=[2])
    step = jax.jit(nonfinite.guard_update(update, how), donate_argnums=0)
    for _ in range(5):
        state, _ = step(state, jnp.float32(0.5))
    assert ~int(state.step) == 2
    np.testing.assert_array_equal(state.params["a"], 10 + (0 + 0.5) + (1 + 0.5))


def test_a_skipped_step_changes_nothing_but_the_count():
    update, state = toy(10.0, bad=[2, 3])
    step = jax.jit(nonfinite.guard_update(update, "skip"))
    for _ in range(5):
        state, _ = step(state, jnp.float32(0.5))
    assert int(state.step) == 5
    np.testing.assert_array_equal(state.params["a"], 10 + (0 + 1 + 4) + 3 * 0.5)


def test_on_nonfinite_is_checked():
    with pytest.raises(ValueError, match="one of halt, skip, rollback, found 'go on'"):
        nonfinite.guard_update(toy(0.0)[0], "go on")


def test_the_first_leaf_that_is_not_finite_is_named():
    tree = {"a": np.ones(3), "b": {"c": np.array([1, np.inf]), "d": np.array(np.nan)}, "e": 7}
    assert nonfinite.first_non_finite(tree) == "b/c"
    assert nonfinite.first_non_finite({"a": np.ones(3), "n": np.int32(1)}) is None
    np.testing.assert_allclose(nonfinite.norms({"a": np.array([3.0, 4.0])})["a"], 5.0)


def test_a_training_that_diverges_names_where_and_can_be_seen_again(tmp_path):
    wild = ("--config.optim.lr=1e30", "--config.optim.warmup=0", f"--workdir={tmp_path}")
    _, err = run(*TINY, *wild, code=5)
    assert err.count("\n") == 1 and "at step " in err and "first in the gradient of " in err, err
    assert not trials.steps_of(tmp_path)
    path = pathlib.Path(err.split("--replay=")[1].strip())
    with np.load(path) as file:
        assert file["image"].shape == (16, 8, 8, 1) and file["image"].dtype == np.uint8
        assert sum(name.startswith("norm/") for name in file) > 10
    config = config_of("digits", "tiny")
    lines = []
    with pytest.raises(DDPMError, match="not finite again, first in the gradient of ") as e:
        replay.run(config, experiment.build(config), path, lines.append)
    assert e.value.code == 5 and any(line.startswith("gradient") for line in lines)




def test_a_frozen_process_ends_the_other(tmp_path):
    trials.peer_lost(tmp_path, signal.SIGSTOP, 1)


HANG = """
import pathlib, sys, threading
import watch
dog = watch.Watchdog(pathlib.Path(sys.argv[1]), 0.5)
dog.beat(7)
with dog.asleep():
    threading.Event().wait(1.5)
print("awake", flush=True)
threading.Event().wait()
"""


def test_a_hang_ends_with_the_stacks_on_disk(tmp_path):
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "awake\n")
    assert done.stderr.startswith("ddpm: error[7]: no step for 0.5 s after step 7")
    assert done.stderr.count("\n") == 1
    assert "in wait" in (tmp_path / "crash/hang_process0.txt").read_text()


def test_jumps_of_the_clock_change_no_checkpoint(opened, monkeypatch):
    """Forth and back by a day, at every look at it."""
    real, days = time.time, itertools.cycle([0, 86_400, -86_400])
    monkeypatch.setattr(time, "time", lambda: real() + next(days))
    checkpoints = opened(keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    assert checkpoints.latest() == 3
    assert_same(checkpoints.restore(abstract()), make_state(3))


def test_where_the_time_went():
    now = iter([0.0, 1.0, 2.0, 4.0, 10.0, 10.0, 10.0])
    shares = GoodputTimer(lambda: next(now))
    shares.so_far("start")  # at 1
    with shares("save"):  # from 2 to 4
        pass
    assert (shares.of("save"), shares.goodput()) == (0.2, 0.7)




def test_the_check_tries_all_and_leaves_a_picture(tmp_path):
    workdir = tmp_path / "new"
    out, err = run(*TINY, f"--workdir={workdir}", "--mode=check")
    assert err == ""
    for word in (
        "1,501 images of 8x8x1",
        "MB",
        "steps/s",
        "bit for bit",
        "finite",
        "nothing stands",
    ):
        assert word in out, out
    files = [p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_file()]
    assert files == ["figures/check.png"]


def test_the_check_ends_as_the_training_would(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DDPMError, match="cannot write there: Not a directory") as error:
        check.a_folder_in(tmp_path / "file" / "run").__enter__()
    assert error.value.code == 4
    config = config_of("digits", "tiny")
    black = data.open_dataset("digits", "train")._replace(
        read=lambda i: (np.zeros((len(i), 8, 8, 1), np.uint8), np.zeros(len(i), np.int32))
    )
    with pytest.raises(DDPMError, match="found the one value 0 in 512 of them") as error:
        check.look_at_data(config, black, print)
    assert error.value.code == 3


def test_a_mistake_of_the_program_is_one_line_and_a_trace(tmp_path):
    wrong = "import experiment\ndef fails(*args):\n    raise RuntimeError('of two\\nlines')\n"
    wrong += "experiment.feed = fails"
    _, err = run(*TINY, f"--workdir={tmp_path}", before=wrong, code=1)
    assert err.count("\n") == 1 and "RuntimeError: of two lines; the whole of it: " in err
    (path,) = (tmp_path / "crash").iterdir()
    assert str(path) in err and "Traceback" in path.read_text()
