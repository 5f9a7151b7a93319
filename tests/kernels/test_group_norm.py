"""Group normalisation against the textbook's formula and its derivatives, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from diffusion.kernels.group_norm import group_norm, group_norm_with_vjp
from tests.kernels.test_winograd import normal


def textbook(x, scale, bias, groups, epsilon=1e-6):
    """swish(GroupNorm(x)) with the mean and variance of each group, in the dtype of x."""
    b, h, w, c = x.shape
    g = x.reshape(b, h * w, groups, c // groups)
    mean = g.mean(axis=(1, 3), keepdims=True)
    variance = ((g - mean) ** 2).mean(axis=(1, 3), keepdims=True)
    y = ((g - mean) / (variance + epsilon) ** 0.5).reshape(x.shape)
    return nn.swish(y * scale[None, None, None] + bias[None, None, None])


def in_float64(f, *args):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(f)(*(jnp.asarray(a, jnp.float64) for a in args)))


@pytest.mark.parametrize("groups, epsilon", [(1, 1e-6), (2, 1e-6), (8, 0.1)])
def test_derivatives_are_the_textbook_s(groups, epsilon):
    """Both backward passes, and the JVP that the divergence of the probability flow is made of."""
    x, scale, bias = normal(0, 2, 6, 4, 8) + 3, normal(1, 8) + 1, normal(2, 8)
    g = normal(3, 2, 6, 4, 8)

    def derivatives(norm, jvp):
        def run(x, scale, bias, g):
            gradients = jax.vjp(norm, x, scale, bias)[1](g)
            if not jvp:
                return gradients
            return *gradients, jax.jvp(lambda x: norm(x, scale, bias), (x,), (g,))[1]

        return run

    exact = derivatives(lambda *a: textbook(*a, groups, epsilon), jvp=True)
    expected = in_float64(exact, x, scale, bias, g)
    for norm, jvp in ((group_norm, True), (group_norm_with_vjp, False)):
        ours = derivatives(lambda *a, f=norm: f(*a, groups, nn.swish, jnp.float32, epsilon), jvp)
        found = jax.jit(ours)(x, scale, bias, g)
        assert len(found) == 3 + jvp
        for a, b in zip(found, expected, strict=False):
            # Sums of up to 192 float32 products.
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_an_outlier_in_the_middle_costs_no_digits():
    """The middle pixel, around which the moments are taken, is 30 standard deviations off."""
    x = normal(0, 1, 16, 16, 8)
    x[:, 8, 8] = 30
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    found = group_norm(*map(jnp.asarray, (x, ones, zeros)), 2, nn.swish, jnp.float32)
    expected = in_float64(lambda *a: textbook(*a, 2), x, ones, zeros)
    # E[d²] - E[d]² is then 900 times the variance: 900 * 6e-8 of it is lost, half of that of y.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_saves_x_and_two_numbers_per_channel():
    x, c = jnp.zeros((2, 8, 8, 16), jnp.bfloat16), jnp.ones(16)

    def residuals(x, scale, bias):
        norm = lambda *a: group_norm_with_vjp(*a, 4, nn.swish, jnp.bfloat16)  # noqa: E731
        return jax.vjp(norm, x, scale, bias)[1]

    sizes = sorted(a.nbytes for a in jax.tree.leaves(residuals(x, c, c)))
    assert sizes[-1] == x.nbytes and sizes[-2] <= 2 * c.nbytes
