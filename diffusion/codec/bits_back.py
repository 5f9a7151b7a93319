"""Bits-back coding of many images at the bound itself: an archive, read from its last image back.

x_t is not sent but drawn with bits of the images before it, which the decoder gets back (Hinton and
van Camp 1993; Townsend et al. 2019, arXiv:1901.04866), in the order of Bit-Swap (Kingma et al.
2019, arXiv:1905.06845): draw x_t from q(x_t | x_s), then code x_s under p(x_s | x_t). A file costs
the terms of the bound and the bits that it begins with, but every distribution must be the same
to the last bit in encoder and decoder. Entropy coding is constriction's stack and its quantised
Gaussians.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import constriction
import numpy as np

from diffusion.codec import channel
from diffusion.codec.plan import Codec, gaussians, levels_to_x0
from diffusion.codec.progressive import pixel_bits
from diffusion.process import beta_between
from diffusion.utils.errors import IntegrityError

FINENESS = 8  # grid points in a standard deviation of the narrowest distribution of x_t
TAILS = 8.0  # standard deviations, beyond which nothing is drawn
INITIAL_WORDS = 1  # 32-bit words for a dimension of the first batch, of which most stay unused


class Law(NamedTuple):
    """N(mean, std^2) on the grid of multiples of `step`, within `reach` of the mean.

    Every point has a mass of 2^-24 or more. The shorter the grid, the less that is in all.
    """

    mean: np.ndarray
    std: float
    step: float
    reach: float

    def models(self, order: np.ndarray) -> tuple[np.ndarray, tuple]:
        """Returns the points next to the means, and constriction's models of the points around."""
        means = self.mean.ravel()[order].astype(np.float64) / self.step
        centres, most = np.round(means), math.ceil(self.reach / self.step)
        model = constriction.stream.model.QuantizedGaussian(-most, most)
        stds = np.full(means.size, self.std / self.step)
        return centres.astype(np.int64), (model, means - centres, stds)


class _Stack:
    """Numbers on a stack of bits."""

    def __init__(self, words: np.ndarray, arbitrary: bool) -> None:
        """Begins with the words of a stack, or with arbitrary ones, which any pops may follow."""
        self.coder = constriction.stream.stack.AnsCoder(words, arbitrary)

    def pop(self, law: Law, order: np.ndarray) -> np.ndarray:
        """Draws x_t float32 on its grid, its dimensions in the given order."""
        centres, models = law.models(order)
        x = np.empty(centres.size, np.float32)
        x[order] = (centres + self.coder.decode(*models)) * np.float32(law.step)
        return x.reshape(law.mean.shape)

    def push(self, x: np.ndarray, law: Law, order: np.ndarray) -> None:
        """Codes x_t of the grid."""
        centres, models = law.models(order)
        points = np.round(x.ravel()[order] / np.float32(law.step)).astype(np.int64)
        try:
            self.coder.encode_reverse((points - centres).astype(np.int32), *models)
        except KeyError as error:
            raise IntegrityError("the archive decodes to x_t that no encoder draws") from error

    def push_pixels(self, codec: Codec, index: np.ndarray, mean: np.ndarray) -> None:
        """Codes x_0 given its predicted mean."""
        self.coder.encode_reverse(index.ravel().astype(np.int32), *_pixel_model(codec, mean))

    def pop_pixels(self, codec: Codec, mean: np.ndarray) -> np.ndarray:
        """Returns x_0 int[n, h, w, c] given its predicted mean."""
        return self.coder.decode(*_pixel_model(codec, mean)).reshape(mean.shape)


def _grids(codec: Codec) -> list[float]:
    """Returns the distances of the grid of x_t for each of the plan's times, powers of two."""
    stds = [_forward(codec, i)[1] for i in range(len(codec.plan.ts))]
    stds[1:] = [
        min(std, float(gaussians(codec.process, codec.plan, i).std_q))
        for i, std in enumerate(stds[1:])
    ]
    return [2.0 ** math.floor(math.log2(std / FINENESS)) for std in stds]


def _forward(codec: Codec, i: int) -> tuple[np.float32, float]:
    """Returns the factor and standard deviation of q(x_t | x_s) for t = ts[i], s = ts[i + 1]."""
    t, s = codec.plan.ts[i], [*codec.plan.ts, 0][i + 1]
    beta = float(beta_between(codec.process, s, t))
    return np.float32(np.sqrt(1 - beta)), float(np.sqrt(beta))


def _forward_law(codec: Codec, grids: list[float], i: int, x_s: np.ndarray) -> Law:
    """Returns q(x_t | x_s) for t = ts[i], s = ts[i + 1]."""
    factor, std = _forward(codec, i)
    return Law(factor * x_s, std, grids[i], TAILS * std)


def _reverse_law(codec: Codec, grids: list[float], i: int, x_t: np.ndarray) -> Law:
    """Returns p(x_s | x_t) for t = ts[i], s = ts[i + 1]; it reaches x_s whatever x_0 is."""
    g, step = gaussians(codec.process, codec.plan, i), grids[i + 1]
    mean = g.mean(codec.denoise(x_t, codec.plan.ts[i]), x_t)
    # q(x_s | x_t, x_0) has a mean within 2 weight_0; x_t is one of q's draws from x_s.
    spread = 2 * TAILS * float(g.std_p) + TAILS * _forward(codec, i)[1]
    return Law(mean, float(g.std_p), step, 2 * float(g.weight_0) + spread)


def _prior_law(grids: list[float], shape: tuple[int, ...]) -> Law:
    return Law(np.zeros(shape, np.float32), 1.0, grids[0], 2 * TAILS)


def _orders(codec: Codec, i: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the orders in which q(x_t | x_s) and p(x_s | x_t) of step i take the dimensions.

    The bits of x_s are a function of those just drawn for x_t; in one order the next draw would
    take them for the same dimensions again, and noise would add up instead of being independent.
    """
    n = images * int(np.prod(codec.shape))
    return tuple(channel.deal(codec.seed, i, j, n, 1).dims[0] for j in range(2))


def _pixel_model(codec: Codec, mean: np.ndarray) -> tuple:
    """Returns the distributions of x_0 over 0..levels - 1: the Gaussian of eq. 13, quantised."""
    half = (codec.levels - 1) / 2
    model = constriction.stream.model.QuantizedGaussian(0, codec.levels - 1)
    means = (mean.ravel().astype(np.float64) + 1) * half
    return model, means, np.full(means.size, np.sqrt(codec.plan.decoder) * half)


def initial_words(codec: Codec, batch: int) -> np.ndarray:
    """Returns the words uint32 that the stack begins with, for batches of so many images."""
    n = INITIAL_WORDS * batch * int(np.prod(codec.shape)) + 64
    generator = np.random.Generator(np.random.PCG64(codec.seed))
    return generator.bit_generator.random_raw(n).astype(np.uint32)


class Unfinished(NamedTuple):
    """An archive of some batches: its stack's words, the fewest that it had, and the bound so far.

    Attributes:
        words: uint32[n].
        lowest: the fewest words that the stack ever had.
        bound: that of these batches, in bits.
    """

    words: np.ndarray
    lowest: int
    bound: float


class Archive(NamedTuple):
    """An archive's words uint32; how many of them it began with; what the bound is, in bits."""

    words: np.ndarray
    initial: int
    bound: float


def begin_archive(codec: Codec, batch: int) -> Unfinished:
    """Returns an archive without images, for batches of at most `batch`."""
    coder = _Stack(initial_words(codec, batch), True).coder
    return Unfinished(coder.get_compressed(), coder.num_words(), 0.0)


def encode_batch(codec: Codec, unfinished: Unfinished, index: np.ndarray) -> Unfinished:
    """Adds images int[n, h, w, c] of 0..levels - 1, which are decoded before all earlier ones."""
    words, lowest, bound = unfinished
    stack, grids, steps = _Stack(words, False), _grids(codec), len(codec.plan.variances)
    x_0 = x = levels_to_x0(index, codec.levels)
    for i in range(steps, -1, -1):
        forward, reverse = _orders(codec, i, len(index))
        x_s, x = x, stack.pop(_forward_law(codec, grids, i, x), forward)
        lowest = min(lowest, stack.coder.num_words())
        if i == steps:
            predicted = codec.denoise(x, codec.plan.ts[i])
            stack.push_pixels(codec, index, predicted)
            bound += pixel_bits(codec, index, predicted)
            continue
        law, g = _reverse_law(codec, grids, i, x), gaussians(codec.process, codec.plan, i)
        bound += channel.kl_bits((g.mean(x_0, x) - law.mean) / g.std_p, float(g.std_q) / law.std)
        stack.push(x_s, law, reverse)
    stack.push(x, _prior_law(grids, x.shape), np.arange(x.size))
    alpha_bar = codec.process.alpha_bar[codec.plan.ts[0]]
    bound += channel.kl_bits(np.sqrt(alpha_bar) * x_0, np.sqrt(1 - alpha_bar))
    return Unfinished(stack.coder.get_compressed(), lowest, bound)


def finish_archive(codec: Codec, unfinished: Unfinished, batch: int) -> Archive:
    """Returns the archive without the words that no batch has used.

    Raises RuntimeError where the bits that it begins with did not suffice.
    """
    begun, unused = len(initial_words(codec, batch)), unfinished.lowest - 2
    if unused <= 0:  # nothing would decode such an archive
        raise RuntimeError(f"the archive needs more than {begun} words to begin with")
    return Archive(unfinished.words[unused:], begun - unused, unfinished.bound)


def decode_batches(
    codec: Codec, words: np.ndarray, images: int, batch: int
) -> Iterator[np.ndarray]:
    """Yields the batches int[n, h, w, c], the last one first. Raises IntegrityError."""
    stack, steps, grids = _Stack(words, False), len(codec.plan.variances), _grids(codec)
    sizes = [min(batch, images - first) for first in range(0, images, batch)]
    for n in reversed(sizes):
        shape = (n, *codec.shape)
        x = stack.pop(_prior_law(grids, shape), np.arange(math.prod(shape)))
        for i in range(steps):
            forward, reverse = _orders(codec, i, n)
            x_s = stack.pop(_reverse_law(codec, grids, i, x), reverse)
            stack.push(x, _forward_law(codec, grids, i, x_s), forward)
            x = x_s
        index = stack.pop_pixels(codec, codec.denoise(x, codec.plan.ts[-1]))
        forward, _ = _orders(codec, steps, n)
        stack.push(x, _forward_law(codec, grids, steps, levels_to_x0(index, codec.levels)), forward)
        yield index
    try:
        left = stack.coder.get_compressed(True)
    except AssertionError:  # not a whole number of words
        left = np.zeros(1, np.uint32)
    if not np.array_equal(left, initial_words(codec, batch)[-len(left) :]):
        raise IntegrityError("the bits that the archive began with are not what is left of it")
