"""Tests the loop that runs samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules, targets
from diffusion.samplers import SAMPLERS, sample, trajectory
from diffusion.samplers.ancestral import ancestral
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
ALL = np.arange(20, -1, -1)  # every time of SHORT
TS = np.array([20, 17, 16, 9, 4, 1, 0])
KEY = random.key(5)
KEYS = process.example_keys(KEY, 4)


def x_T(b=4):
    return random.normal(random.key(1), (4, 4, 4, 3))[:b]


@pytest.fixture(scope="module", params=["ancestral", "unipc"])
def loop(request):
    """Returns (sampler, predict) of a sampler with noise and of one with memory."""
    return SAMPLERS[request.param](SHORT), targets.make_predict(
        SHORT, oracle.toy, TARGETS["eps"], VARIANCES["fixed_large"]
    )


def test_sample_is_the_end_of_the_trajectory(loop):
    """Also if one program has the times as constants and the other as arguments."""
    sampler, predict = loop
    constant = jax.jit(lambda key, x: sample(sampler, predict, key, x, TS))(KEY, x_T())
    argument = jax.jit(lambda *a: trajectory(sampler, predict, *a))(KEY, x_T(), jnp.asarray(TS))
    # Two programs of the same formulas: XLA may fuse, and so round, them differently.
    np.testing.assert_allclose(constant, argument.x[-1], atol=1e-6)


def test_one_key_for_a_batch(loop):
    """It is folded into a key per example, which does not depend on the batch size."""
    sampler, predict = loop
    run = jax.jit(lambda key, x: sample(sampler, predict, key, x, TS))
    whole = run(KEY, x_T())
    # Float32, as above.
    np.testing.assert_allclose(run(KEYS, x_T()), whole, atol=1e-5)
    np.testing.assert_allclose(run(KEY, x_T(2)), whole[:2], atol=1e-5)


def known_x_0(x, t):
    return targets.Prediction(x, x, jnp.zeros_like(x), jnp.zeros_like(x))


@pytest.mark.parametrize("ts", [[], [5], [5, 5, 0], [0, 5], [5, 3, -1], [3, 4, 0]])
@pytest.mark.parametrize("run", [sample, trajectory])
def test_times_are_checked(run, ts):
    with pytest.raises(ValueError, match="strictly falling"):
        run(ancestral(SHORT), known_x_0, KEY, x_T(), np.array(ts, int))


@pytest.mark.parametrize(
    "x", [jnp.zeros((4, 4, 4, 3), int), jnp.zeros(4)], ids=["ints", "one axis"]
)
@pytest.mark.parametrize("run", [sample, trajectory])
def test_images_are_checked(run, x):
    with pytest.raises(ValueError, match="x_T: expected floats"):
        run(ancestral(SHORT), known_x_0, KEY, x, ALL)


@pytest.mark.parametrize("run", [sample, trajectory])
def test_keys_are_counted(run):
    with pytest.raises(ValueError, match=r"one per example \[4\]"):
        run(ancestral(SHORT), known_x_0, random.split(KEY, 3), x_T(), ALL)
