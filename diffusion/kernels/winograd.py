"""3x3 convolutions with fewer multiplications, for processors.

    (m+2)² pixels of x ── B ──┐
                              × ── A ── m² pixels of y
            3x3 kernel ── G ──┘

F(m x m, 3x3) of Winograd, as in Lavin and Gray (arXiv 1509.09308, Sections 4.1 and 4.3): tile and
kernel are carried to (m+2)² numbers each, these are multiplied one by one, for all channels and
tiles a product of matrices, and the products are carried back. Where the plain sum takes 9
multiplications for a number of y, m = 2 takes 4, and m = 4 takes 2.25. A few images are taken at a
time, so that all this stays in the processor's cache.

    float32 results differ from the exact sum's by    of the largest
    F2                                                1e-6
    F4                                                1e-5
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Matrix = tuple[tuple[float, ...], ...]


class F(NamedTuple):
    """F(m x m, 3x3). B: [m + 2, m + 2], G: [m + 2, 3], A: [m, m + 2]; the paper's Bᵀ, G and Aᵀ."""

    m: int
    B: Matrix
    G: Matrix
    A: Matrix


F2 = F(
    2,
    B=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    G=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    A=((1, 1, 1, 0), (0, 1, -1, -1)),
)

F4 = F(
    4,
    B=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    G=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    A=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)

# Tiles, each channel's counted by itself, that are taken at a time, or one image. A turn of the
# gradient by the kernel also reads and writes its sums, (m+2)² numbers for each pair of channels:
# so it takes more images a turn.
TILES, TILES_BY_KERNEL = 2**15, 2**16


def convolve(x: Array, kernel: Array, f: F) -> Array:
    """The 'SAME' convolution: x [b, h, w, c], kernel [3, 3, c, o] -> [b, h, w, o].

    Raises ValueError where m does not divide h and w.
    """
    return _convolved(x, kernel, f, "jtc,jco->jto")


def by_x(g: Array, kernel: Array, f: F) -> Array:
    """The gradient of `convolve` by x, g [b, h, w, o] being that by its output: -> [b, h, w, c].

    Raises ValueError as it does.
    """
    # The sum is over the last axis of both: transposed beforehand, kernels are read against the
    # grain, which takes longer than all the rest.
    return _convolved(g, kernel[::-1, ::-1], f, "jto,jco->jtc")


def _convolved(x, kernel, f, product):
    kernels = [jnp.stack(row) for row in both_sides(f.G, kernel)]

    def some(x):
        rows = []
        for tile, k in zip(tiles(x, f), kernels, strict=True):
            products = jnp.einsum(product, flat(tile), k).reshape(*tile.shape[:-1], -1)
            rows.append(jnp.stack(times(f.A, products), axis=3))
        rows = lax.optimization_barrier(rows)  # else computed anew for each of the m rows of pixels
        return jnp.stack(times(f.A, rows), axis=2).reshape(*x.shape[:3], -1)

    return lax.map(some, *in_turns(TILES * f.m**2, x)).reshape(*x.shape[:3], -1)


def by_kernel(x: Array, g: Array, f: F) -> Array:
    """The gradient of `convolve` by the kernel, g [b, h, w, o] being that by its output.

    The way of `convolve`, taken backwards: -> [3, 3, c, o]. Raises ValueError as it does.
    """

    def some(x, g):
        of_x, of_g = tiles(x, f), carried(transposed(f.A), f.m, g, *g.shape[1:3])
        pairs = zip(map(flat, of_x), map(flat, of_g), strict=True)
        return [jnp.einsum("jtc,jto->jco", a, b) for a, b in pairs]

    def add(total, next_):
        return jax.tree.map(jnp.add, total, some(*next_)), None

    x, g = in_turns(TILES_BY_KERNEL * f.m**2, x, g)
    total, _ = lax.scan(add, some(x[0], g[0]), (x[1:], g[1:]))
    return jnp.stack([jnp.stack(row) for row in both_sides(transposed(f.G), total)])


def in_turns(numbers: int, *arrays: Array) -> tuple[Array, ...]:
    """[b, h, w, c] -> [turns, images of a turn, h, w, c] each: at most so many numbers, or one."""
    b, largest = arrays[0].shape[0], max(a[0].size for a in arrays)
    images = max(k for k in range(1, b + 1) if b % k == 0 and (k * largest <= numbers or k == 1))
    # Computed once: else a single turn would compute them again for each of the tiles' numbers.
    arrays = lax.optimization_barrier(arrays)
    return tuple(a.reshape(-1, images, *a.shape[1:]) for a in arrays)


def tiles(x: Array, f: F) -> list[Array]:
    """[b, m i, m j, c] -> m + 2 of [m + 2, b, i, j, c]: B on both sides of overlapping tiles.

    Raises ValueError where m does not divide the height and width.
    """
    _, height, width, _ = x.shape
    if height % f.m or width % f.m:
        wanted = f"expected a height and width that {f.m} divides"
        raise ValueError(f"{wanted}, found {height}x{width}")
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return carried(f.B, f.m, padded, height, width)


def carried(matrix: Matrix, m: int, x: Array, height: int, width: int) -> list[Array]:
    """[n, k] on both sides of k² pixels of x at every m-th one -> n of [n, b, h / m, w / m, c].

    x: [b, height, width, c], and k - m more rows and columns, which the last of the pixels need.
    """
    k = range(len(matrix[0]))
    rows = times(matrix, [x[:, i : i + height : m] for i in k])
    return [jnp.stack(times(matrix, [row[:, :, j : j + width : m] for j in k])) for row in rows]


def flat(tile: Array) -> Array:
    """[n, b, i, j, c] -> [n, b i j, c]: with more axes XLA would transpose products in memory."""
    return tile.reshape(len(tile), -1, tile.shape[-1])


def both_sides(matrix: Matrix, grid: Sequence[Sequence[Array]] | Array) -> list[list[Array]]:
    """M g Mᵀ of a small matrix g of arrays of one shape."""
    half = [times(matrix, row) for row in grid]
    columns = [times(matrix, column) for column in zip(*half, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def times(matrix: Matrix, arrays: Sequence[Array] | Array) -> list[Array]:
    """M v of a small vector v of arrays of one shape."""
    return [sum(m * a for m, a in zip(row, arrays, strict=True) if m) for row in matrix]


def transposed(matrix: Matrix) -> Matrix:
    """Mᵀ."""
    return tuple(zip(*matrix, strict=True))
