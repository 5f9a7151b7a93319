"""The one loop that drives every sampler, from noise to images.

A sampler is two pure functions. It never sees the network: `predict` (targets.py) is all it knows
of a model, and it asks it only at the times of the list that it walks. What it must remember is in
its carry, so a walk can stop at any of these times and go on later.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.process import example_keys
from diffusion.targets import Predict


class SamplerState(NamedTuple):
    """What goes from step to step: x_t and the last prediction of x_0, both [b, ...].

    Samplers that remember more have a carry of their own; it has these two fields too, and every
    array in it has the axis [b] first, so that all of it is cut over devices as the images are.
    """

    x: Array
    x_0: Array


class Sampler(NamedTuple):
    """One way of walking.

    init: x_T -> carry.
    step: (predict, keys[b], carry, t, s) -> carry, from t to s < t; t, s: int scalars.
    evaluations: how many times n steps from T to 0 ask the network.
    """

    init: Callable[[Array], SamplerState]
    step: Callable[[Predict, Array, SamplerState, Array, Array], SamplerState]
    evaluations: Callable[[int], int] = lambda n: n


def initial_state(x_T: Array) -> SamplerState:
    """The carry of samplers that remember nothing else; no x_0 is predicted yet."""
    return SamplerState(x_T, jnp.zeros_like(x_T))


def _check(ts: np.ndarray, x_T: Array) -> None:
    if not jnp.issubdtype(x_T.dtype, jnp.floating) or x_T.ndim < 2:
        raise ValueError(f"x_T: expected floats [b, ...], found {x_T.dtype}{list(x_T.shape)}")
    if isinstance(ts, Array):
        return  # on the device already: its values cannot be looked at here
    if len(ts) < 2 or ts[-1] < 0 or np.any(np.diff(ts) >= 0):
        raise ValueError(f"ts: expected strictly falling times such as T..0, found {ts}")


def advance(sampler: Sampler, predict: Predict, key: Array, carry: SamplerState, ts: np.ndarray) -> SamplerState:
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


def trajectory(sampler: Sampler, predict: Predict, key: Array, x_T: Array, ts: np.ndarray) -> SamplerState:
    """As `sample`, keeping the way: Carry of [n, b, ...], x at ts[1:], x_0 predicted at ts[:-1].

    The last x is what `sample` returns. Holds n images per image in memory.
    """
    _check(ts, x_T)
    keys, ts = example_keys(key, x_T.shape[0]), jnp.asarray(ts)

    def body(carry, pair):
        carry = sampler.step(predict, keys, carry, *pair)
        return carry, SamplerState(carry.x, carry.x_0)

    return lax.scan(body, sampler.init(x_T), (ts[:-1], ts[1:]))[1]
