"""likelihoods.py: a pass gives every image once, and goes on where it was killed."""

import jax
import numpy as np
import pytest

from diffusion import data, experiment
from diffusion.data import loader
from diffusion.modes import likelihood
from diffusion.utils.errors import DDPMError
from tests.test_configs import config_of


@pytest.fixture(scope="module")
def setting():
    config = config_of("digits", "tiny")
    return config, experiment.build(config)


def sums_of_pixels(batch):
    """Two values an image: what its bytes sum to, and its number."""
    total = np.asarray(batch.image, np.float64).sum(axis=(1, 2, 3))
    return np.stack([total, np.asarray(batch.number, np.float64)], axis=1)


def make(setting, n=30, batch_size=8):
    config, x = setting
    config = config.copy_and_resolve_references()
    config.bpd.batch_size = batch_size
    return likelihood.make_pass(config, x, "test", n)


def test_every_image_counts_once(setting, tmp_path):
    """30 images in batches of 8: the last batch is filled up, and what fills it is not counted."""
    work, told = make(setting), []
    sums = likelihood.accumulate(work, sums_of_pixels, tmp_path / "kept.npz", told.append)
    images = loader.load_dataset(data.open_dataset("digits", "test")).image[:30].astype(np.float64)
    values = np.stack([images.sum((1, 2, 3)), np.arange(30.0)], axis=1)
    assert sums.n == 30 and told == [8, 16, 24, 30]
    average = sums.average()
    np.testing.assert_allclose(average.mean, values.mean(0), rtol=1e-12)
    # The textbook's standard error; sums of squares of numbers up to 1e4 cancel to 1e-10.
    np.testing.assert_allclose(average.error, values.std(0, ddof=1) / np.sqrt(30), rtol=1e-8)


def test_a_killed_pass_goes_on_and_another_config_starts_anew(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "KEEP_S", 0)
    kept, seen = tmp_path / "folder" / "kept.npz", []

    def killed(batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(int(batch.number[0]))
        return sums_of_pixels(batch)

    with pytest.raises(KeyboardInterrupt):
        likelihood.accumulate(make(setting), killed, kept, lambda n: None)

    def noted(batch):
        seen.append(int(batch.number[0]))
        return sums_of_pixels(batch)

    told = []
    resumed = likelihood.accumulate(make(setting), noted, kept, told.append)
    assert seen == [0, 8, 16, 24] and told == [16, 24, 30]
    straight = likelihood.accumulate(make(setting), sums_of_pixels, tmp_path / "x.npz", told.append)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    for other in (make(setting, n=20), make(setting, batch_size=4)):
        seen.clear()
        assert likelihood.accumulate(other, noted, kept, lambda n: None).n == other.n
        assert seen[0] == 0 and len(seen) == -(-other.n // other.size)
    whole = kept.read_bytes()
    for damaged in (b"", b"cut short", whole[: len(whole) // 2]):
        kept.write_bytes(damaged)
        seen.clear()
        assert likelihood.accumulate(make(setting), noted, kept, lambda n: None).n == 30
        assert seen == [0, 8, 16, 24]


def test_more_images_than_there_are_is_an_error(setting):
    with pytest.raises(DDPMError, match="expected at most 296 of test, found 300"):
        make(setting, n=300)
