"""Tests --init_from: what a training begins with, and which weights it refuses."""

import contextlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from diffusion import experiment
from diffusion.modes import _initial_weights
from diffusion.modes._common import open_checkpoints
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils import digests, io
from diffusion.utils.errors import ConfigError
from tests.runs import TINY, run
from tests.test_configs import config_of

CONFIG = config_of("digits", "tiny")


def state_of(workdir):
    """Returns the newest checkpoint's state, of NumPy arrays."""
    with contextlib.closing(open_checkpoints(workdir, read_only=True)) as checkpoints:
        abstract = experiment.build(CONFIG).abstract_state
        return digests.on_host(checkpoints.restore(abstract))


def begin(workdir, source, weights="ema", changes=()):
    """Returns the run of a training in `workdir`, and the state that it would begin with."""
    changes = {"train.init_weights": weights, "model.dropout": 0.2, **dict(changes)}
    config = with_overrides(CONFIG, changes)
    run_ = Run("train", config, workdir, SimpleNamespace(init_from=source))
    return run_, _initial_weights.load_initial_state(run_, experiment.build(config))


def assert_new(opt_state, parameters):
    """Asserts that moments and counts are 0: all but the coefficients of Muon's polynomial."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    known = {jax.tree_util.keystr(path) for path, leaf in leaves if np.any(leaf)}
    assert len(leaves) > parameters and all(name.endswith(".ns_coeffs") for name in known), known


@pytest.mark.parametrize("weights, item", [("ema", "ema"), ("raw", "params")])
def test_the_state_is_the_weights_and_a_new_optimizer(trained, tmp_path, weights, item):
    _, state = begin(tmp_path, trained[0], weights)
    theirs = digests.sha256(getattr(state_of(trained[0]), item))
    assert theirs == digests.sha256(state.params) == digests.sha256(state.ema)
    assert int(state.step) == 0
    assert_new(state.opt_state, len(theirs))


def test_a_training_begins_with_the_weights_and_resumes_without_the_flag(trained, tmp_path):
    args = (TINY, f"--init_from={trained[0]}", f"--workdir={tmp_path}", "--config.optim.lr=0.001")
    out, err = run(*args, "--config.train.steps=2", "--config.train.sample_every=0")
    assert err == "" and f"weights    ema, step 8 of {trained[0]}" in out
    assert "differs    optim.lr: was 0.004, now 0.001\n" in out and "from step 0" in out
    out, _ = run(f"--workdir={tmp_path}", "--init_from=nothing")  # which is not read any more
    assert "weights    " in out and "own checkpoints" in out and "nothing to do" in out
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    begun = state_of(tmp_path)  # of step 0: what a resume or a rollback finds
    assert digests.sha256(begun.ema) == digests.sha256(state_of(trained[0]).ema)
    assert int(begun.step) == 0
    assert_new(begun.opt_state, len(jax.tree.leaves(begun.params)))


@pytest.mark.parametrize(
    "changes, code, message",
    [
        (["--config.model.ch=16"], 2, "found model.ch: was 8, now 16; give its values"),
        (["--config.target=v", "--config.model.dropout=0.1"], 2, "found target: was eps, now v; "),
        (["--config.process.T=30"], 2, "found process.T: was 20, now 30; "),
    ],
)
def test_other_weights_are_refused(trained, tmp_path, changes, code, message):
    """Before anything is written."""
    args = (TINY, f"--workdir={tmp_path / 'new'}", f"--init_from={trained[0]}", *changes)
    _, err = run(*args, code=code)
    assert message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_tuning_that_begins_with_denoising_learns_another_target(trained, tmp_path, capsys):
    changes = {"target": "v", "loss.name": "consistency", "loss.stage_steps": 2}
    _, state = begin(tmp_path, trained[0], changes=changes)
    assert digests.sha256(state.ema) == digests.sha256(state_of(trained[0]).ema)
    assert "; target: was eps, now v" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="found target: was eps, now v; give its values"):
        begin(tmp_path, trained[0], changes=changes | {"loss.stage_steps": 0})


def test_no_weights_and_damaged_ones_are_refused(trained, tmp_path):
    source = tmp_path / "source"
    args = (TINY, f"--workdir={tmp_path / 'new'}", f"--init_from={source}")
    _, err = run(*args, code=4)
    assert f"--init_from={source}: expected a trained work directory, found none; " in err
    shutil.copytree(trained[0], source)
    for path in source.glob("checkpoints/*/manifest/metadata"):
        path.write_text(path.read_text()[:-20])
    _, err = run(*args, code=4)
    assert "is not complete: manifest" in err and not (tmp_path / "new").exists()


def test_a_training_that_ended_before_its_first_checkpoint_remembers(trained, tmp_path, bucket):
    """Which weights it began with, in a bucket too; the flag is not needed any more."""
    for name in ("config.json", "checkpoints"):
        copy = shutil.copy if name.endswith("json") else shutil.copytree
        copy(trained[0] / name, tmp_path / name)
    io.upload_folder(tmp_path, bucket / "trained")
    new = tmp_path / "new"
    run_, state = begin(new, str(bucket / "trained"))
    with contextlib.closing(open_checkpoints(new)) as checkpoints:
        _initial_weights.save_initial_state(run_, checkpoints, state)
    assert begin(new, str(bucket / "trained"))[1] is None
    shutil.rmtree(new / "checkpoints")
    assert digests.sha256(begin(new, None)[1]) == digests.sha256(state)
