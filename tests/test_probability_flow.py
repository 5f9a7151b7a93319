"""Tests the probability-flow ODE on Gaussian data, whose flow and density are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.tree_util import Partial
from scipy import stats

from diffusion import probability_flow, process, schedules
from diffusion.probability_flow import (
    TO_EPS,
    evaluate_spline,
    hutchinson,
    log_alpha_bar_spline,
    log_density,
)
from diffusion.targets import TARGETS
from tests.oracle import Gaussian

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(50, 2e-3, 0.3))
KEY = random.key(2)


def denoiser(p, known):
    """Returns the exact eps of Gaussian data at real t: -sigma times the score of x_t."""
    cubics = log_alpha_bar_spline(p)

    def eps(x, t):
        a = process.broadcast_right(jnp.exp(evaluate_spline(cubics, t)[0]), x)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * known.mean) / (a * known.var + 1 - a)

    return eps


def closed_form(p, known, x, t_min):
    """Returns x_T and log p(x) in nats per dimension: the flow keeps (x - mean_t) / std_t.

    log p(x) is log N(x_T; 0, 1) + log(std_T / std_{t_min}).
    """
    a = np.exp([evaluate_spline(log_alpha_bar_spline(p), np.float64(t))[0] for t in (t_min, p.T)])
    (mean, mean_T), (std, std_T) = np.sqrt(a) * known.mean, np.sqrt(a * known.var + 1 - a)
    x_T = mean_T + std_T / std * (x - mean)
    log_p = stats.norm.logpdf(x_T) + np.log(std_T / std)
    return x_T, log_p.reshape(len(x), -1).mean(1)


@pytest.mark.parametrize("T", [1, 2, 20, 1000])
@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_continuous_time(name, T):
    """The spline goes through every step and decreases; its derivative is correct."""
    ends = (1e-4, 0.02) if T == 1000 else (1e-3, 0.4)
    p = process.from_betas(schedules.SCHEDULES[name](T, *ends))
    if name == "jsd":
        with pytest.raises(ValueError, match="ends in pure noise"):
            log_alpha_bar_spline(p)
        return
    cubics = log_alpha_bar_spline(p)
    value, _ = evaluate_spline(cubics, np.arange(T + 1.0))
    np.testing.assert_allclose(value, np.log(p.alpha_bar), rtol=1e-12, atol=1e-15)  # float64
    t = np.linspace(0, T, 40 * T + 1)
    value, slope = evaluate_spline(cubics, t)
    assert np.all(np.diff(value) < 0) and np.all(slope[1:] < 0)
    # Central differences of a cubic are off by its third derivative, h^2 / 6 of it.
    middle = (np.diff(value) / np.diff(t))[1:-1]
    between = evaluate_spline(cubics, (t[1:] + t[:-1]) / 2)[1][1:-1]
    np.testing.assert_allclose(middle, between, atol=1e-3 * np.abs(slope).max())
    # And the same on the device, in float32: alpha_bar's logarithm and t each to 1e-7.
    on_device = evaluate_spline(cubics, jnp.asarray(t, jnp.float32))
    for ours, wanted in zip(on_device, (value, slope), strict=True):
        assert ours.dtype == jnp.float32
        close = 1e-5 * np.abs(wanted).max() + 1e-4 * np.abs(slope).max() * (T == 1000)
        np.testing.assert_allclose(ours, wanted, atol=close)


@pytest.mark.parametrize("target", TO_EPS)
def test_eps_of_a_network(target, x64):
    """At the trained times it is that of make_predict, without the log-variance."""
    known = Gaussian(0.2, 0.3)
    predict = known.predict(SHORT, target)
    eps = probability_flow.eps_fn(SHORT, known.network(SHORT, target), target)
    x, t = random.normal(KEY, (4, 2, 2, 1)), jnp.array([1, 2, 17, 50])
    wanted = predict(x, t).eps
    np.testing.assert_allclose(eps(x, t.astype(float)), wanted, rtol=1e-9)  # float64
    np.testing.assert_allclose(denoiser(SHORT, known)(x, t.astype(float)), wanted, rtol=1e-9)


def test_mu_has_no_eps_at_real_times():
    assert set(TO_EPS) <= set(TARGETS) - {"mu"}
    with pytest.raises(KeyError, match="mu"):
        probability_flow.eps_fn(SHORT, lambda x, t: x, "mu")


@pytest.mark.parametrize("p, t_min", [(LINEAR, 1.0), (LINEAR, 0.3), (SHORT, 1.0), (SHORT, 7.7)])
def test_density_of_gaussian_data(p, t_min, x64):
    """The closed form, for data far from the prior."""
    known = Gaussian(0.4, 0.02)
    x = known.mean + np.sqrt(known.var) * random.normal(KEY, (3, 4, 2, 1))
    eps = denoiser(p, known)
    out = log_density(p, eps, KEY, x, 1e-9, 1e-9, t_min, exact_divergence)
    x_T, log_p = closed_form(p, known, np.asarray(x), t_min)
    assert out.log_p.shape == (3,) and out.log_p.dtype == np.float64 and out.x_T.shape == x.shape
    # A few hundred steps, each to 1e-9, and the flow widens the data sevenfold.
    np.testing.assert_allclose(out.log_p, log_p, atol=3e-6)
    np.testing.assert_allclose(out.x_T, x_T, atol=3e-6)
    # For a diagonal Jacobian Rademacher probes are exact.
    probed = log_density(p, eps, KEY, x, 1e-9, 1e-9, t_min)
    np.testing.assert_allclose(probed.log_p, out.log_p, atol=1e-12)


def test_error_falls_with_the_tolerance(x64):
    """A hundredth of the tolerance gives less than a tenth of the error."""
    known = Gaussian(0.4, 0.02)
    x = known.mean + np.sqrt(known.var) * random.normal(KEY, (3, 4, 2, 1))
    eps, wanted = denoiser(LINEAR, known), closed_form(LINEAR, known, np.asarray(x), 1.0)[1]
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        out = log_density(LINEAR, eps, KEY, x, tolerance, tolerance)
        errors.append(np.abs(out.log_p - wanted).max())
        evaluations.append(out.evaluations)
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[1] < 1e-3
    assert evaluations[0] < evaluations[1] < evaluations[2]


def exact_divergence(f, x, probes):
    """Computes the trace per dimension from the whole Jacobian."""

    def diagonal(unit):
        unit = jnp.broadcast_to(unit, x.shape)  # images do not depend on each other
        return (unit * jax.jvp(f, (x,), (unit,))[1]).reshape(len(x), -1).sum(1)

    units = jnp.eye(x[0].size, dtype=x.dtype).reshape(-1, *x.shape[1:])
    return f(x), jax.vmap(diagonal)(units).mean(0)


def linear_network(matrix):
    """Returns x [b, 2, 2, 1] -> matrix x, whose Jacobian is not diagonal."""

    def f(x):
        return (x.reshape(-1, 4) @ matrix.T).reshape(x.shape)

    return f


def test_divergence_of_a_linear_network(x64):
    """Both the exact one and the mean over all Rademacher probes are the trace."""
    matrix = random.normal(random.key(0), (4, 4))
    f, trace = linear_network(matrix), np.trace(matrix) / 4
    x = random.normal(KEY, (16, 2, 2, 1))
    _, ours = exact_divergence(f, x, None)
    np.testing.assert_allclose(ours, np.full(16, trace), rtol=1e-12)  # float64
    signs = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=4))).reshape(16, 2, 2, 1)
    value, ours = hutchinson(f, x, signs)
    np.testing.assert_array_equal(value, f(x))
    assert ours.std() > 0.1
    np.testing.assert_allclose(ours.mean(), trace, rtol=1e-12)


def test_probes_are_unbiased():
    """E[v^T A v] = tr A, and its variance is 2 |S|^2 without the diagonal."""
    matrix = random.normal(random.key(0), (4, 4))
    symmetric = np.asarray(matrix + matrix.T) / 2
    n = 20000
    x = jnp.zeros((n, 2, 2, 1))
    probes = probability_flow.rademacher(KEY, x)
    assert set(np.unique(probes)) == {-1, 1}
    _, ours = jax.jit(lambda v: hutchinson(linear_network(matrix), x, v))(probes)
    variance = 2 * ((symmetric - np.diag(np.diag(symmetric))) ** 2).sum() / 16
    assert abs(ours.mean() - np.trace(matrix) / 4) < 4 * np.sqrt(variance / n)
    np.testing.assert_allclose(ours.var(), variance, rtol=0.1)  # n draws with heavier tails
    # Each image has its own probes, the same for the same key.
    np.testing.assert_array_equal(probes[:3], probability_flow.rademacher(KEY, x[:3]))


def test_divergence_of_a_solution(x64):
    """If the network mixes pixels, probes agree with the exact trace on average only."""
    turn = jnp.asarray([[1.0, 0.3, 0, 0], [-0.2, 1, 0.3, 0], [0, 0, 1, 0.4], [0.1, 0, 0, 1]])

    def eps(x, t):
        return jnp.tanh(linear_network(turn)(x)) * 0.1

    x = jnp.broadcast_to(random.normal(KEY, (1, 2, 2, 1)), (256, 2, 2, 1))
    close = 1e-6, 1e-6
    exact = log_density(SHORT, eps, KEY, x[:1], *close, divergence=exact_divergence).log_p[0]
    log_p = log_density(SHORT, eps, KEY, x, *close).log_p
    error = log_p.std() / 16
    assert 0 < error < 0.05 and abs(log_p.mean() - exact) < 4 * error


def test_parameters_are_arguments():
    """Other parameters, keys and images do not trace again."""
    traces = []

    def eps(params, x, t):
        traces.append(t.shape)
        return params * x

    x = random.normal(KEY, (2, 2, 2, 1))
    results = [
        log_density(SHORT, Partial(eps, jnp.float32(c)), key, x + c)
        for c, key in ((0.5, KEY), (0.8, random.key(9)))
    ]
    assert traces == [(2,)]
    assert abs(results[0].log_p - results[1].log_p).max() > 0.01
    again = log_density(SHORT, lambda x, t: 0.5 * x, KEY, x + 0.5)
    # Both solve the same system to 1e-5 in each of a hundred steps.
    np.testing.assert_allclose(results[0].log_p, again.log_p, atol=1e-4)


def test_dequantisation_is_uniform():
    """In a level's width, with noise of each image's own."""
    x_0 = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32).reshape(4, 8, 8, 1)
    x = probability_flow.dequantise(KEY, jnp.tile(x_0, (100, 1, 1, 1)))
    u = np.asarray(x - jnp.tile(x_0, (100, 1, 1, 1))) * 127.5
    # The largest of 25,600, and float32 of 1 + u / 127.5.
    assert 0.499 < np.abs(u).max() <= 0.5 + 1e-5
    assert stats.kstest(u.ravel(), stats.uniform(-0.5, 1).cdf).pvalue > 1e-3
    np.testing.assert_array_equal(
        probability_flow.dequantise(KEY, x_0)[:2], probability_flow.dequantise(KEY, x_0[:2])
    )
    assert np.abs(np.corrcoef(u[0].ravel(), u[4].ravel())[0, 1]) < 0.5  # twins differ


@pytest.mark.parametrize("levels", [256, 17])
def test_bits_are_those_of_the_levels(levels, x64):
    """Against the mass that the perfect model's Gaussian gives each level."""
    known, half = Gaussian(0.1, 0.06), (levels - 1) / 2
    level = np.array([30, 100, 140, 143, 180, 250]) if levels == 256 else np.array([5, 8, 9, 11])
    x_0 = jnp.asarray(level / half - 1).reshape(-1, 1, 1, 1)
    x_0 = jnp.broadcast_to(x_0, (len(level), 16, 16, 1))
    options = {"levels": levels, "rtol": 1e-7, "atol": 1e-7}
    out = probability_flow.bits_per_dim(LINEAR, denoiser(LINEAR, known), KEY, x_0, **options)
    # x at t = 1 is Gaussian under the model up to the prior's mismatch: use the flow for its law.
    grid = np.linspace(-1, 1, 2)[:, None]
    x_T, _ = closed_form(LINEAR, known, grid, 1.0)
    slope = (x_T[1] - x_T[0]) / 2
    # The mean over a level's width of -log2 of the density, by the midpoints of 1,000 parts.
    u = (np.arange(1000) + 0.5) / 1000 - 0.5
    x = x_T[0] + slope * ((level[:, None] + u) / half)
    bits = np.log2(half) - np.log2(stats.norm.pdf(x) * slope)
    # At one u per pixel, 256 of them: the sampling error, and the solver's.
    error = bits.std(1) / np.sqrt(256)
    assert np.all(np.abs(out.bits - bits.mean(1)) < 4 * error + 1e-3)
    # By Jensen's inequality that is no less than the code length of the level's mass.
    lower, upper = (x_T[0] + slope * (level + side) / half for side in (-0.5, 0.5))
    mass = -np.log2(stats.norm.cdf(upper) - stats.norm.cdf(lower))
    assert np.all(bits.mean(1) > mass) and np.all(bits.mean(1) < mass + 12 * error**2 * 256)
    assert out.bits.shape == level.shape and 50 < out.evaluations < 1000
    # The trace is exact here, so another key only changes the places within the levels.
    key = random.key(4)
    other = probability_flow.bits_per_dim(LINEAR, denoiser(LINEAR, known), key, x_0, **options)
    assert np.all(np.abs(other.bits - out.bits) > 1e-3 * error)


def test_bits_do_not_depend_on_the_batch(x64):
    """Within the tolerance of the joint solution."""
    eps = denoiser(SHORT, Gaussian(0.1, 0.06))
    x_0 = jnp.round(127.5 * random.uniform(KEY, (5, 4, 4, 1))) / 127.5
    keys = process.example_keys(KEY, 5)
    whole = probability_flow.bits_per_dim(SHORT, eps, keys, x_0, rtol=1e-8, atol=1e-8)
    alone = probability_flow.bits_per_dim(SHORT, eps, keys[3:4], x_0[3:4], rtol=1e-8, atol=1e-8)
    # A few hundred steps, each within 1e-8; squares of numbers that the model finds unlikely.
    np.testing.assert_allclose(alone.bits[0], whole.bits[3], atol=2e-4)
    other = probability_flow.bits_per_dim(SHORT, eps, random.key(4), x_0)
    assert np.abs(other.bits - whole.bits).max() > 1e-2


def test_errors():
    x = jnp.zeros((1, 2, 2, 1))
    for t_min in (0, -1.0, 50, 51.0):
        with pytest.raises(ValueError, match="t_min: expected a time between 0 and 50"):
            log_density(SHORT, lambda x, t: x, KEY, x, t_min=t_min)
    with pytest.raises(RuntimeError, match="log_density"):
        log_density(SHORT, lambda x, t: jnp.nan * x, KEY, x)
