"""Gradients of the mean loss of a batch: at once, in microbatches, or clipped in groups."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, random

Tree = Any
# x_0 float[b, h, w, c] in [-1, 1], label int[b] or None; then, where they are drawn for the whole
# batch, t int[b] and the weights of their losses float[b].
TrainBatch = tuple[Array | None, ...]
Metrics = dict[str, Array]
GradFn = Callable[..., tuple[Tree, Metrics, Array]]


class Network(NamedTuple):
    """A network with everything bound but image and time, as losses apply it.

    params: everything that is trained, of which a loss may read what is not the network's.
    step: int32[], the number of updates made before.
    """

    apply: Callable[[Array, Array], Array]
    params: Tree
    step: Array | int = 0

    def __call__(self, x_t: Array, t: Array) -> Array:
        return self.apply(x_t, t)


def make_grad_fn(
    loss: Callable,
    apply: Callable[[Tree, Array, Array, Array, Array | None], Array],
    *,
    accumulate: int = 1,
    clip_groups: int = 1,
    clip: float = 1.0,
) -> GradFn:
    """Builds (params, key, batch, step=0) -> (gradient of the mean loss, {name: mean}, losses).

    The losses float[b] of the examples are without their weights, in the order of the batch.

    Args:
      loss: one of losses.LOSSES, built.
      apply: (params, dropout key, x_t, t, label) -> network output.
      accumulate: number of microbatches, taken one after the other to save memory; divides b.
      clip_groups: above 1, the gradients of that many parts of a microbatch are clipped to `clip`
        before they are averaged; 8 is what the official code does on its eight cores.
      clip: largest global norm of each part's gradient.
    """

    def objective(params, key, batch, step):
        x_0, label, *drawn = batch  # times and weights, or neither
        key_loss, key_dropout = random.split(key)
        network = Network(lambda x_t, t: apply(params, key_dropout, x_t, t, label), params, step)
        losses, metrics = loss(network, key_loss, x_0, *drawn[:1])
        weight = drawn[1] if drawn else 1.0
        metrics = jax.tree.map(lambda v: jnp.mean(weight * v), {"loss": losses, **metrics})
        return metrics["loss"], (metrics, losses)

    def grad_fn(params, key, batch, step=0):
        gradient, (metrics, losses) = jax.grad(objective, has_aux=True)(params, key, batch, step)
        return gradient, metrics, losses

    def grad_of_groups(params, key, batch, step=0):
        groups = jax.tree.map(lambda x: x.reshape(clip_groups, -1, *x.shape[1:]), batch)
        keys = random.split(key, clip_groups)
        each = jax.vmap(grad_fn, (None, 0, 0, None))
        gradients, metrics, losses = each(params, keys, groups, step)
        metrics = jax.tree.map(jnp.mean, metrics)
        return mean_of_clipped(gradients, clip), metrics, losses.reshape(-1)

    micro_grad_fn = grad_fn if clip_groups == 1 else grad_of_groups

    def grad_of_microbatches(params, key, batch, step=0):
        # Every k-th image, not a contiguous k-th: a microbatch then lies evenly on all devices.
        def strided(x):
            return jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0)

        def add(total, key_and_part):
            *found, losses = micro_grad_fn(params, *key_and_part, step)
            return jax.tree.map(jnp.add, total, tuple(found)), losses

        parts = (random.split(key, accumulate), jax.tree.map(strided, batch))
        shapes = jax.eval_shape(micro_grad_fn, params, key, batch, step)[:2]
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
