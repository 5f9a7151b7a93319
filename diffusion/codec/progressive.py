"""Algorithms 3 and 4 of the paper with real bits: x_T, ..., x_t sent step by step, then x_0.

Encoder and decoder run the same loop, so that their x_t are equal: on the host all arithmetic
is elementwise in float32. Whatever was received of a file, the decoder predicts x_0 from the x_t
that it has come to.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array, random

from diffusion.codec import channel, entropy
from diffusion.codec.plan import (
    BITS,
    CRC_BYTES,
    Codec,
    bits_code,
    checksum,
    chunk_sizes,
    expected_code,
    from_pure_noise,
    gaussians,
    levels_to_x0,
)
from diffusion.utils.errors import IntegrityError

PIXELS = 4096  # distributions of pixels in memory at a time
CODE_BITS = 5  # of a place in BITS
NEAR = 2**CODE_BITS // 2  # a group's bits are from 1/4 to 3.7 times the expected ones
MAX_BITS = 64  # of a dimension at one step


def group_sizes(images: int, group: int) -> list[int]:
    """Returns the numbers of images in the groups of so many."""
    return [min(group, images - first) for first in range(0, images, group)]


def initial_noise(codec: Codec, first: int, images: int) -> np.ndarray:
    """Returns x_T float32[images, h, w, c] of the images from number `first` on."""
    numbers = np.arange(first, first + images)
    noise = channel.normals(codec.seed, (0, channel.NOISE), numbers, dimensions(codec))
    return noise.reshape(images, *codec.shape)


def dimensions(codec: Codec) -> int:
    """Returns the number of an image's dimensions."""
    return int(np.prod(codec.shape))


class Group(NamedTuple):
    """A group's chunks at one step: the place in BITS of all its bits, their sizes, the deal."""

    code: int
    sizes: list[int]
    dealt: channel.Deal


def _group(codec: Codec, i: int, number: int, images: int, code: int) -> Group:
    """Returns the chunks of a group of so many images, whose bits are BITS[code]."""
    n = images * dimensions(codec)
    if BITS[code] > MAX_BITS * n:
        raise IntegrityError(f"a step of {BITS[code]} bits does not fit {images} images")
    sizes = chunk_sizes(BITS[code], codec.plan.candidates, codec.plan.padding)
    return Group(code, sizes, channel.deal(codec.seed, i, number, n, len(sizes)))


def _expected(codec: Codec, i: int, images: int) -> int:
    """Returns the place in BITS of what so many images are expected to need at step i."""
    n = images * dimensions(codec)
    return expected_code(from_pure_noise(codec.process), codec.plan, i, n)


def _arrived(codec, i, x, x_0, groups: Sequence[Group], indices) -> np.ndarray:
    """Returns x_s of step i from what was sent of each group."""
    g = gaussians(from_pure_noise(codec.process), codec.plan, i)
    z = [
        channel.received(codec.seed, i, group.dealt, k)
        for group, k in zip(groups, indices, strict=True)
    ]
    return g.mean(x_0, x) + g.std_p * np.concatenate(z).reshape(x.shape)


class Encoded(NamedTuple):
    """Groups as segments, and what they say of the model.

    Attributes:
        segments: [steps + 1][groups] bytes; the last ones are x_0.
        mse: float64[steps + 1], of the x_0 predicted after so many steps, summed over all pixels.
    """

    segments: list[list[bytes]]
    mse: np.ndarray


def encode_groups(codec: Codec, index: np.ndarray, first_group: int, key: Array) -> Encoded:
    """Encodes images int[n, h, w, c] of 0..levels - 1, whose first group has the given number.

    key: of the encoder's own randomness; the file decodes whatever it was.
    """
    x_0 = levels_to_x0(index, codec.levels)
    sizes = group_sizes(len(index), codec.group)
    cuts = np.cumsum(sizes)[:-1]
    steps = len(codec.plan.variances)
    x = initial_noise(codec, first_group * codec.group, len(index))
    segments, mse = [], np.zeros(steps + 1)
    process = from_pure_noise(codec.process)
    for i in range(steps):
        predicted = codec.denoise(x, codec.plan.ts[i])
        mse[i] = np.sum((predicted - x_0) ** 2, dtype=np.float64)
        g = gaussians(process, codec.plan, i)
        shift = (g.mean(x_0, x) - g.mean(predicted, x)) / g.std_p
        ratio = float(g.std_q) / float(g.std_p)
        shifts = [part.ravel() for part in np.split(shift, cuts)]
        groups = []
        for j, (part, images) in enumerate(zip(shifts, sizes, strict=True)):
            code = _expected(codec, i, images)
            code = min(max(bits_code(channel.kl_bits(part, ratio)), code - NEAR), code + NEAR - 1)
            groups.append(_group(codec, i, first_group + j, images, max(code, 0)))
        args = [group.dealt for group in groups], shifts, ratio
        lengths = np.concatenate([np.array(group.sizes) for group in groups])
        found = channel.chosen(codec.seed, i, *args, lengths, random.fold_in(key, i))
        indices = np.split(found, np.cumsum([len(group.sizes) for group in groups])[:-1])
        segments.append([_write_indices(*pair) for pair in zip(groups, indices, strict=True)])
        x = _arrived(codec, i, x, predicted, groups, indices)
    predicted = codec.denoise(x, codec.plan.ts[-1])
    mse[steps] = np.sum((predicted - x_0) ** 2, dtype=np.float64)
    pairs = zip(np.split(index, cuts), np.split(predicted, cuts), strict=True)
    last = [_write_pixels(codec, part, mean) for part, mean in pairs]
    return Encoded([*segments, last], mse)


class FileBound(NamedTuple):
    """What the bound says of images: its terms, and the errors of the predicted x_0.

    Attributes:
        bits: float64[steps + 1], KL(q || p) of each step and -log2 p(x_0 | x_t), in bits.
        mse: float64[steps + 1], of the x_0 predicted after so many steps, summed over all pixels.
    """

    bits: np.ndarray
    mse: np.ndarray


def file_bound(codec: Codec, index: np.ndarray, seed: int) -> FileBound:
    """Returns the bound of images int[n, h, w, c], with one draw of each x_t from q."""
    x_0, steps = levels_to_x0(index, codec.levels), len(codec.plan.variances)
    x, process = initial_noise(codec, 0, len(index)), from_pure_noise(codec.process)
    bits, mse = np.zeros(steps + 1), np.zeros(steps + 1)
    generator = np.random.default_rng(seed)
    for i in range(steps):
        predicted = codec.denoise(x, codec.plan.ts[i])
        mse[i] = np.sum((predicted - x_0) ** 2, dtype=np.float64)
        g = gaussians(process, codec.plan, i)
        mean = g.mean(x_0, x)
        bits[i] = channel.kl_bits(
            (mean - g.mean(predicted, x)) / g.std_p, float(g.std_q) / float(g.std_p)
        )
        x = mean + g.std_q * generator.standard_normal(x.shape, np.float32)
    predicted = codec.denoise(x, codec.plan.ts[-1])
    mse[steps] = np.sum((predicted - x_0) ** 2, dtype=np.float64)
    bits[steps] = pixel_bits(codec, index, predicted)
    return FileBound(bits, mse)


def _write_indices(group: Group, indices: np.ndarray) -> bytes:
    encoder = entropy.RangeEncoder()
    encoder.encode(group.code % 2**CODE_BITS, 1, CODE_BITS)
    for k, size in zip(indices.tolist(), group.sizes, strict=True):
        entropy.encode_index(encoder, k, size)
    return encoder.finish()


def _read_indices(codec, i, number: int, images: int, content: bytes) -> tuple[Group, np.ndarray]:
    decoder = entropy.RangeDecoder(content)
    modulo = decoder.peek(CODE_BITS)
    decoder.advance(modulo, 1, CODE_BITS)
    lowest = _expected(codec, i, images) - NEAR
    # An expectation that another machine rounds otherwise changes nothing but at the range's ends.
    code = lowest + (modulo - lowest) % 2**CODE_BITS
    group = _group(codec, i, number, images, min(max(code, 0), len(BITS) - 1))
    return group, np.array([entropy.decode_index(decoder, size) for size in group.sizes], np.int64)


def _rows(codec: Codec, mean: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the distributions of some pixels at a time, int64[rows, levels + 1]."""
    mean, std = mean.ravel(), float(np.sqrt(codec.plan.decoder))
    for first in range(0, mean.size, PIXELS):
        yield entropy.gaussian_cumulative(mean[first : first + PIXELS], std, codec.levels)


def _intervals(codec, index, mean) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the starts and widths of some pixels at a time, int64[rows]."""
    symbols, first = index.ravel(), 0
    for rows in _rows(codec, mean):
        part = symbols[first : first + len(rows), None]
        start, end = (np.take_along_axis(rows, part + j, 1)[:, 0] for j in (0, 1))
        yield start, end - start
        first += len(rows)


def pixel_bits(codec: Codec, index: np.ndarray, mean: np.ndarray) -> float:
    """Returns -log2 p(x_0 | x_t) of pixels int[n, h, w, c] given the predicted mean."""
    total = 2.0**entropy.CODER_BITS
    return float(sum(-np.log2(width / total).sum() for _, width in _intervals(codec, index, mean)))


def _write_pixels(codec: Codec, index: np.ndarray, mean: np.ndarray) -> bytes:
    """Returns x_0 given the predicted mean, with a checksum in front."""
    encoder = entropy.RangeEncoder()
    for starts, widths in _intervals(codec, index, mean):
        for start, width in zip(starts.tolist(), widths.tolist(), strict=True):
            encoder.encode(start, width)
    return checksum(index) + encoder.finish()


def _read_pixels(codec: Codec, content: bytes, mean: np.ndarray) -> np.ndarray:
    """Returns the pixels int[n, h, w, c]. Raises IntegrityError if they are not those encoded."""
    decoder, parts = entropy.RangeDecoder(content[CRC_BYTES:]), []
    for rows in _rows(codec, mean):
        found = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            k = int(row.searchsorted(decoder.peek(), "right")) - 1
            start = int(row[k])
            decoder.advance(start, int(row[k + 1]) - start)
            found[i] = k
        parts.append(found)
    index = np.concatenate(parts).reshape(mean.shape)
    if checksum(index) != content[:CRC_BYTES]:
        raise IntegrityError("the decoded pixels are not those that were encoded")
    return index


class Decoded(NamedTuple):
    """What a decoder knows after some steps: x_t at time t, and x_0 predicted from it.

    index: the exact pixels int[n, h, w, c] of 0..levels - 1, if all of a lossless file was read.
    """

    x: np.ndarray
    t: int
    x_0: np.ndarray
    index: np.ndarray | None


def decode_groups(
    codec: Codec, segments: Sequence[Sequence[bytes]], first_group: int, n: int
) -> Decoded:
    """Decodes n images from the segments [k][groups] of the first k steps, or of all and x_0.

    Raises IntegrityError if pixels of a lossless file are not those that were encoded.
    """
    return collections.deque(decode_prefixes(codec, segments, first_group, n), maxlen=1)[0]


def decode_prefixes(
    codec: Codec, segments: Sequence[Sequence[bytes]], first_group: int, n: int
) -> Iterator[Decoded]:
    """Yields what is known before the first segment and after each one, as decode_groups does."""
    sizes, steps = group_sizes(n, codec.group), len(codec.plan.variances)
    x = initial_noise(codec, first_group * codec.group, n)
    for i in range(min(len(segments), steps) + 1):
        predicted = codec.denoise(x, codec.plan.ts[i])
        yield Decoded(x, codec.plan.ts[i], predicted, None)
        if i < min(len(segments), steps):
            parts = enumerate(zip(sizes, segments[i], strict=True), first_group)
            read = [_read_indices(codec, i, j, images, part) for j, (images, part) in parts]
            groups, indices = zip(*read, strict=True)
            x = _arrived(codec, i, x, predicted, groups, indices)
    if len(segments) > steps:
        cuts = np.cumsum(sizes)[:-1]
        pairs = zip(segments[steps], np.split(predicted, cuts), strict=True)
        index = np.concatenate([_read_pixels(codec, part, mean) for part, mean in pairs])
        yield Decoded(x, codec.plan.ts[steps], predicted, index)
