"""Shared randomness is the same everywhere, and what is sent has the law of q."""

import jax
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from diffusion.codec import channel

# Salmon et al. 2011, the known answers of their library Random123 (kat_vectors): key, counter, out.
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("key, counter, out", KNOWN)
def test_threefry_gives_the_known_answers(key, counter, out):
    words = [tuple(np.array([w], np.uint32) for w in pair) for pair in (key, counter)]
    assert tuple(int(w[0]) for w in channel.threefry(*words)) == out


def test_threefry_is_that_of_jax():
    key, counter = np.random.default_rng(0).integers(0, 2**32, (2, 50, 2), np.uint32)
    for k, c in zip(key, counter, strict=True):
        ours = channel.threefry((k[:1], k[1:]), (c[:1], c[1:]))
        np.testing.assert_array_equal(np.concatenate(ours), threefry_2x32(k, c))


def test_the_table_is_of_a_standard_normal():
    table = channel.normal_table().astype(np.float64)
    assert table.shape == (2**16,) and np.all(np.diff(table) >= 0)
    np.testing.assert_array_equal(table, -table[::-1])
    moments = [np.mean(table**n) for n in (2, 4, 6)]
    np.testing.assert_allclose(moments, [1, 3, 15], rtol=2e-3)


def test_numbers_are_normal_and_independent():
    z = channel.normals(7, (3, channel.POOL), np.arange(300), 101)
    assert z.shape == (300, 101)
    assert abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.03
    correlations = np.corrcoef(z.T) - np.eye(101)
    assert np.abs(correlations).max() < 5 / np.sqrt(300)


def test_numbers_depend_on_their_place_alone():
    z = channel.normals(7, (3, channel.POOL), np.arange(9), 40)
    few = channel.normals(7, (3, channel.POOL), np.array([5, 2]), 13)
    np.testing.assert_array_equal(few, z[[5, 2], :13])
    for other in (
        channel.normals(8, (3, 0), np.arange(9), 40),
        channel.normals(7, (4, 0), np.arange(9), 40),
    ):
        assert abs(np.corrcoef(z.ravel(), other.ravel())[0, 1]) < 0.2


@pytest.mark.parametrize("n, chunks", [(1, 1), (12, 12), (12, 5), (100, 7), (64, 1)])
def test_every_dimension_is_dealt_once(n, chunks):
    dealt = channel.deal(3, 2, 1, n, chunks)
    inside = dealt.dims >= 0
    np.testing.assert_array_equal(np.sort(dealt.dims[inside]), np.arange(n))
    sizes = inside.sum(1)
    assert len(sizes) == chunks and np.ptp(sizes) <= 1
    np.testing.assert_array_equal(np.abs(dealt.signs), inside)


def test_groups_and_steps_are_dealt_differently():
    deals = [channel.deal(3, step, group, 64, 4).dims for step in (1, 2) for group in (0, 1)]
    for i, one in enumerate(deals):
        assert all(np.mean(one == other) < 0.2 for other in deals[:i])


def send(bits, size, ratio=1.0, chunks=64, seed=0):
    """Sends a shift that holds `bits` a chunk; returns (shift, z, indices).

    With a ratio, shifts are such that the variance of p is the best one.
    """
    width = 40 if ratio == 1 else round(bits / -np.log2(ratio))
    n = chunks * width
    direction = np.random.default_rng(seed).standard_normal((chunks, width))
    if ratio == 1:  # |shift|^2 = 2 ln(2) bits in every chunk
        direction *= np.sqrt(2 * np.log(2) * bits / (direction**2).sum(1, keepdims=True))
    else:
        direction *= np.sqrt(1 - ratio**2)
    dealt = channel.deal(seed, 1, 0, n, chunks)
    shift = np.zeros(n, np.float32)
    shift[dealt.dims] = direction
    args = seed, 1, [dealt], [shift], ratio, np.full(chunks, size), jax.random.key(seed)
    indices = channel.chosen(*args)
    return shift, channel.received(seed, 1, dealt, indices), indices


@pytest.mark.parametrize("bits, ratio", [(6, 1.0), (8, 1.0), (8, 0.9), (3, 0.97)])
def test_what_is_sent_has_the_law_of_q(bits, ratio):
    """Of endless lists; here they are 2^7 times as long as what they hold."""
    each = [send(bits, bits + 7, ratio, seed=seed) for seed in range(3)]
    shift, z, indices = (np.concatenate(parts) for parts in zip(*each, strict=True))
    n = shift.size
    bias = np.sum((z - shift) * shift) / np.sum(shift**2)
    assert abs(bias) < 4 / np.sqrt(np.sum(shift**2))
    assert abs(np.var(z - shift) / ratio**2 - 1) < 5 * np.sqrt(2 / n)
    # Li and El Gamal 2018: E[log2(k)] is at most KL + log2(e) / e.
    if ratio == 1:
        assert np.log2(indices + 1).mean() < bits + np.log2(np.e) / np.e + 0.5


@pytest.mark.parametrize("bits", [8, 11, 14])
def test_lists_that_end_take_variance_from_one_direction_only(bits):
    """Of lists 2^4 times as long as what they hold: the mean and all other directions are q's."""
    chunks = 256
    shift, z, _ = send(bits, bits + 4, chunks=chunks)
    dims = channel.deal(0, 1, 0, len(shift), chunks).dims
    unit = shift[dims] / np.linalg.norm(shift[dims], axis=1, keepdims=True)
    noise = z[dims] - shift[dims]
    along = np.sum(noise * unit, 1)
    across = noise - along[:, None] * unit
    assert abs(along.mean()) < 4 / np.sqrt(chunks) and 0.05 < np.var(along) < 0.6
    n = across.size * 39 / 40  # one of a chunk's 40 dimensions is taken out
    assert abs(np.sum(across**2) / n - 1) < 5 * np.sqrt(2 / n)


@pytest.mark.parametrize("bits, ratio", [(8, 0.95), (8, 0.85), (10, 0.9)])
def test_the_mean_is_right_where_q_is_narrower_than_p(bits, ratio):
    shift, z, _ = send(bits, bits + 4, ratio, chunks=1500)
    bias = np.sum((z - shift) * shift) / np.sum(shift**2)
    assert abs(bias) < 3 * ratio / np.sqrt(np.sum(shift**2))


def best_of_a_list(shift, size, tau, n):
    """Returns n draws of z of arg min tau log T_k - shift z_k, by brute force."""
    rng, found = np.random.default_rng(size), []
    for _ in range(n):
        z, arrivals = rng.standard_normal(2**size), np.cumsum(rng.exponential(size=2**size))
        found.append(z[np.argmin(tau * np.log(arrivals) - shift * z)])
    return np.array(found)


@pytest.mark.parametrize("bits, size", [(3, 7), (5, 12), (8, 12), (10, 14)])
def test_the_temperature_makes_the_mean_right(bits, size):
    """At tau = 1 a list of 2^4 times as many candidates falls short of it by 5 % or more."""
    shift, n = np.sqrt(2 * np.log(2) * bits), 3000
    tau = channel.temperature(bits, size)
    assert 0.1 < tau < 1
    z = best_of_a_list(shift, size, tau, n)
    assert abs(z.mean() - shift) < 4 * z.std() / np.sqrt(n) + 0.02
    if size - bits == 4:
        assert best_of_a_list(shift, size, 1.0, n).mean() < 0.95 * shift


def test_lists_too_short_for_the_mean_are_used_to_their_end():
    assert channel.temperature(6.0, 5) == pytest.approx(channel.LEAST_TAU)
    assert channel.temperature(0.1, 5) > 0.95


def test_chunks_of_different_groups_are_chosen_together():
    """A group's indices have the same law beside other groups: here the same sent shift."""
    deals = [
        channel.deal(0, 1, group, n, chunks) for group, (n, chunks) in enumerate([(90, 3), (25, 2)])
    ]
    shifts = [np.full(n, 0.4, np.float32) for n in (90, 25)]
    sizes = np.array([9, 9, 8, 7, 6])
    indices = channel.chosen(0, 1, deals, shifts, 1.0, sizes, jax.random.key(0))
    assert indices.shape == (5,) and np.all(indices < 2**sizes - 1) and np.all(indices >= 0)
    z = [channel.received(0, 1, d, k) for d, k in zip(deals, np.split(indices, [3]), strict=True)]
    assert [len(part) for part in z] == [90, 25]
    assert np.mean(np.concatenate(z)) > 0.15  # unselected candidates have a mean of 0 +- 0.09
