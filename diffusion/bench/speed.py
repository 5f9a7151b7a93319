"""--mode=bench, training and sampling: how fast, and how near the device's peak.

FLOPs are counted by formula (`forward_flops`: what the network needs) and by the compiler (what the
program executes). A share of the peak is by the formula, and always of the bfloat16 peak.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import experiment, unet
from diffusion.bench import pytorch
from diffusion.bench.timing import PEAKS, Measured, in_turn, ratio
from diffusion.experiment import Experiment
from diffusion.runtime.config import with_overrides
from diffusion.samplers import advance
from diffusion.sharding import batch_sharded, make_global_array, replicated

SAMPLES = 256  # as many as the paper's 17 seconds are for
QUICK = {"sampler.name": "dpmpp_2m", "sampler.steps": 20, "sampler.grid": "logsnr"}


def forward_flops(net: unet.UNet, height: int, width: int, channels: int) -> int:
    """Returns the FLOPs of the convolutions and products of one image's forward pass.

    A multiplication and an addition count as two. A training step takes three times that per image:
    forward, and the gradients with respect to inputs and weights.
    """
    levels = range(len(net.ch_mult))
    ch = [net.ch * mult for mult in net.ch_mult]
    pixels = [height * width // 4**i for i in levels]
    attention = [max(height, width) // 2**i in net.attn_resolutions for i in levels]

    def product(n, c_in, c_out):
        return 2 * n * c_in * c_out

    def block(n, c_in, c_out):
        shortcut = product(n, c_in, c_out) if c_in != c_out else 0
        time_ = product(1, 4 * net.ch, c_out)
        return 9 * (product(n, c_in, c_out) + product(n, c_out, c_out)) + time_ + shortcut

    def attend(n, c):
        return 4 * product(n, c, c) + 2 * product(n, n, c)

    total = product(1, net.ch, 4 * net.ch) + product(1, 4 * net.ch, 4 * net.ch)
    total += 9 * product(pixels[0], channels, net.ch)
    c, skips = net.ch, [net.ch]
    for i in levels:
        for _ in range(net.num_res_blocks):
            total += block(pixels[i], c, ch[i]) + attention[i] * attend(pixels[i], ch[i])
            c = ch[i]
            skips.append(c)
        if i < levels[-1]:
            total += 9 * product(pixels[i + 1], c, c)
            skips.append(c)
    total += 2 * block(pixels[-1], c, c) + attend(pixels[-1], c)
    for i in reversed(levels):
        for _ in range(net.num_res_blocks + 1):
            total += block(pixels[i], c + skips.pop(), ch[i])
            total += attention[i] * attend(pixels[i], ch[i])
            c = ch[i]
        if i > 0:
            total += 9 * product(pixels[i - 1], c, c)
    return total + 9 * product(pixels[0], c, net.out_ch)


def program(compiled: Any) -> Iterator[Measured]:
    """Yields the memory and the FLOPs of a program on one device, by its compiler."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    yield Measured("memory of the program, a device", "GB", [held / 1e9])
    what = "FLOPs of the program, a device, by its compiler"
    yield Measured(what, "GFLOP", [cost["flops"] / 1e9])
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        yield Measured("most memory that this process has used, a device", "GB", [peak / 1e9])


def achieved(flops: float, took: list[float]) -> Iterator[Measured]:
    """Yields FLOP/s of all devices, by formula, and their share of the peak where it is known."""
    rates = [flops / s for s in took]
    yield Measured("achieved, by formula", "TFLOP/s", [rate / 1e12 for rate in rates])
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak:
        shares = [rate / (peak.flops * jax.device_count()) for rate in rates]
        yield Measured("share of the bfloat16 peak (MFU)", "", shares)


def training_step(
    config: ConfigDict, exp: Experiment, resident: bool = True
) -> tuple[Any, Callable[[int], None], float]:
    """Compiles a training step on random images, 16 MiB of them on the device if resident.

    Returns (the compiled step, a function that takes n steps, seconds of compiling). As in
    training, one step is in flight while the next is dispatched.
    """
    size, pixels = config.train.batch_size, math.prod(exp.image_shape)
    rng, everywhere = np.random.default_rng(0), replicated(exp.mesh)
    sharding = everywhere if resident else batch_sharded(exp.mesh)
    n = max(size, 2**24 // pixels) if resident else size
    image = rng.integers(0, 256, (n, *([pixels] if resident else exp.image_shape)), np.uint8)
    arrays = [image, np.zeros(n, np.int32)]
    inputs = [make_global_array(a, sharding, a.shape) for a in arrays]
    if resident:
        index = rng.integers(0, n, size, np.int32)
        inputs = [make_global_array(index, everywhere, index.shape), *inputs]
    state = experiment.make_initial_state(config, exp)
    began = time.perf_counter()
    update = experiment.make_update(config, exp, resident).lower(state, *inputs).compile()
    took = time.perf_counter() - began

    def steps(n):
        nonlocal state
        last = ()
        for _ in range(n):
            state, metrics = update(state, *inputs)
            jax.block_until_ready(last)  # more steps in flight can deadlock CPU devices
            last = metrics
        jax.block_until_ready(last)

    return update, steps, took


def train_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures the config's training step, and PyTorch's of the same network."""
    size = config.train.batch_size
    update, ours, compiling = training_step(config, exp)
    yield Measured("compiling the training step", "s", [compiling])
    with pytorch.training(config) as others:
        steps, took, others = _compare(ours, others)
    yield Measured("training step", "s", took)
    yield Measured("training", "steps/s", [1 / s for s in took])
    yield Measured("training", "images/s", [size / s for s in took])
    yield from achieved(3 * size * forward_flops(exp.net, *exp.image_shape), took)
    yield from program(update)
    yield from _ratios(took, others, f"training, {steps} steps a measurement")


def sample_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures a part of the config's chain, and of a solver's, and the network alone as often."""
    params = experiment.make_initial_state(config, exp).params
    size = -(-config.sample.batch_size // exp.mesh.size) * exp.mesh.size
    for changes in ({}, QUICK):
        c = with_overrides(config, changes)
        sampler, ts = experiment.make_sampler(c, exp)
        steps = len(ts) - 1
        part = min(steps, 5 if jax.default_backend() == "cpu" else 50)
        calls = round(part * sampler.evaluations(steps) / steps)
        chain = _compile_chain(c, exp, sampler, params, size, ts[: part + 1])
        times = np.resize(exp.process.model_t[ts[:part]], calls)
        alone = _compile_network(exp, params, size, times)
        remote = contextlib.nullcontext({}) if changes else pytorch.network(config, size)
        with remote as torch:
            runs = [lambda f=f, k=calls: f(k) for f in torch.values()]
            took, network, *others = zip(*in_turn(chain, alone, *runs), strict=True)
        total = [s * steps / part * SAMPLES / size for s in took]
        what = f"{SAMPLES} samples, {c.sampler.name}, {steps} steps"
        yield Measured(f"{what}, from {part} steps of {size}", "s", total)
        yield ratio("  its time over that of the network alone", took, network)
        yield from achieved(calls * size * forward_flops(exp.net, *exp.image_shape), list(took))
        named = dict(zip(torch, others, strict=True))
        yield from _ratios(list(network), named, f"the network alone, {calls} times")


def _compile_chain(config, exp, sampler, params, size, ts) -> Callable[[], None]:
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)
    predictor = experiment.make_predictor(config, exp)
    x_T = np.random.default_rng(0).standard_normal((size, *exp.image_shape)).astype(np.float32)
    x_T = make_global_array(x_T, sharded, x_T.shape)
    keys = jax.device_put(jax.random.split(jax.random.key(0), size), sharded)
    label = make_global_array(np.zeros(size, np.int32), sharded, (size,))

    def chain(params, keys, label, x_T):
        predict = predictor(params, label)
        return advance(sampler, predict, keys, sampler.init(x_T), ts).x

    compiled = jax.jit(
        chain, in_shardings=(everywhere, sharded, sharded, sharded), out_shardings=sharded
    )
    return lambda: jax.block_until_ready(compiled(params, keys, label, x_T))


def network_alone(network: Callable, x_0: jax.Array, model_ts: np.ndarray) -> jax.Array:
    """Applies the network at each of the times in sequence: each needs the last one's output."""

    def one(x_t, t):
        output = network(x_t, jnp.broadcast_to(t, (len(x_t),)))
        return 0.5 * x_t + 0.1 * output[..., : x_0.shape[-1]], None

    return jax.lax.scan(one, x_0, jnp.asarray(model_ts, x_0.dtype))[0]


def _compile_network(exp, params, size, model_ts) -> Callable[[], None]:
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)
    images = np.random.default_rng(0).standard_normal((size, *exp.image_shape)).astype(np.float32)
    images = make_global_array(images, sharded, images.shape)

    def chained(params, images):
        def apply(x_t, t):
            return experiment.apply_model(exp, params, x_t, t, None)

        return network_alone(apply, images, model_ts)

    compiled = jax.jit(chained, in_shardings=(everywhere, sharded), out_shardings=sharded)
    return lambda: jax.block_until_ready(compiled(params, images))


def _compare(ours: Callable[[int], None], theirs: Mapping[str, Callable[[int], None]]):
    """Returns (steps a measurement, seconds of our step, {name: of theirs}), measured in turn.

    Enough steps are taken at a time that the first, whose memory may have been reclaimed while the
    others ran, hardly counts.
    """
    ours(1)
    began = time.perf_counter()
    ours(1)
    steps = max(3, min(50, round(0.5 / (time.perf_counter() - began))))
    runs = [lambda f=f: f(steps) for f in (ours, *theirs.values())]
    took, *others = zip(*in_turn(*runs), strict=True)
    per_step = [[s / steps for s in times] for times in (took, *others)]
    return steps, per_step[0], dict(zip(theirs, per_step[1:], strict=True))


def _ratios(ours: list[float], others: Mapping[str, list[float]], what: str) -> Iterator[Measured]:
    for name, theirs in others.items():
        yield Measured(f"{name}: {what}", "s", list(theirs))
        yield ratio(f"  {name}'s time over ours", theirs, ours)
