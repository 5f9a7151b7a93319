"""Promises of docs/reliability.md that need whole runs or many damages.

The table there says which files test the others; `make soak` tries all of them often.
"""

import contextlib

import numpy as np
import pytest

from diffusion import experiment
from diffusion.checkpoint import Checkpoints
from diffusion.utils.errors import WorkdirError
from tests import trials
from tests.runs import run
from tests.test_checkpoint import abstract, make_state
from tests.trials import TINY


def test_damage_is_never_restored(tmp_path):
    count = trials.damaged(tmp_path, 24, np.random.default_rng(0), trials.ours)
    assert count["wrong"] == 0 and count["older"] > 8


def test_bare_orbax_restores_a_flipped_bit(tmp_path):
    """The control of R3: if this fails, digests are no longer needed."""
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(8, make_state(8))
    path = max((tmp_path / "8/ema").glob("**/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert trials.bare_orbax(tmp_path) == "wrong"
    match = r"step 8 is damaged: ema/.* is not what was saved"
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        with pytest.raises(WorkdirError, match=match):
            checkpoints.restore_ema(abstract().ema)


def test_a_training_that_diverges_names_the_array_and_can_be_replayed(tmp_path):
    wild = ("--config.optim.lr=1e30", "--config.optim.warmup=0", f"--workdir={tmp_path}")
    _, err = run(*TINY, *wild, code=5)
    assert err.count("\n") == 1 and "at step " in err and "first in the gradient of " in err, err
    assert not trials.steps_of(tmp_path)
    name = err.split("--replay=")[1].strip()
    with np.load(tmp_path / "crash" / name) as file:
        assert file["image"].shape == (16, 8, 8, 1) and file["image"].dtype == np.uint8
        assert sum(name.startswith("norm/") for name in file) > 10
    replay = ("--mode=check", f"--replay={name}", f"--workdir={tmp_path}")
    out, err = run(*TINY, *wild[:2], *replay, code=5)
    assert "not finite again, first in the gradient of " in err
    assert any(line.startswith("gradient") for line in out.splitlines())


def test_a_defect_of_the_program_is_one_line_and_a_traceback(tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("of two\nlines")

    monkeypatch.setattr(experiment, "make_input_pipeline", fails)
    _, err = run(*TINY, f"--workdir={tmp_path}", code=1)
    assert err.count("\n") == 1 and "RuntimeError: of two lines; " in err
    (path,) = (tmp_path / "crash").iterdir()
    assert str(path) in err and "Traceback" in path.read_text()
