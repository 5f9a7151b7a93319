"""Tests running moments against NumPy, the Frechet distance against closed forms and programs."""

import numpy as np
import pytest

from diffusion.metrics import frechet
from diffusion.metrics.frechet import (
    Moments,
    covariance_factor,
    empty_moments,
    finalize,
    frechet_distance,
    frechet_distance_infinity,
    jackknife_stderr,
    merge,
    moments_from,
    update,
)
from tests.oracle import official

RNG = np.random.RandomState(0)
X = 3 + RNG.randn(200, 7) @ RNG.randn(7, 7)


def running_moments(x, *sizes):
    """Moments of x in batches of the given sizes, the rest in one."""
    moments = empty_moments(x.shape[1])
    for batch in np.split(x, np.cumsum(sizes, dtype=int)):
        moments = update(moments, batch)
    return moments


def mean_cov_of(x):
    return finalize(running_moments(x))


def assert_close(moments, expected, rtol=1e-12):
    assert moments.n == expected.n
    for x, y in zip(moments[1:], expected[1:], strict=True):
        # Off the diagonal entries cancel: relative to the largest, as a matrix norm is.
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.abs(y).max())


def test_finalize_equals_numpy():
    mean, cov = mean_cov_of(X)
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-13)
    np.testing.assert_allclose(cov, np.cov(X, rowvar=False), rtol=0, atol=1e-13 * cov.max())
    assert mean.dtype == cov.dtype == np.float64


@pytest.mark.parametrize("sizes", [(1,) * 199, (3, 50, 0, 100), (199,)], ids=["ones", "some", "1"])
def test_batches_order_and_merging_change_nothing(sizes):
    expected = running_moments(X)
    assert_close(running_moments(X, *sizes), expected)
    shuffled = X[np.random.RandomState(1).permutation(200)]
    assert_close(running_moments(shuffled, *sizes), expected)
    assert_close(merge(running_moments(X[:120], 7, 70), running_moments(X[120:])), expected)
    assert_close(merge(running_moments(X[120:]), running_moments(X[:120])), expected)
    assert_close(merge(empty_moments(7), expected), expected, 0)
    assert_close(merge(expected, empty_moments(7)), expected, 0)


def test_large_mean_costs_no_digits():
    """Integers far from 0 have the covariance of the same integers near 0."""
    small = RNG.randint(-8, 9, (300, 3)).astype(np.float64)
    far = running_moments(small + 2.0**27, 1, 17, 100)
    assert np.all(far.sum == small.sum(0) + 300 * 2.0**27)
    # A batch's mean is rounded at 2^-26; the sum of x x^T would be off by 2^54 / 2^53 in 20.
    np.testing.assert_allclose(far.outer, running_moments(small).outer, rtol=0, atol=1e-5)


def test_float32_features_are_summed_in_float64():
    x = X.astype(np.float32)
    assert_close(running_moments(x, 50, 90), running_moments(x.astype(np.float64)))


def test_size_does_not_depend_on_the_count():
    few, many = running_moments(X[:2]), running_moments(X, 100)
    assert [np.shape(a) for a in few] == [np.shape(a) for a in many] == [(), (7,), (7, 7)]


def test_update_does_not_change_its_arguments():
    moments, x = running_moments(X[:50]), X.copy()
    before = [np.copy(a) for a in moments]
    update(moments, x)
    assert all(np.array_equal(a, b) for a, b in zip(moments, before, strict=True))
    assert np.array_equal(x, X)


def test_published_statistics_round_trip(tmp_path):
    mean, cov = mean_cov_of(X)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=cov)
    with np.load(tmp_path / "stats.npz") as file:
        moments = moments_from(file["mu"], file["sigma"], 200)
    assert_close(moments, running_moments(X))
    assert frechet_distance(finalize(moments), (mean, cov)) < 1e-12 * np.trace(cov)
    # Some statistics are published in float32.
    rounded = moments_from(mean.astype(np.float32), cov.astype(np.float32), 200)
    assert_close(rounded, running_moments(X), 1e-6)


@pytest.mark.parametrize(
    "mu, sigma, n, message",
    [
        (np.zeros(3), np.eye(2), 9, r"mu \[d\] and sigma \[d, d\], found \[3\] and \[2, 2\]"),
        (np.zeros((2, 2)), np.eye(2), 9, "expected mu"),
        (np.zeros(2), np.array([[1, np.nan], [0, 1]]), 9, "expected finite"),
        (np.zeros(2), np.eye(2), 1, "found n = 1"),
        (np.zeros(2), np.array([[1, 0.5], [0, 1]]), 9, "no covariance"),
        (np.zeros(2), -np.eye(2), 9, "no covariance"),
    ],
)
def test_invalid_statistics_raise(mu, sigma, n, message):
    with pytest.raises(ValueError, match=message) as error:
        moments_from(mu, sigma, n)
    assert "\n" not in str(error.value)


def test_bad_features_are_named():
    x = X.copy()
    x[17, 3], x[30] = np.nan, np.inf
    moments = running_moments(X[:100])
    with pytest.raises(ValueError, match="2 of 200 rows with NaN or infinities, the first is 117"):
        update(moments, x)
    with pytest.raises(ValueError, match=r"expected \[b, 7\], found \[200, 6\]"):
        update(moments, X[:, :6])
    with pytest.raises(ValueError, match="found 7, 6"):
        merge(moments, empty_moments(6))
    for few in (empty_moments(7), running_moments(X[:1])):
        with pytest.raises(ValueError, match=f"two or more images, found {few.n}"):
            finalize(few)


def covariance(d, seed, rank=None):
    half = np.random.RandomState(seed).randn(d, rank or d)
    return half @ half.T


def test_distance_of_commuting_gaussians():
    """Sums (mu - mu')^2 + (sigma - sigma')^2 over common principal axes."""
    turn, _ = np.linalg.qr(np.random.RandomState(3).randn(5, 5))
    mu_a, mu_b = np.array([[0, 1, 2, 3, 4.0], [1, 1, 0, 5, -2.0]])
    s_a, s_b = np.array([[1, 2, 0, 0.5, 3.0], [2, 2, 1, 0, 1e-3]])
    a = turn @ mu_a, turn * s_a**2 @ turn.T
    b = turn @ mu_b, turn * s_b**2 @ turn.T
    truth = ((mu_a - mu_b) ** 2).sum() + ((s_a - s_b) ** 2).sum()
    # A variance of 0 is accurate to 1e-16, so its root to 1e-8, beside others of order 1.
    np.testing.assert_allclose(frechet_distance(a, b), truth, rtol=1e-7)


def test_distance_in_the_plane():
    """Two eigenvalues: tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2), commuting or not."""
    a, b = covariance(2, 0), covariance(2, 1)
    assert np.abs(a @ b - b @ a).max() > 0.1
    common = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    zero = np.zeros(2)
    np.testing.assert_allclose(
        frechet_distance((zero, a), (zero, b)), np.trace(a) + np.trace(b) - 2 * common, rtol=1e-12
    )


def test_distance_of_lines():
    """Covariances of rank one, A = a a^T and B = b b^T: tr (A B)^(1/2) = |a.b|."""
    a, b = np.random.RandomState(0).randn(2, 40)
    found = frechet_distance((a, np.outer(a, a)), (b, np.outer(b, b)))
    truth = ((a - b) ** 2).sum() + a @ a + b @ b - 2 * abs(a @ b)
    # 39 eigenvalues of 0 are accurate to 1e-16 of the largest, their roots to 1e-8.
    np.testing.assert_allclose(found, truth, rtol=1e-6)


@pytest.mark.parametrize("rank", [30, 5])
def test_distance_is_symmetric_zero_and_homogeneous(rank):
    a = np.zeros(30), covariance(30, 0, rank)
    b = np.ones(30), covariance(30, 1, rank)
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-9)
    for i in range(10):  # rounding has both signs
        x = np.ones(30), covariance(30, i, rank)
        assert 0 <= frechet_distance(x, x) < 1e-12 * np.trace(x[1])
    # Four times the covariance and twice the mean: four times the distance.
    twice = [(2 * mean, 4 * cov) for mean, cov in (a, b)]
    np.testing.assert_allclose(frechet_distance(*twice), 4 * frechet_distance(a, b), rtol=1e-9)


@official("inception_math", "fid", "fid_rankdef", "fid_f32in")
def test_distance_equals_tfgan(official):
    """The function that the official code calls, run by TensorFlow 1."""
    real, gen = official["act_real"], official["act_gen"]
    official.close("fid", frechet_distance(mean_cov_of(gen), mean_cov_of(real)), rtol=1e-12)
    few = frechet_distance(mean_cov_of(gen[:40]), mean_cov_of(real[:50]))  # in 64 dimensions
    official.close("fid_rankdef", few, rtol=1e-8)  # a matrix square root loses half the digits
    rounded = frechet_distance(*(mean_cov_of(x.astype(np.float32)) for x in (gen, real)))
    official.close("fid_f32in", rounded, rtol=1e-7)  # the official result is float32


@official("metrics", "fid.torch_fidelity", "fid.clean_fid", "fid.pytorch_fid")
def test_distance_equals_other_programs(official):
    """torch-fidelity 0.4.0, clean-fid 0.1.35, pytorch-fid 0.3.0."""
    ours = frechet_distance(mean_cov_of(official["fid.a"]), mean_cov_of(official["fid.b"]))
    for name in ("torch_fidelity", "clean_fid", "pytorch_fid"):
        official.close(f"fid.{name}", ours, rtol=1e-12)


def test_different_dimensions_raise():
    with pytest.raises(ValueError, match="the same number in both sets, found 2, 3"):
        frechet_distance((np.zeros(2), np.eye(2)), (np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("rank", [6, 2], ids=["regular", "singular"])
def test_covariance_factor(rank):
    cov = covariance(6, 5, rank)
    factor = covariance_factor(cov)
    np.testing.assert_allclose(factor @ factor.T, cov, atol=1e-13)


def test_extrapolation_removes_the_bias():
    """Infinitely many draws of the reference's own distribution are at distance 0."""
    d, n = 10, 1000
    reference = np.zeros(d), np.eye(d)
    sets = [np.random.RandomState(i).randn(n, d) for i in range(20)]
    # E |mean|^2 = d / n; E tr (S - I)^2 / 4 = d (d + 1) / 4 n, to first order in 1 / n.
    bias = (d + d * (d + 1) / 4) / n
    biased = [frechet_distance(mean_cov_of(x), reference) for x in sets]
    np.testing.assert_allclose(np.mean(biased), bias, rtol=0.1)  # its deviation is a fifth of it
    values, errors = np.transpose([frechet_distance_infinity(x, reference) for x in sets])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(20) < 0.5 * bias
    # The error of the fit is of the right order, if too small.
    assert 0.2 < errors.mean() / values.std() < 1


@pytest.mark.parametrize("noise", [0, 1e-5])
def test_extrapolation_is_a_least_squares_line(monkeypatch, noise):
    """Distances 3 + 5 / N give 3 exactly; with noise, the solution of the normal equations."""
    counts, distances, rng = [], [], np.random.RandomState(2)

    def fake_distance(part, b, factor_b):
        counts.append(len(part))
        distances.append(3 + 5 / len(part) + noise * rng.randn())
        return distances[-1]

    monkeypatch.setattr(frechet, "_fast_frechet_distance", fake_distance)
    value, stderr = frechet_distance_infinity(np.zeros((50000, 2)), (np.zeros(2), np.eye(2)))
    # The paper's 15 counts from 5000 to 50,000.
    np.testing.assert_array_equal(counts, np.linspace(5000, 50000, 15).round())
    if not noise:
        np.testing.assert_allclose((value, stderr), (3, 0), atol=1e-12)
    design = np.stack([np.ones(15), 1 / np.array(counts)], 1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ distances
    variance = np.square(distances - design @ coefficients).sum() / (15 - 2)
    np.testing.assert_allclose(value, coefficients[0], rtol=1e-9)
    np.testing.assert_allclose(stderr, np.sqrt(variance * inverse[0, 0]), rtol=1e-6, atol=1e-12)


def test_extrapolation_needs_six_rows():
    reference = np.zeros(2), np.eye(2)
    for m in (0, 1, 3, 5):
        with pytest.raises(ValueError, match=f"kept rows of features, found {m}"):
            frechet_distance_infinity(np.zeros((m, 2)), reference)
    six = np.random.RandomState(0).randn(6, 2)
    assert np.isfinite(frechet_distance_infinity(six, reference)).all()


def test_moments_are_plain_arrays(tmp_path):
    np.savez(tmp_path / "moments.npz", **running_moments(X)._asdict())
    with np.load(tmp_path / "moments.npz") as file:
        loaded = Moments(*(file[name] for name in Moments._fields))
    assert_close(loaded, running_moments(X), 0)


def test_jackknife_error_equals_the_deviation_of_fresh_sets():
    """Its mean over 40 sets of 200 is the deviation of their distances, to a fifth."""
    rng = np.random.RandomState(0)
    reference = np.array([1.0, 0, 0]), np.diag([1.0, 2.0, 0.5])
    sets = [rng.standard_normal((200, 3)) for _ in range(40)]
    distances = [frechet_distance(mean_cov_of(x), reference) for x in sets]
    errors = [jackknife_stderr(x, reference, 10) for x in sets]
    np.testing.assert_allclose(np.mean(errors), np.std(distances, ddof=1), rtol=0.2)


@pytest.mark.parametrize("m", [5, 200])
def test_fast_distance_equals_the_distance(m):
    """With fewer and with more rows than dimensions."""
    reference = mean_cov_of(X[::2] + 0.3)
    factor = covariance_factor(reference[1])
    fast = frechet._fast_frechet_distance(X[:m], reference, factor)
    np.testing.assert_allclose(fast, frechet_distance(mean_cov_of(X[:m]), reference), rtol=1e-6)
