"""Tests what a FeatureSet keeps, how it is saved and continued, and which inputs it refuses."""

import numpy as np
import pytest

from diffusion.metrics.feature_set import (
    add,
    begin,
    from_arrays,
    from_stats,
    kept_indices,
    to_arrays,
    warnings_for,
)
from tests.metrics.feature_sets import collect_split, draw_features, logits_of

X = draw_features(400, 0).astype(np.float32)


def test_kept_rows_do_not_depend_on_batches():
    indices = kept_indices(400, 30)
    assert len(set(indices)) == 30 and np.all(np.diff(indices) > 0)
    for edges in [(), (1, 2, 399), (130, 260)]:
        np.testing.assert_array_equal(collect_split(X, *edges, keep=30).features, X[indices])
    np.testing.assert_array_equal(collect_split(X).features, X)
    assert collect_split(X, keep=0).features.shape == (0, 6)
    assert collect_split(X, keep=30).stats.n == 400


def test_kept_rows_are_spread():
    """Over a set sorted by class, and over one whose classes come in turn."""
    indices = kept_indices(50_000, 10_000)
    for part in (indices // 5000, indices % 10):
        counts = np.bincount(part)  # 1000 each, with a deviation of 27
        assert len(counts) == 10 and np.abs(counts - 1000).max() < 5 * 27


@pytest.mark.parametrize("prefix", ["", "random/"])
@pytest.mark.parametrize("stop", [0, 57, 200])
def test_saved_set_continues(tmp_path, stop, prefix):
    x = X[:200]
    part = begin(200, 6, keep=50, classes=5)
    for rows in np.split(x[:stop], 3) if stop % 3 == 0 else [x[:stop]]:
        part = add(part, rows, logits_of(rows))
    np.savez(tmp_path / "set.npz", **to_arrays(part, prefix), other=np.zeros(3))
    with np.load(tmp_path / "set.npz") as file:
        found = add(from_arrays(dict(file), prefix), x[stop:], logits_of(x[stop:]))
    expected = to_arrays(collect_split(x, keep=50))
    for name, value in to_arrays(found).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-10, atol=1e-10)
        assert value.dtype == expected[name].dtype


def test_set_without_classes_saves_none():
    stats = collect_split(X[:200])
    classes = {"classes.n", "classes.p", "classes.plogp", "classes.unsure"}
    assert to_arrays(from_stats(stats.stats)).keys() == to_arrays(stats).keys() - classes


def test_from_arrays_refuses_other_arrays():
    arrays = to_arrays(collect_split(X[:200]))
    with pytest.raises(ValueError, match=r"expected \['features', 'n', 'stats.n'.* found \['mu'\]"):
        from_arrays({"mu": np.zeros(2)})
    with pytest.raises(ValueError, match=r"found \[200, 6\], sum \[6\], outer \[2, 2\]"):
        from_arrays(arrays | {"stats.outer": np.eye(2)})


def test_images_and_logits_are_counted():
    x, z = X[:8], logits_of(X[:8])
    with pytest.raises(ValueError, match="expected 7 images, found 8 or more"):
        add(add(begin(7, 6, 9, 5), x[:4], z[:4]), x[4:], z[4:])
    with pytest.raises(ValueError, match="found n = 0"):
        begin(0, 6, 9)
    with pytest.raises(ValueError, match="keep = -1"):
        begin(9, 6, -1)
    with pytest.raises(ValueError, match="logits of 8 images, found none"):
        add(begin(9, 6, 9, 5), x)
    with pytest.raises(ValueError, match="logits of 8 images, found 7"):
        add(begin(9, 6, 9, 5), x, z[:7])
    with pytest.raises(ValueError, match="logits of none images, found 8"):
        add(begin(9, 6, 9), x, z)


def test_nan_images_are_named():
    x = X[:20].copy()
    x[[13, 15], 0] = np.nan
    with pytest.raises(ValueError, match="2 of 10 rows with NaN or infinities, the first is 13"):
        collect_split(x, 10)
    logits = logits_of(X[:9])
    logits[7] = np.inf
    with pytest.raises(ValueError, match=r"logits: .* the first is 7"):
        add(begin(9, 6, 9, 5), X[:9], logits)


def test_too_few_images_are_warned_of():
    assert warnings_for(collect_split(X[:200])) == []
    few = collect_split(X[:6])
    assert warnings_for(few) == [
        "6 images for 6 features: the covariance is singular, and the Frechet distance biased"
        " upwards",
        "6 images for 5 classes: the Inception Score is biased downwards",
    ]
    assert warnings_for(few._replace(classes=None)) == warnings_for(few)[:1]
