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

from diffusion.timestep_samplers import TimestepSampler

Tree = Any
# x_0 float[b, h, w, c] in [-1, 1], label int[b] or None; then, where they are drawn for the whole
# batch, t int[b] and the weights of their losses float[b].
TrainBatch = tuple[Array | None, ...]
Metrics = dict[str, Array]
# Folded into a step's key; far from what else is folded in or split off.
LABEL_DROPOUT, TIMES = 2**31, 2**31 + 1


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


class Network(NamedTuple):
    """A network with everything bound but image and time, as losses apply it.

    params: everything that is trained, of which a loss may read what is not the network's.
    """

    apply: Callable[[Array, Array], Array]
    params: Tree

    def __call__(self, x_t: Array, t: Array) -> Array:
        return self.apply(x_t, t)


GradFn = Callable[[Tree, Array, TrainBatch], tuple[Tree, Metrics, Array]]


def make_grad_fn(
    loss: Callable,
    apply: Callable[[Tree, Array, Array, Array, Array | None], Array],
    *,
    accumulate: int = 1,
    clip_groups: int = 1,
    clip: float = 1.0,
) -> GradFn:
    """Builds (params, key, batch) -> (gradient of the mean loss, {name: mean}, losses float[b]).

    The losses of the examples are without their weights, in the order of the batch.

    Args:
      loss: one of losses.LOSSES, built.
      apply: (params, dropout key, x_t, t, label) -> network output.
      accumulate: number of microbatches, taken one after the other to save memory; divides b.
      clip_groups: above 1, the gradients of that many parts of a microbatch are clipped to `clip`
        before they are averaged; 8 is what the official code does on its eight cores.
      clip: largest global norm of each part's gradient.
    """

    def objective(params, key, batch):
        x_0, label, *times = batch
        key_loss, key_dropout = random.split(key)
        network = Network(lambda x_t, t: apply(params, key_dropout, x_t, t, label), params)
        losses, metrics = loss(network, key_loss, x_0, *times[:1])
        weight = times[1] if times else 1.0
        metrics = jax.tree.map(lambda v: jnp.mean(weight * v), {"loss": losses, **metrics})
        return metrics["loss"], (metrics, losses)

    def grad_fn(params, key, batch):
        gradient, (metrics, losses) = jax.grad(objective, has_aux=True)(params, key, batch)
        return gradient, metrics, losses

    def grad_of_groups(params, key, batch):
        groups = jax.tree.map(lambda x: x.reshape(clip_groups, -1, *x.shape[1:]), batch)
        keys = random.split(key, clip_groups)
        gradients, metrics, losses = jax.vmap(grad_fn, (None, 0, 0))(params, keys, groups)
        metrics = jax.tree.map(jnp.mean, metrics)
        return mean_of_clipped(gradients, clip), metrics, losses.reshape(-1)

    micro_grad_fn = grad_fn if clip_groups == 1 else grad_of_groups

    def grad_of_microbatches(params, key, batch):
        # Every k-th image, not a contiguous k-th: a microbatch then lies evenly on all devices.
        def strided(x):
            return jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)

        def add(total, key_and_part):
            *found, losses = micro_grad_fn(params, *key_and_part)
            return jax.tree.map(jnp.add, total, tuple(found)), losses

        parts = (random.split(key, accumulate), jax.tree.map(strided, batch))
        shapes = jax.eval_shape(micro_grad_fn, params, key, batch)[:2]
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        # XLA's CPU backend runs the gradient of a convolution many times slower inside a loop.
        unroll = accumulate if jax.default_backend() == "cpu" else 1
        total, losses = jax.lax.scan(add, zero, parts, unroll=unroll)
        return *jax.tree.map(lambda x: x / accumulate, total), losses.T.reshape(-1)

    return micro_grad_fn if accumulate == 1 else grad_of_microbatches


def mean_of_clipped(gradients: Tree, clip: float) -> Tree:
    """Clips each of the gradients [g, ...] to a global norm of at most `clip` and averages them."""
    norms = jax.vmap(optax.tree.norm)(gradients)
    scale = clip / jnp.maximum(norms, clip) / norms.shape[0]
    return jax.tree.map(lambda g: jnp.einsum("g...,g->...", g, scale.astype(g.dtype)), gradients)


def draw_times(
    timesteps: TimestepSampler | None, key: Array, batch: TrainBatch, memory: Tree
) -> TrainBatch:
    """Returns the batch with the times that the sampler draws for it, if there is one.

    key: of the step; memory: of the sampler, TrainState.times.
    """
    if timesteps is None:
        return batch
    return *batch, *timesteps.draw(random.fold_in(key, TIMES), len(batch[0]), memory)


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
        batch = draw_times(timesteps, key, batch, state.times)
        gradients, metrics, losses = grad_fn(state.params, key, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.where(state.step == 0, 1.0, 1.0 - ema_decay)
        ema = optax.incremental_update(params, state.ema, rate)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        times = timesteps.update(state.times, batch[2], losses) if timesteps else ()
        return TrainState(state.step + 1, params, ema, opt_state, times), metrics

    return train_step
