"""Optimal variances, least-cost trajectories and cheap readings, against what they must equal."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import likelihood, process, schedules, targets
from diffusion.likelihood import vlb_terms
from diffusion.modes.likelihood import mean_and_stderr
from diffusion.samplers import analytic, timesteps
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
LINEAR = process.from_betas(schedules.linear(1000))
KEY = random.key(3)


def network(x, t):
    """A poor denoiser: biased, not linear, and told the time."""
    return 0.6 * jnp.tanh(x) + 0.2 + 0.1 * jnp.sin(t).reshape(-1, 1, 1, 1)


def predictor(variance, p=SHORT, target="eps"):
    return targets.make_predict(p, network, TARGETS[target], variance)


@pytest.fixture(scope="module")
def images():
    """Grey pictures on the levels, no two pixels alike."""
    x = random.normal(random.key(0), (24, 6, 6, 1))
    x = jnp.clip(0.3 * x + random.normal(random.key(1), (24, 1, 1, 1)), -1, 1)
    return jnp.round((x + 1) * 127.5) / 127.5 - 1


@pytest.fixture(scope="module")
def reading(images):
    """The estimation pass over `images`, clipped as in every evaluation."""
    predict = predictor(VARIANCES["fixed_small"])
    return jax.jit(lambda x: analytic.timestep_errors(SHORT, predict, KEY, x))(images)


@pytest.fixture(scope="module")
def optimum(reading):
    return analytic.optimal_variance(SHORT, [reading])


@pytest.fixture(scope="module")
def measured(images):
    """terms of `images` with the draws of `reading`: (Variance, times) -> mean bits, compiled."""

    def mean_terms(variance, ts=None):
        ts = np.arange(1, SHORT.T + 1) if ts is None else np.sort(ts)
        predict = targets.respace_predict(SHORT, predictor(VARIANCES["fixed_small"]), variance, ts)
        table = jnp.asarray(np.append(0, ts))

        def run(x):
            with pytest.MonkeyPatch.context() as patch:  # x_t by its time on the trained chain
                draw = process.sample_noise
                patch.setattr(likelihood, "noise", lambda k, i, like: draw(k, table[i], like))
                return vlb_terms(process.respace(SHORT, ts), predict, KEY, x).bits

        return np.asarray(jax.jit(run)(images), np.float64).mean(0)

    return mean_terms


def test_readings_are_those_of_the_terms(images, reading):
    """The same draws: the same errors, and at t = 1 the decoder of the fixed variances."""
    predict = predictor(VARIANCES["fixed_small"])
    out = jax.jit(lambda x: vlb_terms(SHORT, predict, KEY, x))(images)
    assert reading.mse.shape == (24, 20) and reading.decoder.shape == (24, 20, 82)
    np.testing.assert_allclose(reading.mse, out.mse, rtol=1e-5)  # float32, fused otherwise
    # Float32; masses are differences, good to 2e-7 of a few percent.
    np.testing.assert_allclose(reading.decoder[:, 0, -1], out.bits[:, 0], rtol=1e-4)


def test_decoders_of_every_time(images, monkeypatch):
    """Column t - 1 is -log2 p(x_0 | x_t) around the prediction from x_t, per scale, in bits/dim."""
    monkeypatch.setattr(analytic, "noise", oracle.cheap_noise)
    predict = predictor(VARIANCES["fixed_small"])
    out = jax.jit(lambda x: analytic.timestep_errors(SHORT, predict, KEY, x))(images)
    scales = analytic.decoder_scales(SHORT)
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


def test_optimum_does_not_depend_on_the_batches(reading, optimum):
    """Parts of unequal size, and plain means and standard errors over the images."""
    parts = [jax.tree.map(lambda a, i=i: a[i], reading) for i in (slice(5), slice(5, 24))]
    # Float64 sums of squares against sums of squared differences.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9),
        analytic.optimal_variance(SHORT, iter(parts)),
        optimum,
    )
    assert optimum.n == 24
    np.testing.assert_allclose(optimum.var_0[1:], mean_and_stderr(reading.mse).mean, rtol=1e-12)
    np.testing.assert_allclose(optimum.var_0_error[1:], mean_and_stderr(reading.mse).error, rtol=1e-9)
    best = np.argmin(reading.decoder.mean(0), axis=-1)
    decoder = mean_and_stderr(np.take_along_axis(np.asarray(reading.decoder), best[None, :, None], -1))
    np.testing.assert_allclose(optimum.decoder_bits[1:], decoder.mean[:, 0], rtol=1e-6)
    np.testing.assert_allclose(optimum.decoder_bits_error[1:], decoder.error[:, 0], rtol=1e-5)
    np.testing.assert_allclose(optimum.decoder[1:], analytic.decoder_scales(SHORT)[best] ** 2)
    assert all(table[0] == 0 for table in optimum[:-1])
    with pytest.raises(ValueError, match="two or more images, found 1"):
        analytic.optimal_variance(SHORT, [jax.tree.map(lambda a: a[:1], reading)])


# Float32 terms, each a sum over pixels that cancels down to 1e-3 of its parts.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}


def test_analytic_variance_has_the_least_bound(optimum, measured):
    """On the images it was estimated from: every term, against both fixed ones and against others.

    The network is biased and its x_0 is clipped: neither matters.
    """
    best = measured(analytic.analytic_variance(optimum.var_0, optimum.decoder))
    for name in ("fixed_small", "fixed_large"):
        other = measured(VARIANCES[name])
        assert np.all(best <= other * (1 + ROUNDING["rtol"]) + ROUNDING["atol"])
        assert best.sum() < 0.99 * other.sum()
    for factor in (0.8, 1.25):
        other = measured(analytic.analytic_variance(factor * optimum.var_0, optimum.decoder))
        assert np.all(best[1:-1] <= other[1:-1] * (1 + ROUNDING["rtol"]) + ROUNDING["atol"])
        assert np.all(best[1:12] < other[1:12])  # where x_t still says something of x_0
        np.testing.assert_array_equal(best[[0, -1]], other[[0, -1]])


def test_the_paper_s_estimate_is_worse_for_a_poor_network(images, reading, optimum, measured):
    """Gamma_t = E||eps^||^2 / d supposes a perfect eps; with this network its variance costs."""
    predict = predictor(VARIANCES["fixed_small"])

    @jax.jit
    def gamma(x, t):
        x_t = process.q_sample(SHORT, x, t, process.sample_noise(process.example_keys(KEY, 24), t[0], x))
        return (predict(x_t, t).eps ** 2).mean()

    gamma = np.array([gamma(images, jnp.full(24, t)) for t in range(1, 21)])
    a = SHORT.alpha_bar[1:]
    paper = np.append(0, np.maximum((1 - a) / a * (1 - gamma), 0))
    ours = measured(analytic.analytic_variance(optimum.var_0, optimum.decoder))
    assert ours.sum() < 0.99 * measured(analytic.analytic_variance(paper, optimum.decoder)).sum()


@pytest.mark.parametrize("K", [3, 6])
def test_cost_model_is_the_measured_bound(K, optimum, measured):
    """On the draws of the estimation, term by term: what costs least there measures least."""
    costs = analytic.step_costs(SHORT, optimum)
    variance = analytic.analytic_variance(optimum.var_0, optimum.decoder)
    bits = {}
    for name, ts in (("least", analytic.least_cost(costs, K)), ("even", timesteps.uniform(SHORT, K))):
        out = measured(variance, ts[:-1])
        assert out.shape == (K + 1,)
        ends = ts[::-1]
        np.testing.assert_allclose(out[:-1], costs[ends[:-1], ends[1:]], **ROUNDING)
        bits[name] = out[:-1].sum()
        assert bits[name] == pytest.approx(analytic.path_cost(costs, ts), rel=1e-4)
    assert bits["least"] < bits["even"]


def test_costs_of_gaussian_data():
    """With the true Var[x_0 | x_t] a step costs I(x_0; x_s | x_t), of any length."""
    known, p = Gaussian(0.1, 0.3), SHORT
    t = np.arange(1, p.T + 1)
    var_0 = np.append(0, known.given(p, 0, t)[2])
    decoder = np.append(0, np.linspace(1, 5, p.T))
    costs = analytic.step_costs(p, analytic.OptimalVariance(var_0, var_0, var_0, decoder, decoder, 2))
    s, t = np.triu_indices(p.T + 1, 1)
    inside = s > 0
    ratio = known.given(p, s, t)[2][inside] / Gaussian(0, 0).given(p, s, t)[2][inside]
    np.testing.assert_allclose(costs[s, t][inside], 0.5 * np.log2(ratio), rtol=1e-9)  # float64
    np.testing.assert_array_equal(costs[0, 1:], decoder[1:])
    assert np.all(np.isinf(costs[np.tril_indices(p.T + 1)]))


def test_readings_of_gaussian_data():
    """The measured Var[x_0 | x_t] is the true one, within five of its standard errors."""
    known, p = Gaussian(0.1, 0.06), process.from_betas(schedules.linear(12, 0.02, 0.4))
    x_0 = known.mean + np.sqrt(known.var) * random.normal(random.key(4), (512, 8, 8, 1))
    x_0 = jnp.round((x_0 + 1) * 127.5).clip(0, 255) / 127.5 - 1
    apply = known.network(p, "v", learned=False)
    predict = targets.make_predict(p, apply, TARGETS["v"], VARIANCES["fixed_large"], clip=False)
    out = analytic.optimal_variance(p, [jax.jit(lambda x: analytic.timestep_errors(p, predict, KEY, x))(x_0)])
    # Five standard errors, and the rounding to levels, 1 / (12 * 127.5^2) = 5e-6.
    wanted = known.given(p, 0, np.arange(1, 13))[2]
    assert np.all(np.abs(out.var_0[1:] - wanted) < 5 * out.var_0_error[1:] + 5e-6)
    assert np.all(out.var_0_error[1:] < 0.02 * wanted)
    # A Gaussian's best decoder has its variance; levels that are coarse against it widen nothing.
    assert np.all(np.abs(np.log2(out.decoder[1:] / wanted)) < 0.25)  # one rung of the ladder
    density = 0.5 * np.log2(2 * np.pi * np.e * wanted) + np.log2(127.5)
    # The ladder costs up to 2.7e-3 bits, the tanh formula and the levels 2e-3 each.
    assert np.all(np.abs(out.decoder_bits[1:] - density) < 5 * out.decoder_bits_error[1:] + 7e-3)


def exhaustive(costs, K):
    """The least cost of K steps from T to 0, by looking at every way."""
    T = len(costs) - 1
    ways = (
        np.array([T, *sorted(inner, reverse=True), 0])
        for inner in itertools.combinations(range(1, T), K - 1)
    )
    return min(analytic.path_cost(costs, ts) for ts in ways)


def test_least_cost_is_the_least_of_all():
    rng = np.random.RandomState(0)
    for T in (1, 2, 5, 9):
        costs = np.where(np.triu(np.ones((T + 1, T + 1)), 1) > 0, rng.rand(T + 1, T + 1), np.inf)
        for K in range(1, T + 1):
            ts = analytic.least_cost(costs, K)
            assert ts.dtype == np.int32 and len(ts) == K + 1
            assert ts[0] == T and ts[-1] == 0 and np.all(np.diff(ts) < 0)
            assert analytic.path_cost(costs, ts) == pytest.approx(exhaustive(costs, K))
        for K in (0, T + 1):
            with pytest.raises(ValueError, match=f"1 to {T} steps"):
                analytic.least_cost(costs, K)


def test_no_way_costs_less(optimum):
    """For any number of steps, the even one of samplers.GRIDS included."""
    costs = analytic.step_costs(SHORT, optimum)
    least = [analytic.path_cost(costs, analytic.least_cost(costs, K)) for K in range(1, 21)]
    even = [analytic.path_cost(costs, timesteps.uniform(SHORT, K)) for K in range(1, 21)]
    assert np.all(np.array(least) <= even)
    assert least[3] < 0.97 * even[3]
    np.testing.assert_array_equal(analytic.least_cost(costs, 20), np.arange(20, -1, -1))
    np.testing.assert_array_equal(analytic.least_cost(costs, 1), [20, 0])


def test_strata():
    """Every time is in one part, 1 alone in its own, and parts never shrink as t grows."""
    for T in (*range(2, 30), 1000):
        for n in range(2, T + 1):
            edges = analytic.timestep_strata(T, n)
            assert edges.dtype == np.int32 and len(edges) == n + 1
            assert list(edges[:2]) == [1, 2] and edges[-1] == T + 1 and np.all(np.diff(edges) > 0)
    np.testing.assert_array_equal(analytic.timestep_strata(1000, 1000), np.arange(1, 1002))
    np.testing.assert_array_equal(analytic.timestep_strata(1, 1), [1, 2])
    # Of the paper's chain at a tenth: early times one by one, later ones in parts of about 5 %.
    edges = analytic.timestep_strata(1000, 100)
    assert np.all(np.diff(edges)[:15] == 1)
    assert np.all(np.diff(edges)[50:] < 0.08 * edges[50:-1])
    for T, n in ((20, 1), (20, 21), (1, 2), (1, 0)):
        with pytest.raises(ValueError, match="strata: expected"):
            analytic.timestep_strata(T, n)


def gaussian_levels(known, key, shape):
    x_0 = known.mean + np.sqrt(known.var) * random.normal(key, shape)
    return jnp.round((x_0 + 1) * 127.5).clip(0, 255) / 127.5 - 1


def test_all_strata_are_the_whole_bound(images):
    """n = T: the terms of the same key, added up."""
    predict = predictor(VARIANCES["fixed_large"])

    @jax.jit
    def both(x):
        edges = analytic.timestep_strata(20, 20)
        return analytic.stratified_vlb(SHORT, predict, KEY, x, edges), vlb_terms(SHORT, predict, KEY, x).bits

    ours, bits = both(images)
    np.testing.assert_allclose(ours, bits.sum(1), rtol=1e-5)  # float32, summed in another order


@pytest.fixture(scope="module")
def cheap():
    """Readings at 5 of 20 times of 6400 images, and their whole bounds, by other draws."""
    known = Gaussian(-0.2, 0.15)
    predict = predictor(VARIANCES["fixed_large"], target="x0")
    x_0 = gaussian_levels(known, random.key(5), (6400, 2, 2, 1))
    traces = []

    def counted(x, t):
        traces.append(t.shape)
        return predict(x, t)

    @jax.jit
    def stratified(key, x, edges):
        return analytic.stratified_vlb(SHORT, counted, key, x, edges)

    whole = jax.jit(lambda x: vlb_terms(SHORT, predict, random.key(7), x).bits.sum(1))(x_0)
    ours = stratified(random.key(6), x_0, analytic.timestep_strata(20, 5))
    # Another division of as many parts is no other program.
    even = stratified(random.key(6), x_0, np.array([1, 2, 7, 12, 17, 21], np.int32))
    assert len(traces) == 1
    return tuple(np.asarray(a, np.float64) for a in (x_0, whole, ours, even))


def test_stratified_is_unbiased(cheap):
    """Its mean is the whole bound's, on the same images, whatever the parts."""
    _, whole, ours, even = cheap
    for reading in (ours, even):
        mean, error = mean_and_stderr(reading - whole)
        assert abs(mean) < 4 * error and error < 0.01 * whole.mean()


def test_stratified_error_is_honest(cheap):
    """Of 400 readings of 16 images each, 68 % are within one standard error of the truth."""
    _, whole, ours, _ = cheap
    means, errors = np.array([mean_and_stderr(part) for part in np.split(ours, 400)]).T
    within = np.mean(np.abs(means - whole.mean()) < errors)
    # Student's t with 15 degrees of freedom: 66.7 %; three standard errors of a share of 400 are 7.
    assert 0.60 < within < 0.74
    np.testing.assert_allclose((errors**2).mean(), means.var(), rtol=0.22)  # 3 * sqrt(2 / 400)


def test_images_draw_their_own_times(images):
    """Nothing that a batch shares: one image's reading is its own, and twins differ."""
    predict = predictor(VARIANCES["fixed_large"])
    run = jax.jit(lambda keys, x: analytic.stratified_vlb(SHORT, predict, keys, x, analytic.timestep_strata(20, 5)))
    keys = process.example_keys(KEY, 24)
    whole = run(keys, images)
    alone = run(keys[7:8], images[7:8])
    np.testing.assert_allclose(alone[0], whole[7], rtol=1e-5)  # float32, summed in another order


def test_times_are_uniform_in_their_part(monkeypatch):
    """Each image has its own t, all of the part's alike, and the part's size as its weight."""
    monkeypatch.setattr(analytic, "term_bits", lambda p, prediction, x_0, x_t, t: t.astype(float))
    monkeypatch.setattr(analytic, "prior_bits", lambda p, x_0: jnp.zeros(len(x_0)))
    predict = predictor(VARIANCES["fixed_large"])
    x_0 = jnp.zeros((6000, 1, 1, 1))
    run = jax.jit(lambda key: analytic.stratified_vlb(SHORT, predict, key, x_0, np.array([5, 11])))
    times, others = np.asarray(run(KEY)) / 6, np.asarray(run(random.key(8))) / 6
    for t in range(5, 11):
        # A share of a sixth, 6000 times over: 29 is its standard deviation.
        assert abs(np.sum(times == t) - 1000) < 5 * 29
        assert abs(np.sum((times == t) & (others == t)) - 6000 / 36) < 5 * 13
