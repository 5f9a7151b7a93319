"""The interface of samplers and the loop that runs them.

Samplers are pure functions of their state, so a chain can be interrupted at any of its times.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.process import example_keys
from diffusion.targets import Predict


class SamplerState(NamedTuple):
    """The state of a sampler: x_t and the last predicted x_0, both [b, ...].

    Samplers with more memory have their own type with these fields, and [b] first in all leaves.
    """

    x: Array
    x_0: Array


class Sampler(NamedTuple):
    """A sampling algorithm.

    Attributes:
        init: x_T -> state.
        step: (predict, keys[b], state, t, s) -> state; a step from time t to s < t, int scalars.
        evaluations: n -> how often n steps from T to 0 evaluate the network.
    """

    init: Callable[[Array], SamplerState]
    step: Callable[[Predict, Array, SamplerState, Array, Array], SamplerState]
    evaluations: Callable[[int], int] = lambda n: n


def init_state(x_T: Array) -> SamplerState:
    """Starts a sampler without memory, with x_0 = 0 before the first prediction."""
    return SamplerState(x_T, jnp.zeros_like(x_T))


def choose(option: str, choices: Mapping[str, Any], name: str) -> Any:
    """Returns choices[name]. Raises ValueError for another name, with the name of the option."""
    if name not in choices:
        raise ValueError(f"{option}: expected one of {', '.join(choices)}, found {name}")
    return choices[name]


def _check(ts: np.ndarray, x_T: Array) -> None:
    if not jnp.issubdtype(x_T.dtype, jnp.floating) or x_T.ndim < 2:
        raise ValueError(f"x_T: expected floats [b, ...], found {x_T.dtype}{list(x_T.shape)}")
    if not isinstance(ts, Array) and (len(ts) < 2 or ts[-1] < 0 or np.any(np.diff(ts) >= 0)):
        raise ValueError(f"ts: expected strictly falling times such as T..0, found {ts}")


def advance(
    sampler: Sampler, predict: Predict, key: Array, state: SamplerState, ts: np.ndarray
) -> SamplerState:
    """Advances a state from time ts[0] to ts[-1], where ts is strictly falling, int[n+1].

    Consecutive calls equal one call over all of their times. The key is one, or one per example.
    """
    _check(ts, state.x)
    keys, ts = example_keys(key, state.x.shape[0]), jnp.asarray(ts)

    def body(state, pair):
        return sampler.step(predict, keys, state, *pair), None

    return lax.scan(body, state, (ts[:-1], ts[1:]))[0]


def sample(sampler: Sampler, predict: Predict, key: Array, x_T: Array, ts: np.ndarray) -> Array:
    """Returns x_0 [b, ...], not clipped, from x_T ~ N(0, 1) through the times ts, T to 0."""
    return advance(sampler, predict, key, sampler.init(x_T), ts).x


def trajectory(
    sampler: Sampler, predict: Predict, key: Array, x_T: Array, ts: np.ndarray
) -> SamplerState:
    """Returns all states of `sample`, [n, b, ...]: x at ts[1:], and x_0 predicted at ts[:-1]."""
    _check(ts, x_T)
    keys, ts = example_keys(key, x_T.shape[0]), jnp.asarray(ts)

    def body(state, pair):
        state = sampler.step(predict, keys, state, *pair)
        return state, SamplerState(state.x, state.x_0)

    return lax.scan(body, sampler.init(x_T), (ts[:-1], ts[1:]))[1]
