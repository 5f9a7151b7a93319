"""Means and covariances of features, and the distance of the Gaussians that have them.

All that a Frechet distance reads of a set: kept as running sums in float64 whose size does not
depend on how many images went in, and which are the same in whatever order and batches they came,
or from how many machines they were merged.
"""

from typing import NamedTuple

import numpy as np


class Stats(NamedTuple):
    """Running sums over the rows of features seen so far; plain numbers and arrays, to be saved.

    n:     how many rows.
    sum:   float64[d], their sum.
    outer: float64[d, d], sum of (x - mean)(x - mean)^T about *their own* mean. Sums of x x^T would
           lose digits as (mean / deviation)^2, all of float64's at 10^8.
    """

    n: int
    sum: np.ndarray
    outer: np.ndarray


Moments = tuple[np.ndarray, np.ndarray]  # mean float64[d], covariance float64[d, d]


def init(d: int) -> Stats:
    """Statistics of nothing, for features of d numbers."""
    return Stats(0, np.zeros(d), np.zeros((d, d)))


def check_rows(features: np.ndarray, d: int, first: int, what: str = "features") -> np.ndarray:
    """The features, or `what` they are, as an array [b, d]; `first` is the place of row 0 in all.

    Raises ValueError for another shape, and for NaN or infinities: how many rows, and the first.
    """
    x = np.asarray(features)
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"{what}: expected [b, {d}], found {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        places = (
            f"{len(bad)} of {len(x)} rows with NaN or infinities, the first is {first + bad[0]}"
        )
        raise ValueError(f"{what}: expected finite numbers, found {places}; look at that image")
    return x


def update(stats: Stats, features: np.ndarray) -> Stats:
    """Takes in features [b, d], floats of any width. Raises ValueError as `check_rows`."""
    x = check_rows(features, len(stats.sum), stats.n).astype(np.float64)
    if not len(x):
        return stats
    total = x.sum(0)
    x -= total / len(x)
    return merge(stats, Stats(len(x), total, x.T @ x))


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of both sets of rows together (Chan, Golub, LeVeque 1983, eq. 2.1).

    Raises ValueError if their dimensions differ.
    """
    _same_dimension(a.sum, b.sum)
    if not a.n or not b.n:
        return a if a.n else b
    apart = b.sum / b.n - a.sum / a.n
    between = np.outer(apart, apart) * (a.n * b.n / (a.n + b.n))
    return Stats(a.n + b.n, a.sum + b.sum, a.outer + b.outer + between)


def finalize(stats: Stats) -> Moments:
    """Mean float64[d] and unbiased covariance float64[d, d] (by n - 1, as the official code).

    Raises ValueError for fewer than two rows.
    """
    if stats.n < 2:
        raise ValueError(f"statistics: expected two or more images, found {stats.n}")
    return stats.sum / stats.n, stats.outer / (stats.n - 1)


def moments_from(mu: np.ndarray, sigma: np.ndarray, n: int) -> Stats:
    """The Stats of n images that `finalize` turns into (mu, sigma): how published files come in.

    mu: [d]; sigma: [d, d], by n - 1. Files do not say their n; it only weights a later `merge`.
    Raises ValueError for other shapes, for numbers that are not finite, and for a sigma that is no
    covariance: not symmetric, or with a variance below 0.
    """
    mu, sigma = (np.asarray(x, np.float64) for x in (mu, sigma))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        found = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise ValueError(f"statistics: expected mu [d] and sigma [d, d], found {found}")
    if n < 2 or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError(f"statistics: expected finite numbers of 2 or more images, found n = {n}")
    scale = np.abs(sigma).max(initial=0)
    # Published covariances were symmetric before some were rounded to float32.
    if np.abs(sigma - sigma.T).max(initial=0) > 1e-5 * scale or (np.diag(sigma) < 0).any():
        raise ValueError("statistics: sigma is no covariance; is it a file of mu and sigma?")
    return Stats(n, n * mu, (n - 1) * 0.5 * (sigma + sigma.T))




def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)): the squared Frechet (Wasserstein-2) distance of
    two Gaussians, arXiv 1706.08500, eq. 6; the FID where the features are Inception's.

    a, b: mean [d] and covariance [d, d], which may be singular, as of fewer images than features.
    Symmetric, 0 for equal moments, and never below 0. Raises ValueError for dimensions that differ.
    """
    # tr (A B)^(1/2) is the sum of the singular values of R_a^T R_b, for any roots A = R_a R_a^T and
    # B = R_b R_b^T. The official code's square root of a product first squares what it then takes
    # the root of: where a covariance is singular it trades rounding of 1e-16 for one of 1e-8.
    (mu_a, cov_a), (mu_b, cov_b) = a, b
    _same_dimension(mu_a, mu_b)
    common = np.linalg.svd(root(cov_a).T @ root(cov_b), compute_uv=False).sum()
    distance = np.square(mu_a - mu_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * common
    return max(0.0, float(distance))


def _distance_of_part(part: np.ndarray, b: Moments, root_b: np.ndarray) -> float:
    """`frechet` of features [m, d], many times as fast and known to 1e-8: what errors need."""
    (mu_b, cov_b), (m, d) = b, part.shape
    mu = part.mean(0, dtype=np.float64)
    rows = (part - mu) / np.sqrt(m - 1)  # A = rows^T rows
    common = rows @ root_b  # its singular values are those of R_a^T R_b
    squares = np.linalg.eigvalsh(common @ common.T if m < d else common.T @ common)
    trace = np.trace(cov_b) + np.square(rows).sum()
    distance = trace + np.square(mu - mu_b).sum() - 2 * np.sqrt(np.maximum(squares, 0)).sum()
    return max(0.0, float(distance))


def jackknife(features: np.ndarray, reference: Moments, groups: int) -> float:
    """The standard error of the Frechet distance of features [m, d], by leaving out a group each.

    Delete-a-group jackknife (Shao and Wu 1989): (g - 1) / g times the squares of what each of g
    groups, of every g-th feature, changes when it is left out. The reference counts as known.
    """
    root_b, group = root(reference[1]), np.arange(len(features)) % groups
    left = [_distance_of_part(features[group != g], reference, root_b) for g in range(groups)]
    return float(np.sqrt((groups - 1) * np.var(left)))


def root(cov: np.ndarray) -> np.ndarray:
    """Some R [d, d] with cov = R R^T; eigenvalues that rounding made negative count as 0."""
    try:
        return np.linalg.cholesky(cov)  # thirty times faster; fails where cov is singular
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov)
        return vectors * np.sqrt(np.maximum(values, 0))


def extrapolated(
    features: np.ndarray, reference: Moments, points: int = 15, seed: int = 0
) -> tuple[float, float]:
    """The Frechet distance for infinitely many images, FID_infinity: (value, standard error).

    Its bias falls as 1 / N (arXiv 1911.07023), so it is read at `points` counts N, each a fresh
    random part of the features [m, d], evenly from m / 10 to m as in the paper's Section 4, and a
    straight line in 1 / N is followed to 0. Below N = d the bias is no line: the counts begin at
    2 d, where m allows. The reference's own bias stays. The standard error is that of the line's
    fit; the parts overlap, so the true one is larger.
    Raises ValueError if m is too small for three different counts.
    """
    d, m = len(reference[0]), len(features)
    features = check_rows(features, d, 0)
    low = max(m // 10, min(2 * d, m // 2), 2)
    counts = np.unique(np.linspace(low, m, points).round().astype(int)) if m > low else np.empty(0)
    if len(counts) < 3:
        raise ValueError(f"extrapolation: expected 6 or more kept rows of features, found {m}")
    draw, root_b = np.random.RandomState(seed), root(reference[1])

    def at(count: int) -> float:
        part = features[draw.permutation(m)[:count]]
        return _distance_of_part(part, reference, root_b)

    return intercept(1 / counts, np.array([at(count) for count in counts]))


def intercept(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Where the least-squares line through (x, y) meets x = 0, and its standard error; n >= 3."""
    centred = x - x.mean()
    slope = centred @ y / (centred @ centred)
    rest = y - y.mean() - slope * centred
    variance = rest @ rest / (len(x) - 2)
    error = np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / (centred @ centred)))
    return float(y.mean() - slope * x.mean()), float(error)


def _same_dimension(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"features: expected the same number in both sets, found {len(a)}, {len(b)}"
        )
