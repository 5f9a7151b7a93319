"""Tests the bound: the official terms, and Gaussian data, whose bound is known in closed form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import integrate, special, stats

from diffusion import likelihood, process, schedules, targets
from diffusion.likelihood import decoder_log_likelihood, normal_kl, prior_bits, vlb_term, vlb_terms
from diffusion.modes import likelihood as modes_likelihood
from diffusion.samplers import timesteps
from diffusion.targets import TARGETS, VARIANCES, Prediction
from tests import oracle
from tests.conftest import AS_SHIPPED
from tests.oracle import Gaussian, official

LINEAR = process.from_betas(schedules.linear(1000))
LEVELS = np.arange(256) / 127.5 - 1
# The first step hides little of the image but much of a level, so the decoder's 256 bins are fine.
FINE = process.from_betas(schedules.linear(12, 0.02, 0.4))


@official("diffusion", "normal_kl", "cdf.out", "dgll.out", "dgll_all.*.out", "prior_bpd")
def test_official_pieces(official):
    x_start, noise, p_noise = (jnp.asarray(official[k]) for k in ("x_start", "noise", "p_noise"))
    kl = normal_kl(x_start, jnp.full_like(x_start, -1), noise, 0.5 * p_noise)
    official.close("normal_kl", kl, rtol=1e-5, atol=1e-6)  # float32; sums that may cancel
    cdf = likelihood._normal_cdf(jnp.asarray(official["cdf.x"]))
    official.close("cdf.out", cdf, atol=2.5e-7)  # float32: two or three roundings near 1
    x, mean, log_scale = (jnp.asarray(official[f"dgll.{k}"]) for k in ("x", "means", "log_scales"))
    out = decoder_log_likelihood(x, mean, log_scale)
    # A mass is a difference of float32 numbers up to 1, hence good to 2e-7, and 2e-3 of a mass of
    # 1e-4; smaller ones are noise on both sides.
    known = official["dgll.out"] > np.log(1e-4)
    assert known.mean() > 0.3
    official.close("dgll.out", out, atol=2e-3, at=known)
    error = np.exp(out) - np.exp(official["dgll.out"])
    assert np.abs(error).max() < 4e-7  # and these are good to 2e-7 each as well
    for i in range(3):
        mean, log_scale = jnp.asarray(official[f"dgll_all.{i}.mean_logscale"])
        out = decoder_log_likelihood(jnp.asarray(official["dgll_all.x"]), mean, log_scale)
        theirs = official[f"dgll_all.{i}.out"]
        official.close(f"dgll_all.{i}.out", out, atol=2e-3, at=theirs > np.log(1e-4))  # as above
        np.testing.assert_allclose(np.exp(out), np.exp(theirs), atol=4e-7)
    # 1 - alpha_bar_T = 0.99996: of its logarithm float32 keeps 1e-7, of the prior's 1e-5 bits.
    official.close("prior_bpd", prior_bits(LINEAR, x_start), rtol=1e-3, atol=1e-8)


KINDS = list(itertools.product(oracle.VARIANCES, (0, 1)))  # variance and clipping


@official("diffusion", "vb.*", "vbB.*")
def test_official_terms_of_one_time(official):
    x_0, x_t = jnp.asarray(official["x_start"]), jnp.asarray(official["x_t"])
    t = jnp.asarray(official["t"]) + 1
    term = jax.jit(functools.partial(vlb_term, LINEAR), compiler_options=AS_SHIPPED)
    for m, (v, clip) in itertools.product(oracle.TARGETS, KINDS):
        for name, network in (("vb", oracle.toy), ("vbB", oracle.toy_b)):
            key = f"{name}.{m}.{v}.clip{clip}."
            prediction = oracle.official_predict(LINEAR, m, v, clip, network)(x_t, t)
            bits = term(prediction, x_0, x_t, t)
            theirs = official[key + "bpd"]
            # KL: float32 squares of differences of means, and an absolute floor where eps at t near
            # T leaves 1e-6 bits.
            np.testing.assert_allclose(bits[1:], theirs[1:], rtol=2e-4, atol=3e-7, err_msg=key)
            # Decoder: with the first network as x_0 or mu most pixels are so far in the tail that
            # float32 differences of the CDF are noise and meet the floor of 1e-12; the official
            # formula in float64 is 4 % from its own float32. Elsewhere plain float32.
            rtol = 0.06 if name == "vb" and m != "eps" else 1e-5
            official.close(key + "bpd", bits, rtol=rtol, atol=3e-7)
            if name == "vb":
                # Float32, amplified by 157 (eps) or 7800 (mu) at t = T where nothing clips.
                atol = {"eps": 2e-4, "xstart": 2e-7, "xprev": 2e-2}[m]
                official.close(key + "pred_xstart", prediction.x_0, rtol=1e-6, atol=atol)


@official("diffusion", "T20.bpd_*")
def test_official_bound(official, monkeypatch):
    """calc_bpd_loop on a chain of 20 steps, with the noise of each step given."""
    p = process.from_betas(official["T20.betas"])
    given = jnp.asarray(official["T20.q_noise"])
    # All kinds, with noise and without, are parts of one batch.
    n = len(KINDS)
    noise = jnp.concatenate([given, 0 * given] * n, axis=1)
    x_0 = jnp.tile(jnp.asarray(official["T20.x_start"]), (2 * n, 1, 1, 1))
    monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: noise[t - 1])
    for m in oracle.TARGETS:
        predict = oracle.side_by_side(
            [oracle.official_predict(p, m, v, clip, oracle.toy) for v, clip in KINDS]
        )
        out = jax.jit(lambda x, predict=predict: vlb_terms(p, predict, random.key(0), x))(x_0)
        parts = (np.split(np.asarray(part), 2 * n) for part in out)
        kinds = [(name, *kind) for kind in KINDS for name in ("noise", "zero")]
        for (name, v, clip), bits, mse in zip(kinds, *parts, strict=True):
            key = f"T20.bpd_{name}.{m}.{v}.clip{clip}."
            theirs = official[key + "terms"]
            # KL: a float32 sum of numbers near 1 that cancel down to 1e-3.
            close = {"rtol": 5e-5, "atol": 3e-7, "err_msg": key}
            np.testing.assert_allclose(bits[:, 1:-1], theirs[:, 1:], **close)
            # Decoder in the far tail, as in the test above.
            rtol = 1e-5 if m == "eps" else 0.06
            official.close(key + "terms", bits[:, :-1], rtol=max(rtol, 5e-5), atol=3e-7)
            np.testing.assert_allclose(bits[:, 0], theirs[:, 0], rtol=rtol, err_msg=key)
            official.close(key + "prior", bits[:, -1], rtol=1e-5, atol=1e-8)  # float32
            official.close(key + "total", bits.sum(1), rtol=rtol)
            # Predictions of x_0 in float32, amplified by at most 1 / weight_0 where nothing clips.
            official.close(key + "mse", mse, rtol=1e-5, atol=1e-7)


def test_masses_of_the_decoder_sum_to_one(x64):
    """Over 256 bins, the outer two unbounded (eq. 13), for any mean and scale."""
    mean = jnp.asarray([-3.0, -1.0, -0.997, -0.3, 0.0, 0.5, 0.999, 1.0, 2.0])
    log_scale = jnp.linspace(-7, 3, 11)
    mean, log_scale = (m.reshape(1, -1) for m in jnp.meshgrid(mean, log_scale))
    masses = np.exp(decoder_log_likelihood(jnp.asarray(LEVELS).reshape(-1, 1), mean, log_scale))
    # A mass counts as at least 1e-12, so up to 256e-12 too much; else the sum telescopes.
    np.testing.assert_allclose(masses.sum(0), 1, atol=3e-10)
    assert masses.min() >= 1e-12 * (1 - 1e-12)
    for levels in (2, 3, 17, 100):
        x_0 = jnp.linspace(-1, 1, levels).reshape(-1, 1)
        masses = np.exp(decoder_log_likelihood(x_0, mean, log_scale, levels))
        np.testing.assert_allclose(masses.sum(0), 1, atol=3e-10, err_msg=str(levels))


def test_masses_of_the_decoder_are_a_gaussian_s(x64):
    """Against the true normal CDF on the same intervals."""
    mean = jnp.linspace(-1.2, 1.2, 25).reshape(1, -1)
    edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    for scale in (0.003, 0.02, 0.3, 2.0):
        log_scale = jnp.full_like(mean, np.log(scale))
        masses = np.exp(decoder_log_likelihood(jnp.asarray(LEVELS).reshape(-1, 1), mean, log_scale))
        true = np.diff(special.ndtr((edges[:, None] - mean) / scale), axis=0)
        # The tanh formula is at most 1.8e-4 from the CDF, on either edge.
        np.testing.assert_allclose(masses, true, atol=3.6e-4)


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_prior(name, x64):
    """L_T is the integral of q(x_T | x_0) log2(q(x_T | x_0) / N(x_T; 0, 1))."""
    p = process.from_betas(schedules.SCHEDULES[name](10, 0.01, 0.2))
    for x_0 in (-1.0, 0.2, 1.0):
        a = p.alpha_bar[-1]
        q = stats.norm(np.sqrt(a) * x_0, np.sqrt(1 - a))
        nats, _ = integrate.quad(
            lambda x, q=q: q.pdf(x) * (q.logpdf(x) - stats.norm.logpdf(x)), -12, 12, limit=200
        )
        ours = prior_bits(p, jnp.full((1, 2, 2, 1), x_0))
        np.testing.assert_allclose(ours, nats / np.log(2), atol=1e-8)  # quadrature's own error


def test_prior_of_the_paper():
    """Section 4: with T = 1000, 1e-4 -> 0.02, L_T is about 1e-5 bits per dimension for images."""
    pixels = jnp.asarray(LEVELS, jnp.float32).reshape(1, 16, 16, 1)
    assert 0.5e-5 < prior_bits(LINEAR, pixels)[0] < 2e-5


def test_term_is_the_closed_form_for_each_draw(x64):
    """The KL of two Gaussians whose parameters follow from eq. 2, for given x_0 and x_t."""
    p, known = FINE, Gaussian(0.1, 0.3)
    t = np.arange(2, p.T + 1)
    x_0, eps = np.random.RandomState(0).randn(2, p.T - 1, 3, 3, 1)
    column = (-1, 1, 1, 1)
    a, b = (p.alpha_bar[i].reshape(column) for i in (t - 1, t))
    x_t = np.sqrt(b) * x_0 + np.sqrt(1 - b) * eps
    # q(x_{t-1} | x_t, x_0) combines a prior N(sqrt(a) x_0, 1 - a) for x_{t-1} with a measurement
    # x_t of it, of gain sqrt(b / a) and noise 1 - b / a; precisions add.
    precision = 1 / (1 - a) + (b / a) / (1 - b / a)
    q_mean = (np.sqrt(a) * x_0 / (1 - a) + np.sqrt(b / a) * x_t / (1 - b / a)) / precision
    intercept, slope, variance = (c.reshape(column) for c in known.given(p, t - 1, t))
    p_mean = intercept + slope * x_t
    ratio = 1 / (precision * variance)
    nats = 0.5 * (ratio - 1 - np.log(ratio) + (q_mean - p_mean) ** 2 / variance)

    @jax.jit
    def bits(x_0, x_t, t):
        return vlb_term(p, known.predict(p)(x_t, t), x_0, x_t, t)

    wanted = nats.mean(axis=(1, 2, 3)) / np.log(2)
    np.testing.assert_allclose(bits(x_0, x_t, t), wanted, rtol=1e-10)  # float64


def four_points(p, known, t):
    """Returns x_0 and x_t [4, n, 1, 1], over which the mean of a quadratic is its expectation.

    A random sign times the standard deviation has a Gaussian's first two moments.
    """
    sign_0, sign = np.array([[1, 1, -1, -1], [1, -1, 1, -1]]).reshape(2, 4, 1, 1, 1)
    x_0 = known.mean + np.sqrt(known.var) * sign_0 + np.zeros((1, len(t), 1, 1))
    a = p.alpha_bar[t].reshape(1, -1, 1, 1)
    return x_0, np.sqrt(a) * x_0 + np.sqrt(1 - a) * sign


def expected_bits(p, known, predict, t):
    """Returns E[L_{t-1}] over data and noise for t > 1, where the term is a quadratic."""
    x_0, x_t = (x.reshape(-1, 1, 1, 1) for x in four_points(p, known, t))
    times = np.tile(t, 4)
    bits = jax.jit(lambda x_0, x_t, t: vlb_term(p, predict(x_t, t), x_0, x_t, t))(x_0, x_t, times)
    return np.asarray(bits).reshape(4, -1).mean(0)


def information(p, known, s, t):
    """Returns I(x_0; x_s | x_t) in bits, from the variances of x_s with and without x_0."""
    without = known.given(p, s, t)[2]
    given_x_0 = Gaussian(0, 0).given(p, s, t)[2]
    return 0.5 * np.log2(without / given_x_0)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_expected_terms_are_mutual_informations(variance, x64):
    """E[L_{t-1}] = I(x_0; x_{t-1} | x_t) for the perfect denoiser and the optimal variance."""
    t = np.arange(2, FINE.T + 1)
    for known in (Gaussian(0.1, 0.3), Gaussian(-0.4, 1e-3), Gaussian(0, 4)):
        ours = expected_bits(FINE, known, known.predict(FINE, variance=variance), t)
        np.testing.assert_allclose(ours, information(FINE, known, t - 1, t), rtol=1e-9)  # float64


RESPACED = np.array([2, 3, 7, 12])


def test_expected_terms_of_a_respaced_chain(x64):
    """E[L_{i-1}] = I(x_0; x_s | x_t) at the trained times s and t."""
    known, q = Gaussian(0.1, 0.3), process.respace(FINE, RESPACED)
    predict = timesteps.respace_predict(FINE, known.predict(FINE), VARIANCES["learned"], RESPACED)
    ours = expected_bits(q, known, predict, np.arange(2, 5))
    wanted = information(FINE, known, RESPACED[:-1], RESPACED[1:])
    np.testing.assert_allclose(ours, wanted, rtol=1e-9)  # float64


def test_data_of_the_fixed_variances(x64):
    """fixed_large is optimal for unit Gaussian data, fixed_small for a point (Section 3.2).

    Then the term is the information that x_{t-1} adds; otherwise it costs more.
    """
    t = np.arange(2, FINE.T + 1)
    unit, point, other = Gaussian(0, 1), Gaussian(0.4, 0), Gaussian(0.1, 0.3)
    bits = {
        (name, known): expected_bits(FINE, known, known.predict(FINE, "x0", name), t)
        for name in ("fixed_small", "fixed_large")
        for known in (unit, point, other)
    }
    wanted = information(FINE, unit, t - 1, t)
    np.testing.assert_allclose(bits["fixed_large", unit], wanted, rtol=1e-9)  # float64
    np.testing.assert_allclose(bits["fixed_small", point], 0, atol=1e-13)
    assert np.all(bits["fixed_small", unit] > 1.001 * wanted)
    assert np.all(bits["fixed_large", point] > 1e-4)
    wanted = information(FINE, other, t - 1, t)
    assert np.all(bits["fixed_small", other] > wanted) and np.all(
        bits["fixed_large", other] > wanted
    )


def test_bound_tightens_with_more_steps(x64):
    """The excess cost of fixed_large falls as 1/T over the same noise levels.

    That of fixed_small does not near t = 0, where it takes x_0 as known.
    """
    known, gaps = Gaussian(0.1, 0.3), []
    for T in (50, 100, 200, 400):
        p = process.from_betas(schedules.linear(T, 0.1 / T, 20 / T))
        t = np.arange(2, T + 1)
        excess = expected_bits(p, known, known.predict(p, "x0", "fixed_large"), t)
        gaps.append((excess - information(p, known, t - 1, t)).sum())
    orders = np.log2(np.array(gaps[:-1]) / gaps[1:])
    assert gaps[0] < 0.1
    np.testing.assert_allclose(orders, 1, atol=0.15)  # the next order in 1/T, at T = 50
    assert abs(orders[-1] - 1) < abs(orders[0] - 1)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_levels_cost_their_logarithm(levels):
    """Under the exact mean and variance of independent, uniform levels given x_t.

    The bound is log2(levels) or more, and near it on a fine chain, whose steps are nearly Gaussian.
    """
    grid, p = np.linspace(-1, 1, levels).astype(np.float32), LINEAR

    def predict(x_t, t):
        a = process.gather(p.alpha_bar, t).reshape(-1, 1, 1, 1, 1)
        logits = -((x_t[..., None] - jnp.sqrt(a) * grid.reshape(1, 1, 1, 1, -1)) ** 2)
        weights = jax.nn.softmax(logits / (2 * (1 - a)), axis=-1)
        mean = (weights * grid.reshape(1, 1, 1, 1, -1)).sum(-1)
        spread = (grid.reshape(1, 1, 1, 1, -1) - mean[..., None]) ** 2
        variance = jnp.maximum((weights * spread).sum(-1), 1e-12)
        step = process.posterior(p, t - 1, t)
        beta, weight = (process.broadcast_right(c, x_t) for c in (step.variance, step.weight_0))
        return Prediction(mean, x_t, jnp.log(beta + weight**2 * variance), variance)

    x_0 = grid[np.random.default_rng(0).integers(0, levels, (32, 4, 4, 1))]
    bits = jax.jit(lambda x: vlb_terms(p, predict, random.key(0), x, levels).bits)(x_0).sum(1)
    error = float(bits.std()) / np.sqrt(32)
    assert np.log2(levels) - 4 * error < bits.mean() < 1.02 * np.log2(levels) + 4 * error


def bound_by_quadrature(p, predict, x_0, monkeypatch, nodes=48):
    """Returns E[terms] over the noise, bits [T+1], by Gauss-Hermite quadrature.

    Exact for the KL terms, which are quadratic, and to 1e-9 for the decoder, which is smooth.
    """
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    batch = jnp.broadcast_to(jnp.asarray(x_0).reshape(1, -1, 1, 1), (nodes, len(x_0), 1, 1))
    draw = jnp.broadcast_to(jnp.asarray(z).reshape(-1, 1, 1, 1), batch.shape)
    monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: draw)
    bits = jax.jit(lambda x: vlb_terms(p, predict, random.key(0), x).bits)(batch)
    return weights / weights.sum() @ np.asarray(bits)


def exact_bits(p, known, x_0):
    """Returns the perfect model's bound for each x_0, in bits/dim on 256 levels.

    If p_theta(x_{t-1} | x_t) = q(x_{t-1} | x_t), the model's joint is q's with p(x_T) for q(x_T),
    so the bound is -log q(x_0) + E[log q(x_T) / p(x_T) | x_0], for any number of steps.
    """
    a = p.alpha_bar[-1]
    mean_T, var_T = known.marginal(p, p.T)
    nll = -stats.norm.logpdf(x_0, known.mean, np.sqrt(known.var))
    second = a * x_0**2 + 1 - a  # E[x_T^2 | x_0]
    centred = (np.sqrt(a) * x_0 - mean_T) ** 2 + 1 - a
    end = -0.5 * np.log(var_T) - centred / (2 * var_T) + second / 2
    return (nll + end) / np.log(2) + np.log2(127.5)


# Of the decoder against a density: the tanh formula costs up to 1e-3 bits here, and a level, which
# is 0.06 of the standard deviation, 1e-4.
DECODER = 2e-3


def test_bound_is_the_likelihood(x64, monkeypatch):
    """The terms of an image sum to its negative log-likelihood, on a chain of 12 steps."""
    p, known = FINE, Gaussian(0.1, 0.06)
    x_0 = LEVELS[[70, 128, 139, 160, 200]]
    bits = bound_by_quadrature(p, known.predict(p), x_0, monkeypatch)
    assert bits.shape == (p.T + 1,)
    wanted = exact_bits(p, known, x_0).mean()
    np.testing.assert_allclose(bits.sum(), wanted, atol=DECODER)
    # All but the decoder, E[-log N(x_0; E[x_0 | x_1], Var[x_0 | x_1]) | x_0] as a density.
    intercept, slope, var_0 = known.given(p, 0, 1)
    a = p.alpha_bar[1]
    miss = (x_0 - intercept - slope * np.sqrt(a) * x_0) ** 2 + slope**2 * (1 - a)
    density = (0.5 * np.log(2 * np.pi * var_0) + miss / (2 * var_0)) / np.log(2) + np.log2(127.5)
    # Float64, sums of a dozen terms.
    np.testing.assert_allclose(bits[1:].sum(), wanted - density.mean(), rtol=1e-10)


def test_bound_of_a_respaced_chain_is_the_likelihood(x64, monkeypatch):
    """Exact steps of any length have the same bound."""
    p, known, ts = FINE, Gaussian(0.1, 0.06), np.array([1, 2, 5, 12])
    x_0 = LEVELS[[70, 128, 139, 160, 200]]
    predict = timesteps.respace_predict(p, known.predict(p), VARIANCES["learned"], ts)
    bits = bound_by_quadrature(process.respace(p, ts), predict, x_0, monkeypatch)
    assert bits.shape == (5,)
    np.testing.assert_allclose(bits.sum(), exact_bits(p, known, x_0).mean(), atol=DECODER)


def test_bound_of_many_draws():
    """The same in float32 with drawn noise, and its rate and distortion."""
    p, known = FINE, Gaussian(0.1, 0.06)
    rng = np.random.RandomState(0)
    x_0 = known.mean + np.sqrt(known.var) * rng.randn(256, 24, 24, 1)
    x_0 = (np.round((x_0 + 1) * 127.5).clip(0, 255) / 127.5 - 1).astype(np.float32)
    out = jax.jit(lambda x: vlb_terms(p, known.predict(p), random.key(0), x))(x_0)
    assert out.bits.shape == (256, p.T + 1) and out.mse.shape == (256, p.T)
    excess = out.bits.sum(1) - exact_bits(p, known, x_0).mean(axis=(1, 2, 3))
    error = excess.std() / 16
    assert error < 4e-3
    assert abs(excess.mean()) < 5 * error + DECODER
    # The mean squared error is Var[x_0 | x_t], in column t - 1.
    var_0 = known.given(p, 0, np.arange(1, p.T + 1))[2]
    assert np.all(np.abs(out.mse.mean(0) - var_0) < 5 * out.mse.std(0) / 16)

    both = likelihood.rate_distortion(out)
    assert both.rate.shape == both.rmse.shape == (256, p.T)
    rate, rmse = (modes_likelihood.mean_and_stderr(a) for a in both)
    # x_k, ..., x_T have the information I(x_0; x_k), and x_T costs L_T.
    k = np.arange(1, p.T)
    wanted = np.append(np.cumsum(information(p, known, k, k + 1)[::-1])[::-1], 0)
    assert np.all(np.abs(rate.mean - out.bits[:, -1].mean() - wanted)[:-1] < 5 * rate.error[:-1])
    # The mean of a root is below the root of the mean, by 1/8 of the relative variance, 2/576.
    wanted = 127.5 * np.sqrt(var_0)
    assert np.all(np.abs(rmse.mean - wanted) < 5 * rmse.error + wanted / 8 * 2 / 576)
    # From x_T to x_1 the rate rises and the distortion falls.
    assert np.all(np.diff(rate.mean[::-1]) >= 0) and np.all(np.diff(rmse.mean[::-1]) < 0)


def test_rate_and_distortion_of_an_image():
    """In column k - 1 x_k is known, so L_k, ..., L_T have been sent."""
    bits = np.array([[8.0, 4, 2, 1], [80, 40, 20, 10]])  # L_0, L_1, L_2 and the prior
    mse = np.array([[1 / 127.5**2, 0.01, 0.25], [0, 1, 4]])
    out = likelihood.rate_distortion(likelihood.VLBTerms(jnp.asarray(bits), jnp.asarray(mse)))
    np.testing.assert_allclose(out.rate, [[7, 3, 1], [70, 30, 10]], rtol=1e-12)  # float64
    np.testing.assert_allclose(out.rmse, [[1, 12.75, 63.75], [0, 127.5, 255]], rtol=1e-6)


def test_mean_and_stderr():
    """The error of the mean of n independent draws, of any shape."""
    values = np.random.RandomState(0).randn(2000, 50, 3).astype(np.float32)
    mean, error = modes_likelihood.mean_and_stderr(values[:50])
    assert mean.shape == error.shape == (50, 3) and mean.dtype == np.float64
    np.testing.assert_allclose(
        modes_likelihood.mean_and_stderr([1.0, 3.0]), (2, 1)
    )  # sqrt(2) / sqrt(2)
    means, errors = zip(
        *(modes_likelihood.mean_and_stderr(v) for v in np.split(values, 400)), strict=True
    )
    means, errors = np.array(means), np.array(errors)
    np.testing.assert_allclose((errors**2).mean(), means.var(), rtol=0.03)  # 60,000 of each
    for few in ([], [1.0]):
        with pytest.raises(ValueError, match="two or more"):
            modes_likelihood.mean_and_stderr(few)


def test_the_paper_s_table_4():
    """In its last row x_1 is known: the rate 1.78 and L_0 = 1.97 sum to 3.75 (Section 4.3)."""
    steps, rate, rmse = np.array(modes_likelihood.TABLE_4).T
    np.testing.assert_array_equal(steps, np.arange(1000, 0, -100))
    assert rate[0] + 1.97 == pytest.approx(3.75, abs=0.005)  # Section 4.3, two digits
    assert np.all(np.diff(rate) < 0) and np.all(np.diff(rmse) > 0)
    # After r transmissions x_{T-r+1} is known.
    k = np.arange(1.0, 1001)
    values = np.stack([[k, -k], [k + 2, -k]], axis=1)
    rows = modes_likelihood.table_4(*map(modes_likelihood.mean_and_stderr, values))
    assert [row.step for row in rows] == list(steps)
    np.testing.assert_array_equal([row.rate.mean for row in rows], 1001 - steps + 1)
    np.testing.assert_array_equal([row.rate.error for row in rows], 1)
    np.testing.assert_array_equal([row.rmse.mean for row in rows], steps - 1001)
    with pytest.raises(ValueError, match="10 n steps"):
        modes_likelihood.table_4(*[modes_likelihood.mean_and_stderr(np.ones((2, 25)))] * 2)


def test_point_costs_nothing_after_its_decoder(monkeypatch):
    """If the data are one image, all terms but the decoder's and the prior's are zero."""
    p = process.from_betas(schedules.linear(20, 1e-3, 0.4))
    image = jnp.asarray(LEVELS[random.randint(random.key(0), (4, 4, 3), 0, 256)], jnp.float32)
    x_0 = jnp.broadcast_to(image, (2, 4, 4, 3))

    def apply(x, model_t):
        return jnp.broadcast_to(image, x.shape)

    predict = targets.make_predict(p, apply, TARGETS["x0"], VARIANCES["fixed_small"])
    monkeypatch.setattr(process, "sample_noise", oracle.cheap_noise)
    out = jax.jit(lambda x: vlb_terms(p, predict, random.key(1), x))(x_0)
    assert np.all(out.mse == 0)
    # Rounding of two logarithms of variances, float32: 1e-7 of -9.
    np.testing.assert_allclose(out.bits[:, 1:-1], 0, atol=1e-6)
    # log_scale = log(beta~_2) / 2, about 0.009: a level's half-width is 0.44 of it, so the level
    # holds erf(0.44 / sqrt 2) = 0.34 of the mass, more at the edges.
    scale = np.sqrt(process.posterior(p, 1, 2).variance)
    mass = 1 - 2 * special.ndtr(-1 / 255 / scale)
    edge = np.abs(np.asarray(image)) > 0.999
    wanted = -np.log2(np.where(edge, (1 + mass) / 2, mass)).mean()
    np.testing.assert_allclose(out.bits[:, 0], wanted, atol=2e-3)  # the tanh formula


def test_an_image_s_terms_are_its_own():
    """They do not depend on the batch."""
    p, known = FINE, Gaussian(0.1, 0.06)
    x_0 = jnp.asarray(LEVELS[random.randint(random.key(0), (5, 4, 4, 1), 0, 256)], jnp.float32)
    run = jax.jit(lambda key, x: vlb_terms(p, known.predict(p), key, x))
    key = random.key(1)
    whole = run(key, x_0)
    part = run(key, x_0[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:2], rtol=1e-6), part, whole)
    keys = process.example_keys(key, 5)
    alone = run(keys[3:4], x_0[3:4])
    # Float32: the mean over pixels may be summed in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b[3], rtol=1e-6), alone, whole)
    other = run(random.key(2), x_0)
    assert np.all(np.abs(other.bits[:, :-1] - whole.bits[:, :-1]) > 0)  # other noise at every t
    np.testing.assert_array_equal(other.bits[:, -1], whole.bits[:, -1])  # but not for the prior


def test_a_chain_of_one_step(monkeypatch):
    """With T = 1 there are a decoder and a prior."""
    p = process.from_betas(np.array([0.3]))
    monkeypatch.setattr(process, "sample_noise", oracle.cheap_noise)
    for variance in VARIANCES:
        if VARIANCES[variance].outputs == 1:
            predict = Gaussian(0.1, 0.3).predict(p, "x0", variance)
            x_0 = jnp.zeros((2, 4, 4, 1))
            out = jax.jit(lambda x, predict=predict: vlb_terms(p, predict, random.key(0), x))(x_0)
            assert out.bits.shape == (2, 2) and np.all(np.isfinite(out.bits))
