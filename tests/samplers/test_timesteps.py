"""Grids: the contract of the table, evenness, the times of diffusers; levels between the times."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import process, schedules
from diffusion.samplers import timesteps
from diffusion.samplers.timesteps import GRIDS
from tests.oracle import arrays

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))


def chain(T):
    return process.from_betas(schedules.linear(T, 1e-3, 0.4))


@pytest.mark.parametrize("name", GRIDS)
def test_grids(name):
    """Strictly falling int32 times from T to 0, for every number of steps that a chain has."""
    for p in (*map(chain, range(1, 41)), LINEAR):
        for steps in range(1, p.T + 1):
            ts = GRIDS[name](p, steps)
            assert ts.dtype == np.int32 and len(ts) == steps + 1
            assert ts[0] == p.T and ts[-1] == 0 and np.all(np.diff(ts) < 0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [0, -3, 21])
def test_grids_check_the_number_of_steps(name, steps):
    with pytest.raises(ValueError, match="expected 1 to 20"):
        GRIDS[name](SHORT, steps)


def test_uniform_is_even():
    np.testing.assert_array_equal(timesteps.uniform(SHORT, 20), np.arange(20, -1, -1))
    np.testing.assert_array_equal(timesteps.uniform(LINEAR, 10), np.arange(1000, -1, -100))
    for steps in range(1, 1001):
        # Rounded to the nearest, so at most a half from where evenness would put it.
        even = np.linspace(1000, 0, steps + 1)
        assert np.abs(timesteps.uniform(LINEAR, steps) - even).max() <= 0.5


def test_quadratic_is_even_in_the_root():
    ts = timesteps.quadratic(LINEAR, 10)
    np.testing.assert_array_equal(ts, 10 * np.arange(10, -1, -1) ** 2)


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_logsnr_is_even_in_the_ratio(steps):
    """Each time is a trained one on either side of where evenness would put it."""
    ts = timesteps.logsnr(LINEAR, steps)
    snr = LINEAR.alpha_bar[1:] / (1 - LINEAR.alpha_bar[1:])
    wanted = np.geomspace(snr[-1], snr[0], steps)
    below, above = np.append(snr, 0)[ts[:-1]], np.append(np.inf, snr)[ts[:-1] - 1]
    assert ts[-2] == 1
    assert np.all(below <= wanted * (1 + 1e-9)) and np.all(wanted <= above * (1 + 1e-9))


def test_times_are_those_of_diffusers():
    """There they count from 0, and the last step, to the image, is not listed."""
    full = arrays("schedulers_full")
    for run, grid in {
        "ddim10_eta0_trailing_alpha11_clip0": timesteps.uniform,
        "ddim7_eta0_trailing": timesteps.uniform,
        "ddpm50_fixed_small_trailing_clip0": timesteps.uniform,
        "ddim10_eta0_leading_alpha11_clip0": timesteps.leading,
        "ddim7_eta0_leading": timesteps.leading,
        "dpmpp2_20_karras": timesteps.karras,
    }.items():
        theirs = full[f"{run}/timesteps"].astype(int)
        ts = grid(LINEAR, len(theirs))
        np.testing.assert_array_equal(ts, [*(theirs + 1), 0], err_msg=run)


def test_times_that_round_to_one_are_made_distinct():
    """As few as possible move: the finest parts fill up from below, the rest stays."""
    # 16 / 25, 9 / 25 and 4 / 25 of 2 would be 1, 1, 0.
    np.testing.assert_array_equal(timesteps.quadratic(chain(2), 2), [2, 1, 0])
    # 5 (i / 5)^2 = 0.2, 0.8, 1.8, 3.2: there is room for each time only once.
    np.testing.assert_array_equal(timesteps.quadratic(chain(5), 5), [5, 4, 3, 2, 1, 0])
    # 20 (i / 8)^2 = 0.3, 1.25, 2.8, 5, 7.8, 11.25, 15.3.
    np.testing.assert_array_equal(timesteps.quadratic(SHORT, 8), [20, 15, 11, 8, 5, 3, 2, 1, 0])


@pytest.mark.parametrize("name", ["logsnr", "karras"])
def test_pure_noise_has_no_ratio(name):
    p = process.from_betas(schedules.SCHEDULES["jsd"](20, 0, 0))
    with pytest.raises(ValueError, match="ends in pure noise"):
        GRIDS[name](p, 5)


def test_given():
    for ts in ([20, 7, 1, 0], (1, 7, 20), np.array([7, 20, 1])):
        ours = timesteps.explicit(SHORT, ts)
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, [20, 7, 1, 0])


@pytest.mark.parametrize("ts", [[], [0], [21, 3, 0], [-1, 3], [3, 3, 0], [2.5, 1.0], [True]])
def test_given_is_checked(ts):
    with pytest.raises(ValueError, match=r"distinct integers in 1\.\.20"):
        timesteps.explicit(SHORT, ts)




def test_levels_at_the_times_are_the_chain():
    q = process.at_levels(LINEAR, LINEAR.alpha_bar[1:])
    np.testing.assert_array_equal(q.alpha_bar, LINEAR.alpha_bar)
    np.testing.assert_allclose(q.model_t, LINEAR.model_t, atol=1e-9)


def test_levels_between_the_times():
    """Half way in the logarithm of sigma / alpha is half way in time; outside, the nearest time."""
    odds = (1 - SHORT.alpha_bar[1:]) / SHORT.alpha_bar[1:]
    between = np.sqrt(odds[:-1] * odds[1:])
    q = process.at_levels(SHORT, 1 / (1 + between))
    np.testing.assert_allclose(q.model_t, [-1, *np.arange(0.5, 19)], atol=1e-12)
    assert q.T == 19 and q.alpha_bar[0] == 1
    q = process.at_levels(SHORT, 1 / (1 + np.array([odds[0] / 2, 2 * odds[-1]])))
    np.testing.assert_array_equal(q.model_t, [-1, 0, 19])


@pytest.mark.parametrize(
    "alpha_bar", [[], [0.5, 0.5], [0.2, 0.5], [1.0, 0.5], [0.5, 0.0], [[0.5]], 0.5, [np.nan]]
)
def test_levels_are_checked(alpha_bar):
    with pytest.raises(ValueError, match=r"alpha_bar: expected falling numbers in \(0, 1\)"):
        process.at_levels(SHORT, alpha_bar)


def test_steps_in_log_snr():
    """Neighbours of a long chain, float32: most digits, where lambda's own difference has four."""
    odds = LINEAR.alpha_bar[1:] / (1 - LINEAR.alpha_bar[1:])
    wanted = np.log(odds[:-1] / odds[1:]) / 2
    t = jnp.arange(2, 1001)
    # The two parts of lambda, up to 5, are rounded to 1e-7 of 1e-7: what is left is the sum's.
    np.testing.assert_allclose(process.log_snr_step(LINEAR, t, t - 1), wanted, rtol=1e-6)
    assert process.log_snr_step(LINEAR, jnp.asarray(1), jnp.asarray(0)) == np.inf
