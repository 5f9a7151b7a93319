"""Tests consistency tuning: the official values, the known consistency function, the draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats
from scipy.special import gammaln

from diffusion import consistency, losses, process, schedules
from diffusion.gradients import Network
from diffusion.targets import TARGETS, VARIANCES
from tests.oracle import Gaussian, official

LINEAR = process.from_betas(schedules.linear(1000))
KEY = random.key(3)


def toy_denoiser(theta, x, sigma):
    """The parametric denoiser behind the official arrays, of images [b, h, w, c]."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    root = jnp.sqrt(sigma**2 + 0.25)
    wave = theta * jnp.tanh(2 * x / root) + 0.1 * jnp.sin(jnp.log(sigma) / 4)
    return 0.25 / root**2 * x + 0.5 * sigma / root * wave


@functools.partial(jax.grad, has_aux=True)
def toy_gradient(theta, x_0, eps, sigma, r, c):
    """The gradient of the mean of the toy's losses at sigma, and these: with x_0 where r is 0."""

    def denoise(level):
        return toy_denoiser(theta, x_0 + level.reshape(-1, 1, 1, 1) * eps, level)

    at_r = jax.lax.stop_gradient(denoise(jnp.where(r > 0, r, 1)))
    wanted = jnp.where((r > 0).reshape(-1, 1, 1, 1), at_r, x_0)
    losses = consistency.distance(denoise(sigma), wanted, sigma, r, c)
    return losses.mean(), losses


# github.com/locuslab/ect, commit 4311059, training/loss.py. Tolerances: twice its own float32.
@official("ect", "r.value*")
def test_official_lower_levels(official):
    """At 41 levels, 9 stages and 5 settings of the mapping."""
    for key in ("r.value", "r.value.f64"):
        sigma = official["r.t"].astype(official[key].dtype)
        settings = (official[f"r.{name}"] for name in ("q", "k", "b", "adj"))
        ours = [
            [consistency.lower_level(sigma, stage, *setting) for stage in official["r.stage"]]
            for setting in zip(*settings, strict=True)
        ]
        official.close(key, ours, rtol=1e-15 if key.endswith("f64") else 2e-6, atol=1e-5)


@official("ect", "case.?.r*", "case.?.weight*", "case.?.loss*", "case.?.dmean_dtheta*")
def test_official_losses_and_gradients(official, x64):
    """The gradient shows that the evaluation at r has none."""
    settings = [official[f"case.{name}"] for name in ("q", "stage", "c", "adj")]
    for i, (q, stage, c, adjust) in enumerate(zip(*settings, strict=True)):
        for twin, dtype, rtol in (("", jnp.float32, 1e-3), (".f64", jnp.float64, 1e-12)):
            names = "images", "eps", f"t{twin}", "theta"
            x_0, eps, sigma, theta = (jnp.asarray(official[name], dtype) for name in names)
            r = consistency.lower_level(np.asarray(sigma), stage, q, adjust=str(adjust))
            args = x_0, eps, sigma, jnp.asarray(r, dtype), jnp.asarray(c, dtype)
            gradient, loss = jax.jit(toy_gradient)(theta, *args)
            official.close(f"case.{i}.r{twin}", r, rtol=rtol, atol=rtol)
            official.close(f"case.{i}.weight{twin}", 1 / (np.asarray(sigma) - r), rtol=rtol)
            official.close(f"case.{i}.loss{twin}", loss, rtol=rtol)
            official.close(f"case.{i}.dmean_dtheta{twin}", gradient, rtol=rtol)


def test_distance_of_equal_images_has_a_gradient():
    x, one = jnp.ones((2, 3)), jnp.ones(2)
    for c in (0.0, 0.1):
        value, gradient = jax.value_and_grad(
            lambda y, c=c: consistency.distance(y, x, 2 * one, one, c).sum()
        )(x)
        assert value == 0 and np.all(np.asarray(gradient) == 0)


def known_network(known, p, x_t, model_t):
    """The eps of the data's exact consistency function, between p's steps too."""
    ln_sigma = jnp.interp(model_t, p.model_t[1:], -process.half_log_snr(p)[1:])
    sigma = jnp.exp(ln_sigma).reshape(-1, 1, 1, 1)
    y = x_t * jnp.sqrt(1 + sigma**2)
    x_0 = known.mean + (y - known.mean) * np.sqrt(known.var) / jnp.sqrt(known.var + sigma**2)
    return (y - x_0) / sigma


def tuning(target="eps", variance="fixed_small", p=LINEAR, **options):
    return losses.LOSSES["consistency"](p, TARGETS[target], VARIANCES[variance], **options)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_loss_of_the_known_consistency_function(sigma, x64):
    """It is known for every r, and nears its limit as 2^-stage.

    f(x_0 + sigma e) - f(x_0 + r e) is Gaussian in every pixel with a known variance, whose root
    over sigma - r tends to var / (var + sigma^2) as r nears sigma.
    """
    known, b, d = Gaussian(0.3, 0.25), 4096, 16
    std, stages = np.sqrt(known.var), np.array([4.0, 5.0, 6.0])
    x_0 = known.mean + std * random.normal(KEY, (b, 4, 4, 1))
    drawn = {"log_mean": float(np.log(sigma)), "log_std": 1e-4}

    @jax.jit
    def run(key):
        apply = functools.partial(known_network, known, LINEAR)
        return [tuning(stage=stage, **drawn)(apply, key, x_0)[0] for stage in stages]

    r = consistency.lower_level(sigma, stages)
    slope_0 = std * (1 / np.hypot(std, sigma) - 1 / np.hypot(std, r))
    slope_eps = sigma / np.hypot(std, sigma) - r / np.hypot(std, r)
    length = np.sqrt(2) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2))  # mean of |N(0, 1)^d|
    exact = length * std * np.hypot(slope_0, slope_eps) / (sigma - r)
    ours = np.stack(run(KEY))
    # Four standard errors, and the rounding of sigma and r to levels that are 0.24% apart.
    error = ours.std(1) / np.sqrt(b)
    np.testing.assert_array_less(np.abs(ours.mean(1) - exact), 4 * error + 0.005 * exact)
    off = exact / (length * known.var / (known.var + sigma**2)) - 1
    np.testing.assert_allclose(off[1:] / off[:-1], 0.5, rtol=0.15)  # the next order of 2^-stage


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_draws(target):
    """The levels by Kolmogorov-Smirnov; both evaluations have one noise; low r asks for the image.

    The network is asked for x_0 + 1, so that its output tells which image was wanted.
    """
    seen, b = [], 2000
    x_0 = random.uniform(random.key(0), (b, 2, 2, 1), minval=-1, maxval=1)

    def apply(x_t, model_t):
        seen.append((x_t, model_t))
        return jnp.zeros_like(x_t)

    log_std, stage = 1.5, 0.0
    loss = tuning(target, stage=stage, log_mean=-0.5, log_std=log_std)
    values, metrics = loss(apply, KEY, x_0)
    assert values.shape == (b,) and not metrics and np.all(np.isfinite(values))
    known = -process.half_log_snr(LINEAR)[1:]
    (x_r, at_r), (x_t, at_t) = seen
    low, high = (np.interp(np.float64(t), LINEAR.model_t[1:], known) for t in (at_r, at_t))
    ends = (known[[0, -1]] + 0.5) / log_std
    assert stats.kstest((high + 0.5) / log_std, stats.truncnorm(*ends).cdf).pvalue > 1e-3
    eps = []
    for x, ln_sigma in ((x_r, low), (x_t, high)):
        sigma = np.exp(ln_sigma).reshape(-1, 1, 1, 1)
        eps.append((np.float64(x) * np.sqrt(1 + sigma**2) - x_0) / sigma)
    sure = low > -3  # float32 noise is lost in x_0 at lower levels
    np.testing.assert_allclose(eps[0][sure], eps[1][sure], atol=2e-3)
    assert stats.kstest(eps[1][sure].ravel(), "norm").pvalue > 1e-3
    wanted = consistency.lower_level(np.exp(high), stage)
    image = wanted < np.exp(known[0])
    assert 0.3 < image.mean() < 0.9 and np.all(low[image] == known[0])
    np.testing.assert_allclose(np.exp(low[~image]), wanted[~image], rtol=2e-3)  # half a level


def test_stages_follow_each_other():
    """Of ten updates each; the network is asked at the level that its stage compares with."""
    x_0, asked = jnp.zeros((64, 1, 1, 1)), []

    def apply(x_t, model_t):
        asked.append(model_t)
        return x_t

    for step, stage in ((9, 0), (10, 1), (1000, 2)):
        network = Network(apply, None, jnp.int32(step))
        tuning(stage=2, stage_steps=10)(network, KEY, x_0)
        tuning(stage=stage)(network, KEY, x_0)
        by_schedule, _, by_stage, _ = asked
        np.testing.assert_array_equal(by_schedule, by_stage)
        asked.clear()


def test_levels_below_their_own():
    sigma = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    wanted = np.array([0.9, 1.3, 3.9, 2.1])
    np.testing.assert_array_equal(consistency.nearest_lower(sigma, wanted), [0, 0, 1, 2, 2])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variance": "learned"}, "trains no variance"),
        ({"target": "mu"}, "between steps"),
        ({"p": process.from_betas(schedules.jsd(9))}, "alpha_bar_T = 0"),
        ({"stage": -1}, "found \\(-1, 0, 0.0, 2.0"),
        ({"log_std": 0.0}, "found \\(7, 0, 0.0, 0.0"),
    ],
)
def test_what_cannot_be_tuned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tuning(**options)


def test_times_of_the_chain_are_refused():
    with pytest.raises(ValueError, match="its own noise levels"):
        tuning()(lambda x, t: x, KEY, jnp.zeros((2, 2, 2, 1)), jnp.ones(2, int))
