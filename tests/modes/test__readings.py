"""Pictures during a training: when they are drawn, and by which sampler."""

import numpy as np
import pytest

from diffusion import experiment
from diffusion.modes import _readings, _sampling
from diffusion.runtime.config import Run, with_overrides
from tests.test_configs import config_of


def draw_preview(tmp_path, trained_s, changes=()):
    """Returns the grids and the lines of a preview after 10 steps that took trained_s seconds."""
    config = with_overrides(config_of("digits", "tiny"), dict(changes))
    exp = experiment.build(config)
    state = experiment.make_initial_state(config, exp)
    run_ = Run("train", config, tmp_path, None)
    return _readings.Preview(run_, exp).draw(state, 10, trained_s, 10)


def test_a_preview_that_would_take_too_long_is_left_out(tmp_path, capsys):
    """10 steps of batch 16 pay for 160 images; 20 steps for 2 x 1000 images cost 40,000 / 3."""
    assert draw_preview(tmp_path, 60.0, {"train.preview.num": 1000}) == {}
    assert "no preview" in capsys.readouterr().out and not list(tmp_path.rglob("*.png"))


def test_process_0_decides_for_all_whether_to_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(_readings, "broadcast_from_primary", lambda mine: True)
    assert draw_preview(tmp_path, 0.0) == {}


def test_a_preview_comes_from_its_own_fast_sampler(tmp_path, capsys):
    """20 evaluations of the thousand that config.sampler asks for; within a tenth of the time."""
    changes = {"process.T": 1000, "sampler.steps": 1000, "process.beta_end": 0.02}
    changes |= {"train.batch_size": 10_000}
    grids = draw_preview(tmp_path, 60.0, changes)
    assert grids.keys() == {"raw", "ema"}
    assert "unipc, 20 steps" in capsys.readouterr().out
    np.testing.assert_array_equal(grids["raw"], grids["ema"])  # the average starts as a copy


@pytest.mark.parametrize("schedule", ["linear", "jsd", "cosine"])
@pytest.mark.parametrize("T", [5, 1000])
def test_every_schedule_has_a_preview_sampler(schedule, T):
    config = with_overrides(config_of("digits"), {"process.schedule": schedule, "process.T": T})
    config = with_overrides(config, {"target": "v"})
    exp = experiment.build(config)
    preview = _sampling.preview_config(config, exp)
    sampler, ts = experiment.make_sampler(preview, exp)
    assert len(ts) == min(20, T) + 1 and sampler.evaluations(len(ts) - 1) == len(ts) - 1
