"""Training: the state, the optimiser, the moving average of the weights, and one step of all of it.

Pure functions of arrays; main.py compiles and drives them. The optimiser behaves as the official
one does (utils.make_optimizer, tpu_utils.make_ema), differences are named where they are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

Tree = Any


Batch = tuple[Array, Array | None]  # x_0 float[b, h, w, c] in [-1, 1], label int[b] or None


class TrainState(NamedTuple):
    """Everything that training changes; arrays only. step: int32[], the number of updates made."""

    step: Array
    params: Tree
    ema: Tree
    opt_state: Tree


def warmup_schedule(lr: float, steps: int) -> optax.Schedule:
    """lr * min(step / steps, 1), step counted from 0: as officially, the first update has rate 0.

    optax's own warm-up counts down from lr and so loses four digits of the first rates.
    """
    return lambda step: lr * jnp.minimum(jnp.float32(step) / steps, 1.0) if steps else lr


def make_optimizer(lr: float, warmup_steps: int, clip: float) -> optax.GradientTransformation:
    """Adam (0.9, 0.999, 1e-8) with warm-up, behind a clip of the whole gradient's norm.

    optax adds epsilon to the bias-corrected root, TensorFlow 1 to the uncorrected one. The updates
    differ only where |gradient| is within a few orders of 1e-8.
    """
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(warmup_schedule(lr, warmup_steps)))


def create_train_state(params: Tree, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), tx.init(params))


def mean_of_clipped(gradients: Tree, clip: float) -> Tree:
    """[g, ...] gradients, each clipped to a norm of at most `clip` over all its leaves, averaged.

    The official code clips so on each of eight TPU cores, before the average over the cores.
    """
    norms = jax.vmap(optax.tree.norm)(gradients)
    scale = clip / jnp.maximum(norms, clip) / norms.shape[0]
    return jax.tree.map(lambda g: jnp.einsum("g...,g->...", g, scale.astype(g.dtype)), gradients)


def make_grad_fn(
    loss: Callable,
    apply: Callable[[Tree, Array, Array, Array, Array | None], Array],
    *,
    accumulate: int = 1,
    clip_groups: int = 1,
    clip: float = 1.0,
) -> Callable[[Tree, Array, Batch], tuple[Tree, dict[str, Array]]]:
    """(params, key, batch) -> (gradient of the mean loss, {name: mean over the batch}).

    loss: of losses.py. apply: (params, key of the dropout, x_t, t, label) -> output.
    accumulate: the batch is taken in that many parts, one after the other, to save memory.
    clip_groups: more than 1 cuts each part into groups whose gradients are clipped to `clip` before
    they are averaged; 8 is what the official code does on its eight cores. Both must divide b.
    """

    def objective(params, key, batch):
        x_0, label = batch
        key_loss, key_dropout = random.split(key)
        values, metrics = loss(
            lambda x_t, t: apply(params, key_dropout, x_t, t, label), key_loss, x_0
        )
        return values.mean(), jax.tree.map(jnp.mean, {"loss": values, **metrics})

    gradient = jax.grad(objective, has_aux=True)

    def by_group(params, key, batch):
        groups = jax.tree.map(lambda x: x.reshape(clip_groups, -1, *x.shape[1:]), batch)
        keys = random.split(key, clip_groups)
        gradients, metrics = jax.vmap(gradient, (None, 0, 0))(params, keys, groups)
        return mean_of_clipped(gradients, clip), jax.tree.map(jnp.mean, metrics)

    part_gradient = gradient if clip_groups == 1 else by_group

    def in_parts(params, key, batch):
        # Every k-th image, not a contiguous k-th of them: a part then lies on all devices evenly.
        def strided(x):
            return jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)

        def add(total, key_and_part):
            return jax.tree.map(jnp.add, total, part_gradient(params, *key_and_part)), None

        parts = (random.split(key, accumulate), jax.tree.map(strided, batch))
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part_gradient, params, key, batch)
        )
        # XLA's CPU backend runs the gradient of a convolution many times slower inside a loop.
        unroll = accumulate if jax.default_backend() == "cpu" else 1
        total, _ = jax.lax.scan(add, zero, parts, unroll=unroll)
        return jax.tree.map(lambda x: x / accumulate, total)

    return part_gradient if accumulate == 1 else in_parts


def make_train_step(
    loss: Callable,
    apply: Callable,
    tx: optax.GradientTransformation,
    ema_decay: float,
    **gradient_options,
) -> Callable[[TrainState, Array, Batch], tuple[TrainState, dict[str, Array]]]:
    """(state, key, batch) -> (state, metrics): one update of parameters and average (Algorithm 1).

    metrics: scalars; `loss` and the loss's own, `grad_norm` before the optimiser's clip. The
    average follows the new parameters with a constant decay, no ramp and no bias correction, and
    the first step copies them. gradient_options: of `make_gradient`.
    """
    gradient = make_grad_fn(loss, apply, **gradient_options)

    def step(state: TrainState, key: Array, batch: Batch):
        gradients, metrics = gradient(state.params, key, batch)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = jnp.where(state.step == 0, 1.0, 1.0 - ema_decay)
        ema = optax.incremental_update(params, state.ema, rate)
        metrics["grad_norm"] = optax.tree.norm(gradients)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step
