"""Sending a sample of q with about KL(q || p) bits to one who knows p: channel simulation.

Encoder and decoder share candidates z_1, z_2, ... ~ N(0, I); the encoder sends the index of one,
chosen such that mean_p + std_p z is distributed as q. This is the Poisson functional
representation (Li and El Gamal 2018, arXiv:1701.02827), as DiffC uses it for diffusion models
(Theis et al. 2022, arXiv:2206.08889; Vonderfecht and Liu 2025, arXiv:2501.09815): the dimensions
of a step are dealt to chunks of a few bits each.

All that is shared follows from a seed by integer arithmetic and one stored table, so that candidate
k of a chunk is the same number on every machine. The chunks of a step share one pool of candidates,
each with signs of its own: their scores are then one matrix product.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from scipy.special import ndtr, ndtri

TABLE_BITS, TABLE_CRC = 16, 0xEE8F8A03
POOL, DEAL, NOISE = range(3)  # what a stream of random words is for
PER_WORDS = 4  # normal numbers of one call of threefry
BLOCK_NUMBERS = 2**21  # of the pool in memory at a time
EXACT = 2**12  # candidates whose arrivals are drawn
LEAST_TAU = 0.1  # of lists that are too short for q's mean whatever tau is
CHUNKS = 1024  # chunks whose scores are in memory at a time
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def threefry(key: tuple, counter: tuple) -> tuple:
    """Returns two words uint32[...] of Threefry-2x32 with 20 rounds (Salmon et al. 2011).

    key and counter: two words each, uint32 arrays of NumPy or JAX that broadcast.
    """
    a, b = key
    keys = (a, b, a ^ b ^ np.uint32(0x1BD11BDA))
    x, y = counter[0] + a, counter[1] + b
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            x = x + y
            y = (y << np.uint32(distance)) | (y >> np.uint32(32 - distance))
            y = x ^ y
        x = x + keys[(i + 1) % 3]
        y = y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


@functools.cache
def normal_table() -> np.ndarray:
    """Returns the quantiles of N(0, 1) at (i + 1/2) / 2^16, float32[2^16], in units of 2^-12.

    Their variance is 0.99998. Raises RuntimeError should SciPy compute other ones.
    """
    halves = np.round(ndtri((np.arange(2**15) + 0.5) / 2**16) * 2**12).astype("<i2")
    if google_crc32c.value(halves.tobytes()) != TABLE_CRC:
        raise RuntimeError("the table of normal quantiles differs from that of the file format")
    return np.concatenate([halves, -halves[::-1]]).astype(np.float32) / 2**12


def words(seed: int, stream: tuple[int, int], row: Any, column: Any) -> tuple:
    """Returns two random words uint32[...] at (row, column), which broadcast.

    stream: (number of the step, POOL, DEAL or NOISE).
    """
    key = np.array([[seed], [stream[0] * 4 + stream[1]]], np.uint32)
    return threefry((key[0], key[1]), (row, column))


def _normals_of(pair: tuple, table: Any) -> list:
    """Returns four normal numbers of two words."""
    low = np.uint32(2**TABLE_BITS - 1)
    return [table[half] for word in pair for half in (word & low, word >> np.uint32(16))]


def normals(seed: int, stream: tuple[int, int], rows: np.ndarray, n: int) -> np.ndarray:
    """Returns the first n normal numbers of each row, float32[len(rows), n]."""
    columns = np.arange(-(-n // PER_WORDS), dtype=np.uint32)
    pair = words(seed, stream, rows.astype(np.uint32)[:, None], columns)
    found = np.stack(_normals_of(pair, normal_table()), axis=-1)
    return found.reshape(len(rows), -1)[:, :n]


class Deal(NamedTuple):
    """Which dimensions of a group are in which chunk of a step, and with which sign.

    Attributes:
        dims: int32[chunks, width], numbers of dimensions; -1 beyond the end of a chunk.
        signs: float32[chunks, width], 1 or -1, and 0 beyond the end.
    """

    dims: np.ndarray
    signs: np.ndarray


def deal(seed: int, step: int, group: int, n: int, chunks: int) -> Deal:
    """Deals n dimensions to chunks of equal size, up to one, in an order that the seed gives."""
    column = np.arange(n, dtype=np.uint32)
    rank, coin = words(seed, (step, DEAL), np.full(1, group, np.uint32), column)
    width = -(-n // chunks)
    dims = np.full(chunks * width, -1, np.int32)
    place = np.arange(n)  # a chunk takes each chunks-th dimension of the order
    dims[place % chunks * width + place // chunks] = np.argsort(rank, kind="stable")
    signs = np.where(dims < 0, 0, 1 - 2 * (coin[dims] & 1).astype(np.float32))
    shape = chunks, width
    return Deal(dims.reshape(shape), signs.astype(np.float32).reshape(shape))


def received(seed: int, step: int, dealt: Deal, indices: np.ndarray) -> np.ndarray:
    """Returns z float32[n] of the candidates int[chunks] that were sent."""
    z = normals(seed, (step, POOL), indices, dealt.dims.shape[1]) * dealt.signs
    inside = dealt.dims >= 0
    out = np.empty(inside.sum(), np.float32)
    out[dealt.dims[inside]] = z[inside]
    return out


def kl_bits(shift: np.ndarray, ratio: float) -> float:
    """Returns KL(N(shift, ratio^2) || N(0, 1)) in bits, over all dimensions."""
    squares = np.sum(shift.astype(np.float64) ** 2) + shift.size * (ratio**2 - 1)
    return float(0.5 * squares / np.log(2) - shift.size * np.log2(ratio))


def chosen(
    seed: int,
    step: int,
    deals: Sequence[Deal],
    shifts: Sequence[np.ndarray],
    ratio: float,
    sizes: np.ndarray,
    key: Array,
) -> np.ndarray:
    """Chooses a candidate of each chunk, int64[chunks of all groups].

    Its z has the mean of N(shift, ratio^2 I), and the longer the lists of candidates are, the
    nearer it is to that law.

    Args:
        seed: of the candidates.
        step: the number of the step, another pool for each.
        deals: the chunks of each group.
        shifts: (mean_q - mean_p) / std_p of each group, float32[n].
        ratio: std_q / std_p, at most 1.
        sizes: int[chunks], log2 of the numbers of candidates.
        key: of the encoder's own randomness.
    """
    widths = np.concatenate([(d.dims >= 0).sum(1) for d in deals])
    wide = _round_up(int(widths.max()), PER_WORDS)
    linear, tau = np.zeros((len(widths), wide), np.float32), np.zeros(len(widths), np.float32)
    row = 0
    for dealt, shift in zip(deals, shifts, strict=True):
        rows, columns = dealt.dims.shape
        part = slice(row, row := row + rows)
        linear[part, :columns] = dealt.signs * shift[dealt.dims] / ratio**2
        bits = max(round(kl_bits(shift, ratio) / rows, 1), 0.1)
        tau[part] = [temperature(bits, int(size)) for size in sizes[part]]
    curvature = np.float32(0.5 * (1 / ratio**2 - 1))
    stream, table = np.array([seed, step * 4 + POOL], np.uint32), jnp.asarray(normal_table())
    block = min(1 << int(math.log2(BLOCK_NUMBERS / wide)), 1 << int(max(sizes)), EXACT)
    parts = []
    for first in range(0, len(widths), CHUNKS):
        rows = min(CHUNKS, len(widths) - first)
        pad = (0, _round_up(rows, 1) - rows)
        part = slice(first, first + rows)
        kinds, which = np.unique(widths[part], return_inverse=True)
        inside = np.arange(wide) < kinds[:, None]
        args = (
            np.pad(linear[part], (pad, (0, 0))),
            np.pad(inside * curvature, ((0, _round_up(len(kinds), 1) - len(kinds)), (0, 0))),
            np.pad(which, pad).astype(np.int32),
            np.pad((1 << sizes[part]) - 1, pad).astype(np.int32),
            np.pad(tau[part], pad),
        )
        found = _choose(stream, random.fold_in(key, first), *args, table, block)
        parts.append(np.asarray(found)[:rows].astype(np.int64))
    return np.concatenate(parts)


@functools.cache
def temperature(bits: float, size: int) -> float:
    """Returns the tau with which z has q's mean, where KL(q || p) = bits, of 2^size candidates.

    The best of endless lists has it at tau = 1; lists that end fall short of it, and a lower tau
    makes up for that by larger indices. The law of the best is that of a Poisson process of points
    (T, z) in one dimension, where q is p shifted by so many bits.
    """
    shift = math.sqrt(2 * math.log(2) * bits)
    log_t, z = np.arange(-6, size * math.log(2), 0.1), np.arange(-5, shift + 5, 0.1)[:, None]
    intensity = np.exp(log_t) * 0.1

    def mean(tau):
        value = np.linspace(shift * z[0, 0] - tau * log_t[-1], shift * z[-1, 0] + 6 * tau, 200)
        better = ndtr(-(value[:, None] + tau * log_t) / shift) @ intensity
        none_is = np.exp(-np.interp(shift * z - tau * log_t, value, better))
        mass = np.exp(-0.5 * z**2) * intensity * none_is
        return np.sum(z * mass) / np.sum(mass)

    low, high = LEAST_TAU, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > shift else (low, middle)
    return low


def _round_up(n: int, least: int) -> int:
    """Returns the next number of the form 2^k or 1.5 2^k, so that few shapes are compiled."""
    power = least
    while power < n:
        power *= 2
    three_quarters = 3 * power // 4
    return three_quarters if n <= three_quarters and three_quarters % least == 0 else power


@functools.partial(jax.jit, static_argnames="block")
def _choose(stream, key, linear, quadratic, kind, limits, tau, table, block):
    """Returns arg min over k of tau log T_k - log(q / p)(z_k), T_k arrivals of a Poisson process.

    log(q / p)(z) = linear z - quadratic z^2 + constant, with the row quadratic[kind] of a chunk.
    """
    chunks, wide = linear.shape
    columns = jnp.arange(wide // PER_WORDS, dtype=jnp.uint32)
    # All first numbers of a call of threefry, then all second ones: three times as fast.
    linear, quadratic = (
        a.reshape(len(a), -1, PER_WORDS).swapaxes(1, 2).reshape(a.shape)
        for a in (linear, quadratic)
    )
    # Later arrivals are taken to come one by one: that is so within 1 / sqrt(k) of each.
    first = jnp.cumsum(random.exponential(key, (chunks, EXACT), jnp.float32), axis=1)

    def body(i, carry):
        best, index = carry
        k = (i * block + jnp.arange(block, dtype=jnp.int32))[None]
        rows = k.astype(jnp.uint32).T
        pair = threefry((stream[:1, None], stream[1:, None]), (rows, columns[None]))
        z = jnp.concatenate(_normals_of(pair, table), axis=1)
        scores = jnp.dot(linear, z.T, precision="highest")
        scores -= jnp.dot(quadratic, (z * z).T, precision="highest")[kind]
        early = lax.dynamic_slice_in_dim(first, jnp.minimum(i * block, EXACT - block), block, 1)
        late = first[:, -1:] + (k - EXACT + 1).astype(first.dtype)
        times = jnp.where(k < EXACT, early, late)
        value = jnp.where(k < limits[:, None], tau[:, None] * jnp.log(times) - scores, jnp.inf)
        least = value.min(1)  # a minimum and where it is are four times as fast as argmin
        here = jnp.where(value == least[:, None], k, limits[:, None]).min(1)
        better = least < best
        index = jnp.where(better, here, index)
        return jnp.where(better, least, best), index

    start = jnp.full(chunks, jnp.inf, jnp.float32), jnp.zeros(chunks, jnp.int32)
    blocks = -(-limits.max() // block)
    return lax.fori_loop(jnp.int32(0), blocks, body, start)[1]
