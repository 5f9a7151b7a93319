"""Tests the optimal variances, their costs, and Analytic-DDIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import likelihood, process, schedules, targets
from diffusion.likelihood import vlb_terms
from diffusion.samplers import analytic, ancestral, timesteps, trajectory
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian, column, path_cost

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
KEY = random.key(3)


def make_predict(variance):
    return targets.make_predict(SHORT, oracle.poor_denoiser, TARGETS["eps"], variance)


@pytest.fixture(scope="module")
def images():
    return oracle.images()


@pytest.fixture(scope="module")
def errors(images):
    """Measures `images`, with clipping as in every evaluation."""
    predict = make_predict(VARIANCES["fixed_small"])
    return jax.jit(lambda x: analytic.timestep_errors(SHORT, predict, KEY, x))(images)


@pytest.fixture(scope="module")
def optimum(errors):
    return analytic.optimal_variance(SHORT, [errors])


@pytest.fixture(scope="module")
def measured(images):
    """Returns (Variance, times) -> mean terms of `images` with the draws of `errors`."""

    def mean_terms(variance, ts=None):
        ts = np.arange(1, SHORT.T + 1) if ts is None else np.sort(ts)
        predict = timesteps.respace_predict(
            SHORT, make_predict(VARIANCES["fixed_small"]), variance, ts
        )
        table = jnp.asarray(np.append(0, ts))

        def run(x):
            with pytest.MonkeyPatch.context() as patch:  # x_t by its time on the trained chain
                draw = process.sample_noise
                patch.setattr(process, "sample_noise", lambda k, i, like: draw(k, table[i], like))
                return vlb_terms(process.respace(SHORT, ts), predict, KEY, x).bits

        return np.asarray(jax.jit(run)(images), np.float64).mean(0)

    return mean_terms


def test_errors_are_those_of_the_terms(images, errors):
    """With the same draws, as is the decoder of the fixed variances at t = 1."""
    predict = make_predict(VARIANCES["fixed_small"])
    out = jax.jit(lambda x: vlb_terms(SHORT, predict, KEY, x))(images)
    assert errors.mse.shape == (24, 20) and errors.decoder.shape == (24, 20, 82)
    np.testing.assert_allclose(errors.mse, out.mse, rtol=1e-5)  # float32, fused otherwise
    # Float32; masses are differences, good to 2e-7 of a few percent.
    np.testing.assert_allclose(errors.decoder[:, 0, -1], out.bits[:, 0], rtol=1e-4)


def test_decoders_of_every_time(images, monkeypatch):
    """Column t - 1 is -log2 p(x_0 | x_t) around the prediction from x_t, per scale, in bits/dim."""
    monkeypatch.setattr(process, "sample_noise", oracle.cheap_noise)
    predict = make_predict(VARIANCES["fixed_small"])
    out = jax.jit(lambda x: analytic.timestep_errors(SHORT, predict, KEY, x))(images)
    scales = analytic.decoder_stds(SHORT)
    assert len(scales) == 82 and scales[0] == 2**-10 and scales[80] == 1
    # log beta~_2, the fixed variances at t = 1.
    assert scales[81] ** 2 == pytest.approx(process.posterior(SHORT, 1, 2).variance)
    # Where no pixel is so far in the tail that its mass is noise of float32.
    for t, i in ((1, 40), (1, 81), (9, 72), (20, 80)):
        t_b = jnp.full(24, t)
        x_t = process.q_sample(SHORT, images, t_b, oracle.cheap_noise(None, t, images))
        log_scale = jnp.float32(np.log(scales[i]))
        nats = likelihood.decoder_log_likelihood(images, predict(x_t, t_b).x_0, log_scale)
        wanted = -nats.mean(axis=(1, 2, 3)) / np.log(2)
        np.testing.assert_allclose(out.decoder[:, t - 1, i], wanted, rtol=1e-4)  # as above


def test_optimum_does_not_depend_on_the_batches(errors, optimum):
    """It has the means over the images, in batches of any size."""
    parts = [jax.tree.map(lambda a, i=i: a[i], errors) for i in (slice(5), slice(5, 24))]
    # Float64 sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        analytic.optimal_variance(SHORT, iter(parts)),
        optimum,
    )
    mse, decoder = (np.asarray(a, np.float64) for a in errors)
    np.testing.assert_allclose(optimum.x0_variance[1:], mse.mean(0), rtol=1e-12)
    best = np.argmin(decoder.mean(0), axis=-1)
    decoder = np.take_along_axis(decoder, best[None, :, None], -1)[:, :, 0]
    np.testing.assert_allclose(optimum.decoder_bits[1:], decoder.mean(0), rtol=1e-12)
    np.testing.assert_allclose(optimum.decoder[1:], analytic.decoder_stds(SHORT)[best] ** 2)
    assert all(table[0] == 0 for table in optimum)


# Float32 terms, each a sum over pixels that cancels down to 1e-3 of its parts.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def test_analytic_variance_has_the_least_bound(optimum, measured):
    """Every term is least on the images of the estimate, for a biased network with clipping."""
    best = measured(analytic.analytic_variance(optimum.x0_variance, optimum.decoder))
    for name in ("fixed_small", "fixed_large"):
        other = measured(VARIANCES[name])
        assert np.all(best <= other * (1 + ROUNDING["rtol"]) + ROUNDING["atol"])
        assert best.sum() < 0.99 * other.sum()
    for factor in (0.8, 1.25):
        other = measured(analytic.analytic_variance(factor * optimum.x0_variance, optimum.decoder))
        assert np.all(best[1:-1] <= other[1:-1] * (1 + ROUNDING["rtol"]) + ROUNDING["atol"])
        assert np.all(best[1:12] < other[1:12])  # where x_t still says something of x_0
        np.testing.assert_array_equal(best[[0, -1]], other[[0, -1]])


def test_the_paper_s_estimate_is_worse_for_a_poor_network(images, optimum, measured):
    """Gamma_t = E||eps^||^2 / d supposes a perfect eps (arXiv:2201.06503, Thm. 2)."""
    predict = make_predict(VARIANCES["fixed_small"])

    keys = process.example_keys(KEY, 24)

    @jax.jit
    def gamma(x, t):
        x_t = process.q_sample(SHORT, x, t, process.sample_noise(keys, t[0], x))
        return (predict(x_t, t).eps ** 2).mean()

    gamma = np.array([gamma(images, jnp.full(24, t)) for t in range(1, 21)])
    a = SHORT.alpha_bar[1:]
    paper = np.append(0, np.maximum((1 - a) / a * (1 - gamma), 0))
    ours = measured(analytic.analytic_variance(optimum.x0_variance, optimum.decoder))
    assert ours.sum() < 0.99 * measured(analytic.analytic_variance(paper, optimum.decoder)).sum()


@pytest.mark.parametrize("K", [3, 6])
def test_cost_model_is_the_measured_bound(K, optimum, measured):
    """Term by term on the draws of the estimate, so the least cost is the least bound."""
    costs = analytic.step_costs(SHORT, optimum)
    variance = analytic.analytic_variance(optimum.x0_variance, optimum.decoder)
    bits = {}
    grids = {"least": timesteps.least_cost(costs, K), "even": timesteps.uniform(SHORT, K)}
    for name, ts in grids.items():
        out = measured(variance, ts[:-1])
        assert out.shape == (K + 1,)
        ends = ts[::-1]
        np.testing.assert_allclose(out[:-1], costs[ends[:-1], ends[1:]], **ROUNDING)
        bits[name] = out[:-1].sum()
        assert bits[name] == pytest.approx(path_cost(costs, ts), rel=1e-4)
    assert bits["least"] < bits["even"]


def test_least_cost_against_the_uniform_grid(optimum):
    costs = analytic.step_costs(SHORT, optimum)
    least = [path_cost(costs, timesteps.least_cost(costs, K)) for K in range(1, 21)]
    even = [path_cost(costs, timesteps.uniform(SHORT, K)) for K in range(1, 21)]
    assert np.all(np.array(least) <= even)
    assert least[3] < 0.97 * even[3]
    np.testing.assert_array_equal(timesteps.least_cost(costs, 20), np.arange(20, -1, -1))
    np.testing.assert_array_equal(timesteps.least_cost(costs, 1), [20, 0])


def test_costs_of_gaussian_data():
    """With the true Var[x_0 | x_t] a step of any length costs I(x_0; x_s | x_t)."""
    known, p = Gaussian(0.1, 0.3), SHORT
    t = np.arange(1, p.T + 1)
    var_0 = np.append(0, known.given(p, 0, t)[2])
    decoder = np.append(0, np.linspace(1, 5, p.T))
    costs = analytic.step_costs(p, analytic.OptimalVariance(var_0, var_0, decoder))
    s, t = np.triu_indices(p.T + 1, 1)
    inside = s > 0
    ratio = known.given(p, s, t)[2][inside] / Gaussian(0, 0).given(p, s, t)[2][inside]
    np.testing.assert_allclose(costs[s, t][inside], 0.5 * np.log2(ratio), rtol=1e-9)  # float64
    np.testing.assert_array_equal(costs[0, 1:], decoder[1:])
    assert np.all(np.isinf(costs[np.tril_indices(p.T + 1)]))


def test_optimum_of_gaussian_data():
    """The measured Var[x_0 | x_t] is the true one, within five of its standard errors."""
    known, p = Gaussian(0.1, 0.06), process.from_betas(schedules.linear(12, 0.02, 0.4))
    x_0 = known.mean + np.sqrt(known.var) * random.normal(random.key(4), (512, 8, 8, 1))
    x_0 = jnp.round((x_0 + 1) * 127.5).clip(0, 255) / 127.5 - 1
    predict = known.predict(p, "v", "fixed_large")
    errors = jax.jit(lambda x: analytic.timestep_errors(p, predict, KEY, x))(x_0)
    out = analytic.optimal_variance(p, [errors])
    # Five standard errors, and the rounding to levels, 1 / (12 * 127.5^2) = 5e-6.
    wanted = known.given(p, 0, np.arange(1, 13))[2]
    error = stats.sem(errors.mse)
    assert np.all(np.abs(out.x0_variance[1:] - wanted) < 5 * error + 5e-6)
    assert np.all(error < 0.02 * wanted)
    # A Gaussian's best decoder has its variance; levels that are coarse against it widen nothing.
    assert np.all(np.abs(np.log2(out.decoder[1:] / wanted)) < 0.25)  # one candidate's distance
    density = 0.5 * np.log2(2 * np.pi * np.e * wanted) + np.log2(127.5)
    best = np.asarray(errors.decoder).mean(0).argmin(1)
    error = stats.sem(errors.decoder)[np.arange(p.T), best]
    # The candidates cost up to 2.7e-3 bits, the tanh formula and the levels 2e-3 each.
    assert np.all(np.abs(out.decoder_bits[1:] - density) < 5 * error + 7e-3)


RESPACED = [np.arange(1, 21), np.array([2, 7, 8, 20]), np.array([9, 1, 10])]


def test_analytic_variance_is_exact_for_gaussian_data(x64):
    """One Var[x_0 | x_t] gives the variances of steps of any length (arXiv:2201.06503, Thm. 1)."""
    known, t = Gaussian(0.3, 0.4), np.arange(1, SHORT.T + 1)
    _, _, var_0 = known.given(SHORT, 0, t)
    variance = analytic.analytic_variance(np.append(np.nan, var_0), np.append(np.nan, 3 * var_0))
    for ts in RESPACED:
        q, times = process.respace(SHORT, ts), np.append(0, np.sort(ts))
        i = np.arange(1, len(ts) + 1)
        ours = np.exp(variance.log_var(q, None, jnp.asarray(i)))
        np.testing.assert_allclose(ours[1:], known.given(SHORT, times[1:-1], times[2:])[2], 1e-10)
        np.testing.assert_allclose(ours[0], 3 * var_0[times[1] - 1], rtol=1e-12)  # float64
        of_x_0 = variance.x0_variance(q, column(jnp.zeros(len(ts))), jnp.asarray(i))
        np.testing.assert_allclose(of_x_0, column(var_0[times[1:] - 1]), rtol=1e-12)
        # Without a decoder's table: as the fixed variances.
        without = analytic.analytic_variance(np.append(0, var_0)).log_var(q, None, jnp.asarray(i))
        np.testing.assert_allclose(without[1:], np.log(ours[1:]), rtol=1e-12)
        np.testing.assert_allclose(without[0], targets.posterior_log_var(q, 1), rtol=1e-12)


def test_analytic_variance_between_the_fixed_ones(x64):
    """It is fixed_large for unit Gaussian data, and fixed_small for a point."""
    t = jnp.arange(1, SHORT.T + 1)
    for var_0, fixed in ((np.zeros(21), "fixed_small"), (1 - SHORT.alpha_bar, "fixed_large")):
        ours = analytic.analytic_variance(var_0).log_var(SHORT, None, t)
        np.testing.assert_allclose(ours, VARIANCES[fixed].log_var(SHORT, None, t), rtol=1e-12)


def test_analytic_tables_are_checked():
    for tables in ([[0, -1.0]], [[0, 1.0], [0, 1.0, 2.0]], [[[0, 1.0]]], [[0, np.nan]]):
        with pytest.raises(ValueError, match=r"expected T \+ 1 numbers"):
            analytic.analytic_variance(*tables)
    with pytest.raises(ValueError, match=r"expected variances for t = 0\.\.20, found 4"):
        analytic.analytic_variance(np.ones(4)).log_var(SHORT, None, jnp.array([1]))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_analytic_ddim_keeps_every_marginal(eta, x64, monkeypatch):
    """In steps of any length, where DDIM itself adds too little noise."""
    known, ts = Gaussian(0.3, 0.25), [20, 13, 12, 4, 1, 0]
    args = known.predict(SHORT), known, SHORT, ts, monkeypatch
    oracle.check_marginals(analytic.analytic_ddim(SHORT, eta), *args)
    with pytest.raises(AssertionError):
        oracle.check_marginals(ancestral.ddim(SHORT, eta), *args)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_analytic_ddim_of_a_known_x_0_is_ddim(eta):
    """The x0_variance of fixed_small is 0, so nothing is added."""
    predict = targets.make_predict(SHORT, oracle.toy, TARGETS["eps"], VARIANCES["fixed_small"])
    x_T, ts = random.normal(random.key(1), (2, 4, 4, 3)), np.array([20, 17, 16, 9, 4, 1, 0])
    ours, theirs = (
        trajectory(sampler(SHORT, eta), predict, KEY, x_T, ts).x
        for sampler in (analytic.analytic_ddim, ancestral.ddim)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32
