"""Algorithm 1: the training state, the averaged weights and one step of all of them.

Pure functions of arrays. The average behaves as the official code's (tpu_utils.make_ema).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from diffusion.gradients import GradFn, Metrics, TrainBatch
from diffusion.posthoc_ema import update_rate
from diffusion.timestep_samplers import TimestepSampler, draw_times

Tree = Any
LABEL_DROPOUT = 2**31  # folded into a step's key; far from what else is folded in or split off


class TrainState(NamedTuple):
    """Everything that training changes.

    step: int32[], the number of updates made. times: the memory of the timestep sampler, if any.
    averages: a tuple of those of posthoc_ema.py.
    """

    step: Array
    params: Tree
    ema: Tree
    opt_state: Tree
    times: Tree = ()
    averages: Tree = ()


class TrainingKeys(NamedTuple):
    """The keys of a training: of the initial weights, of the augmentation, of the steps."""

    params: Array
    augment: Array
    steps: Array


def training_keys(seed: int) -> TrainingKeys:
    """Returns the keys that everything random in a training follows from."""
    return TrainingKeys(*random.split(random.key(seed), 3))


def create_train_state(
    params: Tree,
    tx: optax.GradientTransformation,
    timesteps: TimestepSampler | None = None,
    averages: int = 0,
) -> TrainState:
    """Returns the state before the first step; all averages start at the parameters."""
    ema, *more = (jax.tree.map(jnp.copy, params) for _ in range(1 + averages))
    times = timesteps.init() if timesteps else ()
    return TrainState(jnp.int32(0), params, ema, tx.init(params), times, tuple(more))


def drop_labels(key: Array, label: Array, null: int | None, rate: float) -> Array:
    """Hides a share `rate` of the labels int[b] (Ho and Salimans 2022, arXiv:2207.12598, Alg. 1).

    A hidden label is `null`, which means "no class". key: of the step.
    """
    if not rate:
        return label
    hidden = random.bernoulli(random.fold_in(key, LABEL_DROPOUT), rate, label.shape)
    return jnp.where(hidden, null, label)


def make_train_step(
    grad_fn: GradFn,
    tx: optax.GradientTransformation,
    ema_decay: float,
    timesteps: TimestepSampler | None = None,
    lengths: tuple[float, ...] = (),
) -> Callable[[TrainState, Array, TrainBatch], tuple[TrainState, Metrics]]:
    """Builds (state, key, batch) -> (state, metrics): one update of parameters and averages.

    The metrics are scalars: `loss`, the loss's own, and `grad_norm` before the optimizer's clip.
    The average follows the new parameters with a constant decay, no ramp and no bias correction;
    the first step copies them.

    timesteps: None where each loss draws its own times; lengths: of state.averages, relative.
    """

    def train_step(state: TrainState, key: Array, batch: TrainBatch):
        if timesteps:
            batch = *batch, *draw_times(timesteps, key, len(batch[0]), state.times)
        gradients, metrics, losses = grad_fn(state.params, key, batch, state.step)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.where(state.step == 0, 1.0, 1.0 - ema_decay)
        ema = optax.incremental_update(params, state.ema, rate)
        averages = tuple(
            optax.incremental_update(params, average, update_rate(length, state.step + 1))
            for length, average in zip(lengths, state.averages, strict=True)
        )
        metrics["grad_norm"] = optax.tree.norm(gradients)
        times = timesteps.update(state.times, batch[2], losses) if timesteps else ()
        return TrainState(state.step + 1, params, ema, opt_state, times, averages), metrics

    return train_step
