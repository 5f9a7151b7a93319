"""Tests interpolation, forks and inpainting on Gaussian data, whose distributions are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules, targets
from diffusion.samplers import SAMPLERS, SamplerState, editing, sample
from diffusion.samplers.ancestral import ancestral
from diffusion.samplers.editing import resampling_path
from diffusion.targets import TARGETS, VARIANCES, Prediction
from tests import oracle
from tests.oracle import Gaussian

KEY = random.key(5)

# Twenty steps that end in noise: alpha_bar_T = 0.007.
SHORT = process.from_betas(schedules.linear(20, 1e-4, 0.4))

ALL = np.arange(20, -1, -1)


def draws(shape, number=1):
    return random.normal(random.key(number), shape)


@pytest.mark.parametrize("name", ["ancestral", "dpmpp_2m"])
def test_parts_of_any_length_are_the_whole_chain(name):
    """Bit for bit, by one program for all parts, with a sampler's memory."""
    sampler, predict = SAMPLERS[name](SHORT), Gaussian(0.3, 0.2).predict(SHORT)
    ts = np.array([20, 17, 16, 9, 4, 1, 0])

    def go(state, i, j):
        return editing.advance_between(sampler, predict, KEY, state, ts, i, j)

    jitted, start = jax.jit(go), sampler.init(draws((2, 4, 4, 1)))
    whole = jitted(start, 0, 6)
    for cuts in ([0, 3, 6], [0, 1, 1, 2, 5, 6]):
        state = start
        for i, j in itertools.pairwise(cuts):
            with jax.no_tracing():
                state = jitted(state, i, j)
        jax.tree.map(np.testing.assert_array_equal, state, whole)
    scan = jax.jit(lambda x: sample(sampler, predict, KEY, x, ts))(start.x)
    # Another program of the same formulas: XLA may fuse, and so round, them differently.
    np.testing.assert_allclose(whole.x, scan, atol=1e-6)


def test_no_steps_change_nothing():
    state = SamplerState(draws((2, 3)), draws((2, 3), 2))
    predict = Gaussian(0.3, 0.2).predict(SHORT)
    same = editing.advance_between(ancestral(SHORT), predict, KEY, state, ALL, 20, 20)
    jax.tree.map(np.testing.assert_array_equal, same, state)


def test_evenly_spaced_places_include_both_ends():
    for steps in (1, 7, 20, 1000):
        for n in (2, 5, 12, 50):
            for first in (0, 1):
                places = editing.evenly_spaced(steps, n, first)
                assert places[0] == first and places[-1] == steps
                assert len(places) == min(n, steps - first + 1)
                # Rounded from equal distances: no two of them differ by more than one.
                assert len(places) < 3 or np.ptp(np.diff(places)) <= 1
    with pytest.raises(ValueError, match="expected 2 places or more, found 1"):
        editing.evenly_spaced(10, 1)


def test_nearest_index():
    ts = np.arange(1000, -1, -1)
    fractions = (1, 0.875, 0.75, 0.5, 0.125, 0)
    places = [editing.nearest_index(ts, fraction) for fraction in fractions]
    assert ts[places].tolist() == [1000, 875, 750, 500, 125, 0]
    assert editing.nearest_index(np.array([20, 12, 3, 0]), 0.5) == 1  # 12 is nearer to 10 than 3


def test_diffused_images_have_the_distribution_of_x_t():
    """Mean sqrt(alpha_bar) x_0 and variance 1 - alpha_bar (eq. 4), within five standard errors."""
    x_0, n = jnp.full((2, 200, 200), 0.7), 40_000
    for t in (0, 3, 20):
        x_t = np.asarray(editing.diffuse(SHORT, KEY, x_0, t), np.float64).reshape(2, -1)
        a = SHORT.alpha_bar[t]
        np.testing.assert_allclose(
            x_t.mean(1), 0.7 * np.sqrt(a), atol=5 * np.sqrt((1 - a) / n) + 1e-6
        )
        np.testing.assert_allclose(x_t.var(1), 1 - a, rtol=5 * np.sqrt(2 / n), atol=1e-9)
        assert t == 0 or abs(np.corrcoef(x_t)[0, 1]) < 5 / np.sqrt(n)


def test_interpolated_latents_are_on_a_line():
    """From x_t to y_t, whose noise is independent."""
    weight = jnp.linspace(0, 1, 11)
    x_0, y_0 = (jnp.broadcast_to(draws((64, 64), k), (11, 64, 64)) for k in (1, 2))
    keys = jnp.broadcast_to(KEY, (11,))
    x = np.asarray(editing.interpolate_latents(SHORT, keys, x_0, y_0, 9, weight), np.float64)
    line = x[:1] + np.linspace(0, 1, 11)[:, None, None] * (x[-1:] - x[:1])
    np.testing.assert_allclose(x, line, atol=2e-6)  # float32: the noise is the same for all
    a = SHORT.alpha_bar[9]
    eps = [
        (x[i] - np.sqrt(a) * np.asarray(z[0])) / np.sqrt(1 - a) for i, z in ((0, x_0), (10, y_0))
    ]
    # Standard, and of no correlation: five errors of 4096 numbers.
    assert all(abs(e.std() - 1) < 5 / np.sqrt(2 * 4096) for e in eps)
    assert abs(np.corrcoef(np.ravel(eps[0]), np.ravel(eps[1]))[0, 1]) < 5 / 64
    plain = editing.interpolate_latents(SHORT, keys, x_0, y_0, 0, weight)  # of the pixels
    np.testing.assert_allclose(plain[5], (x_0[5] + y_0[5]) / 2, atol=1e-6)


def test_a_shallow_interpolation_reconstructs_both_images():
    """Their error has the variance 2 Var[x_0 | x_t], less that of the last step without noise.

    For data N(0, v), x_0 and its reconstruction are independent draws given x_t.
    """
    known, predict = Gaussian(0.0, 0.25), Gaussian(0.0, 0.25).predict(SHORT)
    x_0, y_0 = (0.5 * draws((1, 128, 128), k) for k in (1, 2))
    weight, keys = jnp.array([0.0, 1.0]), jnp.broadcast_to(KEY, (2,))
    both = jnp.concatenate([x_0, x_0]), jnp.concatenate([y_0, y_0])

    @jax.jit
    def reconstruct(i):
        x_t = editing.interpolate_latents(SHORT, keys, *both, jnp.asarray(ALL)[i], weight)
        sampler = ancestral(SHORT)
        return editing.advance_between(sampler, predict, KEY, sampler.init(x_t), ALL, i, 20).x

    for t in (2, 8, 20):
        error = np.asarray(reconstruct(20 - t) - jnp.concatenate([x_0, y_0]), np.float64)
        variance = 2 * known.given(SHORT, 0, t)[2] - known.given(SHORT, 0, 1)[2]
        np.testing.assert_allclose((error**2).mean((1, 2)), variance, rtol=5 * np.sqrt(2 / 128**2))


def test_forks_share_x_t_and_have_the_posterior_s_distribution():
    """Fig. 7: they are independent draws of p(x_0 | x_t)."""
    known, t, n = Gaussian(0.3, 0.25), 6, 64
    sampler, predict = ancestral(SHORT), known.predict(SHORT)
    keys = jax.vmap(editing.fork_key, (None, 0))(KEY, jnp.arange(n))
    x_t = known.marginal(SHORT, t)[0] + draws((1, 32, 32))

    @jax.jit
    def drawn(keys):
        start = sampler.init(jnp.broadcast_to(x_t, (n, 32, 32)))
        return editing.advance_between(sampler, predict, keys, start, ALL, 20 - t, 20).x

    x_0 = np.asarray(drawn(keys), np.float64)
    intercept, slope, variance = known.given(SHORT, 0, t)
    variance -= known.given(SHORT, 0, 1)[2]  # the last step draws no noise
    away = x_0 - (intercept + slope * np.asarray(x_t, np.float64))
    assert abs(away.mean()) < 5 * np.sqrt(variance / away.size)
    np.testing.assert_allclose(away.var(), variance, rtol=5 * np.sqrt(2 / away.size))
    correlations = np.corrcoef(away.reshape(n, -1)) - np.eye(n)
    assert np.abs(correlations).max() < 6 / 32


def test_fork_0_is_the_key_itself():
    keys = jax.vmap(editing.fork_key, (None, 0))(KEY, jnp.arange(3))
    data = random.key_data(keys)
    np.testing.assert_array_equal(data[0], random.key_data(KEY))
    assert len(np.unique(data, axis=0)) == 3


# RePaint's own schedule, github.com/andreas128/RePaint, guided_diffusion/scheduler.py:
# get_schedule_jump(t_T=12, n_sample=1, jump_length=4, jump_n_sample=3). Times count from 0, so that
# the image is at -1, and jumps up are single steps.
REPAINT = [
    *(11, 10, 9, 8, 7, 6, 5, 4, 5, 6, 7, 8, 7, 6, 5, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0),
    *(1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0, -1),
]


def test_resampling_path_is_repaint_s():
    path, ours = resampling_path(ALL[-13:], jump=4, repeats=3), [11]
    for t, s, u in zip(*(times.tolist() for times in path), strict=True):
        assert t - 1 == ours[-1]
        ours += [s - 1, *range(s, u)]
    assert ours == REPAINT


def test_length_of_a_resampling_path():
    for jump in (1, 3, 10, 40):
        path = resampling_path(ALL, jump, 1)
        np.testing.assert_array_equal(path.t, ALL[:-1])
        np.testing.assert_array_equal(path.s, ALL[1:])
        np.testing.assert_array_equal(path.u, path.s)
    for jump, repeats in ((1, 4), (3, 2), (10, 10), (19, 3), (20, 9)):
        points = len(range(1, 20 - jump + 1, jump))
        assert len(resampling_path(ALL, jump, repeats).t) == 20 + (repeats - 1) * jump * points
    # Algorithm 1: every step but the last `repeats` times.
    path = resampling_path(np.array([9, 5, 2, 0]), jump=1, repeats=2)
    assert np.stack(path).T.tolist() == [[9, 5, 9], [9, 5, 5], [5, 2, 5], [5, 2, 2], [2, 0, 0]]
    for name in ("jump", "repeats"):
        with pytest.raises(ValueError, match=f"{name}: expected 1 or more, found 0"):
            resampling_path(ALL, **{name: 0})


FINE = process.from_betas(schedules.linear(100, 1e-3, 0.1))  # alpha_bar_T = 0.005

COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]]) * 0.25

MEAN = np.array([0.2, -0.1])


def correlated(p):
    """The perfect model of two pixels N(MEAN, COVARIANCE), with the posterior's variance."""
    a = p.alpha_bar[:, None, None]
    gain = np.sqrt(a) * COVARIANCE @ np.linalg.inv(a * COVARIANCE + (1 - a) * np.eye(2))

    def predict(x_t, t):
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        a_t, gain_t = (jnp.asarray(table, x_t.dtype)[t] for table in (p.alpha_bar, gain))
        away = x_t - jnp.sqrt(a_t)[:, None, None] * jnp.asarray(MEAN, x_t.dtype).reshape(1, 1, 2)
        x_0 = jnp.asarray(MEAN, x_t.dtype).reshape(1, 1, 2) + jnp.einsum(
            "bij,bnj->bni", gain_t, away
        )
        log_var = process.broadcast_right(targets.posterior_log_var(p, t), x_t)
        return Prediction(x_0, targets.eps_from_x0(p, x_0, x_t, t), log_var, 0 * log_var)

    return predict


@pytest.mark.parametrize(
    ("repeats", "least", "most"), [(1, 0.15, 0.16), (5, 0.03, 0.05), (30, 0, 0.01)]
)
def test_resampling_corrects_the_mean_of_unknown_pixels(repeats, least, most, x64, monkeypatch):
    """The mean of a pixel beside a known one approaches E[x_2 | x_1] with repeats (Section 4.2).

    The chain is linear in its noise, so its mean is the chain without noise.
    """
    monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: jnp.zeros_like(like))
    path = resampling_path(np.arange(100, -1, -1), 1, repeats)
    x_0, known = jnp.full((1, 1, 2), 0.7), jnp.array([True, False]).reshape(1, 1, 2)
    args = FINE, ancestral(FINE), correlated(FINE), KEY, jnp.zeros((1, 1, 2)), x_0, known, path
    x = np.asarray(jax.jit(lambda: editing.inpaint(*args))()).ravel()
    expected = MEAN[1] + COVARIANCE[1, 0] / COVARIANCE[0, 0] * (0.7 - MEAN[0])
    assert x[0] == 0.7 and least <= expected - x[1] <= most


@pytest.mark.parametrize(("jump", "repeats"), [(1, 1), (1, 4), (5, 3), (20, 2)])
def test_inpainting_of_independent_pixels(jump, repeats):
    """The unknown ones keep the distribution of the data, however often x is renoised.

    A wrong noise level of the jumps, or noise used twice, would change it.
    """
    known, path = Gaussian(0.3, 0.25), resampling_path(ALL, jump, repeats)
    x_0, mask = jnp.full((2, 128, 128), -0.9), jnp.arange(128).reshape(1, 1, 128) < 64
    predict = known.predict(SHORT)

    @jax.jit
    def run(x):
        return editing.inpaint(SHORT, ancestral(SHORT), predict, KEY, x, x_0, mask, path)

    x = run(known.marginal(SHORT, 20)[0] + draws((2, 128, 128)))
    np.testing.assert_array_equal(x[..., :64], x_0[..., :64])
    drawn, n = np.asarray(x[..., 64:], np.float64), 2 * 64 * 128
    # x_T is standard normal, with 1 - var_T = 0.5 % too much variance, of which little is left.
    variance = 0.25 - known.given(SHORT, 0, 1)[2]
    assert abs(drawn.mean() - 0.3) < 5 * np.sqrt(variance / n)
    assert abs(drawn.var() / variance - 1) < 5 * np.sqrt(2 / n)
    correlation = np.corrcoef(np.ravel(drawn[0]), np.ravel(drawn[1]))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(n / 2)


def test_known_pixels_after_a_jump_have_the_distribution_of_x_u():
    """q(x_u | x_0), within five standard errors."""
    path, x_0, n = resampling_path(ALL, 7, 2), jnp.full((1, 128, 128), 0.6), 128 * 128
    predict, everything = Gaussian(0.3, 0.25).predict(SHORT), jnp.full((1, 1, 1), True)

    @jax.jit
    def run(x, j):
        args = SHORT, ancestral(SHORT), predict, KEY, x, x_0, everything, path
        return editing.inpaint(*args, 0, j)

    jumps = np.flatnonzero(path.u > path.s)
    assert len(jumps) == 2
    for i in jumps:
        x = np.asarray(run(draws((1, 128, 128)), i + 1), np.float64)
        a = SHORT.alpha_bar[path.u[i]]
        assert abs(x.mean() - 0.6 * np.sqrt(a)) < 5 * np.sqrt((1 - a) / n)
        assert abs(x.var() / (1 - a) - 1) < 5 * np.sqrt(2 / n)


@pytest.fixture(scope="module")
def inpainting():
    """Returns (run, steps, known), with run compiled: (keys, x, x_0, i, j) -> x."""
    predict = targets.make_predict(SHORT, oracle.toy, TARGETS["eps"], VARIANCES["fixed_large"])
    path, known = resampling_path(ALL, 4, 3), editing.MASKS["centre"](4, 4)[..., None]

    @jax.jit
    def run(keys, x, x_0, i, j):
        return editing.inpaint(SHORT, ancestral(SHORT), predict, keys, x, x_0, known, path, i, j)

    return run, len(path.t), np.broadcast_to(known, (4, 4, 4, 3))


def test_known_pixels_are_unchanged(inpainting):
    run, steps, known = inpainting
    x_0 = jnp.clip(draws((4, 4, 4, 3), 7), -1, 1)
    out = np.asarray(run(random.split(KEY, 4), draws((4, 4, 4, 3)), x_0, 0, steps))
    np.testing.assert_array_equal(out[known], np.asarray(x_0)[known])
    assert np.all(np.isfinite(out)) and np.all(out[~known] != np.asarray(x_0)[~known])


def test_inpainting_in_parts_is_the_whole(inpainting):
    """Bit for bit, from one program."""
    run, steps, _ = inpainting
    keys, x, x_0 = random.split(KEY, 4), draws((4, 4, 4, 3)), draws((4, 4, 4, 3), 7)
    whole, parts = run(keys, x, x_0, 0, steps), x
    with jax.no_tracing():
        for i, j in ((0, 3), (3, 17), (17, steps)):
            parts = run(keys, parts, x_0, i, j)
    np.testing.assert_array_equal(parts, whole)


def test_an_inpainted_image_does_not_depend_on_its_batch(inpainting):
    run, steps, _ = inpainting
    keys, x, x_0 = random.split(KEY, 4), draws((4, 4, 4, 3)), draws((4, 4, 4, 3), 7)
    whole = run(keys, x, x_0, 0, steps)
    turned = run(keys[::-1], x[::-1], x_0[::-1], 0, steps)
    np.testing.assert_array_equal(turned[::-1], whole)
    other = run(random.split(random.key(6), 4), x, x_0, 0, steps)
    assert np.abs(other - whole).max() > 0.01


def test_renoise_is_many_steps_of_the_forward_process(x64):
    """Mean and variance of q(x_u | x_s) by eq. 2, step by step."""
    betas = 1 - SHORT.alpha_bar[1:] / SHORT.alpha_bar[:-1]
    for s, u in ((0, 20), (3, 4), (5, 15), (7, 7)):
        mean, variance = 1.0, 0.0
        for beta in betas[s:u]:
            mean, variance = mean * np.sqrt(1 - beta), (1 - beta) * variance + beta
        one, zero, ends = jnp.ones((1, 1)), jnp.zeros((1, 1)), (jnp.int32(s), jnp.int32(u))
        assert editing.renoise(SHORT, one, *ends, zero)[0, 0] == pytest.approx(mean, rel=1e-12)
        scale = float(editing.renoise(SHORT, zero, *ends, one)[0, 0])
        assert scale == pytest.approx(np.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2), (32, 48)])
def test_masks(size):
    h, w = size
    masks = {name: mask(h, w) for name, mask in editing.MASKS.items()}
    for mask in masks.values():
        assert mask.shape == size and mask.dtype == bool and not mask.all()
    assert (~masks["left"])[:, : w // 2].all() and masks["left"][:, w // 2 :].all()
    np.testing.assert_array_equal(masks["right"], masks["left"][:, ::-1])
    np.testing.assert_array_equal(masks["centre"], masks["centre"][::-1, ::-1])
    if size == (8, 8):
        assert not masks["centre"][2:6, 2:6].any() and masks["centre"].sum() == 64 - 16
