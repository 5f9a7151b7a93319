"""Tests grids, least-cost timesteps, and models on respaced chains."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules, targets
from diffusion.samplers import GRIDS, analytic, timesteps
from diffusion.targets import TARGETS, VARIANCES
from tests.oracle import Gaussian, arrays, column, network, path_cost

LINEAR = process.from_betas(schedules.linear(1000))

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))


def chain(T):
    return process.from_betas(schedules.linear(T, 1e-3, 0.4))


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    """Times are int32 and fall strictly from T to 0, for every number of steps."""
    for p in (*map(chain, range(1, 41)), LINEAR):
        for steps in range(1, p.T + 1):
            ts = GRIDS[name](p, steps)
            assert ts.dtype == np.int32 and len(ts) == steps + 1
            assert ts[0] == p.T and ts[-1] == 0 and np.all(np.diff(ts) < 0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [0, -3, 21])
def test_grids_check_the_number_of_steps(name, steps):
    with pytest.raises(ValueError, match="expected 1 to 20"):
        GRIDS[name](SHORT, steps)


def test_uniform_is_even():
    np.testing.assert_array_equal(timesteps.uniform(SHORT, 20), np.arange(20, -1, -1))
    np.testing.assert_array_equal(timesteps.uniform(LINEAR, 10), np.arange(1000, -1, -100))
    for steps in range(1, 1001):
        # Rounded to the nearest.
        even = np.linspace(1000, 0, steps + 1)
        assert np.abs(timesteps.uniform(LINEAR, steps) - even).max() <= 0.5


def test_quadratic_is_even_in_the_root():
    ts = timesteps.quadratic(LINEAR, 10)
    np.testing.assert_array_equal(ts, 10 * np.arange(10, -1, -1) ** 2)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_logsnr_is_even_in_the_ratio(steps):
    """Each time is a trained one next to the exactly even one."""
    ts = timesteps.logsnr(LINEAR, steps)
    snr = LINEAR.alpha_bar[1:] / (1 - LINEAR.alpha_bar[1:])
    wanted = np.geomspace(snr[-1], snr[0], steps)
    below, above = np.append(snr, 0)[ts[:-1]], np.append(np.inf, snr)[ts[:-1] - 1]
    assert ts[-2] == 1
    assert np.all(below <= wanted * (1 + 1e-9)) and np.all(wanted <= above * (1 + 1e-9))


def leading(p, steps):
    """The times 1, 1 + k, 1 + 2k, ... with k = T // steps, of the DDIM code and of diffusers."""
    return np.append(1 + p.T // steps * np.arange(steps)[::-1], 0).astype(np.int32)


def test_times_are_those_of_diffusers():
    """Those count from 0 and omit the last time, the image."""
    full = arrays("schedulers_full")
    for run, grid in {
        "ddim10_eta0_trailing_alpha11_clip0": timesteps.uniform,
        "ddim7_eta0_trailing": timesteps.uniform,
        "ddpm50_fixed_small_trailing_clip0": timesteps.uniform,
        "ddim10_eta0_leading_alpha11_clip0": leading,
        "ddim7_eta0_leading": leading,
        "dpmpp2_20_karras": timesteps.karras,
    }.items():
        theirs = full[f"{run}/timesteps"].astype(int)
        ts = grid(LINEAR, len(theirs))
        np.testing.assert_array_equal(ts, [*(theirs + 1), 0], err_msg=run)


def test_times_that_round_to_one_are_made_distinct():
    """As few times as possible move."""
    # 16 / 25, 9 / 25 and 4 / 25 of 2 would be 1, 1, 0.
    np.testing.assert_array_equal(timesteps.quadratic(chain(2), 2), [2, 1, 0])
    # 5 (i / 5)^2 = 0.2, 0.8, 1.8, 3.2: there is room for each time only once.
    np.testing.assert_array_equal(timesteps.quadratic(chain(5), 5), [5, 4, 3, 2, 1, 0])
    # 20 (i / 8)^2 = 0.3, 1.25, 2.8, 5, 7.8, 11.25, 15.3.
    np.testing.assert_array_equal(timesteps.quadratic(SHORT, 8), [20, 15, 11, 8, 5, 3, 2, 1, 0])


@pytest.mark.parametrize("name", ["logsnr", "karras"])
def test_grids_in_the_ratio_refuse_pure_noise(name):
    p = process.from_betas(schedules.jsd(20))
    with pytest.raises(ValueError, match="ends in pure noise"):
        GRIDS[name](p, 5)


def test_explicit_times():
    for ts in ([20, 7, 1, 0], (20, 7, 1), np.array([1, 7, 20])):
        ours = timesteps.explicit(SHORT, ts)
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, [20, 7, 1, 0])


@pytest.mark.parametrize(
    "ts",
    [
        *([], [0], [21, 3, 0], [-1, 3], [3, 3, 0], [2.5, 1.0], [True]),
        *([7, 20, 1], [5, 19, 1], [1, 20, 7], [0, 20, 7]),  # in no order
    ],
)
def test_explicit_times_are_checked(ts):
    with pytest.raises(ValueError, match=r"distinct integers in 1\.\.20, falling"):
        timesteps.explicit(SHORT, ts)


def exhaustive(costs, K):
    """Returns the least cost of K steps from T to 0 over all grids."""
    T = len(costs) - 1
    grids = (
        np.array([T, *sorted(inner, reverse=True), 0])
        for inner in itertools.combinations(range(1, T), K - 1)
    )
    return min(path_cost(costs, ts) for ts in grids)


def test_least_cost_is_the_least_of_all():
    rng = np.random.RandomState(0)
    for T in (1, 2, 5, 9):
        costs = np.where(np.triu(np.ones((T + 1, T + 1)), 1) > 0, rng.rand(T + 1, T + 1), np.inf)
        for K in range(1, T + 1):
            ts = timesteps.least_cost(costs, K)
            assert ts.dtype == np.int32 and len(ts) == K + 1
            assert ts[0] == T and ts[-1] == 0 and np.all(np.diff(ts) < 0)
            assert path_cost(costs, ts) == pytest.approx(exhaustive(costs, K))
        for K in (0, T + 1):
            with pytest.raises(ValueError, match=f"expected 1 to {T} "):
                timesteps.least_cost(costs, K)


X_T = random.normal(random.key(0), (5, 4, 4, 2))

RESPACED = [np.arange(1, 21), np.array([2, 7, 8, 20]), np.array([9, 1, 10])]

X0_VARIANCE = np.append(0, np.geomspace(1e-3, 0.5, SHORT.T))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_long_steps_are_steps_of_the_respaced_chain(target, variance, x64):
    """As in the respacing of Improved DDPM (arXiv:2102.09672, Section 4)."""
    ts = np.array([2, 7, 8, 20])
    q = process.respace(SHORT, ts)

    def apply(x, model_t):
        return network(x, model_t, 1)

    @jax.jit
    def step(x, i):
        def reverse(p, s, t):
            predict = targets.make_predict(p, apply, TARGETS[target], VARIANCES[variance])
            return targets.p_mean_log_variance(p, predict(x, t), x, s, t)

        return reverse(SHORT, jnp.asarray(ts[:-1]), jnp.asarray(ts[1:])), reverse(q, i - 1, i)

    x = random.normal(random.key(0), (3, 4, 4, 1), jnp.float64)
    # Without the step from the first time to 0, which is a decoder for q.
    long, short = step(x, np.arange(2, 5))
    for a, b in zip(long, short, strict=True):
        # Float64; alpha_bar's logarithm and its quotient round differently.
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variance", [*VARIANCES, "analytic"])
@pytest.mark.parametrize("target", TARGETS)
def test_respacing_to_all_times_changes_nothing(target, variance):
    """Bit for bit, for every target and variance."""
    variance = VARIANCES.get(variance) or analytic.analytic_variance(X0_VARIANCE)
    apply = functools.partial(network, outputs=variance.outputs)
    predict = targets.make_predict(SHORT, apply, TARGETS[target], variance)
    same = timesteps.respace_predict(SHORT, predict, variance, np.arange(1, 21))
    t = jnp.array([1, 2, 3, 11, 20])  # not compiled: two programs may round differently
    jax.tree.map(np.testing.assert_array_equal, same(X_T, t), predict(X_T, t))


@pytest.mark.parametrize("ts", RESPACED, ids=["all", "from 2", "from 1"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "analytic"])
def test_respaced_fixed_variances_are_those_of_the_shorter_chain(variance, ts):
    """Bit for bit, the first step included, whatever variance the longer chain had."""
    tables = X0_VARIANCE, 2 * X0_VARIANCE
    variance = VARIANCES.get(variance) or analytic.analytic_variance(*tables)
    apply = functools.partial(network, outputs=1)
    q = process.respace(SHORT, ts)
    i = jnp.minimum(jnp.array([1, 2, 3, 3, len(ts)]), len(ts))
    for target in ("eps", "v"):
        longer = targets.make_predict(SHORT, apply, TARGETS[target], VARIANCES["fixed_large"])
        wanted = targets.make_predict(q, apply, TARGETS[target], variance)(X_T, i)
        ours = timesteps.respace_predict(SHORT, longer, variance, ts)(X_T, i)
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)


@pytest.mark.parametrize("ts", RESPACED, ids=["all", "from 2", "from 1"])
@pytest.mark.parametrize("target", TARGETS)
def test_respaced_is_exact_for_gaussian_data(target, ts, x64):
    """A learned variance of single steps, and the mean of a mu-network, on longer steps."""
    p, known, learned = SHORT, Gaussian(0.3, 0.4), VARIANCES["learned"]
    predict = known.predict(p, target)
    q, i = process.respace(p, ts), np.arange(1, len(ts) + 1)
    x_t = random.normal(random.key(0), (len(ts), 2, 2, 1), jnp.float64)

    @jax.jit
    def step(x_t, i):
        prediction = timesteps.respace_predict(p, predict, learned, ts)(x_t, i)
        return targets.p_mean_log_variance(q, prediction, x_t, i - 1, i)

    mean, log_var = step(x_t, i)
    times = np.append(0, np.sort(ts))
    intercept, slope, variance = (column(c) for c in known.given(p, times[:-1], times[1:]))
    # Float64 roundings, amplified by 1 / weight_0^2, up to 2e3, in the way to var_0 and back.
    np.testing.assert_allclose(mean, intercept + slope * x_t, atol=1e-11)
    wanted = jnp.broadcast_to(variance, x_t.shape)
    np.testing.assert_allclose(jnp.exp(log_var), wanted, rtol=1e-10)


def test_a_respaced_decoder_has_a_floor():
    """A learned variance far below beta~ is clipped at the first step as beta~ is."""
    ts = np.array([3, 8, 20])

    def apply(x, model_t):
        return jnp.concatenate([0.1 * x, jnp.full_like(x, -30)], -1)

    learned = VARIANCES["learned"]
    predict = targets.make_predict(SHORT, apply, TARGETS["x0"], learned)
    i = jnp.array([1, 1, 2, 3, 3])
    log_var = timesteps.respace_predict(SHORT, predict, learned, ts)(X_T, i).log_var
    wanted = column(targets.posterior_log_var(process.respace(SHORT, ts), i))
    # Float32: beta~ on the device, of logarithms' differences, and on the host.
    np.testing.assert_allclose(log_var, jnp.broadcast_to(wanted, X_T.shape), rtol=1e-5)
    # But a trained step keeps the network's value.
    log_var = timesteps.respace_predict(SHORT, predict, learned, [1, 2, 9])(
        X_T, jnp.array(2)
    ).log_var
    assert np.all(log_var == -30)
