"""Features of the network's inputs: of time, and of pixel values."""

import math

import jax
import jax.numpy as jnp


def time_embedding(t: jax.Array, dim: int, freq_shift: int = 1, flip: bool = False) -> jax.Array:
    """Returns sines, then cosines, of t [b] at dim // 2 frequencies from 1 to 1/10000.

    The result is float32[b, dim]; an odd dim ends in a zero. freq_shift and flip are those of
    `UNet`. Raises ValueError for dim < 4. Source: official `nn.py`, `get_timestep_embedding`.
    """
    if dim < 4:
        raise ValueError(f"ch: expected 4 channels or more, found {dim}; use a larger ch")
    half = dim // 2
    step = -math.log(10000) / (half - freq_shift)
    frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * step)
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    waves = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(waves[::-1] if flip else waves, axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def fourier_features(x: jax.Array, exponents: tuple[int, ...]) -> jax.Array:
    """Returns sin(2 pi 2^n x), then cos, of each channel and exponent n: [b, h, w, 2 c len].

    The finest of them tell neighbouring pixel values apart: of 256 values two neighbours are half a
    period apart for n = 6. Kingma et al. 2021 (arXiv:2107.00630), Appendix C.
    """
    frequencies = [2 * math.pi * 2.0**n for n in exponents]
    angles = jnp.stack([x * f for f in frequencies], axis=-1).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
