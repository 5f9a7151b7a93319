"""RMS normalisation followed by an activation: an option where the paper has groups."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def rms_norm(
    x: Array,
    scale: Array,
    bias: Array,
    groups: int,
    activation: Callable,
    dtype: Any,
    epsilon: float,
) -> Array:
    """Returns activation(scale x / rms(x) + bias) as `dtype`, computed in float32.

    rms is over the channels of a pixel; arguments are those of `group_norm`, of which groups are
    not used. Source: Zhang and Sennrich 2019 (arXiv:1910.07467), eq. 4, which has no bias.
    """
    h = x.astype(jnp.float32)
    h *= lax.rsqrt((h * h).mean(axis=-1, keepdims=True) + epsilon)
    return activation(h * scale[None, None, None] + bias[None, None, None]).astype(dtype)
