"""checkpoint.py: what comes back is what was saved, bit for bit, or an older step, or an error."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.checkpoint import Checkpoints
from diffusion.utils.errors import WorkdirError

ROOT = pathlib.Path(__file__).parent.parent


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def whole(devices=1):
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
    return jax.device_put(State(np.int32(step), params, ema, opt_state), whole(devices))


def abstract(devices=1):
    state = make_state(0)
    sharding = whole(devices)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_same(a, b):
    """Types, structure and every bit: NaNs and signs of zero too."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def opened(tmp_path):
    """opened(...) -> Checkpoints of tmp_path/run; its warnings in .lines; closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_(directory=tmp_path / "run", **options):
            lines = []
            checkpoints = Checkpoints(directory, warn=lines.append, **options)
            checkpoints.lines = lines
            stack.callback(checkpoints.close)
            return checkpoints

        yield open_


def saved(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    return checkpoints


def names(directory):
    return sorted(path.name for path in directory.iterdir())




def test_state_comes_back_bit_for_bit_in_another_object(opened):
    saved(opened(), 4, 8)
    checkpoints = opened()
    assert checkpoints.latest() == 8
    assert_same(checkpoints.restore(abstract()), make_state(8))
    assert checkpoints.lines == []


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (4, 2)])
def test_any_number_of_devices(opened, before, after):
    checkpoints = opened()
    checkpoints.save(3, make_state(3, before))
    checkpoints.wait()
    state = checkpoints.restore(abstract(after))
    assert_same(state, make_state(3))
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {after}


def test_average_alone_without_reading_the_rest(opened, tmp_path):
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


def test_keeps_the_last_and_the_multiples(opened, tmp_path):
    saved(opened(keep=2, keep_every=4), *range(1, 8))
    assert names(tmp_path / "run") == ["4", "6", "7"]


def test_relative_directory(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(opened("some/run"), 1)
    assert names(tmp_path / "some/run") == ["1"]


def test_keep_is_checked(tmp_path):
    for options in ({"keep": 0}, {"keep_every": 0}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            Checkpoints(tmp_path, **options)




def data_file(step):
    """The largest file of a step's state: of array data."""
    return max((step / "state").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def half_copied(run):
    (run / "9").mkdir()
    shutil.copy(run / "8/_CHECKPOINT_METADATA", run / "9")
    shutil.copytree(run / "8/ema", run / "9/ema")


def halved(name):
    def cut(run):
        path = run / "8" / name
        os.truncate(path, path.stat().st_size // 2)

    return cut


def uncommitted(run):
    shutil.copytree(run / "8", run / "9")
    path = run / "9/_CHECKPOINT_METADATA"
    about = json.loads(path.read_text())
    about["custom_metadata"]["step"], about["commit_timestamp_nsecs"] = 9, None
    path.write_text(json.dumps(about))


# What happens to a directory with the steps 4 and 8: (how, the bad step, what is said of it).
DAMAGES = {
    "empty directory": (lambda run: (run / "9").mkdir(), 9, "is not complete"),
    "half copied": (half_copied, 9, "is not complete"),
    "never committed": (uncommitted, 9, "is not complete"),
    "renamed": (lambda run: (run / "8").rename(run / "50"), 50, "holds the state of step 8"),
    "copied": (lambda run: shutil.copytree(run / "8", run / "9"), 9, "holds the state of step 8"),
    "array data cut": (lambda run: os.truncate(data_file(run / "8"), 100), 8, "cannot be restored"),
    "array data gone": (lambda run: data_file(run / "8").unlink(), 8, "cannot be restored"),
    "index cut": (halved("state/manifest.ocdbt"), 8, "cannot be restored"),
    "index gone": (lambda run: (run / "8/ema/manifest.ocdbt").unlink(), 8, "cannot be restored"),
    "description cut": (halved("ema/_METADATA"), 8, "cannot be restored"),
    "marker cut": (halved("_CHECKPOINT_METADATA"), 8, "is not complete"),
    "item gone": (lambda run: shutil.rmtree(run / "8/ema"), 8, "is not complete"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_step_is_passed_over_named_and_out_of_the_way(
    opened, tmp_path, damage, capfd, caplog
):
    inflict, bad, what = DAMAGES[damage]
    run = tmp_path / "run"
    first = opened()
    saved(first, 4, 8)
    first.close()
    inflict(run)
    good = max(int(name) for name in names(run) if int(name) != bad)
    checkpoints = opened()
    assert checkpoints.latest() in (good, 8)  # 8 where only reading every byte can tell
    assert_same(checkpoints.restore(abstract()), make_state(good))
    (line,) = checkpoints.lines
    assert line.startswith(f"{run}: step {bad} {what}") and "\n" not in line
    assert line.endswith(f"; step {good} is used instead; set aside as {bad}.bad1")
    assert checkpoints.latest() == good
    saved(checkpoints, bad)  # what comes next has its place, and is on disk
    assert opened().latest() == bad
    assert_same(opened().restore(abstract()), make_state(bad))
    assert capfd.readouterr() == ("", "") and caplog.records == []  # the warning said it all


def test_bare_orbax_takes_an_empty_directory_for_the_latest_step(opened, tmp_path):
    """The control: if this fails, less of checkpoint.py is needed."""
    first = opened()
    saved(first, 4)
    first.close()
    (tmp_path / "run/9").mkdir()
    with contextlib.closing(ocp.CheckpointManager(tmp_path / "run")) as manager:
        assert manager.latest_step() == 9


def test_a_state_of_another_step_is_noticed(opened):
    checkpoints = saved(opened(), 4)
    checkpoints.save(8, make_state(7))
    checkpoints.wait()
    assert int(checkpoints.restore(abstract()).step) == 4
    assert "step 8 holds the state of step 7" in checkpoints.lines[0]


def test_what_is_no_step_is_ignored(opened, tmp_path):
    run = tmp_path / "run"
    first = opened()
    saved(first, 8)
    first.close()
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
    assert checkpoints.lines == []


def test_no_step_at_all(opened, tmp_path):
    checkpoints = opened()
    assert checkpoints.latest() is None
    with pytest.raises(WorkdirError, match=f"^{tmp_path}/run: no checkpoint is there$"):
        checkpoints.restore(abstract())


def test_no_good_step_is_an_error_and_nothing_is_moved(opened, tmp_path):
    """Not a fresh start: that would throw a training away."""
    run = tmp_path / "run"
    first = opened()
    saved(first, 4, 8)
    first.close()
    for step in (4, 8):
        data_file(run / str(step)).unlink()
    checkpoints = opened()
    line = f"^{run}: step 8 cannot be restored: .*; nor is any of these good: 4; mend it, or move"
    with pytest.raises(WorkdirError, match=line):
        checkpoints.restore(abstract())
    assert names(run) == ["4", "8"] and checkpoints.lines == []
    for step in (4, 8):
        shutil.rmtree(run / str(step))
    (run / "9").mkdir()
    with pytest.raises(WorkdirError, match=f"^{run}: step 9 is not complete: .*; mend it"):
        opened().latest()


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
def test_a_state_that_does_not_fit_is_an_error_and_nothing_is_moved(opened, tmp_path, change, what):
    checkpoints = saved(opened(), 8)
    with pytest.raises(WorkdirError) as error:
        checkpoints.restore(change(abstract()))
    assert f"run: step 8 does not fit: {what}" in str(error.value)
    assert names(tmp_path / "run") == ["8"]




@pytest.mark.parametrize("below", ["", "below"])
def test_a_place_that_cannot_be_written_is_found_when_opening(tmp_path, below):
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / below
    with pytest.raises(WorkdirError, match=f"^{where}: cannot be written: .*; choose another"):
        Checkpoints(where)


def test_opening_leaves_nothing_behind(opened, tmp_path):
    opened()
    assert names(tmp_path / "run") == []


def test_read_only_makes_and_moves_nothing(opened, tmp_path):
    checkpoints = opened(read_only=True)
    assert checkpoints.latest() is None and not (tmp_path / "run").exists()
    with pytest.raises(WorkdirError, match="no checkpoint is there"):
        checkpoints.restore_ema(abstract().ema)
    saved(opened(), 4, 8)
    data_file(tmp_path / "run/8").unlink()
    checkpoints = opened(read_only=True)
    assert checkpoints.restore_ema(abstract().ema)[0] == 8
    assert int(checkpoints.restore(abstract()).step) == 4
    assert checkpoints.lines[0].endswith("step 4 is used instead")
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


def test_a_full_disk_is_told_and_the_older_step_and_the_next_one_are_good(opened, capfd):
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
    checkpoints.wait()  # told once
    assert checkpoints.latest() == 4
    saved(checkpoints, 12)
    assert_same(checkpoints.restore(abstract()), make_state(12))
    assert checkpoints.restore_ema(abstract().ema, 4)[0] == 4
    assert capfd.readouterr() == ("", "")


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
from tests.test_checkpoint import State
from diffusion.checkpoint import Checkpoints
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def make(step):
    return State(step, {"a": jnp.full(9000, 1.5) * step}, {"a": jnp.full(9, 2.5) * step}, ())
make = jax.jit(make, out_shardings=whole)
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(make, 0))
lines = []
checkpoints = Checkpoints(directory, warn=lines.append)
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


def test_two_processes_save_fall_back_and_save_alike(tmp_path):
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
