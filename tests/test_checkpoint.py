"""checkpoint.py restores exactly what was saved, or an older step, or raises an error."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion import checkpoint, experiment
from diffusion.checkpoint import Checkpoints
from diffusion.runtime.config import fill_defaults
from diffusion.utils import digests
from diffusion.utils.errors import WorkdirError
from tests.conftest import GOLDEN, ROOT

VERSION_1 = "67d728425318f9edee0e4138b7d47dd1becc7b38435d470f3bb692e7fdb0441b"


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def replicated(devices=1):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    return NamedSharding(mesh, PartitionSpec())


def make_state(step, devices=1):
    """Random bits of several types, and what optimisers have: counters and empty nodes."""
    rng = np.random.default_rng(step)

    def bits(dtype, *shape):
        n = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
        return rng.integers(0, 256, n, np.uint8).view(dtype).reshape(shape)

    params = {
        "conv": {"kernel": bits("float32", 40, 50), "bias": bits(jnp.bfloat16, 7)},
        "table": bits("int32", 3, 2),
        "flag": np.array([True, False]),
    }
    floats = {"kernel": params["conv"]["kernel"]}
    ema = {"kernel": bits("float32", 40, 50), "bias": bits(jnp.bfloat16, 7)}
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(floats)
    return jax.device_put(State(np.int32(step), params, ema, opt_state), replicated(devices))


def abstract(devices=1):
    state = make_state(0)
    sharding = replicated(devices)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(a, b):
    """Types, structure and every bit: NaNs and signs of zero too."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def opened(tmp_path):
    """opened(...) -> Checkpoints of tmp_path/run, closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_(directory=tmp_path / "run", **options):
            checkpoints = Checkpoints(directory, **options)
            stack.callback(checkpoints.close)
            return checkpoints

        yield open_


@pytest.fixture
def warned(monkeypatch):
    """The warnings of checkpoint.py, in order."""
    lines = []
    monkeypatch.setattr(checkpoint.logging, "warning", lines.append)
    return lines


def saved(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    return checkpoints


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_restores_the_saved_state_bit_for_bit(opened, warned):
    saved(opened(), 4, 8)
    checkpoints = opened()
    assert checkpoints.latest() == 8
    assert_same(checkpoints.restore(abstract()), make_state(8))
    assert warned == []


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (4, 2)])
def test_restores_on_another_number_of_devices(opened, before, after):
    checkpoints = opened()
    checkpoints.save(3, make_state(3, before))
    checkpoints.wait()
    state = checkpoints.restore(abstract(after))
    assert_same(state, make_state(3))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {after}


def test_restores_the_averaged_weights_without_reading_the_rest(opened, tmp_path):
    checkpoints = saved(opened(), 4, 8)
    for step, ask in ((8, None), (4, 4)):
        found, ema = checkpoints.restore_ema(abstract(4).ema, ask)
        assert found == step
        assert_same(ema, make_state(step).ema)
    for path in (tmp_path / "run/8/state").glob("**/d/*"):
        path.unlink()  # all the arrays of the rest
    assert checkpoints.restore_ema(abstract().ema)[0] == 8
    with pytest.raises(WorkdirError, match=r"no step 5; there are: 8, 4$"):
        checkpoints.restore_ema(abstract().ema, 5)


def test_state_may_be_donated_as_soon_as_save_returns(opened):
    """The save goes on in the background; on a CPU it could be reading the very same memory."""

    def plus(x, k):
        return jax.tree.map(lambda y: y + k, x)

    add = jax.jit(plus, donate_argnums=0)
    state = State(jnp.int32(0), {"a": jnp.zeros(2_000_000)}, {"a": jnp.ones(2_000_000)}, ())
    checkpoints = opened()
    for step in (1, 2, 3):
        state = add(state, 1)
        kept = plus(state, 0)  # NumPy's view of the state itself would hold up the donation
        checkpoints.save(step, state)
        given, state = state, add(add(state, 5), -5)
        assert given.params["a"].is_deleted()  # updated in place: no second state is kept
        checkpoints.wait()
        assert_same(checkpoints.restore(jax.eval_shape(plus, kept, 0)), kept)


def test_saves_overlap_and_close_waits_for_the_last(opened):
    checkpoints = opened()
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    assert_same(opened().restore(abstract()), make_state(3))


def test_saving_a_step_again_does_nothing(opened):
    checkpoints = opened()
    checkpoints.save(5, make_state(5))
    checkpoints.save(5, make_state(6)._replace(step=jnp.int32(5)))  # the first still under way
    checkpoints.wait()
    checkpoints.save(5, make_state(6)._replace(step=jnp.int32(5)))
    assert_same(checkpoints.restore(abstract()), make_state(5))


def test_saving_below_the_newest_step_saves(opened):
    checkpoints = saved(opened(), 8, 6)  # orbax by itself would decline in silence
    assert_same(checkpoints.restore_ema(abstract().ema, 6)[1], make_state(6).ema)


def test_keeps_the_newest_steps_and_the_multiples(opened, tmp_path):
    saved(opened(keep=2, keep_every=4), *range(1, 8))
    assert names(tmp_path / "run") == ["4", "6", "7"]


def test_relative_directory(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(opened("some/run"), 1)
    assert names(tmp_path / "some/run") == ["1"]


def test_rejects_a_keep_below_one(tmp_path):
    for options in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            Checkpoints(tmp_path, **options)


def data_file(step):
    """The largest file of a step's state: of array data."""
    return max((step / "state").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def copy_half(run):
    (run / "9").mkdir()
    shutil.copytree(run / "8/manifest", run / "9/manifest")
    shutil.copytree(run / "8/ema", run / "9/ema")
    edit_manifest(run / "9", step=9)


def halve(name):
    def cut(run):
        path = run / "8" / name
        os.truncate(path, path.stat().st_size // 2)

    return cut


def edit_manifest(folder, **entries):
    path = folder / "manifest/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def copy_without_manifest(run):
    shutil.copytree(run / "8", run / "9")
    shutil.rmtree(run / "9/manifest")


def copy_as_its_own_step(run):
    shutil.copytree(run / "8", run / "9")
    edit_manifest(run / "9", step=9)


def remove_a_digest(run):
    manifest = json.loads((run / "8/manifest/metadata").read_text())
    manifest["sha256"].popitem()
    edit_manifest(run / "8", sha256=manifest["sha256"])


# What is done to a directory with the steps 4 and 8: (how, the bad step, what is said of it).
DAMAGES = {
    "empty directory": (lambda run: (run / "9").mkdir(), 9, "is not complete: manifest"),
    "half copied": (copy_half, 9, "is not complete: state is missing"),
    "no manifest": (copy_without_manifest, 9, "is not complete: manifest"),
    "renamed": (lambda run: (run / "8").rename(run / "50"), 50, "holds the state of step 8"),
    "copied": (lambda run: shutil.copytree(run / "8", run / "9"), 9, "holds the state of step 8"),
    "copied, edited": (copy_as_its_own_step, 9, "holds the state of step 8"),
    "array data cut": (lambda run: os.truncate(data_file(run / "8"), 100), 8, "cannot be restored"),
    "array data gone": (lambda run: data_file(run / "8").unlink(), 8, "cannot be restored"),
    "index cut": (halve("state/manifest.ocdbt"), 8, "cannot be restored"),
    "index gone": (lambda run: (run / "8/ema/manifest.ocdbt").unlink(), 8, "cannot be restored"),
    "description cut": (halve("ema/_METADATA"), 8, "cannot be restored"),
    "manifest cut": (halve("manifest/metadata"), 8, "is not complete: manifest"),
    "digest gone": (remove_a_digest, 8, "is not complete: manifest"),
    "item gone": (lambda run: shutil.rmtree(run / "8/ema"), 8, "is not complete: ema is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_step_is_named_and_set_aside_and_the_older_one_restored(
    opened, warned, tmp_path, damage, capfd, caplog
):
    inflict, bad, what = DAMAGES[damage]
    run = tmp_path / "run"
    saved(opened(), 4, 8).close()
    inflict(run)
    good = max(int(name) for name in names(run) if int(name) != bad)
    checkpoints = opened()
    only_reading_tells = what == "cannot be restored" or damage == "copied, edited"
    assert checkpoints.latest() == (bad if only_reading_tells else good)
    assert_same(checkpoints.restore(abstract()), make_state(good))
    (line,) = warned
    assert line.startswith(f"{run}: step {bad} {what}") and "\n" not in line
    assert line.endswith(f"; step {good} is used instead; set aside as {bad}.bad1")
    assert checkpoints.latest() == good
    saved(checkpoints, bad)  # what comes next has its place, and is on disk
    assert opened().latest() == bad
    assert_same(opened().restore(abstract()), make_state(bad))
    assert capfd.readouterr() == ("", "") and caplog.records == []  # the warning said it all


def test_bare_orbax_takes_an_empty_directory_for_the_latest_step(opened, tmp_path):
    """The control: if this fails, less of checkpoint.py is needed."""
    saved(opened(), 4).close()
    (tmp_path / "run/9").mkdir()
    with contextlib.closing(ocp.CheckpointManager(tmp_path / "run")) as manager:
        assert manager.latest_step() == 9


def test_a_state_of_another_step_is_not_restored(opened, warned):
    checkpoints = saved(opened(), 4)
    checkpoints.save(8, make_state(7))
    checkpoints.wait()
    assert int(checkpoints.restore(abstract()).step) == 4
    assert "step 8 holds the state of step 7" in warned[0]


def test_other_files_and_directories_are_ignored(opened, warned, tmp_path):
    run = tmp_path / "run"
    saved(opened(), 8).close()
    for name in ("12.orbax-checkpoint-tmp/state/d", "8.bad1", "0012", "-3", "notes"):
        (run / name).mkdir(parents=True)
    (run / "12.orbax-checkpoint-tmp/state/d/rest").write_text("of a run that was killed")
    (run / "99").write_text("a file")
    checkpoints = opened()
    assert checkpoints.latest() == 8
    assert_same(checkpoints.restore(abstract()), make_state(8))
    saved(checkpoints, 12)
    assert checkpoints.latest() == 12 and not (run / "12/state/d/rest").exists()
    assert_same(checkpoints.restore(abstract()), make_state(12))
    assert warned == []


def test_restoring_without_any_step_is_an_error(opened, tmp_path):
    checkpoints = opened()
    assert checkpoints.latest() is None
    with pytest.raises(WorkdirError, match=f"^{tmp_path}/run: no checkpoint is there$"):
        checkpoints.restore(abstract())


def test_without_a_good_step_restoring_is_an_error_and_nothing_is_moved(opened, warned, tmp_path):
    """Not a fresh start: that would throw a training away."""
    run = tmp_path / "run"
    saved(opened(), 4, 8).close()
    for step in (4, 8):
        data_file(run / str(step)).unlink()
    checkpoints = opened()
    line = f"^{run}: step 8 cannot be restored: .*; nor is any of these good: 4; mend it, or move"
    with pytest.raises(WorkdirError, match=line):
        checkpoints.restore(abstract())
    assert names(run) == ["4", "8"] and warned == []
    for step in (4, 8):
        shutil.rmtree(run / str(step))
    (run / "9").mkdir()
    checkpoints = opened()
    assert checkpoints.latest() == 9  # None would start a new training
    with pytest.raises(WorkdirError, match=f"^{run}: step 9 is not complete: .*; mend it"):
        checkpoints.restore(abstract())


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda s: s._replace(step=jax.ShapeDtypeStruct((), "uint32")), "state/step is int32[]"),
        (lambda s: s._replace(ema={**s.ema, "bias": s.step}), "ema/bias is bfloat16[7], expected"),
        (
            lambda s: s._replace(params={}),
            "state/params/conv/bias is bfloat16[7], expected nothing",
        ),
        (lambda s: s._replace(ema={**s.ema, "c": s.step}), "ema/c is nothing, expected int32[]"),
    ],
)
def test_restoring_other_arrays_is_an_error_and_nothing_is_moved(opened, tmp_path, change, what):
    checkpoints = saved(opened(), 8)
    with pytest.raises(WorkdirError) as error:
        checkpoints.restore(change(abstract()))
    assert f"run: step 8 does not fit: {what}" in str(error.value)
    assert names(tmp_path / "run") == ["8"]


@pytest.mark.parametrize("below", ["", "below"])
def test_opening_an_unwritable_directory_is_an_error(tmp_path, below):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / below
    with pytest.raises(WorkdirError, match=f"^{where}: cannot be written: .*; choose another"):
        Checkpoints(where)


def test_opening_leaves_nothing_behind(opened, tmp_path):
    opened()
    assert names(tmp_path / "run") == []


def test_read_only_writes_and_moves_nothing(opened, warned, tmp_path):
    checkpoints = opened(read_only=True)
    assert checkpoints.latest() is None and not (tmp_path / "run").exists()
    with pytest.raises(WorkdirError, match="no checkpoint is there"):
        checkpoints.restore_ema(abstract().ema)
    saved(opened(), 4, 8)
    data_file(tmp_path / "run/8").unlink()
    checkpoints = opened(read_only=True)
    assert checkpoints.restore_ema(abstract().ema)[0] == 8
    assert int(checkpoints.restore(abstract()).step) == 4
    assert warned[0].endswith("step 4 is used instead")
    assert names(tmp_path / "run") == ["4", "8"]
    with pytest.raises(ValueError, match="read_only"):
        checkpoints.save(9, make_state(9))


def test_a_save_that_cannot_begin_is_an_error_and_the_next_one_is_saved(opened, tmp_path):
    run = tmp_path / "run"
    checkpoints = saved(opened(), 4)
    run.rename(tmp_path / "elsewhere")
    run.write_text("")
    with pytest.raises(WorkdirError, match=f"^{run}: step 8 was not saved: .*Not a directory"):
        checkpoints.save(8, make_state(8))
    run.unlink()
    (tmp_path / "elsewhere").rename(run)
    saved(checkpoints, 8)
    assert_same(checkpoints.restore(abstract()), make_state(8))


def test_after_a_full_disk_the_older_step_and_the_next_one_are_good(opened, capfd):
    """Files of at most 4 kB: what stands in for a full disk fails in the background too."""
    checkpoints = saved(opened(), 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    try:
        checkpoints.save(8, make_state(8))
        with pytest.raises(WorkdirError, match=r"step 8 was not saved: .*File too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.wait()  # an error is reported once
    assert checkpoints.latest() == 4
    saved(checkpoints, 12)
    assert_same(checkpoints.restore(abstract()), make_state(12))
    assert checkpoints.restore_ema(abstract().ema, 4)[0] == 4
    assert capfd.readouterr() == ("", "")


def test_leftovers_that_cannot_be_removed_go_with_the_next_save(opened, monkeypatch, tmp_path):
    """TensorStore may still write the rest of a save that has failed while its folder goes."""
    checkpoints = saved(opened(keep=1), 4)
    with monkeypatch.context() as patch:
        not_empty = OSError(errno.ENOTEMPTY, "Directory not empty")
        patch.setattr(shutil, "rmtree", mock.Mock(side_effect=not_empty))
        saved(checkpoints, 8)
        patch.setattr(ocp.CheckpointManager, "save", mock.Mock(side_effect=OSError("disk full")))
        with pytest.raises(WorkdirError, match="step 12 was not saved: disk full"):
            checkpoints.save(12, make_state(12))
        left = list(tmp_path.rglob("4.deleted"))
    assert left
    saved(checkpoints, 12)
    assert not left[0].exists() and checkpoints.latest() == 12


def test_orbax_declining_a_save_is_an_error(opened, monkeypatch):
    checkpoints = opened()
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    with pytest.raises(WorkdirError, match="step 3 was not saved: orbax declined"):
        checkpoints.save(3, make_state(3))


PROCESS = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, index, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, 2, index)
import numpy as np, pathlib
from diffusion.train_step import TrainState as State
from diffusion import checkpoint
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def make(step):
    return State(step, {"a": jnp.full(9000, 1.5) * step}, {"a": jnp.full(9, 2.5) * step}, ())
make = jax.jit(make, out_shardings=whole)
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(make, 0))
lines = []
checkpoint.logging.warning = lines.append
checkpoints = checkpoint.Checkpoints(directory)
assert checkpoints.latest() is None
for step in (4, 8, 8):
    checkpoints.save(step, make(step))
checkpoints.wait()
from jax.experimental.multihost_utils import sync_global_devices as together
if index == 0:
    for path in pathlib.Path(directory, "8/state").glob("**/d/*"):
        path.unlink()
together("damaged")
state = checkpoints.restore(shapes)
assert int(state.step) == 4 and float(np.asarray(state.params["a"])[0]) == 6.0
assert checkpoints.restore_ema(shapes.ema)[0] == 4 and len(lines) == 1
checkpoints.save(8, make(8))
checkpoints.wait()
assert checkpoints.latest() == 8
checkpoints.close()
"""


def test_two_processes_save_fall_back_and_save_again(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    with contextlib.ExitStack() as stack:
        pair = [subprocess.Popen([*command, i, str(tmp_path / "run")], **pipes) for i in "01"]
        for process in pair:
            stack.enter_context(process)
            stack.callback(process.kill)
        said = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], "\n".join(said)
    assert names(tmp_path / "run") == ["4", "8", "8.bad1"]


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
    saved(checkpoints, 8)
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
    saved(checkpoints, 4)
    wrong = {"ema": {"kernel": np.zeros(1)}}
    monkeypatch.setattr(checkpoint.files, "read_alone", lambda step: wrong)
    checkpoints.save(8, make_state(8))
    with pytest.raises(
        WorkdirError, match=r"step 8 was not saved: .* differs on disk from what was"
    ):
        checkpoints.wait()
    monkeypatch.undo()
    assert names(tmp_path / "run") == ["4", "8.bad1"]
    saved(checkpoints, 8)
    assert names(tmp_path / "run") == ["8", "8.bad1"]
    assert_same(checkpoints.restore(abstract()), make_state(8))


def test_keeps_the_best_scored_steps(opened, tmp_path):
    checkpoints = opened(keep=1, keep_best=2)
    for step, score in ((1, 3.0), (2, 1.0), (3, 5.0), (4, 2.0), (5, 4.0)):
        checkpoints.save(step, make_state(step))
        checkpoints.score(step, score)
        checkpoints.wait()
    checkpoints = opened(keep=1, keep_best=2)  # what was scored before is remembered
    saved(checkpoints, 6)
    assert names(tmp_path / "run") == ["2", "4", "6", "scores.json"]


def test_opening_removes_what_a_killed_run_left(opened, tmp_path):
    checkpoints = opened()
    saved(checkpoints, 4)
    for name in ("8.orbax-checkpoint-tmp", "2.deleted"):
        (tmp_path / "run" / name / "d").mkdir(parents=True)
    opened(read_only=True)
    assert len(names(tmp_path / "run")) == 3
    opened()
    assert names(tmp_path / "run") == ["4"]


def test_the_third_failure_in_a_row_is_an_error(opened, warned, monkeypatch):
    checkpoints, save = opened(), ocp.CheckpointManager.save
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    checkpoints.save_or_warn(4, make_state(4))
    (line,) = warned
    assert "step 4 was not saved" in line and "failure 1 of 3" in line
    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    checkpoints.save_or_warn(8, make_state(8))
    checkpoints.wait()  # a success: the count begins anew
    monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
    checkpoints.save_or_warn(12, make_state(12))
    checkpoints.save_or_warn(16, make_state(16))
    with pytest.raises(WorkdirError, match="failure 3 in a row"):
        checkpoints.save_or_warn(20, make_state(20))
    assert checkpoints.latest() == 8 and len(warned) == 3


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_a_save_in_a_bucket_that_takes_too_long_is_a_failure_until_it_ends(
    opened, warned, monkeypatch, tmp_path, bucket, place
):
    """On a disk the next one waits for it."""
    folder = bucket / "late-save" if place == "bucket" else tmp_path
    checkpoints, finish, may_end = opened(folder), Checkpoints._finish, threading.Event()

    def late(self, *args):
        may_end.wait()
        finish(self, *args)

    monkeypatch.setattr(Checkpoints, "_finish", late)
    monkeypatch.setattr(checkpoint, "MAX_SAVE_S", 0.0)
    checkpoints.save_or_warn(4, make_state(4))
    if place == "local":
        threading.Timer(0.2, may_end.set).start()
        checkpoints.save_or_warn(8, make_state(8))
        checkpoints.wait()
        assert names(folder) == ["4", "8"] and warned == []
        return
    checkpoints.save_or_warn(8, make_state(8))
    (line,) = warned
    assert "step 4 is still not written after 0 s" in line and "failure 1 of 3" in line
    may_end.set()
    monkeypatch.setattr(checkpoint, "MAX_SAVE_S", 60.0)
    checkpoints.save_or_warn(12, make_state(12))
    checkpoints.wait()
    assert names(checkpoints._directory) == ["12", "4"] and len(warned) == 1


def test_jumps_of_the_clock_change_nothing(opened, monkeypatch):
    """Forth and back by a day, at every look at it."""
    real, days = time.time, itertools.cycle([0, 86_400, -86_400])
    monkeypatch.setattr(time, "time", lambda: real() + next(days))
    checkpoints = opened(keep=2)
    saved(checkpoints, 1, 2, 3)
    assert checkpoints.latest() == 3
    assert_same(checkpoints.restore(abstract()), make_state(3))


def test_opens_a_work_directory_of_version_1(tmp_path, warned):
    """Its digests are in a file of orbax's; the arrays were digested by version 1 as it saved."""
    with tarfile.open(GOLDEN / "workdir_before.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = fill_defaults(json.loads((tmp_path / "config.json").read_text()))
    state = experiment.build(config).abstract_state
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        found = checkpoints.restore(state)
        assert (checkpoints.latest(), int(found.step), warned) == (4, 4, [])
        names_ = hashlib.sha256("".join(sorted(digests.sha256(found).values())).encode())
        assert names_.hexdigest() == VERSION_1
        checkpoints.save(8, found._replace(step=jnp.int32(8)))
        checkpoints.wait()
        assert checkpoints.latest() == 8
    # What came later and is off adds nothing to a checkpoint.
    manifest = json.loads((tmp_path / "checkpoints/8/manifest/metadata").read_text())
    parts = {"/".join(name.split("/")[:2]) for name in manifest["arrays"] if name[:3] != "ema"}
    assert parts == {"state/step", "state/params", "state/opt_state"}
    path = tmp_path / "checkpoints/4/_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"sha256": {', '"sha256": {"ema/x": "0", '))
    shutil.rmtree(tmp_path / "checkpoints/8")
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        with pytest.raises(WorkdirError, match="step 4 is not complete: manifest"):
            checkpoints.restore(state)
