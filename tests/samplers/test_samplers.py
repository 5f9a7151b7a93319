"""Samplers: the official chains, laws in closed form, the loop, and what single ones promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import process, samplers, schedules, targets
from diffusion.samplers import (
    SAMPLERS,
    advance,
    analytic,
    ancestral,
    base,
    heun_langevin,
    sample,
    trajectory,
)
from diffusion.samplers.ancestral import ancestral
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian, official

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
ALL = np.arange(20, -1, -1)  # every time of SHORT
KEY = random.key(5)


def official_predictor(p, m, v, clip=True):
    return targets.make_predict(
        p,
        lambda x, t: oracle.toy(x, t, v == "learned"),
        TARGETS[oracle.TARGETS[m]],
        VARIANCES[oracle.VARIANCES[v]],
        clip=bool(clip),
    )


@official("diffusion", "psample.*", "gd1.psample.*")
def test_official_step(official, monkeypatch):
    """One step of p_sample from eight different times, with the noise given."""
    kinds = list(itertools.product(oracle.VARIANCES, (0, 1)))  # variance and clipping
    keys = process.example_keys(KEY, len(kinds))
    for m in oracle.TARGETS:
        predict = oracle.side_by_side([official_predictor(LINEAR, m, *kind) for kind in kinds])

        @jax.jit
        def step(x, z, t, predict=predict):
            x, z = (jnp.tile(image, (len(kinds), 1, 1, 1)) for image in (x, z))
            monkeypatch.setattr(samplers, "noise", lambda keys, t, like: z)
            sampler = ancestral(LINEAR)
            return sampler.step(predict, keys, sampler.init(x), t, t - 1).x

        given = official["x_t"], official["p_noise"], official["t"] + 1
        out = [step(*one) for one in zip(*given, strict=True)]
        for (v, clip), images in zip(kinds, np.stack(out, axis=1), strict=True):
            # Float32; up to 10 where an unclipped x_0 of 100 has the weight 0.1.
            official.close(f"psample.{m}.{v}.clip{clip}", images, atol=1e-6, rtol=1e-6)
            if (m, v) == ("eps", "fixedsmall"):  # the older class knows only this
                official.close(f"gd1.psample.clip{clip}", images, atol=1e-6, rtol=1e-6)


@official(
    "diffusion", *(f"T20.{k}.*" for k in ("loop", "loop_noise0", "prog", "prog6", "traj", "gd1"))
)
def test_official_chains(official, monkeypatch):
    """p_sample_loop and its progressive form on a chain of 20 steps, with the noise given."""
    p = process.from_betas(official["T20.betas"])
    given = jnp.asarray(official["T20.step_noise"])
    # All variances, with noise and without, are parts of one batch.
    noise = jnp.concatenate([given, 0 * given] * 3, axis=1)
    x_T = jnp.tile(jnp.asarray(official["T20.init"]), (6, 1, 1, 1))
    monkeypatch.setattr(samplers, "noise", lambda keys, t, like: noise[t - 1])

    def predicted_at(way, times):
        """The x_0 predicted at the official times: entry i of a way is from our t = 20 - i."""
        return np.stack([way.x_0[19 - t] for t in times], axis=1)

    # Float32 roundings over 20 steps, which the chain contracts; an x_0 predicted from eps early on
    # is amplified by up to sqrt(1 / alpha_bar) = 12 where nothing clips it.
    x, x_0 = {"atol": 2e-6}, {"atol": 4e-6}
    for m in oracle.TARGETS:
        predict = oracle.side_by_side([official_predictor(p, m, v) for v in oracle.VARIANCES])
        whole = jax.jit(
            lambda x_T, predict=predict: trajectory(ancestral(p), predict, KEY, x_T, ALL)
        )(x_T)
        ways = zip(*(np.split(np.asarray(part), 6, axis=1) for part in whole), strict=True)
        ways = [base.SamplerState(*way) for way in ways]
        for v, way, silent in zip(oracle.VARIANCES, ways[::2], ways[1::2], strict=True):
            official.close(f"T20.loop.{m}.{v}.final", way.x[-1], **x)
            official.close(f"T20.prog.{m}.{v}.final", way.x[-1], **x)
            official.close(f"T20.loop_noise0.{m}.{v}.final", silent.x[-1], **x)
            # One slot per five steps, each overwritten until the last of them, t = 5 j.
            slots = predicted_at(way, (0, 5, 10, 15))
            official.close(f"T20.prog.{m}.{v}.xstartpreds", slots, **x_0)
            if m == "eps" and v != "learned":
                official.close(f"T20.traj.{m}.{v}.x", way.x, **x)
                official.close(f"T20.traj.{m}.{v}.pred_xstart", way.x_0, **x_0)
            if (m, v) == ("eps", "fixedlarge"):
                official.close(f"T20.prog6.{m}.{v}.final", way.x[-1], **x)
                slots = predicted_at(way, (0, 6, 12))  # t = 18 has no slot: 20 // 6 = 3
                official.close(f"T20.prog6.{m}.{v}.xstartpreds", slots, **x_0)
            if (m, v) == ("eps", "fixedsmall"):
                official.close("T20.gd1.loop.final", way.x[-1], **x)


EXACT = {
    "any data, learned variance": (Gaussian(0.3, 0.25), "learned"),
    "unit data, fixed_large": (Gaussian(0.0, 1.0), "fixed_large"),
    "a point, fixed_small": (Gaussian(0.6, 0.0), "fixed_small"),
}


def check_marginals(sampler, predict, known, ts, monkeypatch):
    """Each x_s of the chain has q(x_s)'s mean and variance.

    The chain is linear in x_T and in the noise of each step, so its mean is the chain without noise
    and its variance the sum of the squared derivatives: no draws, no standard errors.
    """
    p = SHORT

    def chain(x_T, z):
        monkeypatch.setattr(samplers, "noise", lambda keys, t, like: z[t].reshape(like.shape))
        way = trajectory(sampler, predict, random.key(0), x_T.reshape(1, 1), np.array(ts))
        return way.x[:, 0, 0]

    mean_T, var_T = known.marginal(p, p.T)
    start = jnp.asarray(mean_T), jnp.zeros(p.T + 1)

    @jax.jit
    def moments(x_T, z):
        by_x, by_z = jax.jacfwd(chain, (0, 1))(x_T, z)
        return chain(x_T, z), by_x**2 * var_T + (by_z**2).sum(1)

    mean, var = moments(*start)
    mean_s, var_s = known.marginal(p, np.array(ts[1:]))
    # No noise in the last step: x_0 is the conditional mean, so its variance lacks Var[x_0 | x_t].
    var_s[-1] -= known.given(p, 0, ts[-2])[2]
    # Float64; var_0 comes out of log_var with an amplification of up to 2e3.
    np.testing.assert_allclose(mean, mean_s, atol=1e-11)
    np.testing.assert_allclose(var, var_s, atol=1e-11)


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("ts", [ALL, [20, 13, 12, 4, 1, 0], [20, 7, 0]], ids=["all", "some", "two"])
@pytest.mark.parametrize("target", TARGETS)
def test_ancestral_keeps_every_marginal(target, ts, case, x64, monkeypatch):
    """With the exact denoiser and the variance that is optimal for it."""
    known, variance = EXACT[case]
    apply = known.network(SHORT, target, learned=variance == "learned")
    predict = targets.make_predict(SHORT, apply, TARGETS[target], VARIANCES[variance], clip=False)
    check_marginals(ancestral(SHORT), predict, known, ts, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_analytic_ddim_keeps_every_marginal(eta, x64, monkeypatch):
    """In steps of any length, where DDIM itself, which adds too little noise, does not."""
    known = Gaussian(0.3, 0.25)
    apply, ts = known.network(SHORT, "eps"), [20, 13, 12, 4, 1, 0]
    predict = targets.make_predict(SHORT, apply, TARGETS["eps"], VARIANCES["learned"], clip=False)
    check_marginals(analytic.analytic_ddim(SHORT, eta), predict, known, ts, monkeypatch)
    with pytest.raises(AssertionError):
        check_marginals(ancestral.ddim(SHORT, eta), predict, known, ts, monkeypatch)


@pytest.mark.parametrize("ts", [ALL, [20, 9, 8, 0]], ids=["all", "some"])
def test_ancestral_gives_the_data_s_law(ts):
    """The same in float32 with the sampler's own noise, as 262,144 independent scalars."""
    p, known = SHORT, Gaussian(0.3, 0.25)
    predict = targets.make_predict(
        p, known.network(p, "eps"), TARGETS["eps"], VARIANCES["learned"], clip=False
    )
    mean_T, var_T = known.marginal(p, p.T)
    shape = (4, 256, 256, 1)

    @jax.jit
    def run(key):
        x_T = mean_T + np.sqrt(var_T) * random.normal(random.fold_in(key, 99), shape)
        return trajectory(ancestral(p), predict, key, x_T, np.array(ts)).x

    x = np.asarray(run(random.key(0)), np.float64).reshape(len(ts) - 1, -1)
    n = x.shape[1]
    mean, var = known.marginal(p, np.array(ts[1:]))
    var[-1] -= known.given(p, 0, ts[-2])[2]  # no noise in the last step
    # Five standard errors, of a mean and of a Gaussian's variance.
    assert np.all(np.abs(x.mean(1) - mean) < 5 * np.sqrt(var / n))
    assert np.all(np.abs(x.var(1) / var - 1) < 5 * np.sqrt(2 / n))
    standard = (x[-1] - mean[-1]) / np.sqrt(var[-1])
    assert stats.kstest(standard, "norm").pvalue > 1e-4  # one fixed draw: luck is settled




TS = np.array([20, 17, 16, 9, 4, 1, 0])
KEYS = process.example_keys(KEY, 4)


def x_T(b=4):
    return random.normal(random.key(1), (4, 4, 4, 3))[:b]


@pytest.fixture(scope="module", params=["ancestral", "unipc"])
def loop(request):
    """(sampler, predict), of a sampler with noise and of one that remembers."""
    return SAMPLERS[request.param](SHORT), targets.make_predict(
        SHORT, lambda x, t: oracle.toy(x, t), TARGETS["eps"], VARIANCES["fixed_large"]
    )


def test_sample_is_the_end_of_the_trajectory(loop):
    """With times that are constants of the program, and with times that are given to it."""
    sampler, predict = loop
    fixed = jax.jit(lambda key, x: sample(sampler, predict, key, x, TS))(KEY, x_T())
    given = jax.jit(lambda *a: trajectory(sampler, predict, *a))(KEY, x_T(), jnp.asarray(TS))
    # Two programs of the same formulas: XLA may fuse, and so round, them differently.
    np.testing.assert_allclose(fixed, given.x[-1], atol=1e-6)


def test_one_key_is_one_for_each_example(loop):
    """Example i of a batch gets key i, however many there are."""
    sampler, predict = loop
    run = jax.jit(lambda key, x: sample(sampler, predict, key, x, TS))
    whole = run(KEY, x_T())
    # Float32, as above.
    np.testing.assert_allclose(run(KEYS, x_T()), whole, atol=1e-5)
    np.testing.assert_allclose(run(KEY, x_T(2)), whole[:2], atol=1e-5)




def toy_predictor(variance):
    return targets.make_predict(SHORT, oracle.toy, TARGETS["eps"], VARIANCES[variance])


def test_ddim_with_all_its_noise_is_ancestral():
    """eta = 1 and the posterior's variance: one chain in two parametrisations."""
    ours, theirs = (
        trajectory(sampler, toy_predictor("fixed_small"), KEY, x_T(2), TS).x
        for sampler in (ancestral.ddim(SHORT, 1.0), ancestral(SHORT))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_analytic_ddim_of_a_known_x_0_is_ddim(eta):
    """Fixed_small takes x_0 as known: nothing is added."""
    ours, theirs = (
        trajectory(sampler(SHORT, eta), toy_predictor("fixed_small"), KEY, x_T(2), TS).x
        for sampler in (analytic.analytic_ddim, ancestral.ddim)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32


def test_langevin_steps_reach_their_stationary_law():
    """Data N(0, 1) has the score -x at every t; the corrector mends a start that is far too narrow.

    A step x' = (1 - d) x + sqrt(2 d) z is stationary at the variance V = 1 / (1 - d / 2), and d = 2
    (1 - beta_s) snr^2 / V for images of many pixels: V = 1 + (1 - beta_s) snr^2.
    """
    s, snr, a = 12, 0.5, SHORT.alpha_bar
    predict = targets.make_predict(
        SHORT,
        Gaussian(0.0, 1.0).network(SHORT, "eps", learned=False),
        TARGETS["eps"],
        VARIANCES["fixed_small"],
        clip=False,
    )
    sampler = heun_langevin.predictor_corrector(SHORT, "ddim", corrections=100, snr=snr)
    start = sampler.init(0.3 * random.normal(random.key(4), (4, 128, 128, 1)))
    x = jax.jit(lambda c: advance(sampler, predict, KEY, c, np.array([15, s])))(start).x
    wanted = 1 + a[s] / a[s - 1] * snr**2
    # 16,384 numbers in an image: five standard errors of a variance.
    np.testing.assert_allclose(np.var(x, axis=(1, 2, 3)), wanted, rtol=5 * np.sqrt(2 / 16384))


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


def test_ancestral_noise_is_fresh_in_every_step():
    """Two seeds differ, a step's noise is no other step's, the last step has none."""
    predict = targets.make_predict(
        SHORT, lambda x, t: oracle.toy(x, t), TARGETS["x0"], VARIANCES["fixed_large"]
    )
    x = random.normal(random.key(1), (2, 24, 24, 3))
    run = jax.jit(lambda key: trajectory(ancestral(SHORT), predict, key, x, ALL))
    way, other = run(KEY), run(random.key(6))
    before = np.concatenate([x[None], way.x[:-1]])
    z = []
    for i, t in enumerate(ALL[:-1]):
        c = process.posterior(SHORT, t - 1, t)
        z.append(np.ravel(way.x[i] - c.weight_0 * way.x_0[i] - c.weight_t * before[i]))
        # The variance is beta, of a noise that is standard: 3456 numbers, so 12 % is five errors.
        wanted = process.beta_between(SHORT, t - 1, t) if t > 1 else 0
        np.testing.assert_allclose(z[-1].var(), wanted, rtol=0.12, atol=1e-12)
    correlations = np.corrcoef(z[:-1]) - np.eye(19)
    assert np.abs(correlations).max() < 0.1  # six standard errors
    assert np.abs(way.x[-1] - other.x[-1]).max() > 0.01


def known_x_0(x, t):
    return targets.Prediction(x, x, jnp.zeros_like(x), jnp.zeros_like(x))


@pytest.mark.parametrize("ts", [[], [5], [5, 5, 0], [0, 5], [5, 3, -1], [3, 4, 0]])
@pytest.mark.parametrize("run", [sample, trajectory])
def test_times_are_checked(run, ts):
    with pytest.raises(ValueError, match="strictly falling"):
        run(ancestral(SHORT), known_x_0, KEY, x_T(), np.array(ts, int))


@pytest.mark.parametrize(
    "x", [jnp.zeros((4, 4, 4, 3), int), jnp.zeros(4)], ids=["ints", "one axis"]
)
@pytest.mark.parametrize("run", [sample, trajectory])
def test_images_are_checked(run, x):
    with pytest.raises(ValueError, match="x_T: expected floats"):
        run(ancestral(SHORT), known_x_0, KEY, x, ALL)


@pytest.mark.parametrize("run", [sample, trajectory])
def test_keys_are_counted(run):
    with pytest.raises(ValueError, match=r"one per example \[4\]"):
        run(ancestral(SHORT), known_x_0, random.split(KEY, 3), x_T(), ALL)


# What the comparisons leave out, and why.
INPUTS = {
    "schedules": set(),
    # What the official functions were given: read by the comparisons, made by nobody.
    "diffusion": {
        *("k", "x_start", "noise", "p_noise", "t", "T20.init", "T20.step_noise", "T20.q_noise"),
        *(
            "T20.x_start",
            "dgll.k",
            "dgll.x",
            "dgll.means",
            "dgll.log_scales",
            "dgll_all.x",
            "cdf.x",
        ),
        *(f"dgll_all.{i}.mean_logscale" for i in range(3)),
    },
}


@pytest.mark.parametrize("file", INPUTS)
def test_no_official_array_is_forgotten(file):
    from tests import (  # noqa: F401 (each notes on import what it compares)
        test_likelihood,
        test_losses,
        test_process,
        test_schedules,
        test_targets,
    )

    assert oracle.COMPARED[file].isdisjoint(INPUTS[file])
    assert oracle.COMPARED[file] | INPUTS[file] == set(oracle.arrays(file))
