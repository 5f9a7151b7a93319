"""What --mode=bench measures with: a clock, and what the makers say that their devices can do."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

REPETITIONS = 5


class Measured(NamedTuple):
    """What one thing took or gave, in `unit`, in each repetition."""

    what: str
    unit: str
    values: list[float]

    def line(self) -> str:
        middle, low, high = statistics.median(self.values), min(self.values), max(self.values)
        return f"{self.what:58} {middle:10,.4g}  ({low:,.4g} to {high:,.4g}) {self.unit}"


def seconds(run: Callable[[], None], n: int = REPETITIONS) -> Iterator[tuple[float, float]]:
    """(wall seconds, this process's processor seconds) of each of n runs, after one unmeasured."""
    run()
    for _ in range(n):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        yield time.perf_counter() - wall, time.process_time() - cpu


def in_turn(*runs: Callable[[], None], n: int = REPETITIONS) -> list[tuple[float, ...]]:
    """Wall seconds of each of the runs, n times over: what else the machine does falls on all."""
    clocks = [seconds(run, n) for run in runs]
    return [tuple(wall for wall, _ in each) for each in zip(*clocks, strict=True)]


class Peak(NamedTuple):
    """Of one chip: bfloat16 FLOP/s of its matrix units, dense, and bytes/s of its memory."""

    flops: float
    bytes: float


PEAKS = {  # by jax.Device.device_kind, of NVIDIA's data sheets and cloud.google.com/tpu/docs
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3350e9),
    "NVIDIA H200": Peak(989e12, 4800e9),
    "TPU v4": Peak(275e12, 1228e9),
    "TPU v5 lite": Peak(197e12, 819e9),
    "TPU v5": Peak(459e12, 2765e9),
    "TPU v6 lite": Peak(918e12, 1638e9),
}
