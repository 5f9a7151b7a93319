"""Tests Heun's method at pure noise, and the stationary distribution of Langevin steps."""

import jax
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules
from diffusion.samplers import advance, heun_langevin
from tests.oracle import Gaussian

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))


def test_stationary_distribution_of_langevin_steps():
    """It is N(0, 1 + (1 - beta_s) snr^2) for data N(0, 1), from a start that is far too narrow.

    The score is -x. A step x' = (1 - d) x + sqrt(2 d) z is stationary at the variance
    V = 1 / (1 - d / 2), and d = 2 (1 - beta_s) snr^2 / V for images of many pixels.
    """
    s, snr, a = 12, 0.5, SHORT.alpha_bar
    predict = Gaussian(0.0, 1.0).predict(SHORT, "eps", "fixed_small")
    sampler = heun_langevin.predictor_corrector(SHORT, "ddim", corrections=100, snr=snr)
    start = sampler.init(0.3 * random.normal(random.key(4), (4, 128, 128, 1)))
    x = jax.jit(lambda c: advance(sampler, predict, random.key(5), c, np.array([15, s])))(start).x
    wanted = 1 + a[s] / a[s - 1] * snr**2
    # 16,384 numbers in an image: five standard errors of a variance.
    np.testing.assert_allclose(np.var(x, axis=(1, 2, 3)), wanted, rtol=5 * np.sqrt(2 / 16384))


def test_heun_refuses_pure_noise():
    p = process.from_betas(schedules.jsd(8))  # alpha_bar_T = 0
    with pytest.raises(ValueError, match="heun: this schedule ends in pure noise"):
        heun_langevin.heun(p)
