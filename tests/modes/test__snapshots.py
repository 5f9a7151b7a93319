"""Averages of any length from a training's snapshots: what is written, read back, and refused."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from diffusion import experiment, posthoc_ema
from diffusion.convert import readers
from diffusion.modes import _averages, _snapshots, import_weights
from diffusion.modes._common import load_models, load_state, load_trained
from diffusion.modes._snapshots import Snapshots, snapshot_steps
from diffusion.runtime.config import Run, with_overrides
from diffusion.runtime.validation import validate
from diffusion.utils.errors import ConfigError, WorkdirError
from tests.runs import TINY, assert_same, logged, run
from tests.test_configs import config_of

ON = {
    "optim.posthoc": (0.1, 0.05),  # in no order
    "optim.name": "adamw",
    "optim.schedule": "cosine",
    "optim.weight_decay": 0.01,
    "train.snapshots": 4,
    "train.sample_every": 0,
}
FLAGS = tuple(f"--config.{key}={value}" for key, value in ON.items())
PIXELS = "--config.eval.features=('pixels',)"
MANY = "--config.eval.weights=('ema','ema:0.05','ema:0.08','raw')"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished tiny training with snapshots, which tests must not change, and its console."""
    workdir = tmp_path_factory.mktemp("snapshots") / "run"
    return workdir, run(TINY, *FLAGS, f"--workdir={workdir}")[0]


@pytest.fixture
def workdir(kept, tmp_path):
    """A copy to write to."""
    return shutil.copytree(kept[0], tmp_path / "run")


def config_with(**more):
    return with_overrides(config_of("digits", "tiny"), ON | more)


def snapshots_of(workdir):
    """Returns {file/array: array}."""
    found = {}
    for path in workdir.glob("snapshots/*.npz"):
        with np.load(path) as file:
            found |= {f"{path.stem}/{name}": file[name] for name in file.files}
    return found


def run_of(workdir, **more):
    return Run("sample", config_with(**more), workdir, None)


def restored(workdir):
    return load_state(run_of(workdir), experiment.build(config_with()))


def loaded(workdir, *names):
    """Returns the parameters of each of the weights."""
    return [
        model.params
        for model in load_models(run_of(workdir), experiment.build(config_with()), names)
    ]


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize(
    "steps, n, expected",
    [(8, 4, [2, 4, 6, 8]), (10, 4, [3, 5, 8, 10]), (3, 16, [1, 2, 3]), (7, 1, [7])],
)
def test_snapshots_are_evenly_spaced_and_the_last_step_is_one(steps, n, expected):
    config = config_with(**{"train.steps": steps, "train.snapshots": n})
    assert snapshot_steps(config) == expected
    assert snapshot_steps(with_overrides(config, {"optim.posthoc": ()})) == []


def test_a_training_writes_its_snapshots_and_says_how_many(kept):
    workdir, out = kept
    assert re.search(r"^snapshots +4 of 2 x 42\.4 kB$", out, re.M), out  # 10,593 float32
    names = sorted(path.name for path in (workdir / "snapshots").iterdir())
    assert names == [f"{step:08d}.npz" for step in (2, 4, 6, 8)]
    last = snapshots_of(workdir)
    for length, average in zip(("0.1", "0.05"), restored(workdir).averages, strict=True):
        kernel = last[f"00000008/{length}/conv_in/kernel"]
        np.testing.assert_array_equal(kernel, average["conv_in"]["kernel"])


def test_the_logged_rate_is_the_schedule_s(kept):
    """lr (1 + cos(pi s)) / 2 after a warm-up of 2, at the update before each logged step."""
    rates, lr = logged(kept[0], "train/lr"), config_of("digits").optim.lr
    expected = [lr / 2, *(lr * (1 + np.cos(np.pi * (t - 2) / 6)) / 2 for t in (3, 5, 7))]
    np.testing.assert_allclose([*rates.values()], expected, rtol=1e-5)


def test_a_resumed_training_writes_the_same_snapshots_bit_for_bit(kept, workdir):
    """From the checkpoint of step 4, after a kill in the middle of step 6's snapshot."""
    for path in ("snapshots/00000008.npz", "checkpoints/8"):
        (shutil.rmtree if "check" in path else type(workdir).unlink)(workdir / path)
    (workdir / "snapshots" / "00000006.npz").write_bytes(b"half")
    (workdir / "snapshots" / "00000005.npz").write_bytes(b"of a training with other steps")
    out, _ = run(TINY, *FLAGS, f"--workdir={workdir}")
    assert "from step 4" in out
    assert_same(snapshots_of(workdir), snapshots_of(kept[0]))
    assert_trees_close(*map(restored, (workdir, kept[0])), rtol=0, atol=0)


def test_a_length_that_was_tracked_is_given_back(kept):
    """And another lies near both, as the training is short."""
    state = restored(kept[0]).averages
    tenth, half, between, raw = loaded(kept[0], "ema:0.1", "ema:0.05", "ema:0.07", "raw")
    assert_trees_close(tenth, state[0], rtol=0, atol=1e-6)
    assert_trees_close(half, state[1], rtol=0, atol=1e-6)
    kernels = [tree["conv_in"]["kernel"] for tree in (half, between, tenth, raw)]
    steps = [np.abs(kernels[1] - kernel).max() for kernel in (kernels[0], kernels[2], kernels[3])]
    assert 0 < max(steps[:2]) < 2 * np.abs(kernels[0] - kernels[2]).max() and steps[2] > 0


def test_the_config_s_weights_are_loaded_and_have_a_folder(kept):
    exp, state = experiment.build(config_with()), restored(kept[0])
    expected = {"ema": state.ema, "raw": state.params, "ema:0.1": state.averages[0]}
    folders = {"ema": "00000008", "raw": "00000008_raw", "ema:0.1": "00000008_ema0.1"}
    for weights, params in expected.items():
        trained = load_trained(run_of(kept[0], weights=weights), exp)
        assert_trees_close(trained.params, params, rtol=0, atol=1e-6)
        assert trained.weights == weights
        assert trained.folder("eval") == kept[0] / "eval" / folders[weights]


def test_eval_of_several_lengths_draws_and_compares_them(workdir):
    out, err = run("--mode=eval", f"--workdir={workdir}", PIXELS, MANY)
    assert err == ""
    assert re.search(
        r"^average +ema:0\.08 of 3 snapshots and the checkpoint of step 8; ", out, re.M
    )
    folder = workdir / "eval" / "00000008"
    sets = sorted(re.match(r"(.*)_seed0", path.name)[1] for path in folder.glob("*_seed0_*"))
    assert sets == ["ema", "ema0.05", "ema0.08", "raw"]
    assert (folder / "average.png").stat().st_size > 10_000
    content = json.loads((folder / "metrics.json").read_text())
    names = ["ema", "ema:0.05", "ema:0.08", "raw"]
    assert [*content["scores"]] == names and [*content["bits_per_dim"]["weights"]] == names
    fd = {w: content["scores"][w]["train"]["fd_pixels"]["value"] for w in names}
    best = min(("ema:0.05", "ema:0.08"), key=fd.get)
    assert f"note       the best length by fd_pixels: {best} {fd[best]:.4g}" in out
    assert "the best length by bits/dim: ema:0.0" in out


def test_errors_of_a_comparison_leave_out_what_the_images_differ_by():
    """Two models that differ by 1 +- 0.1 on images that differ by 100."""
    rng = np.random.default_rng(0)
    images, gap = 100 * rng.normal(size=400), 1 + 0.1 * rng.normal(size=400)
    found = _averages.compared(np.stack([images, images + gap]), ["a", "b"])
    np.testing.assert_allclose(found["b"][0] - found["a"][0], gap.mean(), rtol=1e-9)
    # The error of the difference is sqrt(2) times that of either.
    np.testing.assert_allclose(np.sqrt(2) * found["a"][1], gap.std(ddof=1) / 20, rtol=1e-9)


# Refusals


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path):
    shutil.copy(path.with_stem("00000002"), path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage", [flip_a_bit, swap, cut])
def test_a_damaged_snapshot_is_named(workdir, damage):
    path = workdir / "snapshots" / "00000004.npz"
    damage(path)
    with pytest.raises(WorkdirError, match=f"^{path}: damaged: .*; delete it to do without, or"):
        loaded(workdir, "ema:0.07")


def test_a_missing_snapshot_is_a_warning_and_none_at_all_an_error(workdir, capsys):
    (workdir / "snapshots" / "00000004.npz").unlink()
    loaded(workdir, "ema:0.03")
    missing, extrapolated = capsys.readouterr().err.splitlines()
    assert f"{workdir}/snapshots: missing: step 4; restore" in missing
    assert "ema:0.03 is extrapolated: the shortest average that was tracked is 0.05" in extrapolated
    shutil.rmtree(workdir / "snapshots")
    args = "--mode=sample", f"--workdir={workdir}", "--config.weights=ema:0.07"
    _, err = run(*args, code=4)
    assert err.count("\n") == 1 and "expected snapshots of the training, found none" in err


def test_a_full_disk_costs_a_snapshot_and_not_the_training(tmp_path, monkeypatch, capsys):
    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_snapshots.io, "save_npz", disk_full)
    exp = experiment.build(config_with())
    state = experiment.make_initial_state(config_with(), exp)
    Snapshots(Run("train", config_with(), tmp_path, None)).save(2, state)
    assert "00000002.npz: not written: No space left" in capsys.readouterr().err


def test_snapshots_in_a_bucket(bucket):
    """Written there and read back; averages of ones and twos give the sum of their weights."""
    config = config_with(**{"train.steps": 4, "train.snapshots": 4})
    exp = experiment.build(config)
    state = experiment.make_initial_state(config, exp)
    ones, twos = (jax.tree.map(lambda x, v=v: v + 0 * x, state.params) for v in (1, 2))
    state = state._replace(averages=(ones, twos))  # of optim.posthoc, 0.1 and 0.05
    folder = bucket / "snapshots"
    Snapshots(Run("train", config, folder, None)).save(1, state)
    state = state._replace(step=np.int32(2))
    (found,) = _snapshots.reconstruct(config, folder, exp, state, ["ema:0.08"])
    weights, _ = posthoc_ema.fit([1, 1, 2, 2], [0.1, 0.05, 0.1, 0.05], 2, 0.08)
    expected = jax.tree.map(lambda x: x * (weights @ [1, 2, 1, 2]), ones)
    assert_trees_close(found, expected, rtol=0, atol=1e-6)


WRONG = {
    "weights: expected ema, raw, or ema:LENGTH .* found 'ema:0.5'": {"weights": "ema:0.5"},
    "weights: expected ema, raw, or ema:LENGTH .* found 'ema:'": {"weights": "ema:"},
    "eval.weights: expected a tuple of .* found ": {"eval.weights": ("raw", "raw")},
    "optim.posthoc: expected a tuple of distinct": {"optim.posthoc": (0.05, 0.05)},
    "optim.posthoc: expected .* between 0 and 0.28, or ": {"optim.posthoc": (0.3,)},
    "train.snapshots: expected an int of 1 or more": {"train.snapshots": 0},
}


@pytest.mark.parametrize("match", WRONG)
def test_weights_that_cannot_be_are_refused(match):
    with pytest.raises(ConfigError, match=f"^{match}"):
        validate(with_overrides(config_of("digits"), WRONG[match]))


def test_a_length_needs_a_training_that_kept_snapshots(trained):
    args = "--config.weights=ema:0.05", "--config.eval.weights=('ema','ema:0.05')"
    for mode, weights in zip(("sample", "eval"), args, strict=True):
        _, err = run(f"--mode={mode}", f"--workdir={trained[0]}", weights, code=2)
        assert "weights: expected ema or raw, found ema:0.05, of which only a training" in err


def test_eval_takes_its_weights_from_its_own_key(kept):
    _, err = run("--mode=eval", f"--workdir={kept[0]}", "--config.weights=raw", code=2)
    assert "eval.weights: expected a tuple for --mode=eval, found weights='raw'" in err


def test_an_export_has_the_weights_that_were_asked_for_and_no_need_of_snapshots(kept, tmp_path):
    args = "--mode=export", f"--workdir={kept[0]}", "--config.weights=ema:0.05"
    out, _ = run(*args, f"--output={tmp_path / 'out'}")
    assert "exporting  ema:0.05 in place of the averaged weights" in out
    found = readers.read(tmp_path / "out")
    assert_trees_close(found.ema, restored(kept[0]).averages[1], rtol=0, atol=1e-6)
    assert found.config["optim"]["posthoc"] == [] and found.config["weights"] == "ema"
    config = config_with()
    with pytest.raises(ConfigError, match=r"^optim.posthoc: expected \(\) for --mode=import"):
        import_weights.make_state(found, experiment.build(config), "out")
