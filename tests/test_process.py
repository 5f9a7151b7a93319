"""Tests the forward process: official tables, brute-force conditioning, float32 on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import stats

from diffusion import process, schedules
from tests.oracle import official

LINEAR = process.from_betas(schedules.linear(1000))


def chain(T=30, beta_end=0.3):
    return process.from_betas(schedules.linear(T, 1e-3, beta_end))


@official(
    "schedules",
    "gd*.linear.T1000.betas",
    "gd*.linear.T1000.alphas_cumprod*",
    "gd*.linear.T1000.sqrt_alphas_cumprod",
    "gd*.linear.T1000.*one_minus_alphas_cumprod",
    "gd*.linear.T1000.posterior_variance",
    "gd*.linear.T1000.posterior_mean_coef*",
)
def test_official_tables(official, x64):
    t = np.arange(1, 1001)
    c = process.posterior(LINEAR, t - 1, t)
    one, t_device = jnp.ones((1000, 1)), jnp.asarray(t)
    tables = {
        "betas": process.beta_between(LINEAR, t - 1, t),
        "alphas_cumprod": LINEAR.alpha_bar[1:],
        "alphas_cumprod_prev": LINEAR.alpha_bar[:-1],
        # The factors of eq. 4 as q_sample applies them; taken off again they are the two "recip"
        # tables of test_targets.py.
        "sqrt_alphas_cumprod": process.q_sample(LINEAR, one, t_device, 0 * one)[:, 0],
        "sqrt_one_minus_alphas_cumprod": process.q_sample(LINEAR, 0 * one, t_device, one)[:, 0],
        "log_one_minus_alphas_cumprod": np.log(process.beta_between(LINEAR, 0, t)),
        "posterior_variance": c.variance,
        "posterior_mean_coef1": c.weight_0,
        "posterior_mean_coef2": c.weight_t,
    }
    for name, table in tables.items():
        # Float64 against float64. Two of the tables subtract neighbours that agree in four digits:
        # 1e-16 becomes 1e-12.
        official.close(f"gd2.linear.T1000.{name}", table, rtol=2e-12)
        # The older class keeps float32 constants: half a unit in the last of 24 bits.
        official.close(f"gd1_f32.linear.T1000.{name}", table, rtol=2.0**-24 + 1e-11)


@official("diffusion", "q_mv.*", "x_t", "q_post.mean", "q_post.variance", "gd1.q_mv.*", "gd1.x_t")
def test_official_q(official):
    x_0, eps, t = (jnp.asarray(official[k]) for k in ("x_start", "noise", "t"))
    t = t + 1  # the official code counts from 0
    x_t = process.q_sample(LINEAR, x_0, t, eps)
    variance = process.beta_between(LINEAR, 0, t).reshape(-1, 1, 1, 1)
    for name in ("", "gd1."):
        # Float32 on both sides, values up to 4: 1e-6 is two units in the last place.
        official.close(f"{name}x_t", x_t, atol=1e-6)
        official.close(f"{name}q_mv.mean", process.q_sample(LINEAR, x_0, t, 0 * eps), atol=1e-6)
        # The same on a log scale, whose values go down to -9; near t = T they are 4e-5, of a
        # variance near 1.
        official.close(f"{name}q_mv.log_variance", jnp.log(variance), atol=2e-6)
    official.close("q_mv.variance", variance, rtol=1e-6)
    # The older class subtracts float32 numbers near 1.
    official.close("gd1.q_mv.variance", variance, atol=1e-7)
    mean, variance = process.q_posterior(LINEAR, x_0, jnp.asarray(official["x_t"]), t - 1, t)
    official.close("q_post.mean", mean, atol=1e-6)
    official.close("q_post.variance", variance, rtol=1e-6)


def brute_force(betas):
    """Returns x_0..x_T as rows over (x_0, eps_1..eps_T), by eq. 2 one step at a time."""
    rows = [np.eye(len(betas) + 1)[0]]
    for t, beta in enumerate(betas, 1):
        row = np.sqrt(1 - beta) * rows[-1]
        row[t] = np.sqrt(beta)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd", "const"])
def test_against_brute_force(name):
    """q(x_t | x_0), q(x_t | x_s) and q(x_s | x_t, x_0) for all s < t follow from eq. 2.

    Conditions the joint Gaussian of the whole chain.
    """
    T = 40
    betas = schedules.SCHEDULES[name](T, 1e-3, 0.3)
    p = process.from_betas(betas)
    rows = brute_force(betas)
    signal, covariance = rows[:, 0], rows[:, 1:] @ rows[:, 1:].T
    # Float64 throughout: what is lost is a few roundings per step, at most 1e-12 after forty.
    close = {"rtol": 1e-10, "atol": 1e-14}
    np.testing.assert_allclose(np.sqrt(p.alpha_bar), signal, **close)
    np.testing.assert_allclose(1 - p.alpha_bar, np.diag(covariance), **close)
    for s, t in zip(*np.triu_indices(T + 1, 1), strict=True):
        weight_t = covariance[s, t] / covariance[t, t]
        wanted = (
            signal[s] - weight_t * signal[t],
            weight_t,
            covariance[s, s] - weight_t * covariance[s, t],
        )
        np.testing.assert_allclose(process.posterior(p, s, t), wanted, err_msg=f"{s, t}", **close)
        if s:
            ratio = covariance[s, t] / covariance[s, s]  # of x_s in x_t
            kept = covariance[t, t] - ratio**2 * covariance[s, s]
            np.testing.assert_allclose(process.beta_between(p, s, t), kept, **close)


def test_q_posterior_on_images():
    """With a time per example and one time for all: the coefficients of `posterior`, broadcast."""
    p = chain()
    x_0, x_t = random.normal(random.key(0), (2, 3, 4, 4, 2))
    s, t = jnp.array([0, 3, 7]), jnp.array([1, 4, 30])
    mean, variance = process.q_posterior(p, x_0, x_t, s, t)
    assert mean.shape == x_0.shape and variance.shape == (3, 1, 1, 1)
    for i in range(3):
        c = process.posterior(p, int(s[i]), int(t[i]))
        wanted = c.weight_0 * np.float64(x_0[i]) + c.weight_t * np.float64(x_t[i])
        np.testing.assert_allclose(mean[i], wanted, atol=2e-6)  # float32, values up to 4
        np.testing.assert_allclose(variance[i, 0, 0, 0], c.variance, rtol=1e-6)  # float32
        one, _ = process.q_posterior(p, x_0, x_t, int(s[i]), int(t[i]))
        np.testing.assert_allclose(one[i], mean[i], atol=1e-6)  # host tables, then float32


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_float32_coefficients_are_accurate(name):
    """On the device, in float32, to 1e-6 relative, which is eight roundings.

    Differences of a plain float32 table of log alpha_bar would be wrong in the fourth digit.
    """
    p = process.from_betas(schedules.SCHEDULES[name](1000))
    t = np.arange(1, 1001)
    s_far, t_far = np.sort(np.random.RandomState(0).randint(0, 1001, (2, 3000)), axis=0)
    s = np.concatenate([t - 1, s_far[s_far < t_far]])
    t = np.concatenate([t, t_far[s_far < t_far]])
    on_device = jax.jit(lambda s, t: process.posterior(p, s, t))(s, t)
    for ours, exact in zip(on_device, process.posterior(p, s, t), strict=True):
        assert ours.dtype == jnp.float32 and exact.dtype == np.float64
        np.testing.assert_allclose(ours, exact, rtol=1e-6)


def test_steps_in_log_snr():
    """float32 steps between neighbours of a long chain are accurate, although lambda's own differ
    in the fourth digit only."""
    odds = LINEAR.alpha_bar[1:] / (1 - LINEAR.alpha_bar[1:])
    wanted = np.log(odds[:-1] / odds[1:]) / 2
    t = jnp.arange(2, 1001)
    # The two parts of lambda, up to 5, are rounded to 1e-7 of 1e-7: what is left is the sum's.
    np.testing.assert_allclose(process.log_snr_step(LINEAR, t, t - 1), wanted, rtol=1e-6)
    assert process.log_snr_step(LINEAR, jnp.asarray(1), jnp.asarray(0)) == np.inf


def test_respace():
    """A respaced chain has the same marginals, posteriors and time inputs at its times."""
    ts = np.array([1, 5, 6, 17, 30])
    p = chain()
    q = process.respace(p, ts[[3, 0, 4, 2, 1]])  # the order does not matter
    assert q.T == 5
    np.testing.assert_array_equal(q.alpha_bar, np.append(1, p.alpha_bar[ts]))
    np.testing.assert_array_equal(q.model_t[1:], p.model_t[ts])
    times = np.append(0, ts)
    for i in range(1, 6):
        long = process.posterior(p, times[i - 1], times[i])
        np.testing.assert_allclose(process.posterior(q, i - 1, i), long, rtol=1e-12)  # float64
    again = process.respace(q, [2, 4])  # of the steps 5 and 17
    np.testing.assert_array_equal(again.alpha_bar, np.append(1, p.alpha_bar[[5, 17]]))
    np.testing.assert_array_equal(again.model_t[1:], p.model_t[[5, 17]])


def test_respace_to_all_steps_changes_nothing():
    p = chain()
    q = process.respace(p, np.arange(1, p.T + 1))
    np.testing.assert_array_equal(q.alpha_bar, p.alpha_bar)
    np.testing.assert_array_equal(q.model_t, p.model_t)


def test_time_inputs_count_from_zero():
    """The released weights were trained with t in 0..T-1."""
    np.testing.assert_array_equal(LINEAR.model_t[1:], np.arange(1000))
    assert LINEAR.T == 1000


@pytest.mark.parametrize("betas", [[], [[0.1]], [0.1, 0.0], [-0.1], [0.1, 1.01], [np.nan], 0.1])
def test_betas_are_checked(betas):
    with pytest.raises(ValueError, match="betas: expected"):
        process.from_betas(np.array(betas))


@pytest.mark.parametrize("ts", [[], [0, 1], [1, 31], [1, 1, 2], [1.0, 2.0], [-1, 3]])
def test_respace_checks_its_times(ts):
    with pytest.raises(ValueError, match=r"distinct integers in 1\.\.30"):
        process.respace(chain(), np.array(ts))


def test_q_sample_checks_shapes():
    x = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="expected eps of x_0's shape"):
        process.q_sample(LINEAR, x, jnp.array([1, 2]), x[:1])


def test_q_sample_takes_one_time_for_all():
    x_0, eps = random.normal(random.key(0), (2, 3, 4, 4, 1))
    each = process.q_sample(LINEAR, x_0, jnp.full(3, 500), eps)
    for t in (500, np.int32(500), jnp.asarray(500)):
        # The host's coefficient and the device's gathered one are the same float32.
        np.testing.assert_array_equal(process.q_sample(LINEAR, x_0, t, eps), each)
    np.testing.assert_array_equal(process.q_sample(LINEAR, x_0, 0, eps), x_0)


def test_noise_of_an_example():
    """It depends on the example's key and on t, not on the batch, and is standard normal."""
    key = random.key(3)
    like = jnp.zeros((5, 40, 40, 3))
    keys = process.example_keys(key, 5)
    z = process.sample_noise(keys, jnp.asarray(7), like)
    np.testing.assert_array_equal(
        process.sample_noise(process.example_keys(key, 2), 7, like[:2]), z[:2]
    )
    np.testing.assert_array_equal(process.sample_noise(keys[3:4], 7, like[:1])[0], z[3])
    assert process.example_keys(keys, 5) is keys
    draws = [
        z[0],
        z[1],
        process.sample_noise(keys, 8, like)[0],
        process.sample_noise(keys, 6, like)[0],
    ]
    # 4800 numbers: a correlation of 0.1 is seven standard errors.
    correlations = np.corrcoef([np.ravel(d) for d in draws]) - np.eye(4)
    assert np.abs(correlations).max() < 0.1
    assert stats.kstest(np.ravel(z), "norm").pvalue > 1e-4  # one fixed draw: luck is settled


def test_raw_keys_are_the_same_keys():
    new = process.example_keys(random.key(3), 4)
    old = process.example_keys(random.PRNGKey(3), 4)
    np.testing.assert_array_equal(random.key_data(old), random.key_data(new))


def test_keys_are_counted():
    with pytest.raises(ValueError, match=r"one per example \[3\]"):
        process.example_keys(random.split(random.key(0), 4), 3)


def test_noise_levels_at_the_trained_times():
    q = process.at_levels(LINEAR, LINEAR.alpha_bar[1:])
    np.testing.assert_array_equal(q.alpha_bar, LINEAR.alpha_bar)
    np.testing.assert_allclose(q.model_t, LINEAR.model_t, atol=1e-9)


def test_noise_levels_between_the_trained_times():
    """Half way in log(sigma / alpha) is half way in time; outside it is the nearest time."""
    p = chain(20)
    odds = (1 - p.alpha_bar[1:]) / p.alpha_bar[1:]
    q = process.at_levels(p, 1 / (1 + np.sqrt(odds[:-1] * odds[1:])))
    np.testing.assert_allclose(q.model_t, [-1, *np.arange(0.5, 19)], atol=1e-12)
    assert q.T == 19 and q.alpha_bar[0] == 1
    q = process.at_levels(p, 1 / (1 + np.array([odds[0] / 2, 2 * odds[-1]])))
    np.testing.assert_array_equal(q.model_t, [-1, 0, 19])


@pytest.mark.parametrize("levels", [(), (0.5, 0.6), (0.5, 0.5), (1.0, 0.5), (0.5, 0.0)])
def test_noise_levels_that_do_not_fall_are_refused(levels):
    with pytest.raises(ValueError, match="expected falling numbers"):
        process.at_levels(LINEAR, levels)
