"""Unbiased estimates of the variational bound from a few timesteps, for use during training."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion import likelihood, process
from diffusion.process import Process, example_keys, q_sample
from diffusion.targets import Predict


def timestep_strata(T: int, n: int) -> np.ndarray:
    """Returns the edges, int32[n+1], of n strata edges[i] <= t < edges[i + 1] of the times 1..T.

    t = 1, whose term is the decoder's, is a stratum of its own. The other terms fall about as 1/t,
    so the strata grow with t to cost about the same.
    """
    if not min(2, T) <= n <= T:
        raise ValueError(f"strata: expected {min(2, T)} to {T} (the trained chain), found {n}")
    edges = [1, 2]
    for left in range(n - 1, 0, -1):
        low = edges[-1]
        edges.append(max(low + 1, round(low * ((T + 1) / low) ** (1 / left))))
    return np.array(edges, np.int32)


def stratified_vlb(
    p: Process, predict: Predict, key: Array, x_0: Array, edges: np.ndarray, levels: int = 256
) -> Array:
    """Estimates each image's bound in bits/dim [b] from one time in each stratum, without bias.

    Every image draws its own times, so the images' estimates are independent and their standard
    error is honest. Noise is drawn as in `likelihood.vlb_terms`: n = T strata give its sum.

    Args:
        p: the process.
        predict: the model on p.
        key: one key, or one per example [b].
        x_0: [b, ...] in [-1, 1].
        edges: int[n+1], from `timestep_strata`.
        levels: of x_0, see data.augment.scale.
    """
    keys = example_keys(key, x_0.shape[0])
    keys_t = jax.vmap(random.fold_in, (0, None))(keys, 0)  # noise is drawn at t >= 1 only

    def term(total, stratum):
        i, low, high = stratum

        def draw(key_t, key, x):
            t = random.randint(random.fold_in(key_t, i), (), low, high)
            return t, process.sample_noise(key[None], t, x[None])[0]

        t, eps = jax.vmap(draw)(keys_t, keys, x_0)
        x_t = q_sample(p, x_0, t, eps)
        bits = likelihood.vlb_term(p, predict(x_t, t), x_0, x_t, t, levels)
        return total + (high - low).astype(bits.dtype) * bits, None

    edges = jnp.asarray(edges)
    strata = (jnp.arange(len(edges) - 1), edges[:-1], edges[1:])
    return lax.scan(term, likelihood.prior_bits(p, x_0), strata)[0]
