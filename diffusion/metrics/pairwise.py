"""Metrics of all pairs of features, in blocks: KID, MMD, precision, recall, density, coverage."""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

MAX_PAIRS_PER_BLOCK = 2**22  # 32 MB in float64
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
MEDIAN_ROWS = 1000  # features whose distances give the bandwidth of a kernel


def _check_sets(a: np.ndarray, b: np.ndarray, min_rows: int, name: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{name}: expected two [n, d] of one d, found {a.shape} and {b.shape}")
    if min(len(a), len(b)) < min_rows:
        found = f"{len(a)} and {len(b)}"
        raise ValueError(f"{name}: expected {min_rows} or more features in each set, found {found}")


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, MAX_PAIRS_PER_BLOCK // columns)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    blocks = (x[rows] @ y.T / x.shape[1] + 1 for rows in _blocks(len(x), len(y)))
    return sum(float(np.vdot(block * block, block)) for block in blocks)


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the unbiased squared MMD of features [m, d] and [n, d] in float64.

    The KID of all features (arXiv:1801.01401, Section 4), with the kernel (x.y / d + 1)^3; it may
    be negative. Raises ValueError for fewer than two features in a set.
    """
    x, y = (np.asarray(features, np.float64) for features in (x, y))
    _check_sets(x, y, 2, "kid")

    def mean_within(x):
        diagonal = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (_kernel_sum(x, x) - diagonal) / (len(x) * (len(x) - 1))

    mean_across = _kernel_sum(x, y) / (len(x) * len(y))
    return float(mean_within(x) + mean_within(y) - 2 * mean_across)


def kid_subsets(
    m: int, n: int, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE
) -> tuple[int, int]:
    """Returns how many subsets `kid` takes of sets of m and n features, and their size.

    The size is at most that of the smaller set; all subsets of two whole sets are one.
    """
    size = min(subset_size, m, n)
    return (1 if size == m == n else subsets), size


def kid(
    x: np.ndarray, y: np.ndarray, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE
) -> tuple[float, float, float]:
    """Returns the Kernel Inception Distance of features [m, d] and [n, d] over random subsets.

    The subsets are torch-fidelity's, drawn in its order from its seed; where a set has fewer
    features than subset_size, which torch-fidelity refuses, they have the size of the smaller set.
    Returns the mean, its standard error, and the standard error of `polynomial_mmd` of all
    features, both by the delete-d jackknife (Shao and Wu 1989) of subsets of at most half of the
    smaller set, since subsets overlap. Raises ValueError for fewer than four features in a set.
    """
    _check_sets(x, y, 4, "kid")
    m = min(len(x), len(y))
    number, size = kid_subsets(len(x), len(y), subsets, subset_size)
    values = halves = _subset_mmds(x, y, number, size)
    if size > (half := min(subset_size, m // 2)):
        halves = _subset_mmds(x, y, subsets, half)
    full = np.var(halves, ddof=1) * half / (m - half)
    error = np.sqrt(full + np.var(values) / number)
    return float(np.mean(values)), float(error), float(np.sqrt(full))


def _subset_mmds(x: np.ndarray, y: np.ndarray, number: int, size: int) -> list[float]:
    rng = np.random.RandomState(KID_SEED)
    draws = ([z[rng.permutation(len(z))[:size]] for z in (x, y)] for _ in range(number))
    return [polynomial_mmd(*draw) for draw in draws]


def gaussian_mmd(x: np.ndarray, y: np.ndarray, bandwidth: float) -> tuple[float, float]:
    """Returns the unbiased squared MMD of features [m, d] and [n, d], and its standard error.

    The kernel is exp(-|x - y|^2 / (2 bandwidth^2)) (Gretton et al. 2012, Lemma 6). It differs from
    KID, whose polynomial kernel compares the first three moments only: this one is 0 in expectation
    for equal distributions alone. A thousand times this value is CMMD (Jayasumana et al. 2024,
    arXiv:2401.09603) for CLIP's features and a bandwidth of 10; its published code has the biased
    estimate, which is larger and grows with smaller sets. This one may be negative.

    The error is the jackknife's over the features of both sets (Arvesen 1969), linear in m + n once
    the sums are there; for sets of one distribution it is too large by up to a factor of sqrt(2).
    Raises ValueError for fewer than three features in a set.
    """
    _check_sets(x, y, 3, "mmd")
    centre = np.mean(y, 0, dtype=np.float64)
    x, y = (np.asarray(features, np.float64) - centre for features in (x, y))
    across_x, across_y = _gaussian_sums(x, y, bandwidth)
    within_x, within_y = (_gaussian_sums(z, z, bandwidth)[0] - 1 for z in (x, y))
    m, n, total = len(x), len(y), across_x.sum()
    mean_x, mean_y = within_x.sum() / (m * (m - 1)), within_y.sum() / (n * (n - 1))
    value = mean_x + mean_y - 2 * total / (m * n)
    # The values without one feature of a set, up to the term of the other set alone.
    without_x = _mean_without(within_x) - 2 * (total - across_x) / ((m - 1) * n)
    without_y = _mean_without(within_y) - 2 * (total - across_y) / (m * (n - 1))
    variance = (m - 1) * np.var(without_x) + (n - 1) * np.var(without_y)
    return float(value), float(np.sqrt(variance))


def _gaussian_sums(x: np.ndarray, y: np.ndarray, bandwidth: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of the kernel over y for each x, float64[m], and over x for each y."""
    by_x, by_y = np.zeros(len(x)), np.zeros(len(y))
    xx, yy = (np.square(z).sum(1) for z in (x, y))
    for rows in _blocks(len(x), len(y)):
        squared = np.maximum(xx[rows, None] + yy - 2 * (x[rows] @ y.T), 0)
        kernel = np.exp(squared / (-2 * bandwidth**2))
        by_x[rows] = kernel.sum(1)
        by_y += kernel.sum(0)
    return by_x, by_y


def _mean_without(sums: np.ndarray) -> np.ndarray:
    """Returns the mean of a kernel over all pairs without one feature, from its sums over pairs."""
    m = len(sums)
    return (sums.sum() - 2 * sums) / ((m - 1) * (m - 2))


def median_distance(x: np.ndarray) -> float:
    """Returns the median distance of two of the features [n, d], the usual bandwidth of a kernel.

    Of more than 1,000 features it takes 1,000, evenly spaced. Raises ValueError if most are equal.
    """
    rows = np.arange(min(len(x), MEDIAN_ROWS)) * len(x) // min(len(x), MEDIAN_ROWS)
    x = np.asarray(x[rows], np.float64)
    i, j = np.triu_indices(len(x), 1)
    x = x - x.mean(0)
    squares = np.square(x).sum(1)
    squared = (squares[:, None] + squares - 2 * (x @ x.T))[i, j]
    median = float(np.sqrt(max(np.median(squared), 0))) if len(i) else 0.0
    if median <= 1e-6 * np.sqrt(squares.max(initial=0)):
        raise ValueError("mmd: expected reference features that differ, found most of them equal")
    return median


# Squared distances |x|^2 + |y|^2 - 2 x.y come from float32 products on the accelerator, with bounds
# on their rounding. Comparisons that the bounds leave open are decided by exact distances in
# float64, so that ties are ties and copies are at distance 0.


def _bounds(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yields blocks of rows of x, with lower and upper bounds of their squared distances to y."""
    centre = y.mean(0, dtype=np.float64)
    x, y = ((z - centre).astype(np.float32) for z in (x, y))
    transposed = jnp.asarray(y.T)
    xx, yy = (np.square(z).sum(1) for z in (x, y))
    # A float32 sum of d products is off by about eps sqrt(d) |x||y|.
    slack = np.float32(8 * float(np.finfo(np.float32).eps) * np.sqrt(x.shape[1]))
    for rows in _blocks(len(x), len(y)):
        product = 2 * np.asarray(jnp.matmul(x[rows], transposed, precision="highest"))
        scale = xx[rows, None] + yy
        yield rows, (1 - slack) * scale - product, (1 + slack) * scale - product


def _exact_distances(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Returns |x_i - y_j|^2 of index pairs in float64, a function of the two rows alone."""
    out = np.empty(len(i))
    for part in _blocks(len(i), x.shape[1]):
        out[part] = np.square(x[i[part]].astype(np.float64) - y[j[part]]).sum(1)
    return out


def squared_radii(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the squared distance of each feature [n, d] to its k-th nearest other, float64[n]."""
    out = np.empty(len(x))
    for rows, low, high in _bounds(x, x):
        itself = np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)
        low[itself] = high[itself] = np.inf
        candidate = low <= np.partition(high, k - 1, axis=1)[:, k - 1, None]
        i, j = np.nonzero(candidate & np.isfinite(low))
        squared = np.full(low.shape, np.inf)
        squared[i, j] = _exact_distances(x[rows], x, i, j)
        out[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return out


def _compare(x: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> Iterator[np.ndarray]:
    """Yields int8[b, n] for blocks of x: -1 inside a centre's ball, 0 on its surface, 1 outside."""
    for rows, low, high in _bounds(x, centres):
        side = (low > radii).astype(np.int8) - (high < radii)
        i, j = np.nonzero(side == 0)
        side[i, j] = np.sign(_exact_distances(x[rows], centres, i, j) - radii[j])
        yield side


def precision_recall(
    generated: np.ndarray, reference: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Returns improved precision and recall of features [m, d] and [n, d].

    Precision is the fraction of generated features in any reference feature's ball, whose radius is
    the distance to its k-th nearest other one, surface included; recall exchanges the sets
    (arXiv:1904.06991, eqs. 1-2). Raises ValueError for fewer than k + 1 features in a set.
    """
    _check_sets(generated, reference, k + 1, "precision and recall")

    def fraction(x, centres):
        blocks = _compare(x, centres, squared_radii(centres, k))
        return float(np.concatenate([(block <= 0).any(1) for block in blocks]).mean())

    return fraction(generated, reference), fraction(reference, generated)


def density_coverage(
    generated: np.ndarray, reference: np.ndarray, k: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Returns density float64[n] and coverage bool[n] of each of n reference features' balls.

    The scores are their means (arXiv:2002.09797, eqs. 3-4), 1 for a set against itself. A ball is
    that of `precision_recall`. Coverage counts its surface; density does not, as in the authors'
    code, where a ball holds its centre and k - 1 others; where ties leave fewer inside, a surface
    point counts as the fraction that makes it k. Raises ValueError for fewer than k + 1 features.
    """
    _check_sets(generated, reference, k + 1, "density and coverage")
    radii = squared_radii(reference, k)
    inside, surface = _count_in_balls(generated, reference, radii)
    own_inside, own_surface = _count_in_balls(reference, reference, radii)
    held = inside + (k - own_inside) * surface / own_surface
    return held * (len(reference) / (k * len(generated))), inside + surface > 0


def _count_in_balls(x: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Returns how many of x are inside and on the surface of each ball, int[2, n]."""
    blocks = _compare(x, centres, radii)
    return sum(np.stack([(block < 0).sum(0), (block == 0).sum(0)]) for block in blocks)
