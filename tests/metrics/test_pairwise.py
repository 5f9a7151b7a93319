"""Tests KID and neighbour metrics against closed forms, SciPy's k-d tree and other programs."""

import tracemalloc

import numpy as np
import pytest
from scipy.spatial import cKDTree

from diffusion.metrics import pairwise
from diffusion.metrics.pairwise import (
    gaussian_mmd,
    kid,
    median_distance,
    polynomial_mmd,
    precision_recall,
    squared_radii,
)
from tests.oracle import official


def normal(n, d, seed=0, mean=0.0):
    return (np.random.RandomState(seed).randn(n, d) + mean).astype(np.float32)


def density_coverage(generated, reference, k=5):
    """Returns the two scores, means over all balls."""
    density, covered = pairwise.density_coverage(generated, reference, k)
    return density.mean(), covered.mean()


def mmd_of_two(x, y):
    """Returns the MMD of a kernel of width 2."""
    return gaussian_mmd(x, y, 2.0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two or three rows, the last one shorter."""
    monkeypatch.setattr(pairwise, "MAX_PAIRS_PER_BLOCK", 100)


@official("metrics", "kid.*")
def test_kid_of_a_small_set_equals_torch_fidelity(official):
    """Its subset size was that of the sets, 250; the same kernel and estimator, in float64."""
    x, y = official["fid.a"][:250], official["fid.b"]
    official.close("kid.a250_b250.full", polynomial_mmd(x, y), rtol=1e-12)
    official.close("kid.a250_b250.full", kid(x, y)[0], rtol=1e-12)


def test_kid_takes_the_subsets_of_torch_fidelity():
    """Its documented protocol: drawn by turns, without replacement, by RandomState(2020)."""
    x, y = normal(90, 3).astype(np.float64), normal(70, 3, 1, 0.4).astype(np.float64)
    rng = np.random.RandomState(2020)
    off_diagonal, values = ~np.eye(50, dtype=bool), []
    for _ in range(7):
        a, b = (z[rng.choice(len(z), 50, replace=False)] for z in (x, y))
        aa, bb, ab = ((u @ v.T / 3 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        values.append(aa[off_diagonal].mean() + bb[off_diagonal].mean() - 2 * ab.mean())
    value, *_ = kid(x, y, subsets=7, subset_size=50)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-10)


def test_mmd_is_unbiased():
    """N(0, 1) and N(1, 1), kernel (x y + 1)^3: E k(x, x') = 4, E k(y, y') = 32, E k(x, y) = 7.

    By the moments 1, 2, 4 of N(1, 1): 1 + 3 (1 1) + 3 (2 2) + 4 4, and across the sets
    1 + 3 (0 1) + 3 (1 2) + 0 4.
    """
    draws = [polynomial_mmd(normal(12, 1, i), normal(9, 1, 1000 + i, 1.0)) for i in range(2000)]
    # Five standard errors are 0.8; the pairs k(x, x) would add 24.
    assert abs(np.mean(draws) - (4 + 32 - 2 * 7)) < 5 * np.std(draws) / np.sqrt(len(draws))


@pytest.mark.parametrize("subset_size", [40, 1000])
def test_kid_has_the_expectation_of_the_mmd_and_true_errors(subset_size):
    """The errors are the deviations over fresh sets."""
    runs = [
        (*kid(x, y, subsets=60, subset_size=subset_size), polynomial_mmd(x, y))
        for x, y in ((normal(150, 4, i), normal(130, 4, 500 + i, 0.3)) for i in range(60))
    ]
    mean, error, full_error, full = np.array(runs).T
    assert abs((mean - full).mean()) < 5 * np.std(mean - full) / np.sqrt(60)
    # Deviations of 60 values are accurate to a tenth; the jackknife overestimates for the larger
    # set. The deviation over the square root of the number of subsets would be a third of it.
    assert 0.7 < np.sqrt((error**2).mean()) / mean.std() < 1.6
    assert 0.7 < np.sqrt((full_error**2).mean()) / full.std() < 1.6
    assert np.all(error > full_error)


def test_kid_of_small_sets_has_an_error():
    """All subsets of two whole sets are equal; their deviation would be 0."""
    x, y = normal(12, 3), normal(9, 3, 1)
    for b in (y, normal(12, 3, 1)):
        value, error, _ = kid(x, b)
        assert np.isfinite(value) and error > 0
    assert kid(x, y) == kid(x, y)


def test_blocks_change_no_kernel_sum(monkeypatch):
    x, y = normal(40, 3), normal(31, 3, 1)
    unblocked = polynomial_mmd(x, y), *gaussian_mmd(x, y, 2.0)
    monkeypatch.setattr(pairwise, "MAX_PAIRS_PER_BLOCK", 100)
    blocked = polynomial_mmd(x, y), *gaussian_mmd(x, y, 2.0)
    np.testing.assert_allclose(blocked, unblocked, rtol=1e-12)


def test_mmds_are_the_formulas_of_others():
    """In plain NumPy: dgm-eval's polynomial one of as many features, CMMD's kernel, unbiased."""
    x, y = (normal(n, 7, i, 0.3 * i).astype(np.float64) for i, n in enumerate((45, 45)))
    off = ~np.eye(45, dtype=bool)
    xx, yy, xy = ((a @ b.T / 7 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    expected = (xx[off].sum() + yy[off].sum()) / (45 * 44) - 2 * xy.sum() / 45**2
    np.testing.assert_allclose(polynomial_mmd(x, y), expected, rtol=1e-10)
    for m, n, sigma in ((45, 45, 10), (45, 31, 0.8)):
        xx, yy, xy = (
            np.exp(-np.square(a[:, None] - b).sum(-1) / (2 * sigma**2))
            for a, b in ((x[:m], x[:m]), (y[:n], y[:n]), (x[:m], y[:n]))
        )
        within = xx[off[:m, :m]].mean() + yy[off[:n, :n]].mean()
        value, _ = gaussian_mmd(x[:m] + 100, y[:n] + 100, sigma)
        np.testing.assert_allclose(value, within - 2 * xy.mean(), rtol=1e-9)


@pytest.mark.parametrize("mean, scale", [(0, 1), (0.6, 1), (0.5, 1.5)])
def test_gaussian_mmd_is_unbiased_and_its_errors_are_true(mean, scale):
    """N(0, I) and N(mean, scale^2 I) in 3 dimensions, whose kernels have known expectations.

    E exp(-|a - b|^2 / (2 s^2)) = (s^2 / (s^2 + v))^(d/2) exp(-|delta|^2 / (2 (s^2 + v))), with v
    the sum of both variances.
    """
    d, sigma, runs = 3, 1.7, 600

    def expected(v, delta):
        return (sigma**2 / (sigma**2 + v)) ** (d / 2) * np.exp(-d * delta**2 / (2 * (sigma**2 + v)))

    truth = expected(2, 0) + expected(2 * scale**2, 0) - 2 * expected(1 + scale**2, mean)
    draws = [
        gaussian_mmd(normal(25, d, i), scale * normal(20, d, 9000 + i) + mean, sigma)
        for i in range(runs)
    ]
    value, error = np.array(draws).T
    # The pairs of a feature with itself would add 0.05.
    assert abs(value.mean() - truth) < 4 * value.std() / np.sqrt(runs) < 0.02
    # Sets of one distribution have degenerate sums, of which the jackknife doubles the variance.
    low, high = (1.2, 1.6) if truth == 0 else (0.9, 1.25)
    assert low < np.sqrt((error**2).mean()) / value.std() < high


def test_gaussian_mmd_of_itself_is_below_zero():
    """Copies are nearer to each other than draws; the biased estimate would be 0."""
    x = normal(30, 4)
    value, error = gaussian_mmd(x, x, 2.0)
    assert value < 0 < error


def test_bandwidth_is_the_median_distance():
    x = normal(60, 3, mean=1e3)
    distances = [np.linalg.norm(x[i] - x[j]) for i in range(60) for j in range(i)]
    np.testing.assert_allclose(median_distance(x), np.median(distances), rtol=1e-6)
    # Of draws of N(0, I) in many dimensions all distances are near sqrt(2 d).
    np.testing.assert_allclose(median_distance(normal(4000, 50)), 10, rtol=0.02)
    # Of a sorted set they are of all its parts, not of the first thousand.
    sorted_set = np.repeat([[0.0], [1.0], [5.0]], 700, 0)
    assert median_distance(sorted_set) == pytest.approx(1)
    for equal in (np.ones((5, 2)), np.full((40, 3), 1e4), np.repeat([[0.0], [1.0]], [90, 10], 0)):
        with pytest.raises(ValueError, match="mmd: expected reference features that differ"):
            median_distance(equal)


SETS = {
    "draws": (normal(70, 5), normal(50, 5, 1, 0.5)),
    "far from 0": (normal(70, 5, mean=1e3), normal(50, 5, 1, 1000.5)),
    "two far groups": (
        np.concatenate([normal(35, 5), normal(35, 5, 2, 1e3)]),
        np.concatenate([normal(25, 5, 1), normal(25, 5, 3, 1e3)]),
    ),
    "many features": (normal(40, 500), normal(30, 500, 1)),
    "one feature": (normal(40, 1), normal(30, 1, 1)),
}
COPIES = {
    "draws": normal(40, 5),
    "copies": np.repeat(normal(12, 5), 7, 0),
    "levels": np.round(2 * normal(60, 2)),
    "one image": np.ones((9, 3), np.float32),
    "far copies": np.repeat(normal(12, 300, mean=1e4), 3, 0),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", SETS)
def test_scores_equal_those_of_a_tree(name, k, small_blocks):
    """SciPy finds the neighbours in float64."""
    a, b = (x.astype(np.float64) for x in SETS[name])

    def radii(x):
        return cKDTree(x).query(x, [k + 1])[0][:, 0]  # each feature is its own first neighbour

    def inside(x, centres):
        limits = radii(centres) * (1 + 1e-12)
        return np.linalg.norm(x[:, None] - centres, axis=-1) <= limits

    np.testing.assert_allclose(squared_radii(SETS[name][0], k), radii(a) ** 2, rtol=1e-12)
    precision, recall = precision_recall(*SETS[name], k)
    assert precision == inside(a, b).any(1).mean()
    assert recall == inside(b, a).any(1).mean()
    density, coverage = density_coverage(*SETS[name], k)
    np.testing.assert_allclose(density, inside(a, b).sum() / (k * len(a)), rtol=1e-12)
    assert coverage == inside(a, b).any(0).mean()


@official("metrics", "prc.precision", "prc.recall")
def test_precision_recall_equals_torch_fidelity(official):
    """Which computes in float32."""
    precision, recall = precision_recall(official["prc.gen"], official["prc.real"])
    official.close("prc.precision", precision, rtol=1e-6)
    official.close("prc.recall", recall, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("name", COPIES)
def test_set_against_itself_scores_one(name, k, small_blocks):
    """Exactly, with copies and ties, in any order of its rows."""
    x = COPIES[name]
    shuffled = x[np.random.RandomState(4).permutation(len(x))]
    for other in (x, shuffled):
        assert precision_recall(x, other, k) == (1, 1)
        assert density_coverage(x, other, k) == (1, 1)


def test_balls_on_a_line():
    """Balls about 0, 1, 3, 7 have the radii 1, 1, 2, 4."""
    reference = np.array([[0], [1], [3], [7.0]])
    np.testing.assert_array_equal(squared_radii(reference, 1), [1, 1, 4, 16])
    generated = np.array([[0.5], [0.75], [12], [20.0]])
    # 0.5 and 0.75 are in the balls of 0 and 1, the others in none. Of the reference, 1 is on the
    # surface of 0.75's ball and 7 in that of 12.
    assert precision_recall(generated, reference, 1) == (0.5, 0.5)
    # Surfaces that hold no other reference feature than the k-th do not count.
    assert density_coverage(generated, reference, 1) == (4 / 4, 0.5)
    # -1 is on the surface of 0's ball, 2 on that of 1's, 5 of 3's, 11 of 7's.
    on_surfaces = np.array([[-1], [2], [5], [11.0]])
    assert precision_recall(on_surfaces, reference, 1)[0] == 1
    # Inside: 2 of 3's ball, 5 of 7's.
    assert density_coverage(on_surfaces, reference, 1) == (2 / 4, 1)


def test_density_exceeds_one_where_features_crowd():
    """All generated features are where all balls overlap."""
    reference = np.array([[-1], [1], [-1.5], [1.5], [-2], [2.0]])
    crowd = np.zeros((10, 1)) + 1e-3 * np.arange(10)[:, None]
    density, coverage = density_coverage(crowd, reference, 5)
    assert density == 6 / 5 and coverage == 1


def test_memory_is_bounded(monkeypatch):
    """By the block: fewer bytes than pairs."""
    monkeypatch.setattr(pairwise, "MAX_PAIRS_PER_BLOCK", 2**14)
    x, y = normal(2000, 4), normal(1900, 4, 1)
    tracemalloc.start()
    for run in (polynomial_mmd, mmd_of_two, precision_recall, density_coverage):
        run(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 1900


def test_far_sets_score_zero():
    near, far = normal(60, 8), normal(60, 8, 1, 50)
    assert precision_recall(far, near) == (0, 0)
    assert density_coverage(far, near) == (0, 0)


@pytest.mark.parametrize("d", [1, 64, 2048])
def test_bounds_hold_the_exact_distances(d):
    """Otherwise a comparison that they decide could be wrong."""
    copies = np.repeat(normal(20, d), 3, 0)
    for x in (normal(60, d, mean=1e3), np.abs(normal(60, d)) ** 3, copies):
        truth = np.square(x[:, None].astype(np.float64) - x).sum(-1)
        for rows, low, high in pairwise._bounds(x, x):
            assert np.all(low <= truth[rows]) and np.all(truth[rows] <= high)
            # And they are tight.
            assert np.median((high - low) / truth[rows].mean()) < 1e-3


@pytest.mark.parametrize(
    "run, min_rows, name",
    [
        (polynomial_mmd, 2, "kid"),
        (kid, 4, "kid"),
        (mmd_of_two, 3, "mmd"),
        (precision_recall, 4, "precision and recall"),
        (density_coverage, 6, "density and coverage"),
    ],
)
def test_too_few_or_other_features_raise(run, min_rows, name):
    x = normal(min_rows, 3)
    assert np.all(np.isfinite(run(x, x)))
    for few in (x[:-1], x[:0]):
        with pytest.raises(ValueError, match=f"{name}: expected {min_rows} or more") as error:
            run(x, few)
        assert f"found {min_rows} and {len(few)}" in str(error.value)
    with pytest.raises(ValueError, match=rf"{name}: expected two \[n, d\] of one d"):
        run(x, normal(min_rows, 2))
