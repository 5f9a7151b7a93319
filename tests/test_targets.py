"""Targets and variances: official vectors, round trips, Gaussian data, whose answer is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import likelihood, process, samplers, schedules, targets
from diffusion.samplers import analytic, ancestral, base
from diffusion.targets import TARGETS, VARIANCES, Prediction
from tests.oracle import Gaussian, cheap_noise, official, side_by_side, toy

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))


def column(x):
    return jnp.asarray(x).reshape(-1, 1, 1, 1)


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
        # At t = 1 beta~ is 0. The class that we follow takes t = 2; the older one takes 1e-20,
        # which differs only in a term that is not asked for (no noise is drawn at t = 1).
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
    """Float32 roundings of 6e-8 of the output, amplified by what to_x0 multiplies them with."""
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
    for m, target in TARGETS.items():
        for v, variance in VARIANCES.items():
            for clip in (0, 1):
                predict = targets.make_predict(
                    LINEAR,
                    lambda x, t, learned=v == "learned": toy(x, t, learned),
                    TARGETS[target],
                    VARIANCES[variance],
                    clip=bool(clip),
                )
                prediction = predict(x_t, t)
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
    """to_x0(of(x_0, eps)) is x_0, up to the roundings that the way back amplifies."""
    target, p = TARGETS[name], LINEAR
    with jax.enable_x64(double):
        t = jnp.array([1, 2, 3, 10, 100, 500, 999, 1000])
        dtype = jnp.float64 if double else jnp.float32
        x_0 = random.uniform(random.key(0), (8, 16, 16, 3), dtype, -1, 1)
        eps = random.normal(random.key(1), x_0.shape, dtype)

        @jax.jit
        def there_and_back(x_0, eps):
            x_t = process.q_sample(p, x_0, t, eps)
            output = target.of(p, x_0, eps, x_t, t)
            # With what one unit of the output means for x_0.
            return [target.to_x0(p, output + unit, x_t, t) for unit in (0, 1)]

        back, moved = there_and_back(x_0, eps)
        error, amplification = (np.abs(d).max(axis=(1, 2, 3)) for d in (back - x_0, moved - back))
        # Outputs, x_t and eps are below 5 and meet about five roundings of half a unit each. In
        # float64 the tables count as well: 1 / alpha_bar - 1 at t = 1 is good to 1e-12, its root
        # 0.01 to half of that.
        tables = 3e-14 if double else 0
        assert np.all(error <= 5 * 2.5 * jnp.finfo(dtype).eps * (1 + amplification) + tables)


def test_v_is_the_velocity_on_the_circle(x64):
    """v = d x_t / d phi for x_t = cos(phi) x_0 + sin(phi) eps, cos^2 phi = alpha_bar.

    Salimans & Ho, arXiv 2202.00512, appendix D.
    """
    x_0, eps = random.normal(random.key(0), (2, SHORT.T, 3, 3, 1))
    t = jnp.arange(1, SHORT.T + 1)
    phi = column(np.arccos(np.sqrt(SHORT.alpha_bar[1:])))
    x_t, v = jax.jvp(lambda a: jnp.cos(a) * x_0 + jnp.sin(a) * eps, (phi,), (jnp.ones_like(phi),))
    ours = TARGETS["v"].of(SHORT, x_0, eps, x_t, t)
    np.testing.assert_allclose(ours, v, atol=1e-12)  # float64; arccos loses a digit near 1


KEY = random.key(1)
X_T = random.normal(random.key(0), (5, 4, 4, 2))


def network(x, t, outputs):
    """Any function of both; the log-variance, where asked for, is between the fixed ones or not."""
    output = 0.8 * jnp.tanh(x) + 0.1 * jnp.cos(t).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.concatenate([output, 0.5 * jnp.sin(x) - 3][:outputs], -1)


@pytest.mark.parametrize("target", TARGETS)
def test_contract(target, monkeypatch):
    """Every pair goes through everything that knows a model: shapes, finite, consistent."""
    p = process.from_betas(schedules.linear(5, 0.01, 0.4))
    for module in (likelihood, samplers):
        monkeypatch.setattr(module, "noise", cheap_noise)
    pairs = [
        targets.make_predict(
            p, functools.partial(network, outputs=variance.outputs), TARGETS[target], variance
        )
        for variance in VARIANCES.values()
    ]

    @jax.jit
    def through(x_t, t):
        predict, n = side_by_side(pairs), len(pairs)
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
    x_t, prediction, x_again, steps, x_0, terms = through(X_T, t)
    assert np.abs(prediction.x_0).max() <= 1  # clipped
    # The two belong together, clipped or not. Float32: 1 / sqrt(1 - alpha_bar_1) = 10 comes in and
    # goes out again.
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
    """The same for one time and for one per example; a fixed log-variance is one per example."""
    apply = functools.partial(network, outputs=VARIANCES[variance].outputs)
    predict = targets.make_predict(SHORT, apply, TARGETS[target], VARIANCES[variance])
    together, alone = predict(X_T, 3), predict(X_T, jnp.full(5, 3))
    jax.tree.map(np.testing.assert_array_equal, together, alone)
    assert alone.x_0.shape == alone.eps.shape == X_T.shape
    wanted = X_T.shape if VARIANCES[variance].outputs == 2 else (5, 1, 1, 1)
    assert alone.log_var.shape == alone.var_0.shape == wanted
    assert (alone.mean is None) == (target != "mu")


@pytest.mark.parametrize("target", TARGETS)
def test_clipping(target):
    """Off: x_0 as the network says. On: x_0 in [-1, 1], eps with it; a mu-network's mean stays."""
    x_t = 2 * random.normal(random.key(0), (4, 8, 8, 1))
    t = jnp.array([1, 2, 10, 20])

    def apply(x, model_t):
        return 3 * x

    @jax.jit
    def go(x_t):
        variance = VARIANCES["fixed_small"]
        predicts = [targets.make_predict(SHORT, apply, TARGETS[target], variance, c) for c in (0, 1)]
        both = [predict(x_t, t) for predict in predicts]
        wanted, _ = process.q_posterior(SHORT, both[1].x_0, x_t, t - 1, t)
        return both, [targets.p_mean_log_variance(SHORT, q, x_t, t - 1, t)[0] for q in both], wanted

    (off, on), means, wanted = go(x_t)
    assert np.abs(off.x_0).max() > 1.5
    np.testing.assert_array_equal(on.x_0, np.clip(off.x_0, -1, 1))
    assert np.abs(on.eps - off.eps).max() > 0.1
    if target == "mu":
        np.testing.assert_array_equal(means[0], 3 * x_t)
        np.testing.assert_array_equal(means[1], 3 * x_t)
    else:
        np.testing.assert_array_equal(means[1], wanted)
        assert np.abs(means[0] - means[1]).max() > 0.1


GAUSSIANS = {"wide": Gaussian(0.3, 2.5), "narrow": Gaussian(-0.5, 0.04), "unit": Gaussian(0, 1)}


@pytest.mark.parametrize("known", GAUSSIANS.values(), ids=GAUSSIANS)
@pytest.mark.parametrize("target", TARGETS)
def test_reverse_is_exact_for_gaussian_data(target, known, x64):
    """With the perfect network p_theta(x_s | x_t) is q(x_s | x_t), for steps of any length.

    The network knows the variance of single steps only. That longer ones come out exact as well is
    Theorem 1 of Analytic-DPM (arXiv 2201.06503), read backwards and forwards.
    """
    p = SHORT
    apply = known.network(p, target)
    s, t = np.triu_indices(p.T + 1, 1)  # every pair s < t

    @jax.jit
    def steps(x_t, s, t):
        predict = targets.make_predict(p, apply, TARGETS[target], VARIANCES["learned"], clip=False)
        prediction = predict(x_t, t)
        # Without var_0 it is derived from log_var on the spot.
        with_and_without = (prediction, prediction._replace(var_0=None))
        return prediction, [targets.p_mean_log_variance(p, q, x_t, s, t) for q in with_and_without]

    x_t = random.normal(random.key(0), (len(t), 2, 2, 1), jnp.float64)
    prediction, results = steps(x_t, s, t)
    intercept, slope, variance = (column(c) for c in known.given(p, s, t))
    for mean, log_var in results:
        # Float64 roundings, amplified by 1 / weight_0^2, up to 2e3, in the way to var_0 and back.
        np.testing.assert_allclose(mean, intercept + slope * x_t, atol=1e-11)
        wanted = jnp.broadcast_to(variance, x_t.shape)
        np.testing.assert_allclose(jnp.exp(log_var), wanted, rtol=1e-10)
    # And the same variance of x_0 whatever it is called.
    _, _, var_0 = known.given(p, 0, t)
    wanted = jnp.broadcast_to(column(var_0), x_t.shape)
    np.testing.assert_allclose(prediction.var_0, wanted, rtol=1e-9)


def test_fixed_variances_are_the_two_extremes(x64):
    """Section 3.2: beta_t is optimal for unit Gaussian data, beta~_t for a point; all else between.

    Optimal as in: the true variance of x_{t-1} given x_t.
    """
    t = np.arange(2, SHORT.T + 1)  # at t = 1 both take the decoder's value
    small = targets.posterior_log_var(SHORT, jnp.asarray(t))
    large = targets.beta_log_var(SHORT, jnp.asarray(t))
    true = {var: np.log(Gaussian(0.2, var).given(SHORT, t - 1, t)[2]) for var in (0, 1e-3, 0.3, 1)}
    np.testing.assert_allclose(large, true[1], rtol=1e-12)  # float64
    np.testing.assert_allclose(small, true[0], rtol=1e-12)
    assert np.all(small < true[1e-3]) and np.all(true[1e-3] < true[0.3])
    assert np.all(true[0.3] < large)


@pytest.mark.parametrize("name", ["fixed_small", "fixed_large"])
def test_var_0_of_the_fixed_variances(name, x64):
    """The variance of x_0 that each stands for: of a point 0, of unit Gaussian data 1 - alpha_bar.

    The table's var_0 and the one implied by the log-variance agree wherever both are defined.
    """
    t = jnp.arange(2, SHORT.T + 1)
    log_var = column(VARIANCES[name].log_var(SHORT, None, t))
    _, _, wanted = Gaussian(0, name == "fixed_large").given(SHORT, 0, np.asarray(t))
    # Zero is a difference of numbers of 1e-3 to 0.4 that agree to 1e-16, times up to 2e3.
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(
        VARIANCES[name].var_0(SHORT, log_var, t)[:, 0, 0, 0], wanted, **close
    )
    np.testing.assert_allclose(
        targets.implied_var_0(SHORT, log_var, t)[:, 0, 0, 0], wanted, **close
    )


def test_implied_var_0_has_a_floor():
    """A log-variance below beta~ is no conditional variance of anything: x_0 counts as known."""
    t = jnp.array([2, 10, 20])
    too_small = column(targets.posterior_log_var(SHORT, t)) - 1
    assert np.all(targets.implied_var_0(SHORT, too_small, t) == 0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_long_steps_are_steps_of_the_respaced_chain(target, variance, x64):
    """Improved DDPM's respacing (arXiv 2102.09672, Section 4) and our long steps are one thing."""
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
    # Not from the first time kept to 0: that is a decoder for q, as t = 1 is.
    long, short = step(x, np.arange(2, 5))
    for a, b in zip(long, short, strict=True):
        # Float64; alpha_bar's logarithm and its quotient round differently.
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


RESPACED = [np.arange(1, 21), np.array([2, 7, 8, 20]), np.array([9, 1, 10])]
VAR_0 = np.append(0, np.geomspace(1e-3, 0.5, SHORT.T))


@pytest.mark.parametrize("variance", [*VARIANCES, "analytic"])
@pytest.mark.parametrize("target", TARGETS)
def test_respacing_to_all_times_changes_nothing(target, variance):
    """Bit for bit, whatever is predicted and with which variance."""
    variance = VARIANCES.get(variance) or analytic.analytic_variance(VAR_0)
    apply = functools.partial(network, outputs=variance.outputs)
    predict = targets.make_predict(SHORT, apply, TARGETS[target], variance)
    same = targets.respace_predict(SHORT, predict, variance, np.arange(1, 21))
    t = jnp.array([1, 2, 3, 11, 20])  # not compiled: two programs may round differently
    jax.tree.map(np.testing.assert_array_equal, same(X_T, t), predict(X_T, t))


@pytest.mark.parametrize("ts", RESPACED, ids=["all", "from 2", "from 1"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "analytic"])
def test_respaced_is_the_shorter_chain_s_own_predictor(variance, ts):
    """Bit for bit, its first step included, where a network gives no variance and no mean."""
    tables = VAR_0, 2 * VAR_0
    variance = VARIANCES.get(variance) or analytic.analytic_variance(*tables)
    apply = functools.partial(network, outputs=1)
    q = process.respace(SHORT, ts)
    i = jnp.minimum(jnp.array([1, 2, 3, 3, len(ts)]), len(ts))
    for target in ("eps", "v"):
        # Whatever variance the longer chain had.
        longer = targets.make_predict(SHORT, apply, TARGETS[target], VARIANCES["fixed_large"])
        wanted = targets.make_predict(q, apply, TARGETS[target], variance)(X_T, i)
        ours = targets.respace_predict(SHORT, longer, variance, ts)(X_T, i)
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)


@pytest.mark.parametrize("ts", RESPACED, ids=["all", "from 2", "from 1"])
@pytest.mark.parametrize("target", TARGETS)
def test_respaced_is_exact_for_gaussian_data(target, ts, x64):
    """A learned variance of single steps, and the mean of a mu-network, on longer steps."""
    p, known = SHORT, Gaussian(0.3, 0.4)
    learned = VARIANCES["learned"]
    predict = targets.make_predict(p, known.network(p, target), TARGETS[target], learned, clip=False)
    q, i = process.respace(p, ts), np.arange(1, len(ts) + 1)
    x_t = random.normal(random.key(0), (len(ts), 2, 2, 1), jnp.float64)

    @jax.jit
    def step(x_t, i):
        return targets.p_mean_log_variance(q, targets.respace_predict(p, predict, learned, ts)(x_t, i), x_t, i - 1, i)

    mean, log_var = step(x_t, i)
    times = np.append(0, np.sort(ts))
    intercept, slope, variance = (column(c) for c in known.given(p, times[:-1], times[1:]))
    # Float64 roundings, amplified by 1 / weight_0^2, up to 2e3, in the way to var_0 and back.
    np.testing.assert_allclose(mean, intercept + slope * x_t, atol=1e-11)
    wanted = jnp.broadcast_to(variance, x_t.shape)
    np.testing.assert_allclose(jnp.exp(log_var), wanted, rtol=1e-10)


def test_a_respaced_decoder_has_a_floor():
    """A learned variance that takes x_0 as known: at the first step it is clipped as beta~ is."""
    ts = np.array([3, 8, 20])

    def apply(x, model_t):  # far below beta~
        return jnp.concatenate([0.1 * x, jnp.full_like(x, -30)], -1)

    learned = VARIANCES["learned"]
    predict = targets.make_predict(SHORT, apply, TARGETS["x0"], learned)
    i = jnp.array([1, 1, 2, 3, 3])
    log_var = targets.respace_predict(SHORT, predict, learned, ts)(X_T, i).log_var
    wanted = column(targets.posterior_log_var(process.respace(SHORT, ts), i))
    # Float32: beta~ on the device, of logarithms' differences, and on the host.
    np.testing.assert_allclose(log_var, jnp.broadcast_to(wanted, X_T.shape), rtol=1e-5)
    # But a trained step says what the network says.
    log_var = targets.respace_predict(SHORT, predict, learned, [1, 2, 9])(X_T, jnp.array(2)).log_var
    assert np.all(log_var == -30)


def test_analytic_variance_is_exact_for_gaussian_data(x64):
    """Theorem 1 of Analytic-DPM (arXiv 2201.06503): one Var[x_0 | x_t] for steps of any length."""
    known, t = Gaussian(0.3, 0.4), np.arange(1, SHORT.T + 1)
    _, _, var_0 = known.given(SHORT, 0, t)
    variance = analytic.analytic_variance(np.append(np.nan, var_0), np.append(np.nan, 3 * var_0))
    for ts in RESPACED:
        q, times = process.respace(SHORT, ts), np.append(0, np.sort(ts))
        i = np.arange(1, len(ts) + 1)
        ours = np.exp(variance.log_var(q, None, jnp.asarray(i)))
        np.testing.assert_allclose(ours[1:], known.given(SHORT, times[1:-1], times[2:])[2], 1e-10)
        np.testing.assert_allclose(ours[0], 3 * var_0[times[1] - 1], rtol=1e-12)  # float64
        of_x_0 = variance.var_0(q, column(jnp.zeros(len(ts))), jnp.asarray(i))
        np.testing.assert_allclose(of_x_0, column(var_0[times[1:] - 1]), rtol=1e-12)
        # Without a decoder's table: as the fixed variances.
        without = analytic.analytic_variance(np.append(0, var_0)).log_var(q, None, jnp.asarray(i))
        np.testing.assert_allclose(without[1:], np.log(ours[1:]), rtol=1e-12)
        np.testing.assert_allclose(without[0], targets.posterior_log_var(q, 1), rtol=1e-12)


def test_analytic_variance_between_the_fixed_ones(x64):
    """Nothing known of x_0, as of unit Gaussian data, is fixed_large; all known, fixed_small."""
    t = jnp.arange(1, SHORT.T + 1)
    for var_0, fixed in ((0 * VAR_0, "fixed_small"), (1 - SHORT.alpha_bar, "fixed_large")):
        ours = analytic.analytic_variance(var_0).log_var(SHORT, None, t)
        np.testing.assert_allclose(ours, VARIANCES[fixed].log_var(SHORT, None, t), rtol=1e-12)


def test_analytic_tables_are_checked():
    for tables in ([[0, -1.0]], [[0, 1.0], [0, 1.0, 2.0]], [[[0, 1.0]]], [[0, np.nan]]):
        with pytest.raises(ValueError, match=r"expected T \+ 1 numbers"):
            analytic.analytic_variance(*tables)
    with pytest.raises(ValueError, match="ends at t = 3 < 20"):
        analytic.analytic_variance(np.ones(4)).log_var(SHORT, None, jnp.array([1]))


def test_last_long_step():
    """x_s = x_0: certain where x_0 counts as known, else with the variance of x_0 itself."""
    x = random.normal(random.key(0), (2, 4, 4, 1))
    prediction = Prediction(0.1 * x, x, jnp.zeros((2, 1, 1, 1)), jnp.zeros((2, 1, 1, 1)))
    mean, log_var = targets.p_mean_log_variance(SHORT, prediction, x, 0, 9)
    np.testing.assert_array_equal(mean, prediction.x_0)
    assert np.all(log_var == -np.inf)
    prediction = prediction._replace(var_0=jnp.full((2, 1, 1, 1), 0.25))
    mean, log_var = targets.p_mean_log_variance(SHORT, prediction, x, 0, 9)
    np.testing.assert_array_equal(mean, prediction.x_0)
    np.testing.assert_allclose(jnp.exp(log_var), 0.25, rtol=1e-6)  # float32


def test_a_given_mean_is_for_single_steps_only():
    """A mu-network's mean is that of x_{t-1}; a longer step must go by x_0."""
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
    """T = 1 has no t = 2 to take the decoder's variance from: it is beta_1."""
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


def test_the_network_is_told_the_time_of_its_training():
    """t - 1, as the released weights were trained, in a respaced chain too."""
    told = []

    def apply(x, model_t):
        told.append(np.asarray(model_t))
        return x

    x = jnp.zeros((2, 4, 4, 1))
    for p in (SHORT, process.respace(SHORT, [5, 9, 20])):
        targets.make_predict(p, apply, TARGETS["x0"], VARIANCES["fixed_small"])(x, jnp.array([1, 3]))
    np.testing.assert_array_equal(told, [[0, 2], [4, 19]])
