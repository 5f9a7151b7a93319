"""The contract of samplers.SAMPLERS: what holds for every sampler, tested by its being there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import process, samplers, schedules, targets
from diffusion.samplers import SAMPLERS, advance, sample, timesteps, trajectory
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
KEY = random.key(5)
KEYS = process.example_keys(KEY, 4)

# Every sampler of the table with its defaults, and with options that change how it goes; those that
# change a number only are in test_solvers.py.
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
    """A sampler of the table: (sampler, predict, run), run compiled: (keys, x_T, ts) -> Carry."""
    name, options = request.param
    sampler = SAMPLERS[name](SHORT, **options)
    predict = targets.make_predict(
        SHORT, lambda x, t: oracle.toy(x, t), TARGETS["eps"], VARIANCES["fixed_large"]
    )
    traces = []

    def counted(x, t):
        traces.append(x.shape)
        return predict(x, t)

    @jax.jit
    def run(keys, x_T, ts):
        return trajectory(sampler, counted, keys, x_T, ts)

    return sampler, predict, run, traces


def test_sampler_is_a_function_of_its_key(contract):
    _, _, run, _ = contract
    first, again = run(KEYS, x_T(), TS), run(KEYS, x_T(), TS)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.x.shape == first.x_0.shape == (6, 4, 4, 4, 3)
    assert first.x.dtype == first.x_0.dtype == jnp.float32
    assert np.all(np.isfinite(first.x)) and np.all(np.isfinite(first.x_0))


def test_sampler_compiles_once(contract):
    """Another seed, other images, other times of the same number: nothing is traced again."""
    _, _, run, traces = contract
    run(KEYS, x_T(), TS)
    before = len(traces)
    run(process.example_keys(random.key(6), 4), 0.5 * x_T(), TS)
    run(KEYS, x_T(), np.array([20, 12, 9, 8, 7, 3, 0]))
    assert len(traces) == before


def test_all_that_is_carried_is_of_an_example(contract):
    """So that a carry is cut over devices as images are."""
    sampler, *_ = contract
    leaves = jax.tree.leaves(sampler.init(x_T()))
    assert all(leaf.shape[0] == 4 for leaf in leaves)


def test_trajectory_s_places(contract):
    """x at ts[1:], and the x_0 predicted from the x before, at ts[:-1]."""
    _, predict, run, _ = contract
    way = run(KEYS, x_T(), TS)
    before = jnp.concatenate([x_T()[None], way.x[:-1]])
    for x, t, x_0 in zip(before, TS, way.x_0, strict=False):
        # Float32, compiled another way: sqrt(1 / alpha_bar) = 12 at t = 20 amplifies.
        np.testing.assert_allclose(predict(x, int(t)).x_0, x_0, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(contract):
    """Any of a batch, alone, with its own key."""
    _, _, run, _ = contract
    whole = run(KEYS, x_T(), TS)
    alone = run(KEYS[3:], x_T()[3:], TS)
    # Float32: other shapes may be vectorised with other roundings, which 12 amplifies once.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:, 3:], atol=1e-5), alone, whole)
    assert np.abs(whole.x[-1, 0] - whole.x[-1, 1]).max() > 0.1


def test_parts_in_a_row_are_the_whole(contract):
    """Bit for bit."""
    sampler, predict, run, _ = contract
    whole = run(KEYS, x_T(), TS)
    go = jax.jit(lambda keys, carry, ts: advance(sampler, predict, keys, carry, ts))
    carry = go(KEYS, go(KEYS, sampler.init(x_T()), TS[:4]), TS[3:])
    np.testing.assert_array_equal(carry.x, whole.x[-1])
    np.testing.assert_array_equal(carry.x_0, whole.x_0[-1])


def test_a_point_comes_out_exactly_and_evaluations_are_counted(contract, monkeypatch):
    """A denoiser that knows its one image: every sample is it, bit for bit."""
    sampler, *_ = contract
    image = random.uniform(random.key(0), (1, 4, 4, 3), minval=-1, maxval=1)
    monkeypatch.setattr(samplers, "noise", oracle.cheap_noise)
    asked = []

    def predict(x, t):
        asked.append(int(t if jnp.ndim(t) == 0 else t[0]))
        x_0 = jnp.broadcast_to(image, x.shape)
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        eps, nothing = targets.eps_from_x0(SHORT, x_0, x, t), jnp.zeros((len(x), 1, 1, 1))
        return targets.Prediction(x_0, eps, nothing, nothing)

    with jax.disable_jit():  # each evaluation calls the function
        x_0 = sample(sampler, predict, KEYS, x_T(), TS)
    np.testing.assert_array_equal(x_0, jnp.broadcast_to(image, x_0.shape))
    assert len(asked) == sampler.evaluations(6)
    assert set(asked) == set(TS[:-1].tolist())  # at the given times, and never at 0


@pytest.mark.parametrize("case", CASES, ids=label)
def test_mean_and_variance_of_gaussian_data(case):
    """65,536 numbers of N(0.3, 0.5^2) from their exact denoiser, in a hundred steps."""
    name, options = case
    p, known = LINEAR, Gaussian(0.3, 0.25)
    sampler, ts = SAMPLERS[name](p, **options), timesteps.logsnr(p, 100)
    predict = targets.make_predict(
        p, known.network(p, "eps"), TARGETS["eps"], VARIANCES["learned"], clip=False
    )
    # x_T of the right law, without sampling error and in any order: each quantile once.
    quantiles = stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16)
    mean_T, var_T = known.marginal(p, p.T)
    x_T = mean_T + np.sqrt(var_T) * np.random.RandomState(0).permutation(quantiles)
    x_T = jnp.asarray(x_T.reshape(64, 32, 32, 1), jnp.float32)
    run = jax.jit(lambda key, x: sample(sampler, predict, key, x, ts))
    x = np.asarray(run(KEY, x_T), np.float64)
    # What draws noise has the error of 65,536 draws: four standard ones are allowed. The rest has
    # that of its steps: of order h for DDIM, h^2 and less for the others.
    noisy = np.any(x != run(random.key(8), x_T))
    first_order = "ddim" in (name, options.get("predictor"))
    assert abs(x.mean() - 0.3) < (0.008 if noisy else 0.001)
    assert abs(x.std() / 0.5 - 1) < (0.03 if first_order else 0.011 if noisy else 0.004)
