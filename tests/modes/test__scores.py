"""References, statistics on disk and the scores of images against them."""

import jax
import numpy as np
import pytest

from diffusion import experiment, metrics
from diffusion.metrics import extraction, features
from diffusion.modes import _scores
from diffusion.runtime.config import with_overrides
from diffusion.sharding import data_mesh
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_npz
from tests.metrics.feature_sets import collect
from tests.test_configs import config_of


def normal(n, d, seed=0, mean=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)).astype(np.float32) + np.float32(mean)


@pytest.fixture(scope="module")
def extractor():
    return extraction.make_extractor(("pixels",), (3, 3, 1), data_mesh())


def test_statistics_are_what_other_programs_publish_and_read(tmp_path, extractor):
    """`mu` and `sigma` as NumPy computes them; a file of these alone gives the same distance."""
    x, y = normal(40, 9), normal(50, 9, 1, 0.5)
    ours, other = (collect([(z, None)], len(z)) for z in (x, y))
    _scores.save_statistics(tmp_path / "ours.npz", "pixels", ours)
    with np.load(tmp_path / "ours.npz") as file:
        np.testing.assert_allclose(file["mu"], x.mean(0, dtype=np.float64), atol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(x.T.astype(np.float64)), atol=1e-12)
        np.savez(tmp_path / "theirs.npz", mu=file["mu"], sigma=file["sigma"])
    loaded, published = (
        _scores.load_statistics(tmp_path / f"{name}.npz", extractor)["pixels"]
        for name in ("ours", "theirs")
    )
    assert np.array_equal(loaded.features, ours.features) and not len(published.features)
    fd = [metrics.evaluate("fd", other, s)["fd"].value for s in (ours, loaded, published)]
    assert fd[0] > 1 and np.allclose(fd, fd[0], rtol=1e-9)


def test_statistics_of_other_features_give_one_line(tmp_path, extractor):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DataError, match="expected statistics of pixels 9 features, found 2048"):
        _scores.load_statistics(tmp_path / "x.npz", extractor)
    np.savez(tmp_path / "x.npz", mu=np.zeros(9), sigma=-np.eye(9))
    with pytest.raises(DataError, match="covariance"):
        _scores.load_statistics(tmp_path / "x.npz", extractor)
    save_npz(tmp_path / "x.npz", np.zeros((2, 3, 3, 1), np.uint8))
    assert _scores.load_statistics(tmp_path / "x.npz", extractor) is None


def test_statistics_of_a_split_are_cached(tmp_path, monkeypatch, capsys):
    """A second reading, or one of fewer features, reads no images; it gives the same numbers."""
    monkeypatch.setattr(_scores, "cache_dir", lambda: tmp_path)
    config = config_of("digits", "tiny")
    exp, found = experiment.build(config), []
    for names, reads in (
        (("random", "pixels"), True),
        (("random", "pixels"), False),
        (("pixels",), False),
    ):
        changed = with_overrides(config, {"eval.features": names})
        scorer = _scores.make_scorer(changed, exp, exp.image_shape)
        found.append(_scores.load_reference("train", scorer).feature_sets)
        assert list(found[-1]) == list(names)
        assert ("1,501 images of train" in capsys.readouterr().out) == reads
    for again in found[1:]:
        for kind, each in again.items():
            jax.tree.map(np.testing.assert_array_equal, each, found[0][kind])


def test_metric_names_are_distinct():
    kinds = (*features.FEATURES, "inception", "spatial")
    names = [metrics.metric_name("fd", kind, 10) for kind in kinds]
    assert len(set(names)) == len(names)
    assert [n for n in names if "fid" in n] == ["fid@10", "sfid@10"]
