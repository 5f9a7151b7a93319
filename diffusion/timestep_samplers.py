"""How a training draws the times of its examples, and what it learns from their losses.

`TIMESTEP_SAMPLERS[name](p)` builds a TimestepSampler; None for `uniform`, whose times each loss
draws for itself (Algorithm 1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, random
from scipy import special

from diffusion.process import Process, half_log_snr

HISTORY = 10  # losses that are remembered of each time
TIMES = 2**31 + 1  # folded into a step's key; see train_step.LABEL_DROPOUT
UNIFORM_SHARE = 0.001  # of the draws, so that no weight exceeds 1 / UNIFORM_SHARE


class TimestepSampler(NamedTuple):
    """A way to draw the times of a batch.

    Attributes:
        init: () -> state, a tree of arrays; () without memory.
        draw: (key, b, state) -> (t int[b] in 1..T, weight float[b] of each example's loss).
        update: (state, t, loss[b] before the weight) -> state.
    """

    init: Callable[[], Any]
    draw: Callable[[Array, int, Any], tuple[Array, Array]]
    update: Callable[[Any, Array, Array], Any] = lambda state, t, loss: state


def draw_times(
    timesteps: TimestepSampler | None, key: Array, b: int, memory: Any
) -> tuple[Array, ...]:
    """Returns what `timesteps.draw` does, with the key of a training step; () without a sampler.

    memory: of the sampler, train_step.TrainState.times.
    """
    return timesteps.draw(random.fold_in(key, TIMES), b, memory) if timesteps else ()


def spread(u: Array, b: int) -> Array:
    """Returns (u + i / b) mod 1 for i in 0..b-1, float[b] (arXiv:2107.00630, Appendix I.1)."""
    return jnp.mod(u + jnp.arange(b) / b, 1.0)


def low_discrepancy(p: Process) -> TimestepSampler:
    """Spaces the times of a batch evenly, from a random first one.

    Each is uniform on 1..T. They are shuffled, as parts of a batch are clipped or summed alone.
    """

    def draw(key: Array, b: int, state: Any):
        key_u, key_order = random.split(key)
        u = random.permutation(key_order, spread(random.uniform(key_u), b))
        t = 1 + jnp.minimum(jnp.floor(p.T * u), p.T - 1).astype(jnp.int32)
        return t, jnp.ones(b)

    return TimestepSampler(lambda: (), draw)


class LossHistory(NamedTuple):
    """The last HISTORY losses of each time.

    losses: float[T, HISTORY], that of t = 1 first, each a ring; counts: int32[T], all so far.
    """

    losses: Array
    counts: Array


def importance_probabilities(history: LossHistory) -> Array:
    """Returns p_t ~ sqrt(E[L_t^2]), float[T]; uniform until the history of every time is full."""
    T, n = history.losses.shape
    root = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    p = (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE / T
    return jnp.where(jnp.all(history.counts >= n), p, 1 / T)


def remember(history: LossHistory, t: Array, loss: Array) -> LossHistory:
    """Returns the history with the losses [b] at times t int[b] entered in their order."""
    n = history.losses.shape[1]
    # earlier[i, j]: whether example j has the time of example i and comes before it.
    earlier = jnp.tril(t[:, None] == t[None, :], -1)
    slot = (history.counts[t - 1] + earlier.sum(1, dtype=jnp.int32)) % n
    # Of more than n losses of one time the first are dropped, by a row that is out of range.
    row = jnp.where(earlier.sum(0) < n, t - 1, len(history.counts))
    losses = history.losses.at[row, slot].set(loss.astype(history.losses.dtype), mode="drop")
    return LossHistory(losses, history.counts.at[t - 1].add(1))


def importance(p: Process) -> TimestepSampler:
    """Draws times by the size of their past losses, and weighs losses by 1 / (T p_t).

    So the objective is the same and its noise less, where losses differ much, as those of the bound
    do. Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 18; their LossSecondMomentResampler.
    """

    def init():
        return LossHistory(jnp.zeros((p.T, HISTORY)), jnp.zeros(p.T, jnp.int32))

    def draw(key: Array, b: int, history: LossHistory):
        chances = importance_probabilities(history)
        index = random.choice(key, p.T, (b,), p=chances)
        return index.astype(jnp.int32) + 1, 1 / (p.T * chances[index])

    return TimestepSampler(init, draw, remember)


def lognormal(p: Process, log_mean: float = -1.2, log_std: float = 1.2) -> TimestepSampler:
    """Draws ln sigma, sigma^2 = 1 / alpha_bar - 1, from N(log_mean, log_std^2) within p's range.

    A time has the mass that is nearer to its level than to any other. It is a part of the objective
    of Karras et al. 2022 (arXiv:2206.00364), Table 1, so that all weights are 1.
    """
    level = -half_log_snr(p)[1:]
    edges = np.concatenate([level[:1], (level[1:] + level[:-1]) / 2, level[-1:]])
    rising = special.ndtr((edges - log_mean) / log_std)
    rising = (rising[1:] - rising[0]) / (rising[-1] - rising[0])

    def draw(key: Array, b: int, state: Any):
        u = random.uniform(key, (b,))
        index = jnp.searchsorted(jnp.asarray(rising[:-1], u.dtype), u, side="right")
        return index.astype(jnp.int32) + 1, jnp.ones(b)

    return TimestepSampler(lambda: (), draw)


TIMESTEP_SAMPLERS = {
    "uniform": lambda p: None,
    "low_discrepancy": low_discrepancy,
    "importance": importance,
    "lognormal": lognormal,
}
