"""Interpolation, shared latents and inpainting with a trained sampler.

Every image has its own key, so that it does not depend on its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion import process
from diffusion.process import Process, broadcast_right, example_keys, log_ratio, q_sample
from diffusion.samplers.base import Sampler, SamplerState, advance
from diffusion.targets import Predict

# sample_noise folds times 0..T into keys; data above these numbers give other keys.
FORK_OFFSET, VISIT_OFFSET = 2**31, 2**30


def advance_between(
    sampler: Sampler,
    predict: Predict,
    key: Array,
    state: SamplerState,
    ts: Array,
    i: Array,
    j: Array,
) -> SamplerState:
    """Advances a state from ts[i] to ts[j], like `advance` over ts[i : j + 1].

    i <= j may be traced, so that one program serves all parts of a chain.
    """
    keys, ts = example_keys(key, state.x.shape[0]), jnp.asarray(ts)

    def step(k, state):
        return advance(sampler, predict, keys, state, lax.dynamic_slice_in_dim(ts, k, 2))

    return lax.fori_loop(i, j, step, state)


def evenly_spaced(last: int, n: int, first: int = 0) -> np.ndarray:
    """Returns at most n >= 2 evenly spaced integers from first to last, both included."""
    if n < 2:
        raise ValueError(f"n: expected 2 places or more, found {n}")
    return np.unique(np.linspace(first, last, n).round().astype(int))


def nearest_index(ts: np.ndarray, fraction: float) -> int:
    """Returns the index of the time nearest to fraction * T, the first of two."""
    return int(np.abs(ts - fraction * ts[0]).argmin())


def fork_key(key: Array, number: Array) -> Array:
    """Derives the key of another chain for the same image; number 0 is the key itself."""
    other = random.fold_in(key, jnp.uint32(FORK_OFFSET) + number.astype(jnp.uint32))
    return random.wrap_key_data(
        jnp.where(number == 0, random.key_data(key), random.key_data(other))
    )


def diffuse(p: Process, key: Array, x_0: Array, t: Array) -> Array:
    """Draws x_t ~ q(x_t | x_0) [b, ...] for t, a scalar or int[b] in 0..T."""
    return q_sample(p, x_0, t, process.sample_noise(example_keys(key, x_0.shape[0]), 0, x_0))


def interpolate_latents(
    p: Process, key: Array, x_0: Array, y_0: Array, t: Array, weight: Array
) -> Array:
    """Returns (1 - weight) x_t + weight y_t for weights [b] in [0, 1] (Section 4.3 of the paper).

    The noise of x_t and y_t depends on the key only, so a pair has the same latents for all weights
    under the same key.
    """
    keys = example_keys(key, x_0.shape[0])
    fork = jax.vmap(fork_key, (0, None))
    x_t = diffuse(p, fork(keys, jnp.uint32(1)), x_0, t)
    y_t = diffuse(p, fork(keys, jnp.uint32(2)), y_0, t)
    return broadcast_right(1 - weight, x_t) * x_t + broadcast_right(weight, y_t) * y_t


class ResamplingPath(NamedTuple):
    """The steps of an inpainting, int32[n]: step i goes down from t[i] to s[i], then up to u[i]."""

    t: np.ndarray
    s: np.ndarray
    u: np.ndarray


def resampling_path(ts: np.ndarray, jump: int = 10, repeats: int = 10) -> ResamplingPath:
    """Walks down the times ts and goes through each stretch of `jump` steps `repeats` times.

    Jumps up start where 1, 1 + jump, ... steps are left. Lugmayr et al. 2022 (arXiv:2201.09865),
    Appendix B; jump = 1 is its Algorithm 1, and repeats = 1 is replacement without resampling.
    """
    for name, value in (("jump", jump), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, found {value}")
    rising, left = np.asarray(ts, np.int32)[::-1], len(ts) - 1
    jumps = dict.fromkeys(range(1, left - jump + 1, jump), repeats - 1)
    path = []
    while left:
        t, s = left, left - 1
        up = jumps.get(s, 0) > 0
        if up:
            jumps[s] -= 1
        left = s + jump * up
        path.append((t, s, left))
    return ResamplingPath(*rising[np.array(path).T])


def renoise(p: Process, x_s: Array, s: Array, u: Array, eps: Array) -> Array:
    """Returns x_u ~ q(x_u | x_s) for u >= s, given standard normal eps (eq. 2)."""
    log = log_ratio(p, s, u)
    scale, std = jnp.exp(0.5 * log), jnp.sqrt(-jnp.expm1(log))
    return broadcast_right(scale, x_s) * x_s + broadcast_right(std, x_s) * eps


def inpaint(
    p: Process,
    sampler: Sampler,
    predict: Predict,
    key: Array,
    x: Array,
    x_0: Array,
    known: Array,
    path: ResamplingPath,
    i: Array = 0,
    j: Array | None = None,
) -> Array:
    """Fills in the unknown pixels of x_0 by steps i..j-1 of a path (RePaint).

    After each step down the known pixels are replaced by a draw of q(x_s | x_0). Lugmayr et al.
    2022 (arXiv:2201.09865), eq. 8.

    Args:
        p: the process.
        sampler: a sampler, which is restarted at every step.
        predict: the model on p.
        key: one key, or one per example [b].
        x: [b, ...] at time path.t[i], standard normal at first.
        x_0: [b, ...] in [-1, 1], read where known.
        known: bool, broadcasts against x_0.
        path: from `resampling_path`.
        i, j: the range of steps, to the end for j = None; may be traced.
    """
    keys = example_keys(key, x.shape[0])
    t, s, u = map(jnp.asarray, path)

    def keys_of(k, use):
        """Returns keys of a step k and one of its uses: a time is visited several times."""
        visit = jnp.uint32(VISIT_OFFSET) + jnp.uint32(3) * jnp.uint32(k) + jnp.uint32(use)
        return jax.vmap(random.fold_in, (0, None))(keys, visit)

    def step(k, x):
        down = jnp.stack([t[k], s[k]])
        x = advance(sampler, predict, keys_of(k, 0), sampler.init(x), down).x
        x_s = q_sample(p, x_0, s[k], process.sample_noise(keys_of(k, 1), 0, x))
        x = jnp.where(known, x_s, x)
        return renoise(p, x, s[k], u[k], process.sample_noise(keys_of(k, 2), 0, x))

    return lax.fori_loop(i, len(path.t) if j is None else j, step, x)


def left(h: int, w: int) -> np.ndarray:
    """Marks the left half of bool[h, w] as unknown (False)."""
    return np.broadcast_to(np.arange(w) >= w // 2, (h, w))


def right(h: int, w: int) -> np.ndarray:
    """Marks the right half as unknown."""
    return np.broadcast_to(np.arange(w) < (w + 1) // 2, (h, w))


def centre(h: int, w: int) -> np.ndarray:
    """Marks a box in the middle as unknown, half as high and wide as the image."""
    known = np.ones((h, w), bool)
    known[h // 4 : h - h // 4, w // 4 : w - w // 4] = False
    return known


MASKS = {"left": left, "right": right, "centre": centre}
