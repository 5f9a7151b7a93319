"""Algorithm 1: the training state, the optimizer, the averaged weights and one step of all of them.

Pure functions of arrays. The optimizer and the average behave as the official code's
(utils.make_optimizer, tpu_utils.make_ema); differences are named where they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

from diffusion.gradients import GradFn, Metrics, TrainBatch
from diffusion.timestep_samplers import TimestepSampler, draw_times

Tree = Any
LABEL_DROPOUT = 2**31  # folded into a step's key; far from what else is folded in or split off


class TrainState(NamedTuple):
    """Everything that training changes.

    step: int32[], the number of updates made. times: the memory of the timestep sampler, if any.
    """

    step: Array
    params: Tree
    ema: Tree
    opt_state: Tree
    times: Tree = ()


class TrainingKeys(NamedTuple):
    """The keys of a training: of the initial weights, of the augmentation, of the steps."""

    params: Array
    augment: Array
    steps: Array


def training_keys(seed: int) -> TrainingKeys:
    """Returns the keys that everything random in a training follows from."""
    return TrainingKeys(*random.split(random.key(seed), 3))


def create_train_state(
    params: Tree, tx: optax.GradientTransformation, timesteps: TimestepSampler | None = None
) -> TrainState:
    """Returns the state before the first step; the average starts at the parameters."""
    ema, times = jax.tree.map(jnp.copy, params), timesteps.init() if timesteps else ()
    return TrainState(jnp.int32(0), params, ema, tx.init(params), times)


def warmup_schedule(lr: float, steps: int) -> optax.Schedule:
    """Returns lr * min(step / steps, 1): as in the official code the first update has rate 0.

    optax's own warm-up counts down from lr and so loses four digits of the first rates.
    """
    return lambda step: lr * jnp.minimum(jnp.float32(step) / steps, 1.0) if steps else lr


def make_optimizer(lr: float, warmup_steps: int, clip: float) -> optax.GradientTransformation:
    """Returns Adam (0.9, 0.999, 1e-8) with warm-up, behind a clip of the gradient's global norm.

    optax adds epsilon to the bias-corrected root, TensorFlow 1 to the uncorrected one. The updates
    differ only where |gradient| is within a few orders of magnitude of 1e-8.
    """
    schedule = warmup_schedule(lr, warmup_steps)
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


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
) -> Callable[[TrainState, Array, TrainBatch], tuple[TrainState, Metrics]]:
    """Builds (state, key, batch) -> (state, metrics): one update of parameters and average.

    The metrics are scalars: `loss`, the loss's own, and `grad_norm` before the optimizer's clip.
    The average follows the new parameters with a constant decay, no ramp and no bias correction;
    the first step copies them. timesteps: None where each loss draws its own times.
    """

    def train_step(state: TrainState, key: Array, batch: TrainBatch):
        batch = *batch, *draw_times(timesteps, key, len(batch[0]), state.times)
        gradients, metrics, losses = grad_fn(state.params, key, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.where(state.step == 0, 1.0, 1.0 - ema_decay)
        ema = optax.incremental_update(params, state.ema, rate)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        times = timesteps.update(state.times, batch[2], losses) if timesteps else ()
        return TrainState(state.step + 1, params, ema, opt_state, times), metrics

    return train_step
