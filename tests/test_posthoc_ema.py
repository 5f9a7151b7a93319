"""posthoc_ema.py against the authors' program, closed forms, and averages that were tracked.

phema.npz: NVlabs/edm2, commit 4bf8162, training/phema.py, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import posthoc_ema, train_step
from tests import oracle
from tests.oracle import official

FILE = oracle.arrays("phema")
TRACKED = (0.05, 0.1)
# What least squares between 8 snapshots of two lengths leaves of values up to 6, as in phema.npz.
METHOD_ERROR = {0.03: 0.055, 0.05: 2e-5, 0.075: 6e-3, 0.1: 2e-5, 0.15: 1e-2, 0.2: 3e-2}


@official("phema", "std_to_exp", "exp_to_std")
def test_lengths_are_exponents(theirs):
    theirs.close("std_to_exp", [*map(posthoc_ema.gamma_of, theirs["std"])], rtol=5e-14)
    theirs.close("exp_to_std", [*map(posthoc_ema.length_of, theirs["exp"])], rtol=5e-14)


@pytest.mark.parametrize("length", [0.0, -0.1, posthoc_ema.LONGEST, 0.5])
def test_a_length_that_no_profile_has_is_refused(length):
    with pytest.raises(ValueError, match=r"relative length between 0 and 0.2887, .* found"):
        posthoc_ema.gamma_of(length)


@official("phema", "beta.value")
def test_decays_of_the_update(theirs):
    """A step of 512 images at 512 t of them decays as one of 1 at t."""
    rates = [
        posthoc_ema.update_rate(length, theirs["beta.t_next"]) for length in theirs["beta.std"]
    ]
    decays = np.repeat(1 - np.array(rates)[:, None], 2, axis=1)
    theirs.close("beta.value", decays, rtol=5e-14, atol=1e-15)


@official("phema", "resp.value")
def test_profiles_are_powers_of_the_time(theirs):
    """(t / T)^gamma up to T, nothing after it, each divided by its sum."""
    t = np.arange(theirs["resp.len"])[:, None] / theirs["resp.ofs"]
    gammas = np.array([*map(posthoc_ema.gamma_of, theirs["resp.std"])])
    profiles = np.where(t <= 1, t**gammas, 0)
    theirs.close("resp.value", profiles / profiles.sum(0), rtol=5e-13)


@official("phema", "corr.value")
def test_inner_products_of_profiles(theirs):
    gammas = ([*map(posthoc_ema.gamma_of, theirs[f"corr.{x}_std"])] for x in "ab")
    gamma_a, gamma_b = map(np.array, gammas)
    found = posthoc_ema.inner_products(theirs["corr.a_ofs"], gamma_a, theirs["corr.b_ofs"], gamma_b)
    theirs.close("corr.value", found, rtol=5e-13)


def test_inner_products_do_not_overflow():
    """Of gamma = 97 at step 10^6, whose power has 582 digits; the norm is (g+1)^2 / (2g+1) / T."""
    gamma = posthoc_ema.gamma_of(0.01)
    found = posthoc_ema.inner_products(1e6, gamma, 1e6, gamma)
    np.testing.assert_allclose(found, (gamma + 1) ** 2 / (2 * gamma + 1) / 1e6, rtol=1e-14)
    assert posthoc_ema.inner_products(1, gamma, 1e6, gamma) == 0


@official("phema", "solve.*.coefs")
def test_weights_of_snapshots(theirs):
    for i in range(4):
        times, lengths = theirs[f"solve.{i}.in_ofs"], theirs[f"solve.{i}.in_std"]
        at, wanted = theirs[f"solve.{i}.out_ofs"], theirs[f"solve.{i}.out_std"]
        weights = [posthoc_ema.fit(times, lengths, at, length)[0] for length in wanted]
        theirs.close(f"solve.{i}.coefs", np.transpose(weights), atol=1e-11)


def test_the_distance_of_profiles_is_that_of_the_integral():
    """Of two snapshots, by a sum over 400,000 points of [0, T]."""
    weights, distance = posthoc_ema.fit([500, 1000], [0.1, 0.1], 1000, 0.15)
    t = (np.arange(400_000) + 0.5) / 400_000

    def profile(length, end):
        gamma = posthoc_ema.gamma_of(length)
        return np.where(t <= end, (gamma + 1) / end * (np.minimum(t, end) / end) ** gamma, 0)

    made = weights[0] * profile(0.1, 0.5) + weights[1] * profile(0.1, 1.0)
    wanted = profile(0.15, 1.0)
    expected = np.sqrt(np.mean((made - wanted) ** 2) / np.mean(wanted**2))
    np.testing.assert_allclose(distance, expected, rtol=1e-4)
    assert 0.05 < distance < 0.5


def track(theta, lengths, at):
    """Returns the averages [len(at), len(lengths), ...] that training steps keep of theta [T, n].

    The gradient leads the parameters from wherever they are to theta[t - 1] at step t.
    """
    tx = optax.sgd(1.0)
    step = train_step.make_train_step(
        lambda params, key, batch, step: (jax.tree.map(jnp.subtract, params, batch), {}, None),
        tx,
        0.999,
        lengths=lengths,
    )
    state = train_step.create_train_state(jnp.full(theta.shape[1], 7.0), tx, averages=len(lengths))

    def body(state, batch):
        state, _ = step(state, None, batch)
        return state, state.averages

    with jax.numpy_dtype_promotion("standard"):  # optax's step counter
        _, averages = jax.jit(lambda: jax.lax.scan(body, state, jnp.asarray(theta, "float32")))()
    return np.stack(averages, axis=1)[np.asarray(at) - 1]


@official("phema", "e2e.*d_*", "e2e.snap_value", "e2e.reconstructed", "e2e.profile_sum")
def test_reconstruction_end_to_end(theirs):
    """Tracked by training steps in float32, put together, beside averages that were tracked."""
    theta, wanted, at = theirs["e2e.theta"], theirs["e2e.out_std"], int(theirs["e2e.out_t"])
    times, lengths = theirs["e2e.snap_t"], theirs["e2e.snap_std"]
    everything = track(theta[1:], tuple(map(float, wanted)), np.arange(1, at + 1))
    column = [[*wanted].index(length) for length in lengths]
    snapshots = everything[times - 1, column]
    theirs.close("e2e.snap_value", snapshots, atol=2e-5)
    theirs.close("e2e.tracked_directly", everything[-1], atol=2e-5)

    weights = np.stack([posthoc_ema.fit(times, lengths, at, length)[0] for length in wanted], 1)
    made = np.stack(posthoc_ema.combine(weights, snapshots))
    for i, length in enumerate(wanted):
        assert abs(made - theirs["e2e.tracked_directly"])[i].max() < METHOD_ERROR[length]
    for i in (1, 3):  # a length that was tracked, at a step of a snapshot: the snapshot itself
        np.testing.assert_allclose(made[i], everything[-1, i], rtol=0, atol=1e-6)

    exact = np.stack(posthoc_ema.combine(weights, theirs["e2e.snap_value"]))
    theirs.close("e2e.reconstructed", exact, atol=2e-12)
    half = theirs["e2e.snap_value"].astype(np.float16).astype(np.float64)
    theirs.close(
        "e2e.reconstructed_from_float16", np.stack(posthoc_ema.combine(weights, half)), atol=2e-12
    )
    gammas = np.array([*map(posthoc_ema.gamma_of, wanted)])
    profiles = (np.arange(at + 1)[:, None] / at) ** gammas
    theirs.close("e2e.profile_sum", (profiles / profiles.sum(0)).T @ theta, atol=1e-11)


@pytest.mark.parametrize(
    "gamma, expected",
    [(1.0, lambda T: (T + 1) * (4 * T - 1) / (6 * T)), (2.0, lambda T: 0.75 * T + 0.5 - 0.25 / T)],
)
def test_parameters_that_move_linearly_have_their_closed_form(gamma, expected):
    """theta_t = 3 - 2 t, weights (t^(g+1) - (t-1)^(g+1)) / T^(g+1); theta_0 leaves no trace."""
    T, length = 60, posthoc_ema.length_of(gamma)
    theta = 3 - 2 * np.arange(1.0, T + 1)[:, None]
    found = track(theta, (length,), [1, T])
    np.testing.assert_allclose(found[:, 0, 0], [1, 3 - 2 * expected(T)], rtol=2e-6)


def test_combined_snapshots_keep_types_and_are_added_in_float64():
    trees = [{"a": np.full(3, x, np.float32), "b": np.ones((2, 1), np.float32)} for x in (1e8, 1.0)]
    weights = np.array([[1.0, 2.0], [1.0, 0.0], [-1.0, -2.0]])
    first, second = posthoc_ema.combine(weights, iter([*trees, trees[0]]))
    np.testing.assert_array_equal(first["a"], np.ones(3, np.float32))  # float32 would lose it
    assert first["a"].dtype == np.float32 and second["b"].shape == (2, 1)
    np.testing.assert_array_equal(second["b"], np.zeros((2, 1)))
