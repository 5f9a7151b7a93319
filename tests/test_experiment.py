"""Trainings whose times are drawn by importance: devices, resuming, and a step taken again."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from diffusion import experiment
from diffusion.checkpoint import Checkpoints
from diffusion.modes import _nonfinite
from diffusion.runtime.config import Run, with_overrides
from tests.test_configs import config_of

STEPS = 6
# Of three times each is known ten times soon, though parts of the batch are clipped and summed.
CHANGES = {"train.timesteps": "importance", "process.T": 3, "sampler.steps": 3, "loss.name": "vlb"}
CHANGES |= {"optim.accumulate": 2, "optim.clip_groups": 2}


class Affine:
    """A network of two parameters, which compiles at once."""

    num_classes = 0

    def init(self, key, x, t, y, train):
        return {"params": {"w": jnp.float32(0.5), "b": jnp.float32(0.1)}}

    def apply(self, variables, x, t, y, train, rngs):
        w, b = variables["params"]["w"], variables["params"]["b"]
        return w * x + (b * t).reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def config():
    return with_overrides(config_of("digits", "tiny"), CHANGES)


def build(config, devices=4):
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,)
    )
    exp = experiment.build(config, mesh)._replace(net=Affine(), train_net=Affine())
    return exp._replace(abstract_state=experiment._abstract_state(exp))


def train(config, exp, state=None):
    """Yields (state, metrics) on the host after each step, from a state or the first to STEPS."""
    images = experiment.load_split(config, exp)
    update, inputs = experiment.make_input_pipeline(config, exp, images)
    state = state or experiment.make_initial_state(config, exp)
    first = int(state.step)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step counter with floats
        for _, batch in zip(range(first, STEPS), inputs(first), strict=False):
            state, metrics = update(state, *batch)
            yield jax.device_get((state, metrics))


def test_another_seed_is_the_same_program(config):
    """So that its training finds it compiled: the keys are arguments."""
    texts = set()
    for seed in (0, 1):
        changed = with_overrides(config, {"seed": seed})
        exp = build(changed)
        images = experiment.load_split(changed, exp)
        update, inputs = experiment.make_input_pipeline(changed, exp, images)
        with jax.numpy_dtype_promotion("standard"):
            texts.add(update.lower(exp.abstract_state, *next(inputs(0))).as_text())
    assert len(texts) == 1


@pytest.fixture(scope="module")
def trained_by_importance(config):
    return list(train(config, build(config)))


def test_one_device_draws_the_same_times_as_four(config, trained_by_importance):
    """And remembers the same losses, to rounding: only then do later steps have the same times."""
    for (one, ours), (four, theirs) in zip(
        train(config, build(config, 1)), trained_by_importance, strict=True
    ):
        np.testing.assert_array_equal(one.times.counts, four.times.counts)
        np.testing.assert_allclose(one.times.losses, four.times.losses, rtol=1e-4)
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-4)
    assert one.times.counts.sum() == STEPS * config.train.batch_size
    assert np.ptp(one.times.counts) > 20  # the last times were drawn by importance


def test_a_training_by_importance_goes_on_bit_for_bit(config, trained_by_importance, tmp_path):
    exp = build(config)
    middle, last = trained_by_importance[2][0], trained_by_importance[-1][0]
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, middle)
        checkpoints.wait()
        state = checkpoints.restore(exp.abstract_state)
    *_, (resumed, _) = train(config, exp, state)
    jax.tree.map(np.testing.assert_array_equal, resumed, last)


def test_a_step_with_drawn_times_can_be_taken_again(config, trained_by_importance, tmp_path):
    """From the file of a crash: the loss of step 6 follows from what was known before it."""
    exp = build(config)
    run = Run("train", config, tmp_path, None)
    images = experiment.load_split(config, exp)
    before, (_, metrics) = trained_by_importance[-2][0], trained_by_importance[-1]
    path = _nonfinite.save_crash_step(run, images, STEPS, before)
    found, where, _ = _nonfinite.replay_step(run, exp, path)
    assert where is None
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-4)
