"""Tests the gradients of a batch: microbatches and clipped groups against the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random

from diffusion import gradients, train_step
from tests.test_train_step import dot, linear_loss, start_params


def random_batch(b, n=5):
    return {"0": random.normal(random.key(1), (b, n)), "1": random.normal(random.key(2), (b, 3))}


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_accumulated_gradients_are_the_gradient_of_the_whole_batch(parts):
    batch = (random_batch(12), None)
    grad_fn, args = gradients.make_grad_fn(linear_loss, dot), (start_params(), random.key(0))
    whole, metrics, per_example = grad_fn(*args, batch)
    gradient = gradients.make_grad_fn(linear_loss, dot, accumulate=parts)
    summed, same_metrics, same = jax.jit(gradient)(start_params(), random.key(0), batch)
    # Sums of 12 float32 numbers in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, summed)
    np.testing.assert_allclose(metrics["loss"], same_metrics["loss"], atol=1e-6)
    np.testing.assert_array_equal(per_example, same)  # in the order of the batch


def test_accumulation_and_clip_groups_together():
    """Twelve examples in 2 parts of 3 groups: the mean of six clipped means, found by hand."""
    batch = random_batch(12)
    gradient = gradients.make_grad_fn(linear_loss, dot, accumulate=2, clip_groups=3, clip=0.5)
    found, *_ = gradient(start_params(), random.key(0), (batch, None))
    groups = np.concatenate([batch["0"], batch["1"]], axis=1)
    groups = [groups[part::2].reshape(3, 2, -1).mean(axis=1) for part in (0, 1)]
    groups = np.concatenate(groups)
    groups *= np.minimum(1, 0.5 / np.linalg.norm(groups, axis=1, keepdims=True))
    expected = groups.mean(axis=0)
    np.testing.assert_allclose(np.append(found["0"], found["1"]), expected, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_groups": 3}])
def test_a_loss_knows_how_many_updates_were_made(options):
    def loss(network, key, x):
        values, _ = linear_loss(network, key, x)
        return values, {"step": jnp.broadcast_to(network.step.astype(jnp.float32), values.shape)}

    tx = optax.sgd(0.1)
    state = train_step.create_train_state(start_params(), tx)
    grad_fn = gradients.make_grad_fn(loss, dot, **options)
    step = jax.jit(train_step.make_train_step(grad_fn, tx, 0.9))
    for made in range(3):
        state, metrics = step(state, random.key(0), (random_batch(12), None))
        assert float(metrics["step"]) == made


def test_mean_of_clipped_leaves_zero_gradients_alone():
    zero = {"a": jnp.zeros((4, 3))}
    assert np.all(gradients.mean_of_clipped(zero, 1.0)["a"] == 0)


@pytest.mark.parametrize("accumulate, clip_groups", [(1, 1), (3, 1), (1, 2), (2, 3)])
def test_drawn_times_and_weights_stay_with_their_examples(accumulate, clip_groups):
    """A loss of t x: the weighted mean and its gradient, and the losses without their weights."""
    x = random.normal(random.key(0), (12, 5))
    t, weight = jnp.arange(1, 13), random.uniform(random.key(1), (12,))

    def loss(apply, key, x_0, t):
        values = apply(x_0, None) * t.astype(jnp.float32)
        return values, {"twice": 2 * values}

    options = {"accumulate": accumulate, "clip_groups": clip_groups, "clip": 1e9}
    gradient = gradients.make_grad_fn(loss, dot, **options)
    params = {"0": jnp.arange(5.0)}
    found, metrics, values = gradient(params, random.key(0), ({"0": x}, None, t, weight))
    wanted = np.asarray(x @ params["0"]) * np.asarray(t)
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], np.mean(weight * wanted), rtol=1e-5)
    np.testing.assert_allclose(metrics["twice"], 2 * np.mean(weight * wanted), rtol=1e-5)
    of_all = np.einsum("b,b,bi->i", weight, np.float32(t), x) / 12
    np.testing.assert_allclose(found["0"], of_all, rtol=1e-5, atol=1e-6)
