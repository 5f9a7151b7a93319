"""Tests stratified estimates of the bound."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import likelihood, process, schedules, targets
from diffusion.likelihood import vlb_terms
from diffusion.samplers.stratified import stratified_vlb, timestep_strata
from diffusion.targets import TARGETS, VARIANCES
from tests import oracle
from tests.oracle import Gaussian

SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))
KEY = random.key(3)


def make_predict(target="eps"):
    return targets.make_predict(
        SHORT, oracle.poor_denoiser, TARGETS[target], VARIANCES["fixed_large"]
    )


@pytest.fixture(scope="module")
def images():
    return oracle.images()


def test_strata():
    """Every time is in one stratum, and t = 1 alone in its own."""
    for T in (*range(2, 30), 1000):
        for n in range(2, T + 1):
            edges = timestep_strata(T, n)
            assert edges.dtype == np.int32 and len(edges) == n + 1
            assert list(edges[:2]) == [1, 2] and edges[-1] == T + 1 and np.all(np.diff(edges) > 0)
    np.testing.assert_array_equal(timestep_strata(1000, 1000), np.arange(1, 1002))
    np.testing.assert_array_equal(timestep_strata(1, 1), [1, 2])
    # A tenth of the paper's chain: single times first, later strata of about 5 % of t.
    edges = timestep_strata(1000, 100)
    assert np.all(np.diff(edges)[:15] == 1)
    assert np.all(np.diff(edges)[50:] < 0.08 * edges[50:-1])
    for T, n in ((20, 1), (20, 21), (1, 2), (1, 0)):
        with pytest.raises(ValueError, match="strata: expected"):
            timestep_strata(T, n)


def test_all_strata_are_the_whole_bound(images):
    """With n = T it is the sum of the terms of the same key."""
    predict = make_predict()

    @jax.jit
    def both(x):
        edges = timestep_strata(20, 20)
        return stratified_vlb(SHORT, predict, KEY, x, edges), vlb_terms(SHORT, predict, KEY, x).bits

    ours, bits = both(images)
    np.testing.assert_allclose(ours, bits.sum(1), rtol=1e-5)  # float32, summed in another order


@pytest.fixture(scope="module")
def estimates():
    """Estimates at 5 of 20 times for 6400 images, and their bounds with other draws."""
    known = Gaussian(-0.2, 0.15)
    predict = make_predict("x0")
    x_0 = known.mean + np.sqrt(known.var) * random.normal(random.key(5), (6400, 2, 2, 1))
    x_0 = jnp.round((x_0 + 1) * 127.5).clip(0, 255) / 127.5 - 1
    stratified = jax.jit(functools.partial(stratified_vlb, SHORT, predict))
    key, even = random.key(6), np.array([1, 2, 7, 12, 17, 21], np.int32)
    whole = jax.jit(lambda x: vlb_terms(SHORT, predict, random.key(7), x).bits.sum(1))(x_0)
    ours = stratified(key, x_0, timestep_strata(20, 5))
    with jax.no_tracing():  # other edges of the same number are no other program
        other = stratified(key, x_0, even)
    return tuple(np.asarray(a, np.float64) for a in (x_0, whole, ours, other))


def test_stratified_is_unbiased(estimates):
    """Its mean is that of the bound on the same images, for any strata."""
    _, whole, ours, even = estimates
    for estimate in (ours, even):
        mean, error = (estimate - whole).mean(), stats.sem(estimate - whole)
        assert abs(mean) < 4 * error and error < 0.01 * whole.mean()


def test_stratified_error_is_honest(estimates):
    """Of 400 means of 16 images each, 67 % are within one standard error of the truth."""
    _, whole, ours, _ = estimates
    parts = ours.reshape(400, 16)
    means, errors = parts.mean(1), stats.sem(parts, axis=1)
    within = np.mean(np.abs(means - whole.mean()) < errors)
    # Student's t with 15 degrees of freedom: 66.7 %; three standard errors of a share of 400 are 7.
    assert 0.60 < within < 0.74
    np.testing.assert_allclose((errors**2).mean(), means.var(), rtol=0.22)  # 3 * sqrt(2 / 400)


def test_an_estimate_does_not_depend_on_the_batch(images):
    predict = make_predict()
    run = jax.jit(lambda keys, x: stratified_vlb(SHORT, predict, keys, x, timestep_strata(20, 5)))
    keys = process.example_keys(KEY, 24)
    whole = run(keys, images)
    alone = run(keys[7:8], images[7:8])
    np.testing.assert_allclose(alone[0], whole[7], rtol=1e-5)  # float32, summed in another order


def test_times_are_uniform_in_their_stratum(monkeypatch):
    """Each image draws its own t, weighted by the size of the stratum."""

    def term(p, prediction, x_0, x_t, t, levels):
        return t.astype(float)

    monkeypatch.setattr(likelihood, "vlb_term", term)
    monkeypatch.setattr(likelihood, "prior_bits", lambda p, x_0: jnp.zeros(len(x_0)))
    predict = make_predict()
    x_0 = jnp.zeros((6000, 1, 1, 1))
    run = jax.jit(lambda key: stratified_vlb(SHORT, predict, key, x_0, np.array([5, 11])))
    times, others = np.asarray(run(KEY)) / 6, np.asarray(run(random.key(8))) / 6
    for t in range(5, 11):
        # A share of a sixth, 6000 times over: 29 is its standard deviation.
        assert abs(np.sum(times == t) - 1000) < 5 * 29
        assert abs(np.sum((times == t) & (others == t)) - 6000 / 36) < 5 * 13
