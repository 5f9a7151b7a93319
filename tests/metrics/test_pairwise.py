"""Kernel distance and neighbours, against closed forms, scipy's k-d tree and other programs."""

import tracemalloc

import numpy as np
import pytest
from scipy.spatial import cKDTree

from diffusion.metrics import pairwise
from diffusion.metrics.pairwise import density_coverage, mmd, mmd_of_parts, precision_recall, radii
from tests.oracle import official


def normal(n, d, seed=0, mean=0.0):
    return (np.random.RandomState(seed).randn(n, d) + mean).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two or three rows, the last one shorter."""
    monkeypatch.setattr(pairwise, "PAIRS", 100)




@official("metrics", "kid.*")
def test_official_kid(official):
    """torch-fidelity's kernel and estimator; float64 there and here."""
    x, y = official["fid.a"][:250], official["fid.b"]
    official.close("kid.a250_b250.full", mmd(x, y), rtol=1e-12)


def test_mmd_is_unbiased():
    """N(0, 1) and N(1, 1), kernel (x y + 1)^3: E k(x, x') = 4, E k(y, y') = 32, E k(x, y) = 7.

    From the moments of N(1, 1), which are 1, 2, 4: 1 + 3 (1 1) + 3 (2 2) + 4 4 and, across,
    1 + 3 (0 1) + 3 (1 2) + 0 4.
    """
    draws = [mmd(normal(12, 1, i), normal(9, 1, 1000 + i, 1.0)) for i in range(2000)]
    # Five standard errors, which are 0.8: with x's own pairs k(x, x) it would be 24 too much.
    assert abs(np.mean(draws) - (4 + 32 - 2 * 7)) < 5 * np.std(draws) / np.sqrt(len(draws))


def test_mmd_of_parts_and_its_errors():
    """The mean is the same expectation; the errors say how much other sets would change it."""
    runs = [
        (*mmd_of_parts(x, y, parts=60, size=40), mmd(x, y))
        for x, y in ((normal(150, 4, i), normal(130, 4, 500 + i, 0.3)) for i in range(60))
    ]
    mean, error, whole_error, whole = np.array(runs).T
    assert abs((mean - whole).mean()) < 5 * np.std(mean - whole) / np.sqrt(60)
    # Deviations of 60 values are known to a tenth; the jackknife errs on the safe side for the
    # larger set. By the root of the number of parts it would be a third of that.
    assert 0.7 < np.sqrt((error**2).mean()) / mean.std() < 1.6
    assert 0.7 < np.sqrt((whole_error**2).mean()) / whole.std() < 1.6
    assert np.all(error > whole_error)


def test_mmd_of_parts_takes_halves_of_small_sets():
    """Parts of everything would all be alike, and their error 0."""
    x, y = normal(12, 3), normal(9, 3, 1)
    value, error, _ = mmd_of_parts(x, y)
    assert np.isfinite(value) and error > 0
    assert mmd_of_parts(x, y) == mmd_of_parts(x, y)


def test_blocks_change_no_kernel_sum(monkeypatch):
    x, y = normal(40, 3), normal(31, 3, 1)
    whole = mmd(x, y)
    monkeypatch.setattr(pairwise, "PAIRS", 100)
    np.testing.assert_allclose(mmd(x, y), whole, rtol=1e-12)




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
def test_neighbours_are_the_tree_s(name, k, small_blocks):
    """scipy finds the same neighbours, by another way, in float64."""
    a, b = (x.astype(np.float64) for x in SETS[name])

    def balls(x):
        return cKDTree(x).query(x, [k + 1])[0][:, 0]  # each feature is its own first neighbour

    def inside(x, centres):
        return np.array(
            [np.linalg.norm(one - centres, axis=1) <= balls(centres) * (1 + 1e-12) for one in x]
        )

    np.testing.assert_allclose(radii(SETS[name][0], k), balls(a) ** 2, rtol=1e-12)
    precision, recall = precision_recall(*SETS[name], k)
    assert precision == inside(a, b).any(1).mean()
    assert recall == inside(b, a).any(1).mean()
    density, coverage = density_coverage(*SETS[name], k)
    np.testing.assert_allclose(density, inside(a, b).sum() / (k * len(a)), rtol=1e-12)
    assert coverage == inside(a, b).any(0).mean()


@official("metrics", "prc.precision", "prc.recall")
def test_official_precision_recall(official):
    """torch-fidelity's, in float32."""
    precision, recall = precision_recall(official["prc.gen"], official["prc.real"])
    official.close("prc.precision", precision, rtol=1e-6)
    official.close("prc.recall", recall, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("name", COPIES)
def test_a_set_against_itself(name, k, small_blocks):
    """Exactly 1, with copies and ties, in any order of its rows."""
    x = COPIES[name]
    shuffled = x[np.random.RandomState(4).permutation(len(x))]
    for other in (x, shuffled):
        assert precision_recall(x, other, k) == (1, 1)
        assert density_coverage(x, other, k) == (1, 1)


def test_neighbours_on_a_line():
    """Balls about 0, 1, 3, 7 of the radii 1, 1, 2, 4, surfaces included."""
    reference = np.array([[0], [1], [3], [7.0]])
    np.testing.assert_array_equal(radii(reference, 1), [1, 1, 4, 16])
    generated = np.array([[0.5], [0.75], [12], [20.0]])
    # 0.5 and 0.75 are in the balls of 0 and 1, the others in none. Of the reference, 1 is on the
    # surface of 0.75's ball and 7 in that of 12.
    assert precision_recall(generated, reference, 1) == (0.5, 0.5)
    # Their surfaces hold no other reference feature than the k-th: they do not count.
    assert density_coverage(generated, reference, 1) == (4 / 4, 0.5)
    # -1 is on the surface of 0's ball, 2 on that of 1's, 5 of 3's, 11 of 7's.
    on_surfaces = np.array([[-1], [2], [5], [11.0]])
    assert precision_recall(on_surfaces, reference, 1)[0] == 1
    # Inside: 2 of 3's ball, 5 of 7's.
    assert density_coverage(on_surfaces, reference, 1) == (2 / 4, 1)


def test_density_counts_what_crowds():
    """All generated features at the one place that every ball holds: k balls' worth each."""
    reference = np.array([[-1], [1], [-1.5], [1.5], [-2], [2.0]])
    crowd = np.zeros((10, 1)) + 1e-3 * np.arange(10)[:, None]
    density, coverage = density_coverage(crowd, reference, 5)
    assert density == 6 / 5 and coverage == 1


def test_memory_is_bounded(monkeypatch):
    """By the block, whatever n: of n^2 pairs not even a byte each."""
    monkeypatch.setattr(pairwise, "PAIRS", 2**14)
    x, y = normal(2000, 4), normal(1900, 4, 1)
    tracemalloc.start()
    for run in (mmd, precision_recall, density_coverage):
        run(x, y)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 1900


def test_a_shift_by_the_spread_leaves_nothing():
    near, far = normal(60, 8), normal(60, 8, 1, 50)
    assert precision_recall(far, near) == (0, 0)
    assert density_coverage(far, near) == (0, 0)


@pytest.mark.parametrize("d", [1, 64, 2048])
def test_rounding_of_products_is_within_its_bounds(d):
    """What the float32 products leave open must hold the truth, or a comparison goes wrong."""
    copies = np.repeat(normal(20, d), 3, 0)
    for x in (normal(60, d, mean=1e3), np.abs(normal(60, d)) ** 3, copies):
        truth = np.square(x[:, None].astype(np.float64) - x).sum(-1)
        for rows, low, high in pairwise._bounds(x, x):
            assert np.all(low <= truth[rows]) and np.all(truth[rows] <= high)
            # And not by being loose: open are distances within 1e-4 of the scale.
            assert np.median((high - low) / truth[rows].mean()) < 1e-3


@pytest.mark.parametrize(
    "run, least, who",
    [
        (mmd, 2, "kid"),
        (mmd_of_parts, 4, "kid"),
        (precision_recall, 4, "precision and recall"),
        (density_coverage, 6, "density and coverage"),
    ],
)
def test_too_few_features_and_other_ones(run, least, who):
    x = normal(least, 3)
    assert np.all(np.isfinite(run(x, x)))
    for few in (x[:-1], x[:0]):
        with pytest.raises(ValueError, match=f"{who}: expected {least} or more") as error:
            run(x, few)
        assert f"found {least} and {len(few)}" in str(error.value)
    with pytest.raises(ValueError, match=rf"{who}: expected two \[n, d\] of one d"):
        run(x, normal(least, 2))
