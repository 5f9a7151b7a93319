"""Tests the design of Karras et al. 2022 (arXiv:2206.00364): preconditioning, levels, their law."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import losses, process, schedules, targets
from diffusion.samplers import GRIDS
from diffusion.targets import TARGETS, VARIANCES
from diffusion.timestep_samplers import TIMESTEP_SAMPLERS
from tests.oracle import column

EDM = process.from_betas(schedules.SCHEDULES["edm"](1000))
S = 0.5  # the paper's sigma_data


def levels(p):
    """Returns sigma = sqrt(1 - alpha_bar) / sqrt(alpha_bar) at t = 1..T."""
    return np.sqrt((1 - p.alpha_bar[1:]) / p.alpha_bar[1:])


def paper(n):
    """Equation 5 with the values of Table 1, from the highest level to the lowest."""
    i, (low, high) = np.arange(n), (0.002 ** (1 / 7), 80 ** (1 / 7))
    return (high + i / (n - 1) * (low - high)) ** 7


def test_levels():
    for T in (2, 18, 1000):
        p = process.from_betas(schedules.SCHEDULES["edm"](T))
        np.testing.assert_allclose(levels(p)[::-1], paper(T), rtol=1e-9)  # 1 - alpha_bar cancels


def test_the_karras_grid_takes_the_paper_s_levels():
    """To half a step of the chain, which are 0.6% apart near 80, and 4% near 0.002."""
    ts = GRIDS["karras"](EDM, 18)
    assert ts[0] == 1000 and ts[-2:].tolist() == [1, 0]
    root = levels(EDM)[ts[:-1] - 1] ** (1 / 7)
    np.testing.assert_allclose(root, paper(18) ** (1 / 7), atol=0.51 * (root[0] - root[-1]) / 999)


def test_preconditioning(x64):
    """Table 1: D(y; sigma) = c_skip y + c_out F(c_in y), and its loss is the error of F."""
    t = jnp.array([1, 3, 100, 500, 900, 1000])
    sigma = column(levels(EDM)[np.asarray(t) - 1])
    c_skip, c_in = S**2 / (sigma**2 + S**2), 1 / np.sqrt(sigma**2 + S**2)
    c_out = sigma * S * c_in
    x_0, eps = random.normal(random.key(0), (2, 6, 4, 4, 1))
    y, asked = x_0 + sigma * eps, []

    def F(x, model_t):
        asked.append(x)
        return jnp.tanh(x) + column(model_t) / 1000

    args = TARGETS["edm"], VARIANCES["fixed_small"]
    x_t = process.q_sample(EDM, x_0, t, eps)
    output = F(c_in * y, t.astype(float) - 1)
    D = c_skip * y + c_out * output
    found = targets.make_predict(EDM, F, *args, clip=False)(x_t, t)
    np.testing.assert_allclose(found.x_0, D, rtol=1e-9, atol=1e-9)  # float64; 1 - alpha_bar cancels
    loss, _ = losses.LOSSES["simple"](EDM, *args)(F, random.key(1), x_0, t)
    np.testing.assert_allclose(*asked[:2], rtol=1e-9)
    x_t = asked.pop() / c_in  # of other noise, which the loss drew
    D = c_skip * x_t + c_out * F(c_in * x_t, t.astype(float) - 1)
    weight = (sigma**2 + S**2) / (sigma * S) ** 2
    wanted = (weight * (D - x_0) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, wanted, rtol=1e-7)
    scale = TARGETS["edm"].x0_scale(EDM)[np.asarray(t)]
    np.testing.assert_allclose(scale, np.abs(c_out).ravel(), rtol=1e-9)


def test_inputs_and_outputs_have_unit_variance():
    """For images of standard deviation 0.5, at every level."""
    t = jnp.array([1, 100, 500, 900, 1000]).repeat(20_000)
    x_0 = S * random.normal(random.key(0), (len(t), 1))
    eps = random.normal(random.key(1), x_0.shape)
    x_t, target = process.q_sample(EDM, x_0, t, eps), TARGETS["edm"]
    for x in (target.scale_input(EDM, x_t, t), target.from_x0(EDM, x_0, eps, x_t, t)):
        np.testing.assert_allclose(x.reshape(5, -1).std(axis=1), 1, atol=0.03)  # six deviations


@pytest.mark.parametrize("name", ["edm", "linear", "jsd"])
def test_law_of_the_levels(name):
    """ln sigma ~ N(-1.2, 1.2^2) within the chain: a chi-square test over its quantiles."""
    p = process.from_betas(schedules.SCHEDULES[name](1000))
    sampler = TIMESTEP_SAMPLERS["lognormal"](p)
    t, weight = sampler.draw(random.key(4), 20_000, sampler.init())
    assert t.dtype == jnp.int32 and t.min() >= 1 and t.max() <= 1000 and np.all(weight == 1)
    level = -process.half_log_snr(p)[1:]
    low, high = stats.norm.cdf((level[[0, -1]] + 1.2) / 1.2)
    mass = (stats.norm.cdf((level[np.asarray(t) - 1] + 1.2) / 1.2) - low) / (high - low)
    # Levels have mass: uniform numbers within that of each make the law continuous.
    edges = np.concatenate([level[:1], (level[1:] + level[:-1]) / 2, level[-1:]])
    edges = (stats.norm.cdf((edges + 1.2) / 1.2) - low) / (high - low)
    u = np.random.RandomState(0).uniform(size=len(t))
    left, right = edges[np.asarray(t) - 1], edges[np.asarray(t)]
    assert np.all((left <= mass) & (mass <= right))
    assert stats.kstest(left + u * (right - left), "uniform").pvalue > 1e-3
