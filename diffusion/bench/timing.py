"""Timing of --mode=bench, and the peak rates of accelerators."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

REPETITIONS = 5


class Measured(NamedTuple):
    """One quantity, in `unit`, in each repetition."""

    what: str
    unit: str
    values: list[float]

    def line(self) -> str:
        """Returns the median and the range as a line of the console."""
        middle, low, high = statistics.median(self.values), min(self.values), max(self.values)
        return f"{self.what:58} {middle:10,.4g}  ({low:,.4g} to {high:,.4g}) {self.unit}"


def ratio(what: str, a: list[float], b: list[float]) -> Measured:
    """Returns the ratios a / b of measurements that were taken in turn."""
    return Measured(what, "", [x / y for x, y in zip(a, b, strict=True)])


def seconds(run: Callable[[], object], n: int = REPETITIONS) -> Iterator[tuple[float, float]]:
    """Yields (wall seconds, CPU seconds of this process) of n runs, after an unmeasured one.

    A run ends when the arrays that it returns have been computed.
    """
    jax.block_until_ready(run())
    for _ in range(n):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        yield time.perf_counter() - wall, time.process_time() - cpu


def in_turn(*runs: Callable[[], object], n: int = REPETITIONS) -> list[list[float]]:
    """Returns n wall times of each run in seconds, taken in turn: disturbances fall on all runs."""
    turns = zip(*(seconds(run, n) for run in runs), strict=True)
    return [[wall for wall, _ in each] for each in zip(*turns, strict=True)]


class Peak(NamedTuple):
    """One chip's dense bfloat16 FLOP/s, and the bytes/s of its main memory."""

    flops: float
    bytes: float


PEAKS = {  # by jax.Device.device_kind; NVIDIA's data sheets and cloud.google.com/tpu/docs
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3350e9),
    "NVIDIA H200": Peak(989e12, 4800e9),
    "TPU v4": Peak(275e12, 1228e9),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5": Peak(459e12, 2765e9),
    "TPU v6 lite": Peak(918e12, 1638e9),
}
