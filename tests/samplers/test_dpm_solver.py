"""Tests the orders of convergence of the ODE solvers, and what their options do.

Data with two modes in one dimension have a flow in closed form: it keeps the fraction of the data
below each point, so it takes x_t to the x_s with the same value of the distribution function.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import integrate, stats

from diffusion import process, schedules, targets
from diffusion.samplers import SAMPLERS, ancestral, base, dpm_solver
from diffusion.targets import Prediction
from tests import oracle

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))

# 64 steps of one length in lambda = log(alpha / sigma), from -3 to 2, which is t = 1.
STEPS = 64

EVEN = process.at_levels(SHORT, 1 / (1 + np.exp(-2 * np.linspace(2, -3, STEPS + 1))))

MEANS, SIGMAS, SHARES = np.array([-0.6, 0.5]), np.array([0.2, 0.3]), np.array([0.4, 0.6])


def mixture(p, t):
    """Returns means and standard deviations of the modes of x_t."""
    a = p.alpha_bar[t]
    return np.sqrt(a) * MEANS, np.sqrt(a * SIGMAS**2 + 1 - a)


def flow(p, x_t, t, s):
    """Returns the exact x_s, float64 [n], by bisection."""

    def below(x, t):
        return (SHARES * stats.norm.cdf(x[:, None], *mixture(p, t))).sum(1)

    wanted, low, high = below(x_t, t), np.full_like(x_t, -9.0), np.full_like(x_t, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        over = below(middle, s) > wanted
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return middle


def exact_predict(p):
    """Returns the exact model of the two modes, for x [b, 1]."""

    def predict(x, t):
        a = jnp.asarray(p.alpha_bar)[jnp.broadcast_to(t, x.shape[:1])][:, None]
        mean, var = jnp.sqrt(a) * MEANS[None], a * SIGMAS[None] ** 2 + 1 - a
        away = x - mean
        share = jax.nn.softmax(jnp.log(SHARES)[None] - 0.5 * (away**2 / var + jnp.log(var)), 1)
        eps = jnp.sqrt(1 - a) * (share * away / var).sum(1, keepdims=True)
        x_0 = (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)
        return Prediction(x_0, eps, jnp.zeros_like(x), jnp.zeros_like(x))

    return predict


# (sampler, options) -> the order that its authors give it; UniPC's corrector adds one. The released
# 3M has a test of its own.
ORDERS = {
    ("ddim", ()): 1,
    ("dpmpp_2m", ()): 2,
    ("dpmpp_2m", (("solver", "heun"),)): 2,
    ("dpmpp_3m", (("solver", "exact"),)): 3,
    ("dpmpp_2s", ()): 2,
    ("heun", ()): 2,
    ("unipc", (("order", 1), ("corrector", False))): 1,
    ("unipc", (("order", 1),)): 2,
    ("unipc", (("corrector", False),)): 2,
    ("unipc", ()): 3,
    ("unipc", (("variant", "bh1"),)): 3,
    ("unipc", (("order", 3), ("corrector", False))): 3,
    ("unipc", (("order", 3),)): 4,
}


def errors(name, options, counts):
    """Returns the largest error at t = 1 after n steps from T, for each n of `counts`."""
    p = EVEN
    sampler, predict = SAMPLERS[name](p, **dict(options)), exact_predict(p)
    x_T = np.linspace(-2.5, 2.5, 41)
    exact = flow(p, x_T, p.T, 1)
    step = jax.jit(functools.partial(sampler.step, predict, None))
    out = []
    for n in counts:
        state = sampler.init(jnp.asarray(x_T)[:, None])
        ts = np.arange(p.T, 0, -STEPS // n)
        for t, s in itertools.pairwise(ts):
            state = step(state, t, s)
        out.append(np.abs(np.asarray(state.x)[:, 0] - exact).max())
    return np.array(out)


@pytest.mark.parametrize("case", ORDERS, ids=lambda c: f"{c[0]} {dict(c[1]) or ''}")
def test_order_of_convergence(case, x64):
    """Halving the steps divides the error by 2^order at least, but for 2^0.4."""
    coarse, fine = errors(*case, (32, 64))
    assert np.log2(coarse / fine) > ORDERS[case] - 0.4


def test_the_released_3m_is_of_second_order(x64):
    """It counts the curvature half: better than 2M by a factor, worse than exact by an order."""
    coarse, fine = errors("dpmpp_3m", (), (32, 64))
    assert 1.6 < np.log2(coarse / fine) < 2.6
    assert errors("dpmpp_3m", (("solver", "exact"),), (64,)) < fine
    assert fine < errors("dpmpp_2m", (), (64,))


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
def test_weights_are_the_integrals(double):
    """Of u, u (u - r_1), ... times h exp(-h (1 - u)) over [0, 1], for short and long steps."""
    with jax.enable_x64(double):
        h = np.array([1e-3, 0.02, 0.7, 4.0, 20.0])
        r = np.array([-1.3, -2.1, 1.0])
        ours = dpm_solver.exact(jnp.asarray(h), [jnp.full(len(h), r_k) for r_k in r])
        for k, weights in enumerate(ours, 1):
            q = np.polynomial.Polynomial.fromroots([0.0, *r[: k - 1]])
            for one, weight in zip(h, np.asarray(weights, np.float64), strict=True):
                wanted, _ = integrate.quad(
                    lambda u, h=one, q=q: h * np.exp(-h * (1 - u)) * q(u), 0, 1, epsabs=0
                )
                # Each is a sum of up to three terms of a few times its size.
                np.testing.assert_allclose(weight, wanted, rtol=1e-11 if double else 1e-5)


def test_unipc_of_order_1_without_corrector_is_ddim():
    """Both are the exponential Euler method."""
    predict = targets.make_predict(
        SHORT, oracle.toy, targets.TARGETS["eps"], targets.VARIANCES["fixed_small"]
    )
    x_T = random.normal(random.key(1), (2, 4, 4, 3))
    ours, theirs = (
        base.sample(sampler, predict, random.key(0), x_T, np.array([20, 17, 9, 4, 1, 0]))
        for sampler in (dpm_solver.unipc(SHORT, order=1, corrector=False), ancestral.ddim(SHORT))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32
