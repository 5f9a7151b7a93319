"""Continuous time against the original program and against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import continuous, losses, process, schedules, timestep_samplers, unet
from diffusion.gradients import Network
from diffusion.samplers.ancestral import ancestral
from diffusion.samplers.base import SamplerState
from diffusion.targets import TARGETS, VARIANCES, make_predict
from tests.oracle import Gaussian, official

# github.com/google-research/vdm, commit dc27b98: model_vdm.py. Its pixels lie elsewhere than ours.
VALUES = 2 * (np.arange(256) + 0.5) / 256 - 1
LINE = process.from_betas(schedules.even_log_snr(1000))
NAMES = {
    "fixed": "linear",
    "learnable_scalar": "learned_line",
    "learnable_nnet": "learned_network",
}


def in_both_precisions(test):
    """Calls test(given, array, close) for the float64 arrays, then for their float32 twins."""

    @functools.wraps(test)
    def run(given):
        for suffix, dtype in ((".f64", np.float64), ("", np.float32)):
            with jax.enable_x64(bool(suffix)):

                def array(key, dtype=dtype):
                    return jnp.asarray(given[key], dtype)

                def close(key, ours, rtol, wide=1e-6, suffix=suffix):  # of values of about 1
                    tolerance = wide if suffix else rtol
                    given.close(key + suffix, ours, rtol=tolerance, atol=tolerance)

                test(given, array, close)

    del run.__wrapped__  # whose arguments pytest would take for fixtures
    return run


def gamma_of(array, name):
    """Returns (params, gamma) of one of the program's three schedules."""
    layers = {"l1": ("kernel", "bias"), "l2": ("kernel", "bias"), "l3": ("kernel",)}
    params = {
        "fixed": lambda: None,
        "learnable_scalar": lambda: {k: array(f"scalar.{k}") for k in "wb"},
        "learnable_nnet": lambda: {
            layer: {k: array(f"nnet.{layer}.{k}") for k in names} for layer, names in layers.items()
        },
    }[name]()
    return params, continuous.make_gamma_fn(LINE, NAMES[name])


@official("vdm", "gamma.*.*")
@in_both_precisions
def test_schedules(given, array, close):
    """Values and slopes; the float64 run of the program has float32 ends and weights."""
    u = array("gamma.t")
    for name in NAMES:
        params, gamma = gamma_of(array, name)
        value, slope = jax.jvp(functools.partial(gamma, params), (u,), (jnp.ones_like(u),))
        close(f"gamma.{name}.value", value, 1e-5)
        close(f"gamma.{name}.derivative", slope, 1e-5)


@official("vdm", "fourier.*_*", "temb.dim16*")
@in_both_precisions
def test_features_of_the_input_and_of_time(given, array, close):
    for start, stop, step in ((6, 8, 1), (0, 8, 1), (2, 8, 3)):
        found = unet.fourier_features(array("fourier.z"), tuple(range(start, stop, step)))
        close(f"fourier.{start}_{stop}_{step}", found, 5e-4)  # of angles up to 2,000
    # Ours is float32 in any case.
    close("temb.dim16", unet.time_embedding(1000 * array("temb.t"), 16), 2e-4, wide=2e-4)


def decoder_table(z, gamma_0):
    """Returns log p(value | z) of all VALUES, [..., 256]."""
    values = jnp.broadcast_to(jnp.asarray(VALUES, z.dtype), (*z.shape, 256))
    z = jnp.broadcast_to(z[..., None], values.shape)
    return continuous.log_p_of_pixels(values, z, gamma_0, VALUES)


@official("vdm", "dec.*.logprob*", "dec.*.table*", "gen.samples")
@in_both_precisions
def test_decoder(given, array, close):
    x = jnp.asarray(VALUES, array("eps_0").dtype)[given["images"]]
    for i in range(3):
        gamma_0 = array(f"dec.{i}.gamma_0").reshape(())
        z = x + jnp.exp(gamma_0 / 2) * array("eps_0")
        pixels = continuous.log_p_of_pixels(x, z, gamma_0, VALUES)
        close(f"dec.{i}.logprob_pixel", pixels, 3e-4)
        close(f"dec.{i}.logprob", pixels.sum((1, 2, 3)), 3e-4)
        close(f"dec.{i}.table_of_first_pixel", decoder_table(z[0, 0, 0], gamma_0), 3e-4)
    gamma_0 = array("scalar.b").reshape(())
    z = array("gen.z_0") / jnp.sqrt(jax.nn.sigmoid(-gamma_0))
    given.close("gen.samples", decoder_table(z, gamma_0).argmax(-1))


def toy(array):
    """Returns the program's score network, eps_hat(z, gamma[b])."""
    a, b = array("toy.params")

    def eps_hat(z, gamma):
        scale = jnp.sqrt(jax.nn.sigmoid(gamma)).reshape(-1, 1, 1, 1)
        return a * z * scale + b * jnp.sin(z)

    return eps_hat


@official("vdm", "v.?.*", "anti.?.t*")
@in_both_precisions
def test_bounds_and_their_gradients(given, array, close):
    x = jnp.asarray(VALUES, array("eps_0").dtype)[given["images"]]
    d = 4 * 4 * 3

    def bound(gamma, params, u, steps):
        terms = continuous.continuous_terms(
            *(functools.partial(gamma, params), toy(array), x, u),
            *(array("eps_0"), array("eps"), VALUES, steps),
        )
        return sum(terms).mean() / np.log(2), terms

    cases = zip(given["v.gamma_type"], given["v.n_timesteps"], given["v.antithetic"], strict=True)
    for i, (name, steps, antithetic) in enumerate(cases):
        params, gamma = gamma_of(array, name)
        u = timestep_samplers.spread(array("t0"), 6) if antithetic else array("u")
        run = jax.jit(jax.value_and_grad(bound, 1, has_aux=True), static_argnums=(0, 3))
        (total, terms), slopes = run(gamma, params, u, int(steps))
        u = jnp.ceil(u * int(steps)) / int(steps) if steps else u
        g, ends = gamma(params, u), gamma(params, jnp.array([0.0, 1.0], u.dtype))
        z = process.broadcast_right(jnp.sqrt(jax.nn.sigmoid(-g)), x) * x
        z = z + process.broadcast_right(jnp.sqrt(jax.nn.sigmoid(g)), x) * array("eps")
        close(f"v.{i}.t", u, 1e-6)
        close(f"v.{i}.g_t", g, 1e-5)
        close(f"v.{i}.z_t", z, 2e-5)
        decoder, prior, diffusion = terms
        close(f"v.{i}.loss_recon", d * decoder, 1e-3)
        close(f"v.{i}.loss_klz", d * prior, 1e-4)
        close(f"v.{i}.loss_diff", d * diffusion, 1e-4)
        for end, which in zip(jax.nn.sigmoid(ends), "01", strict=True):
            shape = given[f"v.{i}.var_{which}"].shape
            close(f"v.{i}.var_{which}", end.reshape(shape), 1e-5)
        parts = [part.mean() / np.log(2) for part in (decoder, prior, diffusion)]
        close(f"v.{i}.bpd", jnp.stack([total, *parts]), 1e-4)
        for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
            key = jax.tree_util.keystr(path, simple=True, separator=".")
            close(f"v.{i}.dbpd.{key}", slope, 2e-4)
    for i, n in enumerate(given["anti.n"]):
        ours = jnp.stack([timestep_samplers.spread(u, int(n)) for u in array("anti.t0")])
        theirs = array(f"anti.{i}.t")  # on the circle: 0.9999999 is near 0
        assert np.all(np.abs((ours - theirs + 0.5) % 1 - 0.5) < 1e-6)
        close(f"anti.{i}.t", theirs + ((ours - theirs + 0.5) % 1 - 0.5), 1e-6)


@official("vdm", "samp.*.i*")
@in_both_precisions
def test_ancestral_steps(given, array, close):
    T = int(given["samp.T"])
    for name in NAMES:
        params, gamma = gamma_of(array, name)
        g = np.asarray(gamma(params, jnp.arange(T + 1) / T), np.float64)
        # t = 1 is u = 0, as t = 0 is the image.
        q = process.Process(np.append(1.0, 1 / (1 + np.exp(g))), np.append(0.0, g))
        eps, small = TARGETS["eps"], VARIANCES["fixed_small"]
        predict = make_predict(q, toy(array), eps, small, clip=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process, "sample_noise", lambda *_: array("samp.noise"))
            state = SamplerState(array("samp.z_t"), array("samp.z_t"))
            for j, i in enumerate(given["samp.i"]):
                t = jnp.int32(T + 1 - i)
                x = ancestral(q).step(predict, random.split(random.key(0), 6), state, t, t - 1).x
                close(f"samp.{name}.i{j}", x, 2e-4)


EPS_SMALL = TARGETS["eps"], VARIANCES["fixed_small"]


def test_the_bound_of_the_exact_network_is_the_information(x64):
    """The mean of the diffusion term is I(x; z_0) - I(x; z_1) for Gaussian data."""
    known, low, high = Gaussian(0.1, 0.3), *continuous.gamma_ends(LINE)
    rng = np.random.RandomState(0)
    x = jnp.asarray(known.mean + np.sqrt(known.var) * rng.randn(1024, 4, 4, 1))
    cells = continuous.cells(LINE, 200)
    predict = known.predict(cells._replace(model_t=np.arange(-1.0, 200)), variance="fixed_small")
    bits = continuous.continuous_vlb(cells, predict, random.key(0), x, ends=(low, high))
    wanted = 0.5 * np.log2((1 + known.var * np.exp(-low)) / (1 + known.var * np.exp(-high)))
    found, error = bits[:, 1].mean(), bits[:, 1].std() / np.sqrt(len(x))
    assert error < 0.01 * wanted and abs(found - wanted) < 5 * error


def perfect(known, p):
    """The perfect eps-network of Gaussian data at any gamma, for `losses.continuous`."""

    def apply(z, model_t):
        low, high = continuous.gamma_ends(p)
        gamma = (low + (high - low) * model_t / (p.T - 1)).reshape(-1, 1, 1, 1)
        alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(g)) for g in (-gamma, gamma))
        return sigma * (z - alpha * known.mean) / (alpha**2 * known.var + sigma**2)

    return apply


@pytest.mark.parametrize("schedule", continuous.GAMMAS)
@pytest.mark.parametrize("timesteps", ["uniform", "low_discrepancy"])
def test_the_loss_is_an_unbiased_estimate_of_the_bound(schedule, timesteps, x64):
    """The same value for every schedule between the same ends, and for every way to draw times."""
    known, p = (
        Gaussian(0.1, 0.3),
        process.from_betas(schedules.even_log_snr(50, gamma_min=-6.0, gamma_max=4.0)),
    )
    rng = np.random.RandomState(1)
    values = continuous.pixel_values(17)
    x = known.mean + np.sqrt(known.var) * rng.randn(2048, 4, 4, 1)
    loss = losses.LOSSES["continuous"](p, *EPS_SMALL, levels=17, schedule=schedule)
    make = continuous.GAMMAS[schedule]
    params = {"schedule": make.init(random.key(0), -6.0, 4.0)} if make else {}
    if schedule == "learned_network":  # far from a line, and with other ends
        params["schedule"]["l2"]["kernel"] *= 300
        params["schedule"]["l3"]["kernel"] *= 300
    gamma = functools.partial(continuous.make_gamma_fn(p, schedule), params.get("schedule"))
    low, high = (float(np.squeeze(gamma(jnp.asarray(u)))) for u in (0.0, 1.0))
    sampler = timestep_samplers.TIMESTEP_SAMPLERS[timesteps](p)
    t = sampler.draw(random.key(5), len(x), ())[:1] if sampler else ()
    found, _ = loss(Network(perfect(known, p), params), random.key(3), jnp.asarray(x), *t)
    z = x + np.exp(0.5 * low) * rng.randn(*x.shape)
    decoder = -continuous.log_p_of_pixels(x, jnp.asarray(z), low, values).mean()
    prior = float(continuous.prior_nats(jnp.asarray(x), jnp.asarray(high)).mean())
    wanted = 0.5 * np.log((1 + known.var * np.exp(-low)) / (1 + known.var * np.exp(-high)))
    wanted = (wanted + decoder + prior) / np.log(2)
    error = found.std() / np.sqrt(len(x))
    assert error < 0.08 * abs(wanted) and abs(found.mean() - wanted) < 4 * error


def test_a_learned_chain_is_the_line_before_training():
    p = process.from_betas(schedules.even_log_snr(30))
    params = continuous.GAMMAS["learned_line"].init(random.key(0), *continuous.gamma_ends(p))
    q = continuous.learned_process(p, "learned_line", params)
    np.testing.assert_allclose(
        process.half_log_snr(q)[1:], process.half_log_snr(p)[1:], atol=1e-5
    )  # float32
    np.testing.assert_allclose(q.model_t, p.model_t, atol=1e-4)


def test_the_decoder_is_a_distribution(x64):
    z = jnp.linspace(-1.3, 1.3, 50).reshape(-1, 1)
    values = continuous.pixel_values(17)
    for gamma_0 in (-9.0, -4.0, 1.0):
        x, z_of_x = np.broadcast_arrays(values, z)
        table = continuous.log_p_of_pixels(*map(jnp.asarray, (x, z_of_x)), gamma_0, values)
        np.testing.assert_allclose(np.exp(table).sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize(
    "chosen, message",
    [
        (("x0", "fixed_small", "linear"), "target=eps"),
        (("eps", "fixed_large", "linear"), "fixed_small"),
        (("eps", "learned", "linear"), "fixed_small"),
        (("eps", "fixed_small", "cubic"), "expected one of linear"),
    ],
)
def test_what_continuous_time_cannot_be_is_refused(chosen, message):
    target, variance, schedule = chosen
    with pytest.raises(ValueError, match=message):
        continuous.continuous(LINE, TARGETS[target], VARIANCES[variance], schedule=schedule)
    with pytest.raises(ValueError, match="evenly spaced"):
        continuous.continuous(process.from_betas(schedules.linear(1000)), *EPS_SMALL)
