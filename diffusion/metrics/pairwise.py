"""What the pairs of two sets' features say: a kernel's mean, and who is whose neighbour.

For n features there are n^2 pairs, so all is done in blocks of them: memory is bounded, whatever n.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

PAIRS = 2**22  # in one block: 32 MB in float64


def _check(a: np.ndarray, b: np.ndarray, least: int, who: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{who}: expected two [n, d] of one d, found {a.shape} and {b.shape}")
    if min(len(a), len(b)) < least:
        found = f"{len(a)} and {len(b)}"
        raise ValueError(f"{who}: expected {least} or more features in each set, found {found}")


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, PAIRS // columns)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))




def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    return sum(
        float(((x[rows] @ y.T / x.shape[1] + 1) ** 3).sum()) for rows in _blocks(len(x), len(y))
    )


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of features [m, d] and [n, d] for the kernel (x.y / d + 1)^3.

    The Kernel Inception Distance of all features, arXiv 1801.01401, Section 4. Without bias, so it
    may be negative; in float64. Within a set no feature meets itself; across, the two sets are
    independent and all m n pairs count, those of equal index too. Raises ValueError for fewer than
    two features in a set.
    """
    x, y = (np.asarray(features, np.float64) for features in (x, y))
    _check(x, y, 2, "kid")

    def within(x):
        itself = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
        return (_kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))

    return float(within(x) + within(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y)))


def mmd_of_parts(
    x: np.ndarray, y: np.ndarray, parts: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """KID as it is usually read, over random parts: (mean, its standard error, that of `mmd`).

    Each part has `size` features of either set, or half of the smaller set if that is less. Parts
    overlap, so the deviation over them, by the root of their number, would promise too much. It is
    the delete-d jackknife (Shao and Wu 1989) that says what it means for all m features: variance
    over the parts times size / (m - size), m that of the smaller set. The mean of the parts has
    that error and the one of having drawn no more of them.
    Raises ValueError for fewer than four features in a set.
    """
    x, y = np.asarray(x), np.asarray(y)
    _check(x, y, 4, "kid")
    m = min(len(x), len(y))
    size, draw = min(size, m // 2), np.random.RandomState(seed)
    values = [mmd(*(z[draw.permutation(len(z))[:size]] for z in (x, y))) for _ in range(parts)]
    variance = np.var(values, ddof=1)
    whole = variance * size / (m - size)
    return float(np.mean(values)), float(np.sqrt(whole + variance / parts)), float(np.sqrt(whole))


#
# Squared distances come from products of centred float32 rows, on the accelerator if there is one:
# |x|^2 + |y|^2 - 2 x.y, known to `_slack` of |x|^2 + |y|^2. Where that leaves a comparison open,
# the distance is taken from the difference of the rows in float64. So ties are ties and copies are
# at distance 0, as if all had been done so.


def _slack(d: int) -> float:
    """Rounding of a float32 sum of d products, relative to |x||y|: eps sqrt(d), and some more."""
    return 8 * float(np.finfo(np.float32).eps) * np.sqrt(d)


@jax.jit
def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y.T, precision="highest")


def _bounds(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Blocks of rows of x, and bounds from below and above of their squared distances to y."""
    centre = y.mean(0, dtype=np.float64)
    x, y = ((z - centre).astype(np.float32) for z in (x, y))
    on_device = jnp.asarray(y)
    xx, yy = (np.square(z).sum(1) for z in (x, y))
    slack = np.float32(_slack(x.shape[1]))
    for rows in _blocks(len(x), len(y)):
        product = 2 * np.asarray(_product(jnp.asarray(x[rows]), on_device))
        scale = xx[rows, None] + yy
        yield rows, (1 - slack) * scale - product, (1 + slack) * scale - product


def _exact(x: np.ndarray, y: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """|x_i - y_j|^2 of pairs: float64, and a function of the two rows alone."""
    out = np.empty(len(i))
    for part in _blocks(len(i), x.shape[1]):
        out[part] = np.square(x[i[part]].astype(np.float64) - y[j[part]]).sum(1)
    return out


def radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each feature [n, d] to its k-th nearest other one: float64[n]."""
    out = np.empty(len(x))
    for rows, low, high in _bounds(x, x):
        itself = np.arange(rows.stop - rows.start), np.arange(rows.start, rows.stop)
        low[itself] = high[itself] = np.inf
        near = low <= np.partition(high, k - 1, axis=1)[:, k - 1, None]
        i, j = np.nonzero(near & np.isfinite(low))
        squared = np.full(low.shape, np.inf)
        squared[i, j] = _exact(x[rows], x, i, j)
        out[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return out


def _positions(x: np.ndarray, centres: np.ndarray, squared: np.ndarray) -> Iterator[np.ndarray]:
    """int8[b, n] for blocks of x: -1 inside of each centre's ball, 0 on its surface, 1 outside."""
    for rows, low, high in _bounds(x, centres):
        position = (low > squared).astype(np.int8) - (high < squared)
        i, j = np.nonzero(position == 0)
        position[i, j] = np.sign(_exact(x[rows], centres, i, j) - squared[j])
        yield position


def precision_recall(
    generated: np.ndarray, reference: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, eqs. 1-2) of features [m, d] and [n, d].

    precision: the share of generated features that lie in some reference feature's ball, whose
    radius is the distance to its k-th nearest other one; the surface belongs to it. recall: the
    same with the sets exchanged. A set against itself: both 1. Raises ValueError for fewer than
    k + 1 features in a set.
    """
    a, b = np.asarray(generated), np.asarray(reference)
    _check(a, b, k + 1, "precision and recall")

    def share(x, centres):
        blocks = _positions(x, centres, radii(centres, k))
        return float(np.concatenate([(block <= 0).any(1) for block in blocks]).mean())

    return share(a, b), share(b, a)


def density_coverage(
    generated: np.ndarray, reference: np.ndarray, k: int = 5
) -> tuple[float, float]:
    """Density and coverage (arXiv 2002.09797, eqs. 3-4; k = 5 there) of features [m, d], [n, d].

    density: how many generated features a reference feature's ball holds, over k, as a mean; above
    1 where they crowd. The surface does not count, as in the authors' code: a ball holds its centre
    and k - 1 others. If more features than one are at the k-th distance, or copies at distance 0,
    a surface counts by the share for which its ball would hold k of the reference. coverage: the
    share of the balls, with their surface, that hold any. A set against itself: both 1. Raises
    ValueError for fewer than k + 1 features in a set.
    """
    held, covered = balls(generated, reference, k)
    return float(held.mean()), float(covered.mean())


def balls(generated: np.ndarray, reference: np.ndarray, k: int = 5) -> tuple[np.ndarray, ...]:
    """float64[n], bool[n] of the reference's balls; their means are density and coverage."""
    a, b = np.asarray(generated), np.asarray(reference)
    _check(a, b, k + 1, "density and coverage")
    squared = radii(b, k)
    inside, surface = _counts(a, b, squared)
    own_inside, own_surface = _counts(b, b, squared)
    held = inside + (k - own_inside) * surface / own_surface
    return held * (len(b) / (k * len(a))), inside + surface > 0


def _counts(x: np.ndarray, centres: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """How many of x are inside and on the surface of each ball: int[2, n]."""
    blocks = _positions(x, centres, squared)
    return sum(np.stack([(block < 0).sum(0), (block == 0).sum(0)]) for block in blocks)
