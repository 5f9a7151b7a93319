"""Tests how times are drawn: improved-diffusion's history, closed forms, and a plain deque."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules, timestep_samplers
from diffusion.timestep_samplers import TIMESTEP_SAMPLERS, LossHistory
from tests.oracle import official


def chain(T):
    return process.from_betas(schedules.linear(T, 1e-3, 0.4))


SHORT = chain(4)
n = timestep_samplers.HISTORY


def full(losses):
    """The history of losses [T] that were the same each time."""
    losses = jnp.asarray(losses)
    return LossHistory(jnp.repeat(losses[:, None], n, 1), jnp.full(len(losses), n))


@official(
    "iddpm",
    *("lsm.weights", "lsm.warmed_up", "lsm.counts", "lsm.p", "lsm.importance", "lsm.history"),
    "lsm.uniform_weights",
)
def test_official_history(official, x64):
    """improved-diffusion's LossSecondMomentResampler, fed batch after batch.

    Its weights are 1 until all losses are known, and then the probabilities; it counts to 10.
    """
    p = chain(int(official["lsm.T"]))
    assert (n, timestep_samplers.UNIFORM_SHARE) == (
        official["lsm.history_per_term"],
        official["lsm.uniform_prob"],
    )
    sampler = TIMESTEP_SAMPLERS["importance"](p)
    update, history, size = jax.jit(sampler.update), sampler.init(), int(official["lsm.batch"])
    batches = [jnp.asarray(official[key]).reshape(-1, size) for key in ("lsm.ts", "lsm.losses")]
    at_first = p.T * timestep_samplers.importance_probabilities(history)
    official.close("lsm.uniform_weights", at_first, rtol=1e-15)
    found = collections.defaultdict(list)
    for i in range(len(batches[0]) + 1):
        if i:
            history = update(history, batches[0][i - 1] + 1, batches[1][i - 1])
        chances = timestep_samplers.importance_probabilities(history)
        warm = bool(jnp.all(history.counts >= n))
        drawn = chances[official["lsm.sample_idx"]]
        found["weights"].append(chances if warm else p.T * chances)
        found["warmed_up"].append(warm)
        found["counts"].append(jnp.minimum(history.counts, n))
        found["p"].append(chances)
        found["importance"].append(1 / (p.T * drawn))
    for name, rows in found.items():
        official.close(f"lsm.{name}", np.array(rows), rtol=3e-7 if name == "importance" else 1e-14)
    # Theirs begins with the oldest, ours goes round.
    rows = zip(np.asarray(history.losses), history.counts, strict=True)
    oldest_first = [np.roll(row, -int(count)) for row, count in rows]
    official.close("lsm.history", np.array(oldest_first), rtol=1e-15)


def test_the_history_is_a_deque_for_each_time():
    """Batches of any times, of one time more often than it remembers among them."""
    p, rng = chain(5), np.random.default_rng(0)
    sampler = TIMESTEP_SAMPLERS["importance"](p)
    update, history = jax.jit(sampler.update), sampler.init()
    plain, counts = [collections.deque(maxlen=n) for _ in range(p.T)], np.zeros(p.T, int)
    for i in range(12):
        t = rng.integers(1, p.T + 1, 24)
        if i % 3 == 1:
            t[: n + 4] = 2  # more than it remembers, and twice round the ring with the rest
        loss = rng.random(len(t)).astype(np.float32)
        history = update(history, jnp.asarray(t), jnp.asarray(loss))
        for time, value in zip(t, loss, strict=True):
            plain[time - 1].append(value)
            counts[time - 1] += 1
        np.testing.assert_array_equal(history.counts, counts)
        for row, count, expected in zip(history.losses, counts, plain, strict=True):
            oldest_first = np.roll(row, -int(count)) if count >= n else row[:count]
            np.testing.assert_array_equal(oldest_first, expected)


def test_times_are_drawn_by_the_size_of_their_losses():
    """p_t is L_t over their sum, but for the share that is uniform; 1 / T until all are full."""
    losses = np.array([0.5, 2.0, 0.1, 1.4], np.float32)
    share = timestep_samplers.UNIFORM_SHARE
    wanted = (1 - share) * losses / losses.sum() + share / 4
    known = full(losses)
    found = timestep_samplers.importance_probabilities(known)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    partly = known._replace(counts=known.counts.at[2].set(n - 1))
    found = timestep_samplers.importance_probabilities(partly)
    np.testing.assert_array_equal(found, np.full(4, 0.25, np.float32))
    t, weight = TIMESTEP_SAMPLERS["importance"](SHORT).draw(random.key(0), 40_000, known)
    share = np.bincount(t, minlength=5)[1:] / 40_000
    # One fixed draw: within five standard errors.
    assert np.all(np.abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / 40_000))
    np.testing.assert_allclose(weight, 1 / (4 * wanted[np.asarray(t) - 1]), rtol=1e-6)


def test_importance_does_not_change_the_objective_and_lessens_its_noise():
    """Exact sums over t: the weighted loss has the uniform one's mean, and a smaller variance."""
    known = np.array([0.01, 0.1, 3.0, 0.3])
    chances = np.asarray(timestep_samplers.importance_probabilities(full(np.float32(known))))
    chances = np.float64(chances)
    for losses in (known, known[::-1]):  # also where the history is of no use
        weighted = losses / (4 * chances)
        np.testing.assert_allclose((chances * weighted).sum(), losses.mean(), rtol=1e-6)
    variance = (chances * (known / (4 * chances) - known.mean()) ** 2).sum()
    assert variance < 1e-4 * known.var()


@pytest.mark.parametrize("T, b", [(1, 3), (7, 16), (20, 5), (1000, 128)])
def test_low_discrepancy(T, b):
    """A time is in each batch floor(b / T) or ceil(b / T) times, b / T in the mean.

    Where b divides T the times of a batch are T / b apart, so that their mean is uniform on T / b
    numbers; that of independent times has a variance of (T^2 - 1) / 12 b.
    """
    sampler, batches = TIMESTEP_SAMPLERS["low_discrepancy"](chain(T)), 2_000
    draw = jax.vmap(lambda key: sampler.draw(key, b, ()))
    t, weight = jax.jit(draw)(random.split(random.key(0), batches))
    t = np.asarray(t)
    assert np.all(weight == 1) and t.shape == (batches, b)
    counts = np.apply_along_axis(np.bincount, 1, t, minlength=T + 1)
    assert counts.shape == (batches, T + 1) and not counts[:, 0].any()
    assert counts[:, 1:].min() >= b // T and counts[:, 1:].max() <= -(-b // T)
    more = b / T - b // T  # the share of batches in which a time is there once more
    error = 5 * np.sqrt(more * (1 - more) / batches)  # one fixed draw
    assert np.all(np.abs(counts[:, 1:].mean(0) - b / T) <= error)
    if T % b == 0 or b % T == 0:
        apart = max(T // b, 1)
        variance = (apart**2 - 1) / 12
        # A uniform variable's sample variance has a relative error of about sqrt(0.8 / n).
        assert abs(t.mean(1).var() - variance) <= 5 * np.sqrt(0.8 / batches) * variance


def test_low_discrepancy_is_shuffled():
    """Microbatches are parts of a batch: the times of each are spread like the batch's."""
    t, _ = TIMESTEP_SAMPLERS["low_discrepancy"](chain(1000)).draw(random.key(0), 1000, ())
    np.testing.assert_array_equal(np.sort(t), np.arange(1, 1001))
    assert abs(np.corrcoef(np.arange(1000), np.asarray(t))[0, 1]) < 5 / np.sqrt(1000)


def test_uniform_times_are_drawn_by_each_loss():
    """So that what is trained without this option is bit for bit as before."""
    assert TIMESTEP_SAMPLERS["uniform"](SHORT) is None
    assert timestep_samplers.draw_times(None, random.key(0), 8, ()) == ()


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_contract(name):
    """Times in 1..T, a weight for each, and a memory of the same shapes after an update."""
    if (sampler := TIMESTEP_SAMPLERS[name](SHORT)) is None:
        return
    state = sampler.init()
    t, weight = timestep_samplers.draw_times(sampler, random.key(0), 16, state)
    assert t.shape == weight.shape == (16,) and t.dtype == jnp.int32
    assert weight.dtype == jnp.float32 and np.all(weight > 0)
    assert set(np.asarray(t)) <= {1, 2, 3, 4}
    after = sampler.update(state, t, jnp.ones(16))
    types = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (state, after)]
    assert types[0] == types[1]
