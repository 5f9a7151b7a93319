"""Group normalisation followed by an activation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

EPSILON = 1e-6


def group_norm(
    x: Array,
    scale: Array,
    bias: Array,
    groups: int,
    activation: Callable,
    dtype: Any,
    epsilon: float = EPSILON,
) -> Array:
    """Returns activation(GroupNorm(x)) as `dtype`, computed in float32.

    x: [b, h, w, c]. scale, bias: float32[c]. groups: a divisor of c. activation: an elementwise
    function, such as `nn.swish`. epsilon: added to the variance.
    Source: official `normalize` (`tf.contrib.layers.group_norm` and its default epsilon).
    """
    return _forward(x, scale, bias, groups, activation, dtype, epsilon)[0]


def _forward(x, scale, bias, groups, activation, dtype, epsilon):
    """Returns the output and the residuals of the backward pass."""
    mean, rstd = _statistics(x, groups, epsilon)
    (x_again,) = _recompute_casts(x)
    y = (x_again.astype(jnp.float32) - mean[:, None, None]) * (rstd * scale[None])[:, None, None]
    y = activation(y + bias[None, None, None])
    return y.astype(dtype), (x, mean, rstd, scale, bias)


def _backward(groups, activation, dtype, epsilon, residuals, g):
    """Returns the gradients with respect to x, scale and bias, from two passes over x and g."""
    x, mean, rstd, scale, bias = residuals

    def backward_activation(x, g):
        normalised = (x.astype(jnp.float32) - mean[:, None, None]) * rstd[:, None, None]
        y = normalised * scale[None, None, None] + bias[None, None, None]
        return normalised, jax.vjp(activation, y)[1](g.astype(jnp.float32))[0]

    normalised, grad_y = backward_activation(x, g)
    grad_bias, grad_scale = grad_y.sum(axis=(1, 2)), (grad_y * normalised).sum(axis=(1, 2))
    x, g, grad_bias, grad_scale = _recompute_casts(x, g, grad_bias, grad_scale)
    normalised, grad_y = backward_activation(x, g)
    pixels = x.shape[1] * x.shape[2]
    mean_grad = _group_mean(grad_bias * scale[None], groups) / pixels
    projection = _group_mean(grad_scale * scale[None], groups) / pixels
    grad_x = grad_y * scale[None, None, None] - mean_grad[:, None, None]
    grad_x = (grad_x - normalised * projection[:, None, None]) * rstd[:, None, None]
    return grad_x.astype(x.dtype), grad_scale.sum(axis=0), grad_bias.sum(axis=0)


# With a custom VJP that saves x, mean and rstd per channel, to move fewer bytes; no JVP.
group_norm_with_vjp = jax.custom_vjp(group_norm, nondiff_argnums=(3, 4, 5, 6))
group_norm_with_vjp.defvjp(_forward, _backward)


def _recompute_casts(*arrays):
    """Returns the arrays; on accelerators, what follows casts them to float32 again.

    XLA would otherwise store the float32 copies of an earlier pass, twice the bytes of bfloat16.
    """
    return lax.platform_dependent(
        *arrays, cpu=lambda *a: a, default=lambda *a: lax.optimization_barrier(a)
    )


def _statistics(x, groups, epsilon):
    """Returns (mean, rstd) of each channel's group, float32[b, c], in one pass over x."""
    # Moments around a pixel of the image: E[x²] - E[x]² loses digits where the mean is large.
    shift = lax.stop_gradient(x[:, x.shape[1] // 2, x.shape[2] // 2]).astype(jnp.float32)
    d = x.astype(jnp.float32) - shift[:, None, None]
    first, second = d.mean(axis=(1, 2)), jnp.square(d).mean(axis=(1, 2))
    channel_mean = shift + first
    mean = _group_mean(channel_mean, groups)
    variance = second - jnp.square(first) + jnp.square(channel_mean - mean)
    return mean, lax.rsqrt(jnp.maximum(_group_mean(variance, groups), 0) + epsilon)


def _group_mean(per_channel, groups):
    """Averages [b, c] over the channels of each group, -> [b, c]."""
    b, c = per_channel.shape
    grouped = per_channel.reshape(b, groups, c // groups)
    return jnp.broadcast_to(grouped.mean(axis=2, keepdims=True), grouped.shape).reshape(b, c)
