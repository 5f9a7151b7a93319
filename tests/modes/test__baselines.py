"""Baselines of bits/dim: of the images that a reading has, kept, and said where they are better."""

import numpy as np
import pytest

from diffusion import data, experiment
from diffusion.data.loader import load_dataset
from diffusion.metrics.baselines import Baseline, baselines
from diffusion.modes import _baselines
from diffusion.utils.errors import DataError
from tests.test_configs import config_of

ROWS = [Baseline("a", 2.0), Baseline("b", 1.0, 0.1), Baseline("c", 3.0)]


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.setattr(_baselines, "cache_dir", lambda: tmp_path)
    config = config_of("digits", "tiny")
    return config, experiment.build(config)


def test_baselines_are_of_the_first_images_and_kept(digits, monkeypatch, capsys):
    rows = _baselines.load_baselines(*digits, "test", 30)
    train, test = (load_dataset(data.open_dataset("digits", s))[0] for s in ("train", "test"))
    assert rows == baselines(train, test[:30], 17)
    line = "uniform 4.087, pixel histogram "
    about = "bits/dim (30 images of test, 17 levels, by 1,501 of train)"
    out = capsys.readouterr().out
    assert line in out and about in out
    monkeypatch.setattr(_baselines, "load_dataset", None)
    assert _baselines.load_baselines(*digits, "test", 30) == rows


def test_a_data_set_without_a_training_split_has_none(digits, monkeypatch, capsys):
    def no_split(*args):
        raise DataError("no split 'train'")

    monkeypatch.setattr(experiment, "load_split", no_split)
    assert _baselines.load_baselines(*digits, "test", 30) == []
    assert "warning    no baselines of bits/dim: no split 'train'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bits, text",
    [
        (0.9, ""),
        (1.5, "; worse than b 1.000"),
        (2.5, "; worse than b 1.000, a 2.000"),
        (np.float64(9), "; worse than b 1.000, a 2.000, c 3.000"),
    ],
)
def test_what_is_better_is_named(bits, text):
    assert _baselines.worse_than(bits, ROWS) == text
    assert _baselines.worse_than(bits, []) == ""
