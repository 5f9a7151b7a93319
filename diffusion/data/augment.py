"""Which images a step sees, and how: functions of (key, step) alone, for any set of n images.

Every epoch is one random order of all images, read on without a gap. An order is never stored: it
is a bijection of 0..n-1 that is evaluated at the places of a batch, on the device inside the step
or, with the same numbers, by NumPy on the host. So resuming needs the step's number and no more.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

# 8 rounds on at least 2 x 4 bits: with fewer of either, the orders of the smallest sets are seen to
# be unevenly likely.
ROUNDS, MIN_BITS = 8, 4


def shuffled(key: Array, i: Array, n: int) -> Array:
    """What stands at the places i (uint32[...] in 0..n-1) of the random order named by key.

    A bijection of 0..n-1 for any n in 1..2^31-1, computed point by point: no order is stored.
    """
    if not 1 <= n < 2**31:
        raise ValueError(f"n: expected 1..2^31-1, found {n}")
    return walk(random.bits(key, (ROUNDS,), jnp.uint32), i, jnp.uint32(n), half_bits(n))


def walk(keys: Array, i: Array, n: Array, bits: int) -> Array:
    """A Feistel network permutes 0..4^bits-1; what falls outside 0..n-1 goes through it again.

    Until it falls inside, as it must, being on a cycle that began inside (cycle walking: Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). n: uint32[] up to 4^bits.
    """

    def again(x):
        return jnp.where(x < n, x, feistel(keys, x, bits))

    return jax.lax.while_loop(lambda x: jnp.any(x >= n), again, feistel(keys, i, bits))


def half_bits(n: int) -> int:
    """The smallest number, 4 or more, such that 4^half_bits >= n.

    For n > 64 then a pass through the network ends inside 0..n-1 more than one time in four.
    """
    return max(MIN_BITS, ((n - 1).bit_length() + 1) // 2)


def feistel(keys: Array, x: Array, bits: int) -> Array:
    """A bijection of 0..4^bits-1, at x. keys: uint32[rounds]; x: uint32[...]; NumPy's or JAX's.

    Only 32-bit arithmetic that wraps around, so that both give the same numbers.
    """
    mask = np.uint32(2**bits - 1)
    left, right = x >> np.uint32(bits), x & mask
    for k in keys:
        left, right = right, left ^ (_mixed(right ^ k) & mask)
    return (left << np.uint32(bits)) | right


def _mixed(x: Array) -> Array:
    """MurmurHash3's finaliser (Appleby, public domain): every bit depends on all."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def positions(step: Array, batch_size: int, n: int) -> tuple[Array, Array]:
    """Where the batch of a step lies: divmod(step * batch_size + arange(batch_size), n).

    Returns (epoch modulo 2^32, place in the epoch), uint32[b] each; exact for every step < 2^31,
    batch_size < 2^20, n < 2^31, where the product does not fit in the 32 bits that there are.
    """
    if not (1 <= batch_size < 2**20 and 1 <= n < 2**31):
        wanted = "batch_size in 1..2^20-1 and n in 1..2^31-1"
        raise ValueError(f"expected {wanted}, found {batch_size} and {n}")
    step = jnp.asarray(step).astype(jnp.uint32)
    n_, q_b, r_b = (jnp.uint32(x) for x in (n, batch_size // n, batch_size % n))

    def carried(q, r):  # r < 2 n < 2^32
        over = (r >= n_).astype(jnp.uint32)
        return q + over, r - over * n_

    q, r = jnp.uint32(0), jnp.uint32(0)  # the product is q n + r, made bit by bit from the top
    for k in reversed(range(31)):
        bit = (step >> np.uint32(k)) & np.uint32(1)
        q, r = carried(2 * q, 2 * r)
        q, r = carried(q + bit * q_b, r + bit * r_b)
    place = r + jnp.arange(batch_size, dtype=jnp.uint32)
    return q + place // n_, place % n_


def batch_indices(key: Array, step: Array, batch_size: int, n: int) -> Array:
    """Which of n images a step takes, uint32[b] in 0..n-1, at any step < 2^31.

    key: that of the data's order and flips. A batch may begin in one epoch and end in the next.
    Raises ValueError for sizes that `positions` refuses.
    """
    key_order, _ = random.split(key)
    epoch, place = positions(step, batch_size, n)
    order = jax.vmap(lambda e, i: shuffled(random.fold_in(key_order, e), i, n))
    return order(epoch, place)


def gather_batch(
    image: Array,
    label: Array,
    index: Array,
    key: Array,
    step: Array,
    flip: bool,
    shape: tuple[int, int, int],
) -> tuple[Array, Array]:
    """(x_0 float32[b, h, w, c] in [-1, 1], label int32[b]) at `index` of a set on the device.

    image uint8[n, h * w * c], label int32[n]: the whole set, an image a row. Of another shape, a
    TPU would copy all of it before it takes a few. index: what is `chosen` with this key and step.
    flip: see `augment`. shape: (h, w, c). To be called inside a compiled step. Raises ValueError
    for other arrays.
    """
    rows = (*label.shape, math.prod(shape))
    if image.dtype != jnp.uint8 or image.shape != rows or label.ndim != 1:
        found = f"{image.dtype}{list(image.shape)} and {label.dtype}{list(label.shape)}"
        wanted = f"image uint8[n, {rows[-1]}] and label int32[n]"
        raise ValueError(f"expected {wanted}, found {found}")
    return augment(image[index].reshape(-1, *shape), key, step, flip), label[index]


def augment(image: Array, key: Array, step: Array, flip: bool) -> Array:
    """uint8[b, h, w, c], the images of a step -> x_0 float32[b, h, w, c] in [-1, 1].

    flip: each is mirrored left to right with probability 1/2, anew at every visit (the official
    code's random_flip_left_right).
    """
    if flip:
        _, key_flip = random.split(key)
        mirrored = random.bernoulli(random.fold_in(key_flip, step), shape=image.shape[:1])
        image = jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
    return scale(image)


def epoch_words(key: Array, first: int, last: int) -> np.ndarray:
    """What names the orders of the epochs first..last on the host: uint32[epochs, ROUNDS].

    key: the one that `chosen` is given. It takes JAX to make them and NumPy to use them.
    """
    key_order, _ = random.split(key)
    word = jax.vmap(lambda e: random.bits(random.fold_in(key_order, e), (ROUNDS,), jnp.uint32))
    return np.asarray(jax.jit(word)(jnp.arange(first, last + 1).astype(jnp.uint32)))


def indices(words: np.ndarray, first: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """What is `chosen` at a step, int64[b], without JAX.

    words: of the epochs from `first` on. Host integers of 64 bits: exact wherever `positions` is.
    """
    epoch, place = np.divmod(step * batch_size + np.arange(batch_size, dtype=np.int64), n)
    pass_once = functools.partial(feistel, words[epoch - first].T, bits=half_bits(n))
    x = pass_once(place.astype(np.uint32))
    while (x >= n).any():
        x = np.where(x < n, x, pass_once(x))
    return x.astype(np.int64)


def scale(image: Array) -> Array:
    """uint8[...] -> float32[...] in [-1, 1], exactly -1 at 0 and 1 at 255."""
    return image.astype(jnp.float32) / 127.5 - 1


def unscale(x: Array) -> Array:
    """float[...] -> uint8[...]: the nearest level, of what lies outside [-1, 1] the end.

    The official code truncates (utils.unnormalize_data and a cast), and so gives 63 of the 256
    levels one too low; this one undoes `scale` exactly.
    """
    return jnp.clip(jnp.rint((x.astype(jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint8)
