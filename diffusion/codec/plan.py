"""Which steps a file takes, with which variances, and how many bits each is expected to hold.

A plan is part of the file: all that the decoder needs to know besides the model.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import google_crc32c
import numpy as np

from diffusion.process import Process, posterior
from diffusion.samplers.analytic import OptimalVariance, step_costs
from diffusion.samplers.timesteps import least_cost

# What a chunk and a step cost beyond what they hold. They take 3 and 64 bits; to count more makes
# small files 3 % longer with a third of the evaluations, and prefixes nearer to their bound.
INDEX_BITS, STEP_BITS = 5.0, 400
Denoise = Callable[[np.ndarray, int], np.ndarray]  # x_t float32[n, h, w, c], t -> x_0
CRC_BYTES = 4
CODES = 256  # numbers on scales of an eighth of an octave, one byte each
BITS = [round(2 ** (code / 8)) for code in range(CODES)]


class Plan(NamedTuple):
    """Steps ts[i] -> ts[i + 1], then x_0 from ts[-1]; of a prefix, the steps that it has.

    Attributes:
        ts: int[n+1], falling from T to 1 or more.
        variances: int[n], codes of Var[x_0 | x_t] at ts[:-1], which gives p's variances.
        decoder: the variance of p(x_0 | x_t) at ts[-1]; 0 where x_0 is not known to follow.
        candidates: log2 of the most candidates of a chunk.
        padding: bits by which a list of candidates is longer than what its chunk holds.
    """

    ts: tuple[int, ...]
    variances: tuple[int, ...]
    decoder: float
    candidates: int
    padding: int


def variance_code(variance: float) -> int:
    """Returns the nearest code of a variance: 2^(2 - code / 8)."""
    return int(np.clip(np.round(8 * (2 - np.log2(max(variance, 1e-12)))), 0, CODES - 1))


class Codec(NamedTuple):
    """What encoder and decoder of groups of images share.

    Attributes:
        process: the chain of the training.
        denoise: predicts x_0, bit for bit the same from the same x_t.
        plan: the steps.
        shape: (height, width, channels) of an image.
        levels: values that a pixel can have, see data.augment.scale.
        group: images that are coded together.
        seed: of the shared randomness.
    """

    process: Process
    denoise: Denoise
    plan: Plan
    shape: tuple[int, int, int]
    levels: int
    group: int
    seed: int


def levels_to_x0(index: np.ndarray, levels: int) -> np.ndarray:
    """Returns x_0 float32 of pixels int[...] of 0..levels - 1, as data.augment.scale has it."""
    return index.astype(np.float32) * np.float32(2 / (levels - 1)) - np.float32(1)


def checksum(index: np.ndarray) -> bytes:
    """Returns the CRC-32C of pixels as 16-bit numbers, 4 bytes."""
    return google_crc32c.value(index.astype("<u2").tobytes()).to_bytes(CRC_BYTES, "little")


def from_pure_noise(p: Process) -> Process:
    """Returns p with alpha_bar_T = 0: files begin with noise that tells nothing of x_0."""
    return p._replace(alpha_bar=np.append(p.alpha_bar[:-1], 0.0))


def chunk_sizes(bits: int, candidates: int, padding: int) -> list[int]:
    """Returns log2 of the numbers of candidates of the chunks that hold so many bits together.

    As few chunks as have at most 2^candidates of them, of equal size up to one bit (DiffC).
    """
    chunks = -(-bits // (candidates - padding))
    return [bits // chunks + (i < bits % chunks) + padding for i in range(chunks)]


def file_bits(bits: np.ndarray, candidates: int, padding: int) -> np.ndarray:
    """Returns the expected sizes in a file, in bits, of steps that hold `bits`."""
    chunks = np.maximum(np.ceil(bits / (candidates - padding)), 1)
    return bits + chunks * INDEX_BITS


def make_plan(
    p: Process, optimum: OptimalVariance, dims: int, steps: int, candidates: int, padding: int
) -> Plan:
    """Returns the plan of at most `steps` steps whose complete progressive files are the shortest.

    Args:
        p: the chain of the training.
        optimum: measured on p.
        dims: of a group.
        steps: at most.
        candidates, padding: of the chunks, see Plan; padding is below candidates.
    """
    ideal = step_costs(from_pure_noise(p), optimum) * dims
    costs, possible = ideal.copy(), np.isfinite(ideal[1:])
    costs[1:][possible] = file_bits(ideal[1:][possible], candidates, padding) + STEP_BITS
    grids = [least_cost(costs, n) for n in range(1, min(steps + 1, p.T) + 1)]
    ts = min(grids, key=lambda ts: costs[ts[1:], ts[:-1]].sum())[:-1]
    return _plan(ts, optimum, candidates, padding)


def make_archive_plan(p: Process, optimum: OptimalVariance, steps: int) -> Plan:
    """Returns the plan of so many steps, T - 1 at most, with the least bound."""
    ts = least_cost(step_costs(p, optimum), min(steps + 1, p.T))[:-1]
    return _plan(ts, optimum, 2, 0)


def _plan(ts, optimum, candidates, padding) -> Plan:
    variances = tuple(map(variance_code, optimum.x0_variance[ts[:-1]]))
    return Plan(
        tuple(ts.tolist()), variances, bfloat16(optimum.decoder[ts[-1]]), candidates, padding
    )


def bfloat16(x: float) -> float:
    """Returns x with 8 significant bits, rounded down."""
    return float((np.float32(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))


def bits_code(bits: float) -> int:
    """Returns the place in BITS of about so many bits."""
    return int(np.clip(np.round(8 * np.log2(max(bits, 1))), 0, CODES - 1))


class Gaussians(NamedTuple):
    """q(x_s | x_t, x_0) and p(x_s | x_t) of a step: means weight_0 x_0 + weight_t x_t, float32."""

    weight_0: np.float32
    weight_t: np.float32
    std_q: np.float32
    std_p: np.float32

    def mean(self, x_0: np.ndarray, x_t: np.ndarray) -> np.ndarray:
        """Returns the mean given x_0, float32 [b, ...]."""
        return self.weight_0 * x_0 + self.weight_t * x_t


def gaussians(p: Process, plan: Plan, i: int) -> Gaussians:
    """Returns the distributions of step i of a plan on p."""
    return Gaussians(*map(np.float32, _gaussians(p, plan, i)))


def _gaussians(p: Process, plan: Plan, i: int) -> tuple[float, float, float, float]:
    c = posterior(p, plan.ts[i + 1], plan.ts[i])
    x0_variance = 2 ** (2 - plan.variances[i] / 8)
    std_p = math.sqrt(c.variance + c.weight_0**2 * x0_variance)
    return c.weight_0, c.weight_t, math.sqrt(c.variance), std_p


def expected_code(p: Process, plan: Plan, i: int, n: int) -> int:
    """Returns the place in BITS of KL(q || p) that n dimensions are expected to have at step i.

    The expectation is over x_0 and x_t, with the variance of the plan.
    """
    *_, std_q, std_p = _gaussians(p, plan, i)
    return bits_code(n * math.log2(std_p / std_q))
