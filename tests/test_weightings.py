"""Tests the weightings: the authors' code, one objective for all targets, and the bound's terms."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import losses, process, schedules
from diffusion.targets import TARGETS, VARIANCES, Target, eps_from_x0
from diffusion.weightings import WEIGHTINGS, output_weights
from tests.oracle import official

THEIRS = {"eps": "eps", "xstart": "x0", "v": "v"}
FIXED = VARIANCES["fixed_small"]
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))


@official("weights", "s?.*.*", "s?.snr_f64", "loss.*.mse*", "diffusers*")
def test_official_weights(official, monkeypatch):
    """Their code: min-SNR's (5189997), P2's (3da0947) and diffusers' (0.42.1).

    Weights of theirs are float32, and their SNR of the first step subtracts numbers near 1.
    """
    for i in range(3):
        schedule = schedules.SCHEDULES[str(official[f"s{i}.schedule"])]
        p = process.from_betas(schedule(int(official[f"s{i}.T"])))

        def weights(target, *options, p=p):
            return output_weights(p, TARGETS[target], *options)[1:]

        snr, below_1 = (weights("x0", "min_snr", gamma) for gamma in (np.inf, 1.0))
        official.close(f"s{i}.snr_f64", snr, rtol=1e-7)
        official.close(f"s{i}.snr.xstart", snr, rtol=2e-6)
        official.close(f"s{i}.trunc_snr.xstart", snr / below_1, rtol=2e-6)  # max(SNR, 1)
        for j in range(2):
            gamma, (power, k) = float(official[f"gamma.{j}"]), official[f"p2.{j}.gamma_k"]
            for theirs, ours in THEIRS.items():
                key = f"s{i}.minsnr.{j}.{theirs}"
                official.close(key, weights(ours, "min_snr", gamma), rtol=2e-6)
            # `min_snr_5`, a name that their code gives the weights of eps whatever the target.
            key = f"s{i}.minsnr.{j}.v_with_eps_rule"
            official.close(key, weights("eps", "min_snr", gamma), rtol=2e-6)
            official.close(f"s{i}.p2.{j}.eps", weights("eps", "p2", power, k), rtol=2e-6)
        if i == 0:
            check_losses(official, p, monkeypatch)
        if (str(official[f"s{i}.schedule"]), p.T) == ("linear", 1000):  # of a float32 product
            official.close("diffusers.linear1000.snr", snr, rtol=4e-4)


def check_losses(official, p, monkeypatch):
    x_0, eps = (jnp.asarray(official[f"loss.{k}"]) for k in ("x_start", "noise"))
    t = jnp.asarray(official["loss.t"]) + 1
    monkeypatch.setattr(losses, "draw_x_t", lambda *_: (t, eps, process.q_sample(p, x_0, t, eps)))
    for theirs, ours in THEIRS.items():
        for name, weighting in (("mse_raw", "simple"), ("mse", "min_snr")):
            weights = output_weights(p, TARGETS[ours], weighting)
            loss = losses.simple(p, TARGETS[ours], FIXED, weights)
            values, _ = loss(lambda x, t: 0.5 * jnp.tanh(x), None, x_0)
            official.close(f"loss.{theirs}.{name}", values, rtol=2e-5)  # 3e-6 seen


@pytest.mark.parametrize("target", TARGETS)
def test_scale_is_the_change_of_x_0(target, x64):
    """x_0 is linear in the output, so x0_scale is its difference for outputs 1 apart."""
    t = jnp.arange(1, SHORT.T + 1)
    x_t, output = random.normal(random.key(0), (2, SHORT.T, 1, 1, 1))
    to_x0 = TARGETS[target].to_x0
    change = to_x0(SHORT, output + 1, x_t, t) - to_x0(SHORT, output, x_t, t)
    scale = TARGETS[target].x0_scale(SHORT)
    assert scale.shape == (SHORT.T + 1,) and scale.dtype == np.float64
    np.testing.assert_allclose(scale[1:], np.abs(change).ravel(), rtol=1e-10)


@pytest.fixture
def erring(monkeypatch):
    """Returns (x_0, {target: output}) at t = 1..T of networks that all err alike in x_0."""
    x_0, error, eps = random.normal(random.key(0), (3, SHORT.T, 2, 2, 1), jnp.float64)
    t = jnp.arange(1, SHORT.T + 1)
    x_t = process.q_sample(SHORT, x_0, t, eps)
    monkeypatch.setattr(losses, "draw_x_t", lambda *_: (t, eps, x_t))
    found = x_0 + error
    implied = eps_from_x0(SHORT, found, x_t, t)
    return x_0, {
        name: target.from_x0(SHORT, found, implied, x_t, t) for name, target in TARGETS.items()
    }


def values_of(make, target, output, x_0, *args):
    return make(SHORT, TARGETS[target], FIXED, *args)(lambda *_: output, None, x_0)[0]


@pytest.mark.parametrize("chosen", [("min_snr", 2.0), ("p2", 0.7, 0.5), ("vlb",)])
def test_every_target_has_the_same_objective(x64, erring, chosen):
    """The same error of x_0 costs the same, whatever the network predicts.

    Weighted by the bound it costs a fixed small variance's term, but for the decoder at t = 1.
    """
    x_0, outputs = erring
    found = {
        name: values_of(
            losses.simple, name, output, x_0, output_weights(SHORT, TARGETS[name], *chosen)
        )
        for name, output in outputs.items()
    }
    for name, output in outputs.items():
        np.testing.assert_allclose(found[name], found["x0"], rtol=1e-10, err_msg=name)
        if chosen == ("vlb",):
            bits = values_of(losses.vlb, name, output, x_0)
            np.testing.assert_allclose(found[name][1:], bits[1:], rtol=1e-9, err_msg=name)


def test_the_hybrid_loss_weighs_its_error_as_the_simple_one(x64, erring):
    x_0, outputs = erring
    weights = output_weights(SHORT, TARGETS["v"], "min_snr")
    simple = values_of(losses.simple, "v", outputs["v"], x_0, weights)
    hybrid = losses.hybrid(
        SHORT, TARGETS["v"], VARIANCES["learned_range"], vlb_weight=0.0, weights=weights
    )
    both = jnp.concatenate([outputs["v"], jnp.zeros_like(outputs["v"])], -1)
    np.testing.assert_array_equal(hybrid(lambda *_: both, None, x_0)[0], simple)


@pytest.mark.parametrize("target", ["x0", "v"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_a_chain_that_ends_in_pure_noise(weighting, target):
    """They are finite for x_0 and v; those of eps, which is no image there, are refused."""
    p = process.from_betas(schedules.jsd(20))
    weights = output_weights(p, TARGETS[target], weighting)
    if weighting == "simple":
        assert weights is None
        return
    assert weights.shape == (21,) and weights[0] == 0 and np.all(np.isfinite(weights))
    message = rf"weighting: expected simple .* alpha_bar_T = 0, found {weighting}; .* x0 or v"
    with pytest.raises(ValueError, match=message):
        output_weights(p, TARGETS["eps"], weighting)


def test_what_cannot_be_is_refused():
    eps, nothing = TARGETS["eps"], Target(None, None)
    for message, args in {
        "weighting: expected one of simple, .*, found minsnr": (eps, "minsnr"),
        "gamma: expected 0.0 for weighting vlb, found 2.0": (eps, "vlb", 2.0),
        "gamma: expected 0.0 for weighting simple, found 5.0": (eps, "simple", 5.0),
        "k: expected 1.0 for weighting min_snr, found 0.5": (eps, "min_snr", 0.0, 0.5),
        "weighting: expected simple for this target, found p2": (nothing, "p2"),
    }.items():
        with pytest.raises(ValueError, match=f"^{message}$"):
            output_weights(SHORT, *args)
    assert np.all(np.isfinite(output_weights(SHORT, eps, "p2", 1.0, 0.0)))  # SNR^-1
