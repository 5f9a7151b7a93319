"""Tests targets and variances: official arrays, round trips, Gaussian data with known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import likelihood, process, schedules, targets
from diffusion.samplers import ancestral, base
from diffusion.targets import TARGETS, VARIANCES, Prediction
from tests import oracle
from tests.oracle import Gaussian, column, network, official, toy

LINEAR = process.from_betas(schedules.linear(1000))

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))


@official(
    "schedules",
    "gd*.linear.T1000.sqrt_recip*_alphas_cumprod",
    "gd*.linear.T1000.posterior_log_variance_clipped",
    "gd2.linear.T1000.fixed*",
)
def test_official_tables(official, x64):
    t = jnp.arange(1, 1001)
    one = jnp.ones((1000, 1))
    to_x0 = TARGETS["eps"].to_x0
    small = targets.posterior_log_var(LINEAR, t)
    large = targets.beta_log_var(LINEAR, t)
    for gd, rtol in (("gd2", 2e-12), ("gd1_f32", 2.0**-24 + 1e-11)):
        # Float64, where neighbours that agree in four digits are subtracted; and float32's rounding
        # of the older class's constants.
        table = f"{gd}.linear.T1000."
        x_0 = to_x0(LINEAR, 0 * one, one, t)[:, 0]
        official.close(table + "sqrt_recip_alphas_cumprod", x_0, rtol=rtol)
        x_0 = to_x0(LINEAR, -one, 0 * one, t)[:, 0]
        official.close(table + "sqrt_recipm1_alphas_cumprod", x_0, rtol=rtol)
        # At t = 1 beta~ is 0. The newer class takes t = 2, the older one 1e-20; neither is used, as
        # no noise is drawn at t = 1.
        at = slice(1, None) if gd == "gd1_f32" else ...
        official.close(table + "posterior_log_variance_clipped", small, rtol=rtol, at=at)
    table = "gd2.linear.T1000."
    official.close(table + "fixedsmall_log_variance", small, rtol=2e-12)
    official.close(table + "fixedlarge_log_variance", large, rtol=2e-12)
    # The official variances are not the exponentials of its log-variances at t = 1, and unused.
    at = slice(1, None)
    official.close(table + "fixedsmall_variance", jnp.exp(small), rtol=1e-11, at=at)
    official.close(table + "fixedlarge_variance", jnp.exp(large), rtol=1e-11, at=at)


@official("diffusion", "toy*.x_t", "pred_xstart*", "q_post.log_variance_clipped")
def test_official_x0(official):
    """Tolerances are float32 roundings of the output, 6e-8, times the factors of to_x0."""
    x_t, t = jnp.asarray(official["x_t"]), jnp.asarray(official["t"]) + 1
    output = toy(x_t, t - 1)
    official.close("toy.x_t", output, atol=2e-7)  # tanh and sin, two roundings
    official.close("toy_learned.x_t", toy(x_t, t - 1, learned=True), atol=1e-6)  # values near -5
    eps_to_x0, mu_to_x0 = TARGETS["eps"].to_x0, TARGETS["mu"].to_x0
    # 157 at t = T, and x_t up to 4.
    official.close("pred_xstart_from_eps", eps_to_x0(LINEAR, output, x_t, t), atol=2e-4, rtol=1e-6)
    noise = jnp.asarray(official["noise"])
    x_0 = eps_to_x0(LINEAR, noise, x_t, t)
    official.close("pred_xstart_from_eps_true", x_0, atol=2e-4)
    np.testing.assert_allclose(x_0, official["x_start"], atol=2e-4)
    # 1 / weight_0, 7800 at t = T, and as much for x_t: values up to 3e4.
    x_0 = mu_to_x0(LINEAR, output, x_t, t)
    official.close("pred_xstart_from_xprev", x_0, rtol=1e-6, atol=2e-2)
    log_var = column(targets.posterior_log_var(LINEAR, t))
    official.close("q_post.log_variance_clipped", log_var, rtol=1e-6)  # float32


@official("diffusion", "pmv.*", "gd1.pmv.*")
def test_official_p_mean_variance(official):
    x_t, t = jnp.asarray(official["x_t"]), jnp.asarray(official["t"]) + 1
    for m in oracle.TARGETS:
        for v in oracle.VARIANCES:
            for clip in (0, 1):
                prediction = oracle.official_predict(LINEAR, m, v, clip)(x_t, t)
                mean, log_var = targets.p_mean_log_variance(LINEAR, prediction, x_t, t - 1, t)
                key = f"pmv.{m}.{v}.clip{clip}."
                # Values up to 10 where an unclipped x_0 of 100 has the weight 0.1: 1e-6 is one
                # rounding of them.
                official.close(key + "mean", mean, atol=1e-6, rtol=1e-6)
                full = jnp.broadcast_to(log_var, x_t.shape)
                official.close(key + "log_variance", full, rtol=1e-6)  # float32
                # Not at t = 1 for the fixed ones: the official variance (0, or beta_1) is not the
                # exponential of its own log-variance there, and only that one is used.
                at = ... if v == "learned" else slice(1, None)
                official.close(key + "variance", jnp.exp(full), rtol=1e-5, at=at)  # 1e-6 times -10
                # Amplified as in the test above where nothing clips: by 157, or 7800 for mu.
                atol = {"eps": 2e-4, "xstart": 2e-7, "xprev": 2e-2}[m]
                official.close(key + "pred_xstart", prediction.x_0, rtol=1e-6, atol=atol)
                if (m, v) == ("eps", "fixedsmall"):  # the older class knows only this
                    key = f"gd1.pmv.clip{clip}."
                    official.close(key + "mean", mean, atol=1e-6, rtol=1e-6)
                    # Its log-variance at t = 1 is log 1e-20: see test_official_tables.
                    official.close(key + "log_variance", log_var, rtol=1e-6, at=slice(1, None))
                    official.close(key + "variance", jnp.exp(log_var), rtol=1e-5, at=slice(1, None))


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TARGETS)
def test_round_trip(name, double):
    """to_x0 inverts from_x0, up to the roundings that it amplifies."""
    target, p = TARGETS[name], LINEAR
    with jax.enable_x64(double):
        t = jnp.array([1, 2, 3, 10, 100, 500, 999, 1000])
        dtype = jnp.float64 if double else jnp.float32
        x_0 = random.uniform(random.key(0), (8, 16, 16, 3), dtype, -1, 1)
        eps = random.normal(random.key(1), x_0.shape, dtype)

        @jax.jit
        def round_trip(x_0, eps):
            x_t = process.q_sample(p, x_0, t, eps)
            output = target.from_x0(p, x_0, eps, x_t, t)
            # And again with the output one unit larger, for the amplification.
            return [target.to_x0(p, output + unit, x_t, t) for unit in (0, 1)]

        back, moved = round_trip(x_0, eps)
        error, amplification = (np.abs(d).max(axis=(1, 2, 3)) for d in (back - x_0, moved - back))
        # Outputs, x_t and eps are below 5 and meet about five roundings of half a unit each. In
        # float64 the tables count as well: 1 / alpha_bar - 1 at t = 1 is good to 1e-12, its root
        # 0.01 to half of that.
        tables = 3e-14 if double else 0
        assert np.all(error <= 5 * 2.5 * jnp.finfo(dtype).eps * (1 + amplification) + tables)


def test_v_is_the_derivative_by_the_angle(x64):
    """v = d x_t / d phi for x_t = cos(phi) x_0 + sin(phi) eps (arXiv:2202.00512, appendix D)."""
    x_0, eps = random.normal(random.key(0), (2, SHORT.T, 3, 3, 1))
    t = jnp.arange(1, SHORT.T + 1)
    phi = column(np.arccos(np.sqrt(SHORT.alpha_bar[1:])))
    x_t, v = jax.jvp(lambda a: jnp.cos(a) * x_0 + jnp.sin(a) * eps, (phi,), (jnp.ones_like(phi),))
    ours = TARGETS["v"].from_x0(SHORT, x_0, eps, x_t, t)
    np.testing.assert_allclose(ours, v, atol=1e-12)  # float64; arccos loses a digit near 1


def test_positions_between_the_bounds(x64):
    """-1 is log beta~, 1 is log beta, which at t = 1 are beta~_2 and beta_1; nothing is clipped."""
    betas, t = 1 - SHORT.alpha_bar[1:] / SHORT.alpha_bar[:-1], jnp.arange(1, SHORT.T + 1)
    smaller = betas[1:] * (1 - SHORT.alpha_bar[1:-1]) / (1 - SHORT.alpha_bar[2:])
    lower, upper = np.log(np.append(smaller[:1], smaller)), np.log(betas)
    for position in (-1.0, 1.0, 0.0, 3.0):
        found = VARIANCES["learned_range"].log_var(SHORT, jnp.full((SHORT.T, 1, 1, 1), position), t)
        wanted = lower + (position + 1) / 2 * (upper - lower)
        np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-10)


def test_a_position_s_gradient_in_float32():
    """Late in 4,000 steps the bounds differ by less than float32 resolves of their logarithms."""
    p = process.from_betas(schedules.cosine(4000))
    t = np.arange(1, 4001)
    log_var, zero = VARIANCES["learned_range"].log_var, jnp.zeros((4000, 1, 1, 1))
    gradient = jax.grad(lambda position: log_var(p, position, jnp.asarray(t)).sum())(zero)
    noise = 1 - p.alpha_bar
    width = np.append(np.log(process.beta_between(p, 0, 1)), np.log(noise[2:] / noise[1:-1]))
    width[0] -= np.log(process.posterior(p, 1, 2).variance)
    assert width.min() < 1e-6
    np.testing.assert_allclose(gradient.ravel(), 0.5 * width, rtol=1e-6)


KEY = random.key(1)

X_T = random.normal(random.key(0), (5, 4, 4, 2))


@pytest.mark.parametrize("is_range", [False, True])  # which predict another structure
@pytest.mark.parametrize("target", TARGETS)
def test_contract(target, is_range, monkeypatch):
    """Sampling and likelihood give finite, consistent results for every variance."""
    p = process.from_betas(schedules.linear(5, 0.01, 0.4))
    monkeypatch.setattr(process, "sample_noise", oracle.cheap_noise)
    pairs = [
        targets.make_predict(
            p, functools.partial(network, outputs=variance.outputs), TARGETS[target], variance
        )
        for variance in VARIANCES.values()
        if variance.is_range == is_range
    ]

    @jax.jit
    def run(x_t, t):
        predict, n = oracle.side_by_side(pairs), len(pairs)
        x, t_n = jnp.tile(x_t, (n, 1, 1, 1)), jnp.tile(t, n)
        prediction = predict(x, t_n)
        return (
            x,
            prediction,
            process.q_sample(p, prediction.x_0, t_n, prediction.eps),
            [targets.p_mean_log_variance(p, prediction, x, s, t_n) for s in (t_n - 1, 0 * t_n, 0)],
            base.sample(ancestral.ancestral(p), predict, KEY, x, np.array([5, 4, 1, 0])),
            likelihood.vlb_terms(p, predict, KEY, jnp.clip(x, -1, 1)),
        )

    t = jnp.arange(1, 6)
    x_t, prediction, x_again, steps, x_0, terms = run(X_T, t)
    assert np.abs(prediction.x_0).max() <= 1  # clipped
    # x_0 and eps are consistent, clipped or not. Float32, with a factor of 1 / sqrt(1 -
    # alpha_bar_1) = 10 in between.
    np.testing.assert_allclose(x_again, x_t, atol=2e-6)
    for mean, log_var in steps:
        assert mean.shape == x_t.shape and np.all(np.isfinite(mean))
        assert not np.any(np.isnan(log_var)) and np.all(log_var < 2)
    assert x_0.shape == x_t.shape and np.all(np.isfinite(x_0))
    assert terms.bits.shape == (len(x_t), 6) and terms.mse.shape == (len(x_t), 5)
    assert np.all(np.isfinite(terms.bits)) and np.all(terms.bits > 0)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("target", TARGETS)
def test_shapes_of_a_prediction(target, variance):
    """One time for all is a time per example; a fixed log-variance is [b, 1, 1, 1]."""
    apply = functools.partial(network, outputs=VARIANCES[variance].outputs)
    predict = targets.make_predict(SHORT, apply, TARGETS[target], VARIANCES[variance])
    together, each = predict(X_T, 3), predict(X_T, jnp.full(5, 3))
    jax.tree.map(np.testing.assert_array_equal, together, each)
    assert each.x_0.shape == each.eps.shape == X_T.shape
    wanted = X_T.shape if VARIANCES[variance].outputs == 2 else (5, 1, 1, 1)
    assert each.log_var.shape == each.x0_variance.shape == wanted
    assert (each.mean is None) == (not TARGETS[target].is_mean)


@pytest.mark.parametrize("target", TARGETS)
def test_clipping(target):
    """Clipping puts x_0 into [-1, 1] and changes eps with it, but not a mu-network's mean."""
    x_t = 2 * random.normal(random.key(0), (4, 8, 8, 1))
    t = jnp.array([1, 2, 10, 20])

    def apply(x, model_t):
        return 3 * x

    @jax.jit
    def go(x_t):
        args = SHORT, apply, TARGETS[target], VARIANCES["fixed_small"]
        both = [targets.make_predict(*args, clip)(x_t, t) for clip in (False, True)]
        wanted, _ = process.q_posterior(SHORT, both[1].x_0, x_t, t - 1, t)
        return both, [targets.p_mean_log_variance(SHORT, q, x_t, t - 1, t)[0] for q in both], wanted

    (off, on), means, wanted = go(x_t)
    assert np.abs(off.x_0).max() > 1.5
    np.testing.assert_allclose(on.x_0, np.clip(off.x_0, -1, 1), atol=1e-6)  # float32
    assert np.abs(on.eps - off.eps).max() > 0.1
    if TARGETS[target].is_mean:
        np.testing.assert_array_equal(means[0], 3 * x_t)
        np.testing.assert_array_equal(means[1], 3 * x_t)
    else:
        np.testing.assert_allclose(means[1], wanted, atol=1e-6)  # float32
        assert np.abs(means[0] - means[1]).max() > 0.1


GAUSSIANS = {"wide": Gaussian(0.3, 2.5), "narrow": Gaussian(-0.5, 0.04), "unit": Gaussian(0, 1)}


@pytest.mark.parametrize("known", GAUSSIANS.values(), ids=GAUSSIANS)
@pytest.mark.parametrize("target", TARGETS)
def test_reverse_is_exact_for_gaussian_data(target, known, x64):
    """With the perfect network p_theta(x_s | x_t) is q(x_s | x_t), for steps of any length.

    The network knows the variance of single steps only; that of longer ones follows by Theorem 1 of
    Analytic-DPM (arXiv:2201.06503), backwards and forwards.
    """
    p = SHORT
    s, t = np.triu_indices(p.T + 1, 1)  # every pair s < t

    @jax.jit
    def steps(x_t, s, t):
        prediction = known.predict(p, target)(x_t, t)
        return prediction.x0_variance, *targets.p_mean_log_variance(p, prediction, x_t, s, t)

    x_t = random.normal(random.key(0), (len(t), 2, 2, 1), jnp.float64)
    x0_variance, mean, log_var = steps(x_t, s, t)
    intercept, slope, variance = (column(c) for c in known.given(p, s, t))
    # Float64 roundings, amplified by 1 / weight_0^2, up to 2e3, to x0_variance and back.
    np.testing.assert_allclose(mean, intercept + slope * x_t, atol=1e-11)
    np.testing.assert_allclose(jnp.exp(log_var), np.broadcast_to(variance, x_t.shape), rtol=1e-10)
    wanted = np.broadcast_to(column(known.given(p, 0, t)[2]), x_t.shape)
    np.testing.assert_allclose(x0_variance, wanted, rtol=1e-9)


def test_fixed_variances_are_the_two_extremes(x64):
    """Var[x_{t-1} | x_t] is beta_t for unit Gaussian data, beta~_t for a point, else between."""
    t = np.arange(2, SHORT.T + 1)  # at t = 1 both take the decoder's value
    small = targets.posterior_log_var(SHORT, jnp.asarray(t))
    large = targets.beta_log_var(SHORT, jnp.asarray(t))
    true = {var: np.log(Gaussian(0.2, var).given(SHORT, t - 1, t)[2]) for var in (0, 1e-3, 0.3, 1)}
    np.testing.assert_allclose(large, true[1], rtol=1e-12)  # float64
    np.testing.assert_allclose(small, true[0], rtol=1e-12)
    assert np.all(small < true[1e-3]) and np.all(true[1e-3] < true[0.3])
    assert np.all(true[0.3] < large)


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large"])
def test_x0_variance_of_the_fixed_variances(name, x64):
    """Var[x_0 | x_t] is 0 for a point and 1 - alpha_bar for unit Gaussian data.

    The table's entry and the one implied by the log-variance agree where both are defined.
    """
    t = jnp.arange(2, SHORT.T + 1)
    log_var = column(VARIANCES[name].log_var(SHORT, None, t))
    _, _, wanted = Gaussian(0, name == "fixed_large").given(SHORT, 0, np.asarray(t))
    # Zero is a difference of numbers of 1e-3 to 0.4 that agree to 1e-16, times up to 2e3.
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(
        VARIANCES[name].x0_variance(SHORT, log_var, t)[:, 0, 0, 0], wanted, **close
    )
    np.testing.assert_allclose(
        targets.implied_x0_variance(SHORT, log_var, t)[:, 0, 0, 0], wanted, **close
    )


def test_implied_x0_variance_is_not_negative():
    """A log-variance below beta~ counts as that of a known x_0."""
    t = jnp.array([2, 10, 20])
    too_small = column(targets.posterior_log_var(SHORT, t)) - 1
    assert np.all(targets.implied_x0_variance(SHORT, too_small, t) == 0)


def test_last_long_step():
    """x_s = x_0 is certain for an x0_variance of 0, and otherwise has this variance."""
    x = random.normal(random.key(0), (2, 4, 4, 1))
    prediction = Prediction(0.1 * x, x, jnp.zeros((2, 1, 1, 1)), jnp.zeros((2, 1, 1, 1)))
    mean, log_var = targets.p_mean_log_variance(SHORT, prediction, x, 0, 9)
    np.testing.assert_array_equal(mean, prediction.x_0)
    assert np.all(log_var == -np.inf)
    prediction = prediction._replace(x0_variance=jnp.full((2, 1, 1, 1), 0.25))
    mean, log_var = targets.p_mean_log_variance(SHORT, prediction, x, 0, 9)
    np.testing.assert_array_equal(mean, prediction.x_0)
    np.testing.assert_allclose(jnp.exp(log_var), 0.25, rtol=1e-6)  # float32


def test_mean_of_a_mu_network():
    """It is that of x_{t-1}; longer steps use x_0."""
    x = random.normal(random.key(0), (2, 4, 4, 1))
    small = jnp.zeros((2, 1, 1, 1))
    prediction = Prediction(0.1 * x, x, small, small, mean=x + 7)
    s, t = jnp.array([4, 4]), jnp.array([5, 6])
    mean, _ = targets.p_mean_log_variance(SHORT, prediction, x, s, t)
    np.testing.assert_array_equal(mean[0], x[0] + 7)
    wanted, _ = process.q_posterior(SHORT, prediction.x_0, x, s, t)
    np.testing.assert_array_equal(mean[1], wanted[1])


@pytest.mark.parametrize("name", VARIANCES)
def test_a_chain_of_one_step(name):
    """With T = 1 the decoder's variance is beta_1, as there is no t = 2."""
    p = process.from_betas(np.array([0.3]))
    if VARIANCES[name].outputs == 1:
        log_var = VARIANCES[name].log_var(p, None, jnp.array([1]))
        np.testing.assert_allclose(log_var, np.log([0.3]), rtol=1e-6)  # float32


@pytest.mark.parametrize("variance, channels", [("fixed_small", 6), ("learned", 3)])
def test_channels_are_checked(variance, channels):
    def apply(x, model_t):
        return jnp.zeros((*x.shape[:-1], channels))

    predict = targets.make_predict(SHORT, apply, TARGETS["eps"], VARIANCES[variance])
    with pytest.raises(ValueError, match="network output: expected"):
        predict(jnp.zeros((2, 4, 4, 3)), 1)


def test_time_input_of_the_network():
    """It is t - 1, as in the training of the released weights, in a respaced chain too."""
    inputs = []

    def apply(x, model_t):
        inputs.append(np.asarray(model_t))
        return x

    x, t = jnp.zeros((2, 4, 4, 1)), jnp.array([1, 3])
    for p in (SHORT, process.respace(SHORT, [5, 9, 20])):
        targets.make_predict(p, apply, TARGETS["x0"], VARIANCES["fixed_small"])(x, t)
    np.testing.assert_array_equal(inputs, [[0, 2], [4, 19]])
