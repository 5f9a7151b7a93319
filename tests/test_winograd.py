"""Winograd's convolutions against sums in float64, and against their own adjoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import winograd


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def plain(x, kernel):
    """The nine products of a 'SAME' convolution, summed in float64."""
    _, height, width, _ = x.shape
    x = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    moved = [[x[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
    return sum(moved[i][j] @ kernel[i, j] for i in range(3) for j in range(3))


SHAPES = [(1, 2, 2, 1, 1), (2, 4, 6, 3, 5), (3, 8, 2, 16, 8), (5, 16, 16, 32, 64)]


@pytest.mark.parametrize("b, height, width, c, o", SHAPES)
def test_it_is_the_convolution(b, height, width, c, o):
    x, kernel = normal(0, b, height, width, c), normal(1, 3, 3, c, o)
    expected = plain(x, kernel)
    found = jax.jit(winograd.convolve)(x, kernel)
    # Float32 rounds some sums of up to 288 products on the way: 1e-6 of the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("b, height, width, c, o", SHAPES)
def test_the_gradient_by_the_kernel_is_the_adjoint(b, height, width, c, o):
    """sum(g * conv(x, k)) = sum(k * gradient(x, g)), for the kernels that are 1 at one place."""
    x, g = normal(0, b, height, width, c), normal(1, b, height, width, o)
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.array(
        [
            [
                np.einsum("bhwc,bhwo->co", padded[:, i : i + height, j : j + width], g)
                for j in range(3)
            ]
            for i in range(3)
        ]
    )
    found = jax.jit(winograd.by_kernel)(x, g)
    # Sums of up to 1,280 products.
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_images_are_taken_in_turns(monkeypatch):
    """Whatever their size: the same numbers, and as many images at a time as there is room for."""
    x, kernel, g = normal(0, 6, 4, 4, 8), normal(1, 3, 3, 8, 8), normal(2, 6, 4, 4, 8)
    sizes, first = {}, None
    for room in (1, 2 * 4 * 4 * 8, 4 * 4 * 4 * 8, 10**6):
        monkeypatch.setattr(winograd, "NUMBERS", room)
        (turns,) = winograd.in_turns(jnp.asarray(x))
        sizes[room] = turns.shape[1]
        found = winograd.convolve(x, kernel), winograd.by_kernel(x, g)
        first = first or found
        for a, b in zip(found, first, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert list(sizes.values()) == [1, 2, 3, 6]  # divisors of six images


def test_a_constant_is_carried_exactly():
    """Small integers have no rounding: one pixel far from the border gives 9 c."""
    x, kernel = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 4, 2))
    y = winograd.convolve(x, kernel)
    assert (y[0, 1:-1, 1:-1] == 36).all() and (y[0, 0, 0] == 16).all()


@pytest.mark.parametrize("height, width", [(1, 1), (4, 3), (5, 4)])
def test_odd_sizes_are_refused(height, width):
    x = jnp.ones((1, height, width, 2))
    with pytest.raises(ValueError, match=f"even height and width, found {height}x{width}"):
        winograd.convolve(x, jnp.ones((3, 3, 2, 2)))
    with pytest.raises(ValueError, match=f"even height and width, found {height}x{width}"):
        winograd.by_kernel(x, x)
