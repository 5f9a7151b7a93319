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
    about = "bits/dim (30 images of test, 17 levels, histograms of 1,501 of train)"
    out = capsys.readouterr().out
    assert line in out and about in out
    monkeypatch.setattr(_baselines, "load_dataset", None)
    assert _baselines.load_baselines(*digits, "test", 30) == rows


def test_a_split_of_fewer_images_than_are_read_is_read_whole(digits, capsys):
    assert len(_baselines.load_baselines(*digits, "test", 100_000)) == 5
    assert "(296 images of test" in capsys.readouterr().out


def test_no_histograms_where_there_are_no_other_images(digits, monkeypatch, capsys):
    """A histogram that knows the images it is tried on would look better than it is."""
    names = ["uniform", "lossless PNG", "lossless WebP"]
    assert [row.name for row in _baselines.load_baselines(*digits, "train", 50)] == names
    load = experiment.load_split

    def only_test(config, exp, split="train"):
        if split == "train":
            raise DataError("no split 'train'")
        return load(config, exp, split)

    monkeypatch.setattr(experiment, "load_split", only_test)
    assert [row.name for row in _baselines.load_baselines(*digits, "test", 50)] == names
    assert "no histograms: no split 'train'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bits, text",
    [
        (0.9, ""),
        (1.5, "; worse than b 1.000"),
        (1.22, ""),  # within both errors, 0.2 and 0.1
        (2.5, "; worse than b 1.000, a 2.000"),
        (2.0 + 0.2, "; worse than b 1.000"),  # within the reading's error of 0.2
        (np.float64(9), "; worse than b 1.000, a 2.000, c 3.000"),
    ],
)
def test_what_is_better_is_named(bits, text):
    assert _baselines.worse_than(bits, 0.2, ROWS) == text
    assert _baselines.worse_than(bits, 0.2, []) == ""
