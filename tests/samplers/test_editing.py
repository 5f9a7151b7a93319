"""edits.py: for Gaussian data every picture's law is known; a walk in parts is the walk."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, samplers, schedules, targets
from diffusion.metrics.nearest import no_neighbours, update_neighbours
from diffusion.samplers import SAMPLERS, base, editing, sample
from diffusion.samplers.ancestral import ancestral
from diffusion.samplers.editing import resampling_path
from diffusion.targets import TARGETS, VARIANCES, Prediction
from tests import oracle
from tests.oracle import Gaussian

KEY = random.key(5)
# Twenty steps that end in noise: alpha_bar_T = 0.007.
SHORT = process.from_betas(schedules.SCHEDULES["linear"](20, 1e-4, 0.4))
ALL = np.arange(20, -1, -1)


def exact(p, known):
    """The perfect model of independent Gaussian pixels, its variance included."""
    apply = known.network(p, "eps")
    return targets.make_predict(p, apply, TARGETS["eps"], VARIANCES["learned"], clip=False)


def draws(shape, number=1):
    return random.normal(random.key(number), shape)




@pytest.mark.parametrize("name", ["ancestral", "dpmpp_2m"])
def test_descend_in_any_parts_is_the_whole_chain(name):
    """Bit for bit, from one program for all parts, with what a solver remembers."""
    sampler, predict, traces = SAMPLERS[name](SHORT), exact(SHORT, Gaussian(0.3, 0.2)), []
    ts = np.array([20, 17, 16, 9, 4, 1, 0])

    def go(carry, i, j):
        traces.append(i)
        return editing.advance_between(sampler, predict, KEY, carry, ts, i, j)

    jitted, start = jax.jit(go), sampler.init(draws((2, 4, 4, 1)))
    whole = jitted(start, 0, 6)
    for cuts in ([0, 3, 6], [0, 1, 1, 2, 5, 6]):
        carry = start
        for i, j in itertools.pairwise(cuts):
            carry = jitted(carry, i, j)
        jax.tree.map(np.testing.assert_array_equal, carry, whole)
    assert len(traces) == 1
    scan = jax.jit(lambda x: sample(sampler, predict, KEY, x, ts))(start.x)
    # Another program of the same formulas: XLA may fuse, and so round, them differently.
    np.testing.assert_allclose(whole.x, scan, atol=1e-6)


def test_descend_of_no_steps_changes_nothing():
    carry = base.SamplerState(draws((2, 3)), draws((2, 3), 2))
    predict = exact(SHORT, Gaussian(0.3, 0.2))
    same = editing.advance_between(ancestral(SHORT), predict, KEY, carry, ALL, 20, 20)
    jax.tree.map(np.testing.assert_array_equal, same, carry)


def test_even_places_have_both_ends():
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


def test_place_of_a_share():
    ts = np.arange(1000, -1, -1)
    shares = (1, 0.875, 0.75, 0.5, 0.125, 0)
    assert [ts[editing.nearest_index(ts, share)] for share in shares] == [1000, 875, 750, 500, 125, 0]
    assert editing.nearest_index(np.array([20, 12, 3, 0]), 0.5) == 1  # 12 is nearer to 10 than 3




def test_encode_has_the_law_of_x_t():
    """Of one image: mean sqrt(alpha_bar) x_0, variance 1 - alpha_bar (eq. 4); five errors."""
    x_0, n = jnp.full((2, 200, 200), 0.7), 40_000
    for t in (0, 3, 20):
        x_t = np.asarray(editing.diffuse(SHORT, KEY, x_0, t), np.float64).reshape(2, -1)
        a = SHORT.alpha_bar[t]
        np.testing.assert_allclose(
            x_t.mean(1), 0.7 * np.sqrt(a), atol=5 * np.sqrt((1 - a) / n) + 1e-6
        )
        np.testing.assert_allclose(x_t.var(1), 1 - a, rtol=5 * np.sqrt(2 / n), atol=1e-9)
        assert t == 0 or abs(np.corrcoef(x_t)[0, 1]) < 5 / np.sqrt(n)


def test_mix_goes_from_one_latent_to_the_other():
    """At lambda = 0 and 1 both latents, of independent noise; in between, the straight line."""
    share = jnp.linspace(0, 1, 11)
    x_0, y_0 = (jnp.broadcast_to(draws((64, 64), k), (11, 64, 64)) for k in (1, 2))
    keys = jnp.broadcast_to(KEY, (11,))
    x = np.asarray(editing.interpolate_latents(SHORT, keys, x_0, y_0, 9, share), np.float64)
    line = x[:1] + np.linspace(0, 1, 11)[:, None, None] * (x[-1:] - x[:1])
    np.testing.assert_allclose(x, line, atol=2e-6)  # float32: the noise is the same for all
    a = SHORT.alpha_bar[9]
    eps = [
        (x[i] - np.sqrt(a) * np.asarray(z[0])) / np.sqrt(1 - a) for i, z in ((0, x_0), (10, y_0))
    ]
    # Standard, and of no correlation: five errors of 4096 numbers.
    assert all(abs(e.std() - 1) < 5 / np.sqrt(2 * 4096) for e in eps)
    assert abs(np.corrcoef(np.ravel(eps[0]), np.ravel(eps[1]))[0, 1]) < 5 / 64
    plain = editing.interpolate_latents(SHORT, keys, x_0, y_0, 0, share)  # without noise, the pixels are mixed
    np.testing.assert_allclose(plain[5], (x_0[5] + y_0[5]) / 2, atol=1e-6)


def test_a_shallow_interpolation_reconstructs_both_images():
    """Decoded from t, an image comes back up to the error that x_t leaves: Var[x_0 | x_t].

    For data N(0, v): x_0 and its decoding are independent draws given x_t, so they differ by a
    variance of 2 Var[x_0 | x_t], less the last step's, which draws no noise.
    """
    known, predict = Gaussian(0.0, 0.25), exact(SHORT, Gaussian(0.0, 0.25))
    x_0, y_0 = (0.5 * draws((1, 128, 128), k) for k in (1, 2))
    share, keys = jnp.array([0.0, 1.0]), jnp.broadcast_to(KEY, (2,))
    both = jnp.concatenate([x_0, x_0]), jnp.concatenate([y_0, y_0])

    @jax.jit
    def decoded(i):
        x_t = editing.interpolate_latents(SHORT, keys, *both, jnp.asarray(ALL)[i], share)
        sampler = ancestral(SHORT)
        return editing.advance_between(sampler, predict, KEY, sampler.init(x_t), ALL, i, 20).x

    for t in (2, 8, 20):
        error = np.asarray(decoded(20 - t) - jnp.concatenate([x_0, y_0]), np.float64)
        variance = 2 * known.given(SHORT, 0, t)[2] - known.given(SHORT, 0, 1)[2]
        np.testing.assert_allclose((error**2).mean((1, 2)), variance, rtol=5 * np.sqrt(2 / 128**2))


def test_branches_share_x_t_and_have_the_posterior_s_law():
    """Fig. 7: draws of p(x_0 | x_t) spread by Var[x_0 | x_t] around E[x_0 | x_t], independently."""
    known, t, n = Gaussian(0.3, 0.25), 6, 64
    sampler, predict = ancestral(SHORT), exact(SHORT, known)
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


def test_branch_0_is_the_key_itself():
    keys = jax.vmap(editing.fork_key, (None, 0))(KEY, jnp.arange(3))
    data = random.key_data(keys)
    np.testing.assert_array_equal(data[0], random.key_data(KEY))
    assert len(np.unique(data, axis=0)) == 3




# RePaint's own schedule, github.com/andreas128/RePaint, guided_diffusion/scheduler.py:
# get_schedule_jump(t_T=12, n_sample=1, jump_length=4, jump_n_sample=3). The network's times, which
# count from 0, so that the image is at -1; small steps up.
REPAINT = [
    *(
        11,
        10,
        9,
        8,
        7,
        6,
        5,
        4,
        5,
        6,
        7,
        8,
        7,
        6,
        5,
        4,
        5,
        6,
        7,
        8,
        7,
        6,
        5,
        4,
        3,
        2,
        1,
        0,
        1,
        2,
        3,
        4,
    ),
    *(3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0, -1),
]


def test_resampled_path_is_repaint_s():
    path, ours = resampling_path(ALL[-13:], jump=4, repeats=3), [11]
    for t, s, u in zip(*(times.tolist() for times in path), strict=True):
        assert t - 1 == ours[-1]
        ours += [s - 1, *range(s, u)]
    assert ours == REPAINT


def test_resampled_once_is_the_chain_and_more_is_that_much_longer():
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
    for options in ({"jump": 0}, {"repeats": 0}):
        with pytest.raises(
            ValueError, match=f"expected {next(iter(options))} of 1 or more, found 0"
        ):
            resampling_path(ALL, **options)


FINE = process.from_betas(schedules.SCHEDULES["linear"](100, 1e-3, 0.1))  # alpha_bar_T = 0.005
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]]) * 0.25
MEAN = np.array([0.2, -0.1])


def correlated(p):
    """The perfect model of two pixels N(MEAN, COVARIANCE): E[x_0 | x_t] in closed form.

    With the posterior's variance, of which fine steps need no other.
    """
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
def test_resampling_brings_what_is_drawn_into_agreement(repeats, least, most, x64, monkeypatch):
    """The mean of a pixel beside a known one is E[x_2 | x_1], and by replacement alone it is not.

    All is linear in what is drawn, so the mean is the chain without noise: no standard error. How
    far plain replacement errs is as measured; that it errs, and that repeats mend it, is RePaint's
    point (Section 4.2).
    """
    for module in (editing, samplers):
        monkeypatch.setattr(module, "noise", lambda keys, t, like: jnp.zeros_like(like))
    path = resampling_path(np.arange(100, -1, -1), 1, repeats)
    x_0, known = jnp.full((1, 1, 2), 0.7), jnp.array([True, False]).reshape(1, 1, 2)
    args = FINE, ancestral(FINE), correlated(FINE), KEY, jnp.zeros((1, 1, 2)), x_0, known, path
    x = np.asarray(jax.jit(lambda: editing.inpaint(*args))()).ravel()
    expected = MEAN[1] + COVARIANCE[1, 0] / COVARIANCE[0, 0] * (0.7 - MEAN[0])
    assert x[0] == 0.7 and least <= expected - x[1] <= most


@pytest.mark.parametrize(("jump", "repeats"), [(1, 1), (1, 4), (5, 3), (20, 2)])
def test_inpainting_leaves_alone_what_does_not_depend_on_the_known(jump, repeats):
    """Independent pixels: those that are drawn keep the law of the data, however often it goes up.

    One level of noise too much or too little on the way up, or a draw used twice, would show.
    """
    known, path = Gaussian(0.3, 0.25), resampling_path(ALL, jump, repeats)
    x_0, mask = jnp.full((2, 128, 128), -0.9), jnp.arange(128).reshape(1, 1, 128) < 64
    predict = exact(SHORT, known)

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


def test_going_up_again_what_is_known_has_the_law_of_x_u():
    """q(x_u | x_0) after every jump, as if it had come from the image in one draw; five errors."""
    path, x_0, n = resampling_path(ALL, 7, 2), jnp.full((1, 128, 128), 0.6), 128 * 128
    predict, everything = exact(SHORT, Gaussian(0.3, 0.25)), jnp.full((1, 1, 1), True)

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
def painting():
    """Run compiled: (keys [b], x [b, ...], x_0, i, j) -> images; steps; what is known; traces."""
    predict = targets.make_predict(SHORT, oracle.toy, TARGETS["eps"], VARIANCES["fixed_large"])
    path, known, traces = resampling_path(ALL, 4, 3), editing.MASKS["centre"](4, 4)[..., None], []

    @jax.jit
    def run(keys, x, x_0, i, j):
        traces.append(x.shape)
        return editing.inpaint(SHORT, ancestral(SHORT), predict, keys, x, x_0, known, path, i, j)

    return run, len(path.t), np.broadcast_to(known, (4, 4, 4, 3)), traces


def test_what_is_known_comes_out_as_it_was(painting):
    run, steps, known, _ = painting
    x_0 = jnp.clip(draws((4, 4, 4, 3), 7), -1, 1)
    out = np.asarray(run(random.split(KEY, 4), draws((4, 4, 4, 3)), x_0, 0, steps))
    np.testing.assert_array_equal(out[known], np.asarray(x_0)[known])
    assert np.all(np.isfinite(out)) and np.all(out[~known] != np.asarray(x_0)[~known])


def test_inpainting_in_parts_is_the_whole(painting):
    """Bit for bit, from one program."""
    run, steps, _, traces = painting
    keys, x, x_0 = random.split(KEY, 4), draws((4, 4, 4, 3)), draws((4, 4, 4, 3), 7)
    parts = x
    for i, j in ((0, 3), (3, 17), (17, steps)):
        parts = run(keys, parts, x_0, i, j)
    np.testing.assert_array_equal(parts, run(keys, x, x_0, 0, steps))
    assert len(traces) == 1


def test_an_inpainted_image_does_not_depend_on_its_batch(painting):
    run, steps, _, _ = painting
    keys, x, x_0 = random.split(KEY, 4), draws((4, 4, 4, 3)), draws((4, 4, 4, 3), 7)
    whole = run(keys, x, x_0, 0, steps)
    turned = run(keys[::-1], x[::-1], x_0[::-1], 0, steps)
    np.testing.assert_array_equal(turned[::-1], whole)
    other = run(random.split(random.key(6), 4), x, x_0, 0, steps)
    assert np.abs(other - whole).max() > 0.01


def test_renoise_is_many_small_steps_of_the_forward_process(x64):
    """q(x_u | x_s): its mean and variance by going through eq. 2 step by step."""
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




def neighbours(queries, blocks, k):
    best = no_neighbours(len(queries))
    for block in blocks:
        best = update_neighbours(best, queries, block, k)
    return best


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_nearest_is_what_looking_at_all_pairs_finds(kind):
    """Whatever the blocks; bytes of equal distance in the order of their numbers."""
    generator = np.random.default_rng(0)
    high = 4 if kind == np.uint8 else 200  # few levels: many ties
    images = generator.integers(0, high, (101, 2, 3, 1)).astype(kind)
    queries = np.concatenate(
        [images[[40, 7]], generator.integers(0, high, (3, 2, 3, 1)).astype(kind)]
    )
    away = images[None].astype(float) - queries[:, None].astype(float)
    square = (away**2).sum((2, 3, 4))
    expected = np.lexsort([np.broadcast_to(np.arange(101), square.shape), square])[:, :6]
    for cuts in ([], [50], [1, 2, 99], range(10, 101, 10)):
        best = neighbours(queries, np.split(images, cuts), 6)
        np.testing.assert_array_equal(best.number, expected)
        np.testing.assert_array_equal(best.square, np.take_along_axis(square, expected, 1))
        assert best.n == 101
    assert best.square[0, 0] == 0 and images[best.number[0, 0]].tolist() == images[40].tolist()


def test_nearest_is_exact_where_float32_would_not_be():
    """Large bright images: their squares sum to 2e8, of which float32 has the last digit as 16."""
    white = np.full((1, 64, 64, 1), 255, np.uint8)
    images = np.repeat(white, 3, 0)
    images[0, 0, 0], images[1, 0, 0] = 253, 254
    best = neighbours(white, [images], 3)
    assert best.number.tolist() == [[2, 1, 0]] and best.square.tolist() == [[0, 1, 4]]


def test_nearest_of_few_and_of_other_shapes():
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    assert neighbours(images[:1], [images], 8).number.tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match=r"expected images of \[2, 2, 1\] .*, found \[4, 1\]"):
        neighbours(images, [images.reshape(3, 4, 1)], 1)
