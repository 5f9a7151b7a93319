"""Winograd's convolutions against sums in float64, and against their own adjoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.kernels import winograd
from diffusion.kernels.winograd import F2, F4


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def windows(x):
    """The nine [b, h, w, c] that a 'SAME' convolution multiplies, in float64: 3x3 of them."""
    _, height, width, _ = x.shape
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[x[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]


def plain(x, kernel):
    moved = windows(x)
    return sum(moved[i][j] @ kernel[i, j] for i in range(3) for j in range(3))


# How far from the exact sum, in parts of the largest: float32 rounds sums of up to 288 products, of
# up to 1,280 where they are over the pixels.
SUMS, OVER_PIXELS = {F2: 2e-6, F4: 3e-5}, {F2: 3e-6, F4: 3e-5}
SHAPES = [
    *((F2, *shape) for shape in [(1, 2, 2, 1, 1), (2, 4, 6, 3, 5), (3, 8, 2, 16, 8)]),
    *((F4, *shape) for shape in [(1, 4, 4, 1, 1), (2, 4, 12, 3, 5), (3, 8, 4, 16, 8)]),
    *((f, 5, 16, 16, 32, 64) for f in (F2, F4)),
]
every_shape = pytest.mark.parametrize("f, b, height, width, c, o", SHAPES)


@every_shape
def test_it_is_the_convolution(f, b, height, width, c, o):
    x, kernel = normal(0, b, height, width, c), normal(1, 3, 3, c, o)
    expected = plain(x, kernel)
    found = jax.jit(winograd.convolve, static_argnums=2)(x, kernel, f)
    np.testing.assert_allclose(found, expected, rtol=0, atol=SUMS[f] * np.abs(expected).max())


@every_shape
def test_the_gradient_by_x_is_the_adjoint(f, b, height, width, c, o):
    """A convolution with the kernel turned by half a turn, its channels exchanged."""
    g, kernel = normal(0, b, height, width, o), normal(1, 3, 3, c, o)
    expected = plain(g, kernel[::-1, ::-1].swapaxes(2, 3))
    found = jax.jit(winograd.by_x, static_argnums=2)(g, kernel, f)
    np.testing.assert_allclose(found, expected, rtol=0, atol=SUMS[f] * np.abs(expected).max())
    x = normal(2, b, height, width, c)  # and that this is the adjoint: <g, conv(x)> = <by_x(g), x>
    np.testing.assert_allclose((g * plain(x, kernel)).sum(), (expected * x).sum(), rtol=1e-6)


@every_shape
def test_the_gradient_by_the_kernel_is_the_adjoint(f, b, height, width, c, o):
    """sum(g * conv(x, k)) = sum(k * gradient(x, g)), for the kernels that are 1 at one place."""
    x, g = normal(0, b, height, width, c), normal(1, b, height, width, o)
    expected = np.array([[np.einsum("bhwc,bhwo->co", a, g) for a in row] for row in windows(x)])
    found = jax.jit(winograd.by_kernel, static_argnums=2)(x, g, f)
    np.testing.assert_allclose(
        found, expected, rtol=0, atol=OVER_PIXELS[f] * np.abs(expected).max()
    )


@pytest.mark.parametrize("f", [F2, F4])
def test_its_matrices_are_exact(f):
    """To float64's digits: sum_k A[p, k] G[k, q] B[k, s] is 1 where s = p + q, and else 0."""
    a, g, b = (np.float64(matrix) for matrix in (f.A, f.G, f.B))
    found = np.einsum("pk,kq,ks->pqs", a, g, b)
    p, q, s = np.indices((f.m, 3, f.m + 2))
    np.testing.assert_allclose(found, s == p + q, atol=1e-14)


@pytest.mark.parametrize("f, side, atol", [(F2, 4, 1e-5), (F4, 8, 1e-3)])
def test_images_are_taken_in_turns(monkeypatch, f, side, atol):
    """Whatever their size: the same numbers, and as many images at a time as there is room for."""
    x, g = normal(0, 6, side, side, 8), normal(2, 6, side, side, 8)
    kernel = normal(1, 3, 3, 8, 8)
    in_turns, sizes, first = winograd.in_turns, [], None

    def seen(*args):
        turns = in_turns(*args)
        sizes.append(turns[0].shape[1])
        return turns

    monkeypatch.setattr(winograd, "in_turns", seen)
    image = 8 * (side // f.m) ** 2  # tiles of one, for each channel
    for some, more in ((1, image), (2 * image, 4 * image), (10**6, 10**6)):
        monkeypatch.setattr(winograd, "TILES", some)
        monkeypatch.setattr(winograd, "TILES_BY_KERNEL", more)
        found = winograd.convolve(x, kernel, f), winograd.by_kernel(x, g, f)
        first = first or found
        for a, b in zip(found, first, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=atol)
    assert sizes == [1, 1, 2, 3, 6, 6]  # divisors of six images


@pytest.mark.parametrize("f, side, rtol", [(F2, 6, 0), (F4, 8, 1e-6)])
def test_a_constant_is_carried(f, side, rtol):
    """One pixel far from the border gives 9 c, a corner 4 c; by F2, of small integers, exactly."""
    x, kernel = jnp.ones((1, side, side, 4)), jnp.ones((3, 3, 4, 2))
    y = winograd.convolve(x, kernel, f)
    np.testing.assert_allclose(y[0, 1:-1, 1:-1], 36, rtol=rtol)
    np.testing.assert_allclose(y[0, 0, 0], 16, rtol=rtol)


@pytest.mark.parametrize(
    "f, height, width", [(F2, 1, 1), (F2, 4, 3), (F2, 5, 4), (F4, 6, 4), (F4, 4, 2)]
)
def test_sizes_that_tiles_do_not_cover_are_refused(f, height, width):
    x = jnp.ones((1, height, width, 2))
    message = f"height and width that {f.m} divides, found {height}x{width}"
    for call in (winograd.convolve, winograd.by_x):
        with pytest.raises(ValueError, match=message):
            call(x, jnp.ones((3, 3, 2, 2)), f)
    with pytest.raises(ValueError, match=message):
        winograd.by_kernel(x, x, f)
