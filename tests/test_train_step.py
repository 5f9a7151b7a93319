"""Optimizer, average and step against the official code; microbatches against the full batch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random

from diffusion import (
    gradients,
    losses,
    optimisers,
    process,
    schedules,
    targets,
    train_step,
    unet,
)
from tests.conftest import GOLDEN

# Official TensorFlow 1 code (github.com/hojonathanho/diffusion, commit 1e0dceb):
# utils.make_optimizer and tpu_utils.make_ema fed ten given gradients.
OFFICIAL = np.load(GOLDEN / "ema_adam.npz")
# Adam's epsilon stands elsewhere in optax; with these gradients both round at about 1e-7.
ROUNDING = 2e-6


@pytest.fixture(autouse=True)
def optax_promotes():
    """optax multiplies its int32 step counter with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RUNS = ("official", "nowarm", "fast")


def settings(run):
    s = json.loads(str(OFFICIAL[f"{run}.settings_json"]))
    schedule = optimisers.warmup_schedule(s["lr"], s["warmup"])
    return s, optimisers.make_optimizer("adam", schedule, s["grad_clip"])


def linear_loss(apply, key, x_0):
    """A loss whose gradient with respect to the parameters is the batch itself, averaged."""
    return apply(x_0, None), {}


def dot(params, key, x, t, label):
    return sum(jnp.einsum("bi,i->b", x[name], params[name]) for name in params)


def start_params():
    return {"0": jnp.asarray(OFFICIAL["p0.0"]), "1": jnp.asarray(OFFICIAL["p0.1"])}


def run(name, arrays, **options):
    """Yields (state, metrics) of ten steps. arrays: the gradients, {leaf: [10, b, ...]}."""
    s, tx = settings(name)
    grad_fn = gradients.make_grad_fn(linear_loss, dot, **options)
    step = jax.jit(train_step.make_train_step(grad_fn, tx, s["ema_decay"]))
    state = train_step.create_train_state(start_params(), tx)
    for i in range(10):
        batch = ({leaf: jnp.asarray(g[i]) for leaf, g in arrays.items()}, None)
        state, metrics = step(state, random.key(0), batch)
        yield state, metrics


@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_equal_the_official_optimiser(name):
    arrays = {leaf: OFFICIAL[f"grads.{leaf}"][:, None] for leaf in "01"}
    lr = optimisers.warmup_schedule(*(settings(name)[0][k] for k in ("lr", "warmup")))
    for i, (state, metrics) in enumerate(run(name, arrays)):
        assert state.step == OFFICIAL[f"{name}.global_step"][i] == i + 1
        np.testing.assert_allclose(lr(i), OFFICIAL[f"{name}.lr"][i], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], OFFICIAL[f"{name}.gnorm"][i], rtol=1e-6)
        adam = state.opt_state[1][0]
        for leaf in "01":
            for ours, theirs in [
                (state.params, "params"),
                (state.ema, "after.ema"),
                (adam.mu, "m"),
                (adam.nu, "v"),
            ]:
                expected = OFFICIAL[f"{name}.{theirs}.{leaf}"][i]
                np.testing.assert_allclose(ours[leaf], expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", RUNS)
def test_clip_groups_equal_the_official_eight_cores(name):
    """Each core clips its own mean gradient before the average: eight groups of one example."""
    arrays = {leaf: OFFICIAL[f"shard_grads.{leaf}"] for leaf in "01"}
    for i, (state, _) in enumerate(run(name, arrays, clip_groups=8, clip=1.0)):
        for leaf in "01":
            for ours, theirs in [(state.params, "params"), (state.ema, "ema")]:
                expected = OFFICIAL[f"{name}.shards8.{theirs}.{leaf}"][i]
                np.testing.assert_allclose(ours[leaf], expected, rtol=ROUNDING, atol=ROUNDING)


def test_clip_groups_are_not_one_clip_of_the_whole():
    """The forms must differ where a group's gradient is large, or the setting does nothing."""
    arrays = {leaf: OFFICIAL[f"shard_grads.{leaf}"] for leaf in "01"}
    *_, (by_group, _) = run("fast", arrays, clip_groups=8, clip=1.0)
    *_, (at_once, _) = run("fast", arrays)
    assert np.abs(by_group.params["0"] - at_once.params["0"]).max() > 1e-3


def test_the_average_is_copied_first_and_then_decays_by_its_own_rate():
    """Official float32 1 - decay is 1.00017e-4; ours is rounded once: 1.7e-4 relative."""
    assert OFFICIAL["ema_decay_f32"][0] < 1e-9  # step 0: a decay of nothing, which is a copy
    tx, decay = optax.set_to_zero(), settings("official")[0]["ema_decay"]
    step = train_step.make_train_step(lambda params, *_: (params, {}, None), tx, decay)
    for i, rate in enumerate(OFFICIAL["ema_one_minus_decay_f32"]):
        state = train_step.TrainState(
            jnp.int32(i), {"w": jnp.ones(1)}, {"w": jnp.zeros(1)}, tx.init({})
        )
        # From 0 to parameters that stay at 1: the average is the rate.
        np.testing.assert_allclose(step(state, None, ((), None))[0].ema["w"], [rate], rtol=2e-4)


def curve(dtype, steps=60):
    """Losses of a small network trained on blobs; the noise of a step is that of any dtype."""
    net = unet.UNet(ch=16, ch_mult=(1, 2), num_res_blocks=1, dropout=0.1, dtype=dtype)
    betas = schedules.SCHEDULES["linear"](100, 1e-3, 0.2)
    target, variance = targets.TARGETS["eps"], targets.VARIANCES["fixed_large"]
    loss = losses.LOSSES["simple"](process.from_betas(betas), target, variance)

    def apply(params, key, x_t, t, label):
        return net.apply({"params": params}, x_t, t, train=True, rngs={"dropout": key})

    tx = optimisers.make_optimizer("adam", optimisers.warmup_schedule(3e-3, 10), 1.0)
    step = train_step.make_train_step(gradients.make_grad_fn(loss, apply), tx, 0.99)
    place = np.random.RandomState(0).uniform(2, 6, (256, 2))
    y, x = np.mgrid[:8, :8]
    away = (y - place[:, :1, None]) ** 2 + (x - place[:, 1:, None]) ** 2
    blobs = jnp.asarray(2 * np.exp(-away / 4)[..., None] - 1, jnp.float32)
    key = random.key(0, impl="rbg")

    params = jax.jit(lambda: net.init(key, blobs[:1], jnp.zeros(1), train=False)["params"])()

    @jax.jit
    def update(state):
        at = random.randint(random.fold_in(random.key(1), state.step), (32,), 0, len(blobs))
        return step(state, random.fold_in(random.key(2), state.step), (blobs[at], None))

    state, found = train_step.create_train_state(params, tx), []
    for _ in range(steps):  # no scan: the gradient of a convolution is slow in a loop on a CPU
        state, metrics = update(state)
        found.append(metrics["loss"])
    return np.asarray(found)


def test_the_loss_in_bfloat16_is_the_loss_in_float32_within_its_noise():
    full, half = curve("float32"), curve("bfloat16")
    noise = np.std(np.diff(full[30:])) / np.sqrt(2)  # of a step's loss around its course
    assert full[-20:].mean() < 0.5 * full[:3].mean()  # it did learn
    assert not np.array_equal(full, half)  # and bfloat16 is another computation
    # Both means of 20 have an error of noise / sqrt(20), most of it shared: same images, same eps.
    assert abs(half[-20:].mean() - full[-20:].mean()) < noise / np.sqrt(20)


# Labels


def test_hidden_labels_are_no_class_at_the_given_rate():
    """Of 40,000 labels a share of 0.3 becomes the null label, within five standard errors."""
    label = jnp.arange(40_000) % 10
    found = np.asarray(train_step.drop_labels(random.key(0), label, 10, 0.3))
    hidden = found == 10
    assert abs(hidden.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 40_000)
    np.testing.assert_array_equal(found[~hidden], np.asarray(label)[~hidden])


def test_labels_without_dropout():
    label = jnp.arange(4)
    assert train_step.drop_labels(random.key(0), label, None, 0.0) is label
