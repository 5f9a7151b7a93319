"""Running statistics against numpy's, the Frechet distance against closed forms and other code."""

import numpy as np
import pytest

from diffusion.metrics import frechet
from diffusion.metrics.frechet import (
    Stats,
    extrapolated,
    finalize,
    frechet_distance,
    init,
    intercept,
    merge,
    moments_from,
    root,
    update,
)
from tests.oracle import official

RANDOM = np.random.RandomState(0)
X = 3 + RANDOM.randn(200, 7) @ RANDOM.randn(7, 7)


def stats_of(x):
    return update(init(x.shape[1]), x)


def moments_of(x):
    return finalize(stats_of(x))


def in_batches(x, *sizes):
    stats, edges = init(x.shape[1]), np.cumsum([0, *sizes])
    for low, high in zip(edges, [*edges[1:], len(x)], strict=True):
        stats = update(stats, x[low:high])
    return stats


def close(stats, others, rtol=1e-12):
    assert stats.n == others.n
    for one, other in zip(stats[1:], others[1:], strict=True):
        # Off the diagonal entries cancel: relative to the largest, as a matrix norm is.
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


def test_moments_are_numpy_s():
    mean, cov = moments_of(X)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(X, rowvar=False), rtol=0, atol=1e-13 * cov.max())
    assert mean.dtype == cov.dtype == np.float64


@pytest.mark.parametrize("sizes", [(1,) * 199, (3, 50, 0, 100), (199,)], ids=["ones", "some", "1"])
def test_batches_order_and_merging_change_nothing(sizes):
    whole = stats_of(X)
    close(in_batches(X, *sizes), whole)
    close(in_batches(X[np.random.RandomState(1).permutation(200)], *sizes), whole)
    close(merge(in_batches(X[:120], 7, 70), stats_of(X[120:])), whole)
    close(merge(stats_of(X[120:]), stats_of(X[:120])), whole)
    close(merge(init(7), whole), whole, 0)
    close(merge(whole, init(7)), whole, 0)


def test_a_large_mean_costs_no_digits():
    """Integers, far from 0: their covariance is that of the same ones near 0."""
    small = RANDOM.randint(-8, 9, (300, 3)).astype(np.float64)
    far = in_batches(small + 2.0**27, 1, 17, 100)
    assert np.all(far.sum == small.sum(0) + 300 * 2.0**27)
    # A batch's mean is rounded at 2^-26; the sum of x x^T would be off by 2^54 / 2^53 in 20.
    np.testing.assert_allclose(far.outer, stats_of(small).outer, rtol=0, atol=1e-5)


def test_float32_features_are_summed_in_float64():
    x = X.astype(np.float32)
    close(in_batches(x, 50, 90), stats_of(x.astype(np.float64)))


def test_size_does_not_depend_on_the_count():
    few, many = stats_of(X[:2]), in_batches(X, 100)
    assert [np.shape(a) for a in few] == [np.shape(a) for a in many] == [(), (7,), (7, 7)]


def test_update_leaves_what_it_was_given():
    stats, x = stats_of(X[:50]), X.copy()
    before = [np.copy(a) for a in stats]
    update(stats, x)
    assert all(np.array_equal(a, b) for a, b in zip(stats, before, strict=True))
    assert np.array_equal(x, X)


def test_published_statistics_come_in_and_go_out(tmp_path):
    mean, cov = moments_of(X)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=cov)
    with np.load(tmp_path / "stats.npz") as file:
        stats = moments_from(file["mu"], file["sigma"], 200)
    close(stats, stats_of(X))
    assert frechet_distance(finalize(stats), (mean, cov)) < 1e-12 * np.trace(cov)
    # In float32, as some are published, the statistics still serve.
    rounded = moments_from(mean.astype(np.float32), cov.astype(np.float32), 200)
    close(rounded, stats_of(X), 1e-6)


@pytest.mark.parametrize(
    "mu, sigma, n, said",
    [
        (np.zeros(3), np.eye(2), 9, r"mu \[d\] and sigma \[d, d\], found \[3\] and \[2, 2\]"),
        (np.zeros((2, 2)), np.eye(2), 9, "expected mu"),
        (np.zeros(2), np.array([[1, np.nan], [0, 1]]), 9, "expected finite"),
        (np.zeros(2), np.eye(2), 1, "found n = 1"),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), 9, "no covariance"),
        (np.zeros(2), -np.eye(2), 9, "no covariance"),
    ],
)
def test_what_are_no_statistics(mu, sigma, n, said):
    with pytest.raises(ValueError, match=said) as error:
        moments_from(mu, sigma, n)
    assert "\n" not in str(error.value)


def test_bad_features_are_named():
    x = X.copy()
    x[17, 3], x[30] = np.nan, np.inf
    stats = stats_of(X[:100])
    with pytest.raises(ValueError, match="2 of 200 rows with NaN or infinities, the first is 117"):
        update(stats, x)
    with pytest.raises(ValueError, match=r"expected \[b, 7\], found \[200, 6\]"):
        update(stats, X[:, :6])
    with pytest.raises(ValueError, match="found 7, 6"):
        merge(stats, init(6))
    for few in (init(7), stats_of(X[:1])):
        with pytest.raises(ValueError, match=f"two or more images, found {few.n}"):
            finalize(few)




def covariance(d, seed, rank=None):
    half = np.random.RandomState(seed).randn(d, rank or d)
    return half @ half.T


def test_frechet_of_commuting_gaussians():
    """In a common basis of axes it is that of each axis: (mu - mu')^2 + (sigma - sigma')^2."""
    turn, _ = np.linalg.qr(np.random.RandomState(3).randn(5, 5))
    mu_a, mu_b = np.array([[0, 1, 2, 3, 4.0], [1, 1, 0, 5, -2.0]])
    s_a, s_b = np.array([[1, 2, 0, 0.5, 3.0], [2, 2, 1, 0, 1e-3]])
    a = turn @ mu_a, turn * s_a**2 @ turn.T
    b = turn @ mu_b, turn * s_b**2 @ turn.T
    truth = ((mu_a - mu_b) ** 2).sum() + ((s_a - s_b) ** 2).sum()
    # A zero variance is known to 1e-16, its root so to 1e-8, and it meets others of order 1.
    np.testing.assert_allclose(frechet_distance(a, b), truth, rtol=1e-7)


def test_frechet_in_the_plane():
    """Two eigenvalues: tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2), commuting or not."""
    a, b = covariance(2, 0), covariance(2, 1)
    assert np.abs(a @ b - b @ a).max() > 0.1
    common = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    np.testing.assert_allclose(
        frechet_distance((zero, a), (zero, b)), np.trace(a) + np.trace(b) - 2 * common, rtol=1e-12
    )


def test_frechet_of_lines():
    """Covariances of rank one, A = a a^T and B = b b^T: tr (A B)^(1/2) = |a.b|."""
    a, b = np.random.RandomState(0).randn(2, 40)
    found = frechet_distance((a, np.outer(a, a)), (b, np.outer(b, b)))
    truth = ((a - b) ** 2).sum() + a @ a + b @ b - 2 * abs(a @ b)
    # 39 eigenvalues of 0, known to 1e-16 of the largest: their roots are 1e-8 each.
    np.testing.assert_allclose(found, truth, rtol=1e-6)


@pytest.mark.parametrize("rank", [30, 5])
def test_frechet_is_a_distance(rank):
    a = np.zeros(30), covariance(30, 0, rank)
    b = np.ones(30), covariance(30, 1, rank)
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-9)
    for i in range(10):  # rounding has either sign
        x = np.ones(30), covariance(30, i, rank)
        assert 0 <= frechet_distance(x, x) < 1e-12 * np.trace(x[1])
    # Four times the covariance and twice the mean: four times the distance.
    twice = [(2 * mean, 4 * cov) for mean, cov in (a, b)]
    np.testing.assert_allclose(frechet_distance(*twice), 4 * frechet_distance(a, b), rtol=1e-9)


@official("inception_math", "fid", "fid_rankdef", "fid_f32in")
def test_official_frechet(official):
    """tfgan's functions, which the official code calls, run by TensorFlow 1."""
    real, gen = official["act_real"], official["act_gen"]
    official.close("fid", frechet_distance(moments_of(gen), moments_of(real)), rtol=1e-12)
    few = frechet_distance(moments_of(gen[:40]), moments_of(real[:50]))  # in 64 dimensions
    official.close("fid_rankdef", few, rtol=1e-8)  # theirs squares before it takes a root
    rounded = frechet_distance(*(moments_of(x.astype(np.float32)) for x in (gen, real)))
    official.close("fid_f32in", rounded, rtol=1e-7)  # their result is float32


@official("metrics", "fid.torch_fidelity", "fid.clean_fid", "fid.pytorch_fid")
def test_frechet_of_other_programs(official):
    """torch-fidelity 0.4.0, clean-fid 0.1.35, pytorch-fid 0.3.0."""
    ours = frechet_distance(moments_of(official["fid.a"]), moments_of(official["fid.b"]))
    for name in ("torch_fidelity", "clean_fid", "pytorch_fid"):
        official.close(f"fid.{name}", ours, rtol=1e-12)


def test_frechet_needs_one_kind_of_features():
    with pytest.raises(ValueError, match="the same number in both sets, found 2, 3"):
        frechet_distance((np.zeros(2), np.eye(2)), (np.zeros(3), np.eye(3)))


def test_root():
    for rank in (6, 2):  # regular, singular
        cov = covariance(6, 5, rank)
        np.testing.assert_allclose(root(cov) @ root(cov).T, cov, atol=1e-13)




def test_intercept_is_numpy_s():
    x, noise = np.linspace(1, 3, 9), np.random.RandomState(2).randn(9)
    (_, value), cov = np.polyfit(x, 2 - 3 * x + noise, 1, cov=True)
    np.testing.assert_allclose(intercept(x, 2 - 3 * x + noise), (value, cov[1, 1] ** 0.5))
    np.testing.assert_allclose(intercept(x, 2 - 3 * x), (2, 0), atol=1e-13)


def test_extrapolation_removes_the_bias():
    """Draws of the reference's own law: the distance for infinitely many is 0."""
    d, n = 10, 1000
    reference = np.zeros(d), np.eye(d)
    sets = [np.random.RandomState(i).randn(n, d) for i in range(20)]
    # E |mean|^2 = d / n; E tr (S - I)^2 / 4 = d (d + 1) / 4 n, to first order in 1 / n.
    bias = (d + d * (d + 1) / 4) / n
    plain = [frechet_distance(moments_of(x), reference) for x in sets]
    np.testing.assert_allclose(np.mean(plain), bias, rtol=0.1)  # its deviation is a fifth of it
    values, errors = np.transpose([extrapolated(x, reference) for x in sets])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(20) < 0.5 * bias
    # The fit's error is of the right order, if too small.
    assert 0.2 < errors.mean() / values.std() < 1


def test_extrapolation_is_exact_where_the_bias_is(monkeypatch):
    """If the distance is exactly 3 + 5 / N, so is the limit."""
    counts = []

    def biased(part, b, root_b):
        counts.append(len(part))
        return 3 + 5 / len(part)

    monkeypatch.setattr(frechet, "_distance_of_part", biased)
    value, error = extrapolated(np.zeros((50000, 2)), (np.zeros(2), np.eye(2)))
    np.testing.assert_allclose((value, error), (3, 0), atol=1e-12)
    # The paper's: 15 counts from 5000 to 50,000.
    np.testing.assert_array_equal(counts, np.linspace(5000, 50000, 15).round())


def test_extrapolation_needs_some_features():
    reference = np.zeros(2), np.eye(2)
    for m in (0, 1, 2, 3):
        with pytest.raises(ValueError, match=f"kept rows of features, found {m}"):
            extrapolated(np.zeros((m, 2)), reference)
    assert np.isfinite(extrapolated(np.random.RandomState(0).randn(6, 2), reference)).all()


def test_stats_are_plain_arrays(tmp_path):
    np.savez(tmp_path / "stats.npz", **stats_of(X)._asdict())
    with np.load(tmp_path / "stats.npz") as file:
        close(Stats(*(file[name] for name in Stats._fields)), stats_of(X), 0)


def test_the_jackknife_tells_what_fresh_sets_scatter_by():
    """Its mean over 40 sets of 200 is the deviation of their distances, to a fifth."""
    draw = np.random.RandomState(0)
    reference = np.array([1.0, 0, 0]), np.diag([1.0, 2.0, 0.5])
    sets = [draw.standard_normal((200, 3)) for _ in range(40)]
    distances = [frechet_distance(moments_of(x), reference) for x in sets]
    errors = [frechet.jackknife(x, reference, 10) for x in sets]
    np.testing.assert_allclose(np.mean(errors), np.std(distances, ddof=1), rtol=0.2)


@pytest.mark.parametrize("m", [5, 200])
def test_the_quick_distance_is_the_distance(m):
    """Of fewer and of more features than dimensions, to the 1e-8 of a square root of a product."""
    reference = moments_of(X[::2] + 0.3)
    quick = frechet._distance_of_part(X[:m], reference, root(reference[1]))
    np.testing.assert_allclose(quick, frechet_distance(moments_of(X[:m]), reference), rtol=1e-6)
