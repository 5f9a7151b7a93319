"""Running moments of features, and the Frechet distance between the Gaussians they define."""

from typing import NamedTuple

import numpy as np

SUBSETS = 15  # of features that `frechet_distance_infinity` extrapolates from

MeanCov = tuple[np.ndarray, np.ndarray]  # mean float64[d], covariance float64[d, d]


class Moments(NamedTuple):
    """Running sums over n rows x of features, the same in any order and batches up to rounding."""

    n: int
    sum: np.ndarray  # float64[d]
    # float64[d, d], sum of (x - mean)(x - mean)^T; sums of x x^T would lose digits.
    outer: np.ndarray


def empty_moments(d: int) -> Moments:
    """Returns the moments of no rows of d features."""
    return Moments(0, np.zeros(d), np.zeros((d, d)))


def check_rows(features: np.ndarray, d: int, first: int, name: str = "features") -> np.ndarray:
    """Returns an array [b, d] of finite numbers; else raises ValueError, row 0 being `first`."""
    x = np.asarray(features)
    if x.ndim != 2 or x.shape[1] != d:
        raise ValueError(f"{name}: expected [b, {d}], found {list(x.shape)}")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        found = f"{len(bad)} of {len(x)} rows with NaN or infinities, the first is {first + bad[0]}"
        raise ValueError(f"{name}: expected finite numbers, found {found}; look at that image")
    return x


def update(moments: Moments, features: np.ndarray) -> Moments:
    """Adds rows of features, float[b, d]. Raises ValueError as `check_rows`."""
    x = check_rows(features, len(moments.sum), moments.n).astype(np.float64)
    if not len(x):
        return moments
    total = x.sum(0)
    x -= total / len(x)
    return merge(moments, Moments(len(x), total, x.T @ x))


def merge(a: Moments, b: Moments) -> Moments:
    """Returns the moments of the union of two sets (Chan, Golub, LeVeque 1983, eq. 2.1)."""
    _check_same_dimension(a.sum, b.sum)
    if not a.n or not b.n:
        return a if a.n else b
    shift = b.sum / b.n - a.sum / a.n
    between = np.outer(shift, shift) * (a.n * b.n / (a.n + b.n))
    return Moments(a.n + b.n, a.sum + b.sum, a.outer + b.outer + between)


def finalize(moments: Moments) -> MeanCov:
    """Returns mean and unbiased covariance; raises ValueError for fewer than two rows."""
    if moments.n < 2:
        raise ValueError(f"statistics: expected two or more images, found {moments.n}")
    return moments.sum / moments.n, moments.outer / (moments.n - 1)


def moments_from(mu: np.ndarray, sigma: np.ndarray, n: int) -> Moments:
    """Inverts `finalize`, for published files of mu [d] and unbiased sigma [d, d].

    Published files lack n; only `merge` depends on it. Raises ValueError for other shapes, values
    that are not finite, and a sigma that is no covariance.
    """
    mu, sigma = (np.asarray(x, np.float64) for x in (mu, sigma))
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        found = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise ValueError(f"statistics: expected mu [d] and sigma [d, d], found {found}")
    if n < 2 or not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise ValueError(f"statistics: expected finite numbers of 2 or more images, found n = {n}")
    scale = np.abs(sigma).max(initial=0)
    # Some published covariances were rounded to float32, which breaks exact symmetry.
    if np.abs(sigma - sigma.T).max(initial=0) > 1e-5 * scale or (np.diag(sigma) < 0).any():
        raise ValueError("statistics: sigma is no covariance; is it a file of mu and sigma?")
    return Moments(n, n * mu, (n - 1) * 0.5 * (sigma + sigma.T))


def frechet_distance(a: MeanCov, b: MeanCov) -> float:
    """Returns the squared Frechet distance of two Gaussians (arXiv:1706.08500, eq. 6).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0. Covariances may be singular.
    """
    # tr (A B)^(1/2) is the sum of the singular values of R_a^T R_b for any factors A = R_a R_a^T,
    # B = R_b R_b^T; a matrix square root of A B would lose half the digits where one is singular.
    (mu_a, cov_a), (mu_b, cov_b) = a, b
    _check_same_dimension(mu_a, mu_b)
    product = covariance_factor(cov_a).T @ covariance_factor(cov_b)
    trace_root = np.linalg.svd(product, compute_uv=False).sum()
    distance = np.square(mu_a - mu_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    return max(0.0, float(distance))


def covariance_factor(cov: np.ndarray) -> np.ndarray:
    """Returns some R [d, d] with cov = R R^T; negative eigenvalues from rounding count as 0."""
    try:
        return np.linalg.cholesky(cov)  # much faster, but fails for singular matrices
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov)
        return vectors * np.sqrt(np.maximum(values, 0))


def _fast_frechet_distance(part: np.ndarray, b: MeanCov, factor_b: np.ndarray) -> float:
    """Returns `frechet_distance` of rows [m, d] by eigenvalues of a product, accurate to 1e-8."""
    (mu_b, cov_b), (m, d) = b, part.shape
    mu = part.mean(0, dtype=np.float64)
    rows = (part - mu) / np.sqrt(m - 1)  # A = rows^T rows
    product = rows @ factor_b  # has the singular values of R_a^T R_b
    squares = np.linalg.eigvalsh(product @ product.T if m < d else product.T @ product)
    trace = np.trace(cov_b) + np.square(rows).sum()
    distance = trace + np.square(mu - mu_b).sum() - 2 * np.sqrt(np.maximum(squares, 0)).sum()
    return max(0.0, float(distance))


def jackknife_stderr(features: np.ndarray, reference: MeanCov, groups: int) -> float:
    """Returns the standard error of the Frechet distance of features [m, d] to a known reference.

    Delete-a-group jackknife (Shao and Wu 1989) over `groups` interleaved groups.
    """
    factor, group = covariance_factor(reference[1]), np.arange(len(features)) % groups
    left = [_fast_frechet_distance(features[group != g], reference, factor) for g in range(groups)]
    return float(np.sqrt((groups - 1) * np.var(left)))


def frechet_distance_infinity(features: np.ndarray, reference: MeanCov) -> tuple[float, float]:
    """Extrapolates the Frechet distance of features [m, d] to infinitely many images.

    The bias falls as 1 / N: fits a line in 1 / N to the distances of random subsets, N evenly from
    max(m / 10, 2 d) to m (arXiv:1911.07023, Section 4). The reference's own bias stays. Returns the
    intercept and the standard error of the fit, which is too small, as the subsets overlap. Raises
    ValueError for m < 6.
    """
    d, m = len(reference[0]), len(features)
    features = check_rows(features, d, 0)
    if m < 6:
        raise ValueError(f"extrapolation: expected 6 or more kept rows of features, found {m}")
    low = max(m // 10, min(2 * d, m // 2), 2)  # below N = d the bias is not linear in 1 / N
    counts = np.unique(np.linspace(low, m, SUBSETS).round().astype(int))
    rng, factor = np.random.RandomState(0), covariance_factor(reference[1])
    distances = [
        _fast_frechet_distance(features[rng.permutation(m)[:n]], reference, factor) for n in counts
    ]
    (_, intercept), cov = np.polyfit(1 / counts, distances, 1, cov=True)
    return float(intercept), float(np.sqrt(cov[1, 1]))


def _check_same_dimension(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"features: expected the same number in both sets, found {len(a)}, {len(b)}"
        )
