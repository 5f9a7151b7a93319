"""Tests that every sampler of SAMPLERS keeps the contract of samplers.base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import process, schedules, targets
from diffusion.samplers import SAMPLERS, advance, sample, timesteps, trajectory
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian

LINEAR = process.from_betas(schedules.linear(1000))

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))

KEY = random.key(5)

KEYS = process.example_keys(KEY, 4)

# Every sampler with its defaults, and with options that change the algorithm.
OPTIONS = {
    "ddim": [{"eta": 0.5}],
    "unipc": [{"order": 3, "variant": "bh1"}],
    "predictor_corrector": [{"predictor": "ddim", "corrections": 2, "snr": 0.05}],
}

CASES = [(name, options) for name in SAMPLERS for options in ({}, *OPTIONS.get(name, ()))]

TS = np.array([20, 17, 16, 9, 4, 1, 0])


def label(case):
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


def x_T(b=4):
    return random.normal(random.key(1), (4, 4, 4, 3))[:b]


@pytest.fixture(scope="module", params=CASES, ids=label)
def contract(request):
    """Returns (sampler, predict, run) with run compiled: (keys, x_T, ts) -> states."""
    name, options = request.param
    sampler = SAMPLERS[name](SHORT, **options)
    predict = targets.make_predict(SHORT, oracle.toy, TARGETS["eps"], VARIANCES["fixed_large"])
    return sampler, predict, jax.jit(functools.partial(trajectory, sampler, predict))


def test_sampler_is_a_function_of_its_key(contract):
    _, _, run = contract
    first, again = run(KEYS, x_T(), TS), run(KEYS, x_T(), TS)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.x.shape == first.x_0.shape == (6, 4, 4, 4, 3)
    assert first.x.dtype == first.x_0.dtype == jnp.float32
    assert np.all(np.isfinite(first.x)) and np.all(np.isfinite(first.x_0))


def test_sampler_compiles_once(contract):
    """Other keys, images and times of the same shapes do not trace again."""
    _, _, run = contract
    run(KEYS, x_T(), TS)
    keys, x = process.example_keys(random.key(6), 4), 0.5 * x_T()
    with jax.no_tracing():
        run(keys, x, np.array([20, 12, 9, 8, 7, 3, 0]))


def test_states_have_the_batch_axis_first(contract):
    """So that they are sharded as images are."""
    sampler, *_ = contract
    leaves = jax.tree.leaves(sampler.init(x_T()))
    assert all(leaf.shape[0] == 4 for leaf in leaves)


def test_times_of_a_trajectory(contract):
    """It has x at ts[1:], and the x_0 predicted from the x before, at ts[:-1]."""
    _, predict, run = contract
    states = run(KEYS, x_T(), TS)
    before = jnp.concatenate([x_T()[None], states.x[:-1]])
    for x, t, x_0 in zip(before, TS, states.x_0, strict=False):
        # Float32, compiled another way: sqrt(1 / alpha_bar) = 12 at t = 20 amplifies.
        np.testing.assert_allclose(predict(x, int(t)).x_0, x_0, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(contract):
    """The same alone, with its own key."""
    _, _, run = contract
    whole = run(KEYS, x_T(), TS)
    alone = run(KEYS[3:], x_T()[3:], TS)
    # Float32: other shapes may be vectorised with other roundings, which 12 amplifies once.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:, 3:], atol=1e-5), alone, whole)
    assert np.abs(whole.x[-1, 0] - whole.x[-1, 1]).max() > 0.1


def test_parts_in_a_row_are_the_whole(contract):
    """Bit for bit."""
    sampler, predict, run = contract
    whole = run(KEYS, x_T(), TS)
    go = jax.jit(lambda keys, state, ts: advance(sampler, predict, keys, state, ts))
    state = go(KEYS, go(KEYS, sampler.init(x_T()), TS[:4]), TS[3:])
    np.testing.assert_array_equal(state.x, whole.x[-1])
    np.testing.assert_array_equal(state.x_0, whole.x_0[-1])


def test_a_known_image_comes_out_and_evaluations_are_counted(contract, monkeypatch):
    """If the denoiser knows its one image, every sample is that image."""
    sampler, *_ = contract
    image = random.uniform(random.key(0), (1, 4, 4, 3), minval=-1, maxval=1)
    monkeypatch.setattr(process, "sample_noise", oracle.cheap_noise)
    evaluated = []

    def predict(x, t):
        evaluated.append(int(t if jnp.ndim(t) == 0 else t[0]))
        x_0 = jnp.broadcast_to(image, x.shape)
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        eps, nothing = targets.eps_from_x0(SHORT, x_0, x, t), jnp.zeros((len(x), 1, 1, 1))
        return targets.Prediction(x_0, eps, nothing, nothing)

    with jax.disable_jit():  # each evaluation calls the function
        x_0 = sample(sampler, predict, KEYS, x_T(), TS)
    np.testing.assert_allclose(x_0, jnp.broadcast_to(image, x_0.shape), atol=1e-6)  # float32
    assert len(evaluated) == sampler.evaluations(6)
    assert set(evaluated) == set(TS[:-1].tolist())  # at the given times, and never at 0


PURE = process.from_betas(schedules.jsd(8))  # alpha_bar_T = 0


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "heun"])
def test_schedules_that_end_in_pure_noise(name):
    """With lambda_T = -inf the first step ignores x_T, and everything stays finite."""
    image = random.uniform(random.key(0), (1, 2, 2, 1))

    def predict(x, t):
        x_0, t = jnp.broadcast_to(image, x.shape), jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        nothing = jnp.zeros((len(x), 1, 1, 1))
        return targets.Prediction(x_0, targets.eps_from_x0(PURE, x_0, x, t), nothing, nothing)

    x_T = random.normal(random.key(1), (2, 2, 2, 1))
    ts = np.arange(8, -1, -1)
    states = trajectory(SAMPLERS[name](PURE), predict, random.key(2), x_T, ts)
    assert np.all(np.isfinite(states.x))
    wanted = jnp.broadcast_to(image, x_T.shape)
    np.testing.assert_allclose(states.x[-1], wanted, atol=1e-6)  # float32


@pytest.mark.parametrize("case", CASES, ids=label)
def test_mean_and_variance_of_gaussian_data(case):
    """65,536 samples of N(0.3, 0.5^2) by the perfect model, in a hundred steps."""
    name, options = case
    p, known = LINEAR, Gaussian(0.3, 0.25)
    sampler, ts = SAMPLERS[name](p, **options), timesteps.logsnr(p, 100)
    predict = known.consistency_predict(p) if name == "consistency" else known.predict(p)
    # x_T has the right distribution without sampling error: each quantile once.
    quantiles = stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16)
    mean_T, var_T = known.marginal(p, p.T)
    x_T = mean_T + np.sqrt(var_T) * np.random.RandomState(0).permutation(quantiles)
    x_T = jnp.asarray(x_T.reshape(64, 32, 32, 1), jnp.float32)
    run = jax.jit(lambda key, x: sample(sampler, predict, key, x, ts))
    x = np.asarray(run(KEY, x_T), np.float64)
    # Samplers with noise have the error of 65,536 draws, of which four standard errors are allowed;
    # the others that of their steps: of order h for DDIM, h^2 or less for the rest.
    noisy = np.any(x != run(random.key(8), x_T))
    first_order = "ddim" in (name, options.get("predictor"))
    assert abs(x.mean() - 0.3) < (0.008 if noisy else 0.001)
    assert abs(x.std() / 0.5 - 1) < (0.03 if first_order else 0.011 if noisy else 0.004)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("ddim", {"eta": 1.5}, "eta: expected 0"),
        ("analytic_ddim", {"eta": -0.1}, "eta: expected 0"),
        ("dpmpp_2m", {"solver": "euler"}, "solver: expected one of midpoint, heun, found euler"),
        ("dpmpp_3m", {"solver": "euler"}, "solver: expected one of released, exact, found euler"),
        ("unipc", {"order": 4}, "order: expected 1, 2 or 3, found 4"),
        ("unipc", {"variant": "bh3"}, "variant: expected one of bh1, bh2, found bh3"),
        ("predictor_corrector", {"predictor": "heun"}, "expected one of ancestral, ddim"),
        ("predictor_corrector", {"corrections": 0}, "found 0 and 0.1"),
        ("predictor_corrector", {"snr": 0.0}, "found 1 and 0.0"),
    ],
)
def test_options_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        SAMPLERS[name](SHORT, **options)
    assert "\n" not in str(error.value)
