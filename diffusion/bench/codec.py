"""Speed of compressed files: images a second, and how much of the time is the network's."""

import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.bench.timing import REPETITIONS, Measured
from diffusion.codec import plan, progressive
from diffusion.codec.plan import Codec, Plan
from diffusion.experiment import Experiment

IMAGE_VARIANCE = 0.25  # of the Gaussian pixels that are coded
CODED_STEPS = 20


def codec_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures progressive files of codec.group images, with untrained weights.

    The network runs, and the pixels' exact denoiser answers in its place: a file of an untrained
    network would have steps that no file has.
    """
    c, n = config.codec, config.codec.group
    made = gaussian_plan(exp, c.candidates, c.padding)
    params = experiment.make_initial_state(config, exp).params
    label = jnp.full(c.batch_size, exp.net.null_label or 0, jnp.int32)
    network = jax.jit(
        lambda x, t: experiment.apply_model(exp, params, x, jnp.full(len(x), t), label)
    )
    spent = [0.0]

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        began = time.perf_counter()
        for first in range(0, len(x), c.batch_size):
            part = x[first : first + c.batch_size]
            part = np.pad(part, [(0, c.batch_size - len(part)), *[(0, 0)] * 3])
            jax.block_until_ready(network(part, np.float32(exp.process.model_t[t])))
        spent[0] += time.perf_counter() - began
        a = exp.process.alpha_bar[t]
        gain = np.sqrt(a) * IMAGE_VARIANCE / (a * IMAGE_VARIANCE + 1 - a)
        return np.clip(np.float32(gain) * x, -1, 1)

    codec = Codec(exp.process, denoise, made, exp.image_shape, exp.levels, n, 0)
    x_0 = np.random.default_rng(0).normal(0, IMAGE_VARIANCE**0.5, (n, *exp.image_shape))
    index = np.rint((np.clip(x_0, -1, 1) + 1) * (exp.levels - 1) / 2).astype(np.int64)
    rows: dict[str, list[tuple[float, float]]] = {"encoding": [], "decoding": []}
    for repetition in range(REPETITIONS + 1):
        for name in rows:
            spent[0], began = 0.0, time.perf_counter()
            if name == "encoding":
                segments = progressive.encode_groups(codec, index, 0, jax.random.key(0)).segments
            else:
                progressive.decode_groups(codec, segments, 0, n)
            took = time.perf_counter() - began
            if repetition:  # the first one compiles
                rows[name].append((took, spent[0]))
    yield Measured("evaluations of the network for a file", "", [float(len(made.ts))])
    for name, each in rows.items():
        yield Measured(f"{name}, {n:,} images in a group", "images/s", [n / s for s, _ in each])
        yield Measured(f"share of the network in {name}", "", [own / s for s, own in each])


def gaussian_plan(exp: Experiment, candidates: int, padding: int) -> Plan:
    """Returns the plan of CODED_STEPS steps to one bit/dim of independent Gaussian pixels."""
    a = exp.process.alpha_bar[1:]
    known = 0.5 * np.log2(1 + IMAGE_VARIANCE * a / (1 - a))  # bits/dim that x_t tells, t = 1..T
    wanted = np.linspace(known[-1], min(1.0, known[0]), CODED_STEPS + 1)
    falling = np.interp(wanted, known[::-1], np.arange(len(a), 0, -1))
    ts = np.unique(falling.round().astype(int))[::-1]
    codes = [plan.variance_code(IMAGE_VARIANCE / 4**k) for k in known[ts - 1]]
    decoder = plan.bfloat16(IMAGE_VARIANCE / 4 ** known[ts[-1] - 1])
    return Plan(tuple(ts.tolist()), tuple(codes[:-1]), decoder, candidates, padding)
