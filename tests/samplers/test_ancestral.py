"""Tests ancestral sampling and DDIM: official chains, and marginals in closed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import process, schedules, targets
from diffusion.samplers import SamplerState, trajectory
from diffusion.samplers.ancestral import ancestral, ddim
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian, official

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
ALL = np.arange(20, -1, -1)  # every time of SHORT
KEY = random.key(5)


@official("diffusion", "psample.*", "gd1.psample.*")
def test_official_step(official, monkeypatch):
    """One step of p_sample from eight different times, with the noise given."""
    kinds = list(itertools.product(oracle.VARIANCES, (0, 1)))  # variance and clipping
    keys = process.example_keys(KEY, len(kinds))
    for m in oracle.TARGETS:
        predict = oracle.side_by_side([oracle.official_predict(LINEAR, m, *kind) for kind in kinds])

        @jax.jit
        def step(x, z, t, predict=predict):
            x, z = (jnp.tile(image, (len(kinds), 1, 1, 1)) for image in (x, z))
            monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: z)
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
    monkeypatch.setattr(process, "sample_noise", lambda keys, t, like: noise[t - 1])

    def predicted_at(states, times):
        """The x_0 predicted at the official times: entry i is from our t = 20 - i."""
        return np.stack([states.x_0[19 - t] for t in times], axis=1)

    # Float32 roundings over 20 steps, which the chain contracts; an x_0 predicted from eps early on
    # is amplified by up to sqrt(1 / alpha_bar) = 12 where nothing clips it.
    x, x_0 = {"atol": 2e-6}, {"atol": 4e-6}
    for m in oracle.TARGETS:
        predict = oracle.side_by_side([oracle.official_predict(p, m, v) for v in oracle.VARIANCES])
        whole = jax.jit(
            lambda x_T, predict=predict: trajectory(ancestral(p), predict, KEY, x_T, ALL)
        )(x_T)
        chains = zip(*(np.split(np.asarray(part), 6, axis=1) for part in whole), strict=True)
        chains = [SamplerState(*states) for states in chains]
        for v, noisy, silent in zip(oracle.VARIANCES, chains[::2], chains[1::2], strict=True):
            official.close(f"T20.loop.{m}.{v}.final", noisy.x[-1], **x)
            official.close(f"T20.prog.{m}.{v}.final", noisy.x[-1], **x)
            official.close(f"T20.loop_noise0.{m}.{v}.final", silent.x[-1], **x)
            # One slot per five steps, each overwritten until the last of them, t = 5 j.
            slots = predicted_at(noisy, (0, 5, 10, 15))
            official.close(f"T20.prog.{m}.{v}.xstartpreds", slots, **x_0)
            if m == "eps" and v != "learned":
                official.close(f"T20.traj.{m}.{v}.x", noisy.x, **x)
                official.close(f"T20.traj.{m}.{v}.pred_xstart", noisy.x_0, **x_0)
            if (m, v) == ("eps", "fixedlarge"):
                official.close(f"T20.prog6.{m}.{v}.final", noisy.x[-1], **x)
                slots = predicted_at(noisy, (0, 6, 12))  # t = 18 has no slot: 20 // 6 = 3
                official.close(f"T20.prog6.{m}.{v}.xstartpreds", slots, **x_0)
            if (m, v) == ("eps", "fixedsmall"):
                official.close("T20.gd1.loop.final", noisy.x[-1], **x)


EXACT = {
    "any data, learned variance": (Gaussian(0.3, 0.25), "learned"),
    "unit data, fixed_large": (Gaussian(0.0, 1.0), "fixed_large"),
    "a point, fixed_small": (Gaussian(0.6, 0.0), "fixed_small"),
}


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("ts", [ALL, [20, 13, 12, 4, 1, 0], [20, 7, 0]], ids=["all", "some", "two"])
@pytest.mark.parametrize("target", TARGETS)
def test_ancestral_keeps_every_marginal(target, ts, case, x64, monkeypatch):
    """With the perfect denoiser and its optimal variance."""
    known, variance = EXACT[case]
    predict = known.predict(SHORT, target, variance)
    oracle.check_marginals(ancestral(SHORT), predict, known, SHORT, ts, monkeypatch)


@pytest.mark.parametrize("ts", [ALL, [20, 9, 8, 0]], ids=["all", "some"])
def test_ancestral_samples_the_data_distribution(ts):
    """The same in float32 with the sampler's own noise, for 262,144 independent scalars."""
    p, known = SHORT, Gaussian(0.3, 0.25)
    predict = known.predict(p)
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


def test_ddim_with_full_noise_is_ancestral():
    """For eta = 1 and the posterior's variance."""
    predict = targets.make_predict(SHORT, oracle.toy, TARGETS["eps"], VARIANCES["fixed_small"])
    x_T, ts = random.normal(random.key(1), (2, 4, 4, 3)), np.array([20, 17, 16, 9, 4, 1, 0])
    ours, theirs = (
        trajectory(sampler, predict, KEY, x_T, ts).x
        for sampler in (ddim(SHORT, 1.0), ancestral(SHORT))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # float32


def test_ancestral_noise_is_fresh_in_every_step():
    """Seeds and steps have different noise, and the last step has none."""
    predict = targets.make_predict(SHORT, oracle.toy, TARGETS["x0"], VARIANCES["fixed_large"])
    x = random.normal(random.key(1), (2, 24, 24, 3))
    run = jax.jit(lambda key: trajectory(ancestral(SHORT), predict, key, x, ALL))
    states, other = run(KEY), run(random.key(6))
    before = np.concatenate([x[None], states.x[:-1]])
    z = []
    for i, t in enumerate(ALL[:-1]):
        c = process.posterior(SHORT, t - 1, t)
        z.append(np.ravel(states.x[i] - c.weight_0 * states.x_0[i] - c.weight_t * before[i]))
        # The variance is beta, of a noise that is standard: 3456 numbers, so 12 % is five errors.
        wanted = process.beta_between(SHORT, t - 1, t) if t > 1 else 0
        np.testing.assert_allclose(z[-1].var(), wanted, rtol=0.12, atol=1e-12)
    correlations = np.corrcoef(z[:-1]) - np.eye(19)
    assert np.abs(correlations).max() < 0.1  # six standard errors
    assert np.abs(states.x[-1] - other.x[-1]).max() > 0.01
