"""Tests the losses: the official values, perfect networks, and the bound they estimate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import likelihood, losses, process, schedules, targets
from diffusion.losses import LOSSES
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian, official
from tests.test_likelihood import four_points, information

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(4, 0.02, 0.4))
EVEN = process.from_betas(schedules.even_log_snr(4, gamma_min=-5.0, gamma_max=3.0))
RANGE = VARIANCES["learned_range"]
LEVELS = jnp.arange(256, dtype=jnp.float32) / 127.5 - 1


@official("diffusion", "loss*.*", "gd1.p_losses")
def test_official_losses(official, monkeypatch):
    x_0, x_t, noise, t = (jnp.asarray(official[k]) for k in ("x_start", "x_t", "noise", "t"))
    monkeypatch.setattr(losses, "draw_x_t", lambda *_: (t + 1, noise, x_t))
    for m, target in oracle.TARGETS.items():
        for v, variance in oracle.VARIANCES.items():
            learned = v == "learned"
            chosen = LINEAR, TARGETS[target], VARIANCES[variance]
            for name, network in (("loss", oracle.toy), ("lossB", oracle.toy_b)):

                def apply(x, t, network=network, learned=learned):
                    return network(x, t, learned)

                bits, metrics = losses.vlb(*chosen)(apply, random.key(0), x_0)
                theirs = official[f"{name}.{m}.{v}.kl"]
                # As for the terms in test_likelihood.py: float32 KLs, and a decoder whose far tail
                # float32 cannot see where the first network is read as x_0 or mu.
                np.testing.assert_allclose(bits[1:], theirs[1:], rtol=2e-4, atol=3e-7)
                rtol = 0.06 if name == "loss" and m != "eps" else 2e-4
                official.close(f"{name}.{m}.{v}.kl", bits, rtol=rtol, atol=3e-7)
                # The estimate of the whole bound: T of them, and the prior.
                wanted = 1000 * np.float64(bits) + official["prior_bpd"]
                np.testing.assert_allclose(metrics["bpd"], wanted, rtol=1e-6, atol=1e-6)
                if name == "loss" and not learned:
                    mse, _ = losses.simple(*chosen)(apply, random.key(0), x_0)
                    official.close(f"loss.{m}.{v}.mse", mse, rtol=2e-6)  # float32 mean of 192
                    if (m, v) == ("eps", "fixedsmall"):  # the older class knows only this
                        official.close("gd1.p_losses", mse, rtol=2e-6)


KEY = random.key(1)


def fix_draws(monkeypatch, x_0):
    """Draws t, eps and x_t once, outside of the compiled program; returns t, all of 1..4."""
    drawn = losses.draw_x_t(SHORT, KEY, x_0)
    monkeypatch.setattr(losses, "draw_x_t", lambda *_: drawn)
    assert set(np.asarray(drawn[0])) == {1, 2, 3, 4}
    return np.asarray(drawn[0])


def linear_network(params, x, t, outputs):
    """A network with two parameters, on both of which every output depends."""
    scale, shift = params
    output = scale * jnp.tanh(x) + shift * (1 + 0 * x)
    return jnp.concatenate([output, 0.3 * output - 3][:outputs], -1)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", LOSSES)
def test_contract(name, target, variance, monkeypatch):
    """Losses are per example, with finite gradients at every t; or the pair is refused."""
    p = EVEN if name == "continuous" else SHORT
    outputs = VARIANCES[variance].outputs
    refused = {("simple", 2): "trains no variance", ("hybrid", 1): "trains a variance"}
    refused |= {("consistency", 2): "trains no variance", ("consistency", "mu"): "between steps"}
    message = refused.get((name, outputs), refused.get((name, target)))
    if name == "continuous" and (target, variance) != ("eps", "fixed_small"):
        message = "use target=eps, fixed_small"
    if message:
        with pytest.raises(ValueError, match=message):
            LOSSES[name](p, TARGETS[target], VARIANCES[variance])
        return
    loss = LOSSES[name](p, TARGETS[target], VARIANCES[variance])
    x_0 = LEVELS[random.randint(random.key(0), (16, 4, 4, 2), 0, 256)]
    t = fix_draws(monkeypatch, x_0)

    @jax.jit
    def run(params):
        def of(params):
            return loss(lambda x, t: linear_network(params, x, t, outputs), KEY, x_0)

        (per_example, metrics), pull = jax.vjp(of, params)
        zeros = jax.tree.map(jnp.zeros_like, metrics)
        return per_example, metrics, jax.vmap(lambda e: pull((e, zeros))[0])(jnp.eye(16))

    per_example, metrics, gradients = run(jnp.array([0.5, 0.1]))
    assert per_example.shape == (16,) and per_example.dtype == jnp.float32
    assert np.all(np.isfinite(per_example)) and np.all(per_example > 0)
    for values in metrics.values():
        assert values.shape == (16,) and np.all(np.isfinite(values))
    assert gradients.shape == (16, 2) and np.all(np.isfinite(gradients))
    # Both parameters are in every example's loss. Decoders that meet the floor are flat.
    decoded = t == 1 if name == "vlb" else np.zeros(16, bool)
    assert np.all(np.abs(gradients[~decoded]) > 0)


def network_knowing(p, target, x_0):
    """A network that knows x_0: it outputs the target of the eps that leads to x_t."""

    def apply(x_t, model_t):
        t = jnp.round(model_t).astype(int) + 1
        a = jnp.asarray(p.alpha_bar)[t].reshape(-1, 1, 1, 1)
        if target == "edm":  # which gives the network an input of unit variance
            x_t = x_t * jnp.sqrt(1 - 0.75 * a)
        eps = (x_t - jnp.sqrt(a) * x_0) / jnp.sqrt(1 - a)
        return TARGETS[target].from_x0(p, x_0, eps, x_t, t)

    return apply


@pytest.mark.parametrize("target", TARGETS)
def test_perfect_network_has_no_loss(target, x64, monkeypatch):
    """It is zero for `simple`, and for `vlb` with the posterior's variance except at t = 1."""
    x_0 = random.uniform(random.key(0), (64, 3, 3, 1), jnp.float64, -1, 1)
    t = fix_draws(monkeypatch, x_0)

    @jax.jit
    def run(x_0):
        apply, chosen = (
            network_knowing(SHORT, target, x_0),
            (TARGETS[target], VARIANCES["fixed_small"]),
        )
        names = ("simple", "vlb")
        return {name: LOSSES[name](SHORT, *chosen)(apply, KEY, x_0)[0] for name in names}

    by_name = run(x_0)
    # Squares of float64 roundings, which 1 / sqrt(1 - alpha_bar_1) = 7 amplifies.
    np.testing.assert_allclose(by_name["simple"], 0, atol=1e-26)
    np.testing.assert_allclose(by_name["vlb"][t > 1], 0, atol=1e-14)
    assert np.all(by_name["vlb"][t == 1] > 0)


@pytest.mark.parametrize("target", ["eps", "mu"])  # without and with a mean of its own
def test_hybrid_of_the_perfect_network(target, x64, monkeypatch):
    """No other variance than the perfect one has a smaller bound, which trains no mean.

    Its terms are the information that a step adds, over four points that stand for all (see
    test_likelihood).
    """
    known, times = Gaussian(0.1, 0.3), np.arange(2, SHORT.T + 1)
    x_0, x_t = (x.reshape(-1, 1, 1, 1) for x in four_points(SHORT, known, times))
    t = np.tile(times, 4)
    a = oracle.column(SHORT.alpha_bar[t])
    drawn = jnp.asarray(t), (x_t - np.sqrt(a) * x_0) / np.sqrt(1 - a), jnp.asarray(x_t)
    monkeypatch.setattr(losses, "draw_x_t", lambda *_: drawn)
    perfect = known.network(SHORT, target, "range")(drawn[2], drawn[0] - 1)

    @functools.partial(jax.jit, static_argnums=1)
    def run(shift, weight):
        """Returns the losses of a position that is `shift` off, and the output's gradient."""

        def total(output):
            loss = losses.hybrid(SHORT, TARGETS[target], RANGE, vlb_weight=weight)
            values, _ = loss(lambda *_: output, None, jnp.asarray(x_0))
            return values.sum(), values

        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(perfect + shift)
        return values.reshape(4, -1).mean(0), jnp.split(gradient, 2, -1)

    def shifted(by):
        return jnp.array([0.0, by]).reshape(1, 1, 1, 2)

    error, (mean_gradient, _) = run(shifted(0.0), 0.0)
    values, (same_gradient, gradient) = run(shifted(0.0), 1 / SHORT.T)
    np.testing.assert_array_equal(same_gradient, mean_gradient)
    np.testing.assert_allclose(gradient.reshape(4, -1).mean(0), 0, atol=1e-13)
    wanted = information(SHORT, known, times - 1, times)
    np.testing.assert_allclose(values - error, wanted, rtol=1e-9)
    for by in (-0.3, 0.3):
        assert np.all(run(shifted(by), 1 / SHORT.T)[0] > values)


def test_bpd_is_an_unbiased_estimate_of_the_bound():
    """The mean over many draws of t and eps is the mean over many draws of the summed terms."""
    image = LEVELS[jnp.array([40, 100, 128, 200])].reshape(1, 2, 2, 1)
    b = 8192
    x_0 = jnp.broadcast_to(image, (b, 2, 2, 1))

    def apply(x, t):
        return linear_network((0.8, 0.05), x, t, 2)

    chosen = TARGETS["x0"], VARIANCES["learned"]

    @jax.jit
    def run(key):
        _, metrics = losses.vlb(SHORT, *chosen)(apply, key, x_0)
        predict = targets.make_predict(SHORT, apply, *chosen, clip=False)
        return metrics["bpd"], likelihood.vlb_terms(SHORT, predict, key, x_0).bits.sum(1)

    estimate, bound = (np.asarray(v, np.float64) for v in run(random.key(3)))
    errors = [v.std() / np.sqrt(b) for v in (estimate, bound)]
    assert errors[0] < 0.05 * bound.mean()  # or the test could not tell
    assert abs(estimate.mean() - bound.mean()) < 5 * np.hypot(*errors)


def test_draws():
    """t uniform on 1..T by chi-square, eps standard normal at each t, x_t made of these (eq. 4)."""
    p, n = process.from_betas(schedules.linear(10, 1e-3, 0.3)), 100_000
    x_0 = jnp.linspace(-1, 1, n).reshape(n, 1)
    t, eps, x_t = losses.draw_x_t(p, KEY, x_0)
    assert t.shape == (n,) and jnp.issubdtype(t.dtype, jnp.integer)
    t, eps = np.asarray(t), np.asarray(eps)
    counts = np.bincount(t, minlength=11)
    # Both ends are reached, and nothing beyond. One fixed draw: luck is settled.
    assert len(counts) == 11 and counts[0] == 0 and np.all(counts[1:] > 0)
    assert stats.chisquare(counts[1:]).pvalue > 1e-4
    assert all(stats.kstest(eps[t == i, 0], "norm").pvalue > 1e-4 for i in range(1, 11))
    a = p.alpha_bar[t].reshape(n, 1)
    wanted = np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps
    np.testing.assert_allclose(x_t, wanted, atol=1e-6)  # float32
    given, same, _ = losses.draw_x_t(p, KEY, x_0, jnp.asarray(t[::-1]))
    np.testing.assert_array_equal(given, t[::-1])
    np.testing.assert_array_equal(same, eps)  # whoever drew the times
    again, other = (losses.draw_x_t(p, key, x_0) for key in (KEY, random.key(2)))
    np.testing.assert_array_equal(again[1], eps)
    assert np.mean(other[0] == t) < 0.2 and np.mean(other[1] == eps) < 0.01
