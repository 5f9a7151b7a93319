"""From noise to images: ways of walking the reverse process, and the one loop that drives them all.

A sampler is two pure functions. It never sees the network: `predict` (targets.py) is all it knows
of a model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.process import Process, example_keys, noise
from diffusion.targets import Predict, reverse


class Carry(NamedTuple):
    """What goes from step to step: x_t and the last prediction of x_0, both [b, ...]."""

    x: Array
    x_0: Array


class Sampler(NamedTuple):
    """init: x_T -> carry; step: (predict, keys[b], carry, t, s) -> carry, from t to s < t."""

    init: Callable[[Array], Carry]
    step: Callable[[Predict, Array, Carry, Array, Array], Carry]


def ancestral(p: Process) -> Sampler:
    """Algorithm 2: x_s ~ p_theta(x_s | x_t), without noise in the last step.

    For s = t - 1 it is the paper's step. Longer steps use the generalised posterior
    (process.posterior) and the same choice of variance, which is the respaced chain of Improved
    DDPM (arXiv 2102.09672, Section 4).
    """

    def init(x_T: Array) -> Carry:
        return Carry(x_T, jnp.zeros_like(x_T))

    def step(predict: Predict, keys: Array, carry: Carry, t: Array, s: Array) -> Carry:
        prediction = predict(carry.x, t)
        mean, log_var = reverse(p, prediction, carry.x, s, t)
        z = jnp.where(s > 0, noise(keys, t, carry.x), 0)
        return Carry(mean + jnp.exp(0.5 * log_var) * z, prediction.x_0)

    return Sampler(init, step)


def uniform(T: int, steps: int) -> np.ndarray:
    """Times T = ts[0] > ... > ts[steps] = 0, evenly spaced and rounded: int32[steps + 1].

    Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"sampler steps: expected 1 to {T} (the trained chain), found {steps}")
    return np.round(np.linspace(T, 0, steps + 1)).astype(np.int32)


def _check(ts: np.ndarray, x_T: Array) -> None:
    if not jnp.issubdtype(x_T.dtype, jnp.floating) or x_T.ndim < 2:
        raise ValueError(f"x_T: expected floats [b, ...], found {x_T.dtype}{list(x_T.shape)}")
    if isinstance(ts, Array):
        return  # on the device already: its values cannot be looked at here
    if len(ts) < 2 or ts[-1] < 0 or np.any(np.diff(ts) >= 0):
        raise ValueError(f"ts: expected strictly falling times such as T..0, found {ts}")


def advance(sampler: Sampler, predict: Predict, key: Array, carry: Carry, ts: np.ndarray) -> Carry:
    """Takes a carry from time ts[0] to ts[-1]. Parts of a chain in a row equal the whole.

    key: one key, or one per example [b]; ts: strictly falling int[n+1].
    """
    _check(ts, carry.x)
    keys, ts = example_keys(key, carry.x.shape[0]), jnp.asarray(ts)

    def body(carry, pair):
        return sampler.step(predict, keys, carry, *pair), None

    return lax.scan(body, carry, (ts[:-1], ts[1:]))[0]


def sample(sampler: Sampler, predict: Predict, key: Array, x_T: Array, ts: np.ndarray) -> Array:
    """x_0 [b, ...] from x_T through the times ts, as one scan.

    key: one key, or one per example [b], so that an image does not depend on its batch; x_T:
         standard normal [b, ...];
    ts: strictly falling int[n+1], T to 0. The result is not clipped: round it with batches.unscale.
        Raises ValueError.
    """
    return advance(sampler, predict, key, sampler.init(x_T), ts).x


def trajectory(sampler: Sampler, predict: Predict, key: Array, x_T: Array, ts: np.ndarray) -> Carry:
    """As `sample`, keeping the way: Carry of [n, b, ...], x at ts[1:], x_0 predicted at ts[:-1].

    The last x is what `sample` returns. Holds n images per image in memory.
    """
    _check(ts, x_T)
    keys, ts = example_keys(key, x_T.shape[0]), jnp.asarray(ts)

    def body(carry, pair):
        carry = sampler.step(predict, keys, carry, *pair)
        return carry, Carry(carry.x, carry.x_0)

    return lax.scan(body, sampler.init(x_T), (ts[:-1], ts[1:]))[1]


SAMPLERS = {"ancestral": ancestral}
GRIDS = {"uniform": uniform}
