"""3x3 convolutions with fewer multiplications, on CPUs.

    [m + 2, m + 2] pixels of x ── B ──┐
                                      × ── A ── [m, m] pixels of y
                  [3, 3] kernel ── G ─┘

Winograd's F(m x m, 3x3), as in Lavin and Gray 2015 (arXiv:1509.09308), Sections 4.1 and 4.3: the
tile transforms B and G turn tile and kernel into (m + 2)² numbers each, these are multiplied
elementwise, which is a matrix product over channels and tiles, and A transforms the products into
pixels. Of the 9 multiplications per output number, m = 2 needs 4 and m = 4 needs 2.25.

`conv` and `conv_with_vjp` take the place of `lax.conv_general_dilated` in nn.Conv.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

IMAGES, REPLICATED = PartitionSpec("data"), PartitionSpec()  # over `sharding.data_mesh`
Matrix = tuple[tuple[float, ...], ...]


class Transform(NamedTuple):
    """F(m x m, 3x3). B: [m + 2, m + 2], G: [m + 2, 3], A: [m, m + 2]; the paper's Bᵀ, G and Aᵀ."""

    m: int
    B: Matrix
    G: Matrix
    A: Matrix


F2 = Transform(
    2,
    B=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    G=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    A=((1, 1, 1, 0), (0, 1, -1, -1)),
)

F4 = Transform(
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

# Below this much work, height * width * channels in * channels out, XLA's convolution is faster.
MIN_WORK, MIN_WORK_WITH_VJP = 2**21, 2**22
MAX_IMAGE_SIZE = 2**20  # height * width * channels; the tiles of larger images leave the cache
MIN_TILES_PER_SIDE = 4  # of F4; on fewer, transforming the kernel costs more than F4 saves
# Tiles, counted once per channel, that fit in the cache. A chunk of the kernel's gradient also
# reads and writes (m + 2)² sums per pair of channels, so its chunks are larger.
TILES_PER_CHUNK, TILES_PER_KERNEL_CHUNK = 2**15, 2**16


def conv(
    x: Array, kernel: Array, strides: Any, padding: Any, *, mesh: Mesh | None = None, **options
) -> Array:
    """Returns `lax.conv_general_dilated`, on CPUs by F2 where that is faster.

    The rounding error is 1e-6 of the largest output. Can be differentiated in every mode.

    x: [b, h, w, c]. kernel: [kh, kw, c, o]. mesh: the `sharding.data_mesh` over which b is sharded;
    without it a CPU gathers the images first.
    """
    if _is_faster(MIN_WORK, x, kernel, strides, padding, options):
        return _conv_3x3(_mesh_for(x, mesh), F2, x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def conv_with_vjp(
    x: Array, kernel: Array, strides: Any, padding: Any, *, mesh: Mesh | None = None, **options
) -> Array:
    """Returns `conv`, by F4 where it fits, with a custom VJP by the same transform; no JVP.

    The rounding error is 1e-5 of the largest output: far below the noise of a batch's gradient, but
    too coarse for evaluation.
    """
    if _is_faster(MIN_WORK_WITH_VJP, x, kernel, strides, padding, options):
        m, side = F4.m, F4.m * MIN_TILES_PER_SIDE
        fits = all(n % m == 0 and n >= side for n in x.shape[1:3])
        return _conv_3x3_with_vjp(_mesh_for(x, mesh), F4 if fits else F2, x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_faster(min_work, x, kernel, strides, padding, options):
    """Returns whether a transform applies (undilated 3x3, float32, even sides) and pays."""
    _, height, width, channels = x.shape
    *window, c, o = kernel.shape
    steps = {*strides, *(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())}
    applies = window == [3, 3] and steps == {1} and padding == "SAME" and c == channels
    applies &= height % 2 == width % 2 == 0 and x.dtype == kernel.dtype == jnp.float32
    return applies and min(c, o) >= 32 and height * width * c * o >= min_work


def _fits_in_cache(x):
    return math.prod(x.shape[1:]) <= MAX_IMAGE_SIZE


def _mesh_for(x, mesh):
    return mesh if mesh is not None and x.shape[0] % mesh.size == 0 else None


def _conv_3x3(mesh, transform, x, kernel):
    on_cpu = functools.partial(conv_3x3, transform=transform) if _fits_in_cache(x) else _xla_conv
    return _dispatch(mesh, on_cpu, _xla_conv, (IMAGES, REPLICATED), IMAGES, x, kernel)


def _conv_3x3_backward(mesh, transform, residuals, g):
    def gradients(x, kernel, g):
        fits = _fits_in_cache(g)
        grad_x = input_gradient(g, kernel, transform) if fits else xla_gradients(x, kernel, g)[0]
        grad_kernel = kernel_gradient(x, g, transform)
        return grad_x, lax.psum(grad_kernel, mesh.axis_names) if mesh is not None else grad_kernel

    def xla_gradients(x, kernel, g):
        return jax.vjp(_xla_conv, x, kernel)[1](g)

    specs = (IMAGES, REPLICATED, IMAGES), (IMAGES, REPLICATED)
    return _dispatch(mesh, gradients, xla_gradients, *specs, *residuals, g)


def _dispatch(mesh, on_cpu, elsewhere, in_specs, out_specs, *arrays):
    """Returns on_cpu(*arrays), each device of the mesh for its images, or elsewhere(*arrays)."""
    if mesh is not None:
        on_cpu = jax.shard_map(on_cpu, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=elsewhere)


def _xla_conv(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


_conv_3x3_with_vjp = jax.custom_vjp(_conv_3x3, nondiff_argnums=(0, 1))
_conv_3x3_with_vjp.defvjp(lambda *args: (_conv_3x3(*args), args[2:]), _conv_3x3_backward)


def conv_3x3(x: Array, kernel: Array, transform: Transform, product: str = "jtc,jco->jto") -> Array:
    """Returns the 'SAME' convolution of x [b, h, w, c] and kernel [3, 3, c, o].

    product: the sum over channels, of tiles t by kernels, for each element j of a row of the tile.
    Raises ValueError where m does not divide h and w.
    """
    kernels = _transform_2d(transform.G, kernel)

    def convolve_chunk(x):
        rows = []
        for tiles, k in zip(_input_tiles(x, transform), kernels, strict=True):
            products = jnp.einsum(product, _flatten(tiles), k).reshape(*tiles.shape[:-1], -1)
            rows.append(jnp.stack(_matvec(transform.A, products), axis=3))
        # Without the barrier XLA computes them anew for each of the m rows of pixels.
        rows = lax.optimization_barrier(rows)
        return jnp.stack(_matvec(transform.A, rows), axis=2).reshape(*x.shape[:3], -1)

    chunks = _split_batch(TILES_PER_CHUNK * transform.m**2, x)
    return lax.map(convolve_chunk, *chunks).reshape(*x.shape[:3], -1)


def input_gradient(g: Array, kernel: Array, transform: Transform) -> Array:
    """Returns the gradient of `conv_3x3` by x from g [b, h, w, o], the gradient by its output."""
    # Sums over the last axis of both: transposing the kernels beforehand would make these products
    # read memory with a stride, which takes longer than all the rest.
    return conv_3x3(g, kernel[::-1, ::-1], transform, "jto,jco->jtc")


def kernel_gradient(x: Array, g: Array, transform: Transform) -> Array:
    """Returns the gradient of `conv_3x3` by the kernel; g as of `input_gradient`."""

    def sum_chunk(x, g):
        x_tiles = _input_tiles(x, transform)
        g_tiles = _transform_tiles(_transpose(transform.A), transform.m, g, *g.shape[1:3])
        pairs = zip(map(_flatten, x_tiles), map(_flatten, g_tiles), strict=True)
        return [jnp.einsum("jtc,jto->jco", a, b) for a, b in pairs]

    def add_chunk(total, chunk):
        return jax.tree.map(jnp.add, total, sum_chunk(*chunk)), None

    x, g = _split_batch(TILES_PER_KERNEL_CHUNK * transform.m**2, x, g)
    total, _ = lax.scan(add_chunk, sum_chunk(x[0], g[0]), (x[1:], g[1:]))
    return jnp.stack(_transform_2d(_transpose(transform.G), total))


def _split_batch(max_size, *arrays):
    """Reshapes each [b, h, w, c] to [chunks, images, h, w, c], images as many as max_size holds."""
    b, largest = arrays[0].shape[0], max(a[0].size for a in arrays)
    images = max(k for k in range(1, b + 1) if b % k == 0 and (k * largest <= max_size or k == 1))
    # Without the barrier a single chunk would be computed again for each element of the tiles.
    arrays = lax.optimization_barrier(arrays)
    return tuple(a.reshape(-1, images, *a.shape[1:]) for a in arrays)


def _input_tiles(x, transform):
    """Returns the overlapping tiles of x [b, h, w, c], transformed as by `_transform_tiles`."""
    _, height, width, _ = x.shape
    m = transform.m
    if height % m or width % m:
        raise ValueError(f"x: expected a height and width that {m} divides, found {height}x{width}")
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return _transform_tiles(transform.B, m, padded, height, width)


def _transform_tiles(matrix, m, x, height, width):
    """Returns M tile Mᵀ, M [n, k], of the [k, k] pixels at every m-th one, as n arrays [n, …].

    x: [b, height + k - m, width + k - m, c]; … is [b, height / m, width / m, c].
    """
    k = range(len(matrix[0]))
    rows = _matvec(matrix, [x[:, i : i + height : m] for i in k])
    return [jnp.stack(_matvec(matrix, [row[:, :, j : j + width : m] for j in k])) for row in rows]


def _flatten(tiles):
    """Reshapes to [n, b i j, c], as with more axes XLA would transpose products in memory."""
    return tiles.reshape(len(tiles), -1, tiles.shape[-1])


def _transform_2d(matrix, grid):
    """Returns M g Mᵀ, a list of stacked rows, for a small matrix g of arrays of one shape."""
    half = [_matvec(matrix, row) for row in grid]
    columns = [_matvec(matrix, column) for column in zip(*half, strict=True)]
    return [jnp.stack(row) for row in zip(*columns, strict=True)]


def _matvec(matrix, arrays):
    """Returns M v for a small vector v of arrays of one shape."""
    return [sum(m * a for m, a in zip(row, arrays, strict=True) if m) for row in matrix]


def _transpose(matrix):
    return tuple(zip(*matrix, strict=True))
