"""Tests the sampler for consistency functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import process, schedules
from diffusion.samplers import GRIDS, SAMPLERS, sample
from tests.oracle import Gaussian

LINEAR = process.from_betas(schedules.linear(1000))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_law_of_the_data_is_kept_exactly(steps, x64, monkeypatch):
    """By the known consistency function every prediction has it; no draws, no standard errors.

    x_0 is linear in x_T and in the noise of each step, so that its variance is the sum of the
    squared derivatives.
    """
    known, ts = Gaussian(0.3, 0.04), GRIDS["angle"](LINEAR, steps)
    sampler, predict = SAMPLERS["consistency"](LINEAR), known.consistency_predict(LINEAR)

    def draw(x_T, z):
        monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: z[t].reshape(like.shape))
        return sample(sampler, predict, jax.random.key(0), x_T.reshape(1, 1), ts)[0, 0]

    mean_T, var_T = known.marginal(LINEAR, 1000)
    at = jnp.asarray(mean_T), jnp.zeros(1001)
    by_x, by_z = jax.jit(jax.grad(draw, (0, 1)))(*at)
    np.testing.assert_allclose(draw(*at), 0.3, atol=1e-12)
    np.testing.assert_allclose(by_x**2 * var_T + (by_z**2).sum(), 0.04, atol=1e-12)
    # What x_T decides: all in one step, hardly anything after noise at more than the data's level.
    np.testing.assert_allclose(by_x**2 * var_T / 0.04, 1 if steps == 1 else 0, atol=0.1)


def test_the_angle_grid_halves_the_angle():
    """Where image and noise have the same size, alpha_bar is 1/2; thirds have 3/4 and 1/4."""
    for steps, middle in ((2, [0.5]), (3, [0.25, 0.75])):
        ts = GRIDS["angle"](LINEAR, steps)
        np.testing.assert_allclose(LINEAR.alpha_bar[ts[1:-1]], middle, atol=4e-3)
