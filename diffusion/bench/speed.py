"""--mode=bench, training and sampling: how fast, and how near the device's limit that is.

FLOPs are counted twice, by formula (`forward_flops`: what the network needs) and by the compiler
(what the program does, with all that is not a product or a convolution). A share of the peak is by
the formula, and always of the bfloat16 peak.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import experiment, unet
from diffusion.bench import pytorch
from diffusion.bench.timing import PEAKS, Measured, in_turn
from diffusion.modes import _sampling
from diffusion.runtime.config import flatten, with_overrides
from diffusion.sharding import batch_sharded, make_global_array, replicated

SAMPLES = 256  # the paper's 17 seconds are for so many


def forward_flops(net: unet.UNet, height: int, width: int, channels: int) -> int:
    """Of the convolutions and products of one image's forward pass; an addition counts as one.

    A training step takes three times that for each image: forward, and the gradients by what goes
    in and by the weights.
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
    """What the compiler says of a program: memory and FLOPs of one device."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    yield Measured("memory of the program, a device", "GB", [held / 1e9])
    yield Measured(
        "FLOPs of the program, a device, by its compiler", "GFLOP", [cost["flops"] / 1e9]
    )
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak:
        yield Measured("most memory that this process has used, a device", "GB", [peak / 1e9])


def achieved(flops: float, took: list[float]) -> Iterator[Measured]:
    """FLOP/s of all devices, by formula, and their share of the peak where it is known."""
    rates = [flops / s for s in took]
    yield Measured("achieved, by formula", "TFLOP/s", [rate / 1e12 for rate in rates])
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak:
        shares = [rate / (peak.flops * jax.device_count()) for rate in rates]
        yield Measured("share of the bfloat16 peak (MFU)", "", shares)


def training_step(
    config: ConfigDict, x: experiment.Experiment, streamed: bool = False
) -> tuple[Any, Callable[[int], None], float]:
    """(the compiled step, to take so many of them, seconds of compiling).

    As in training, one step is on the way while the next is asked for. streamed: it is handed one
    batch again and again; else it draws its batches from 16 MiB on the device. Their bytes are
    random: what they show has no part in the time.
    """
    size, pixels = config.train.batch_size, math.prod(x.image_shape)
    if streamed:
        make, sharding = experiment.make_streamed_update, batch_sharded(x.mesh)
        shape = size, *x.image_shape
    else:
        make, sharding = experiment.make_update, replicated(x.mesh)
        shape = max(size, 2**24 // pixels), pixels
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    label = np.zeros(len(image), np.int32)
    arrays = [make_global_array(a, sharding, a.shape) for a in (image, label)]
    state = experiment.make_initial_state(config, x)()
    began = time.perf_counter()
    update = make(config, x).lower(state, *arrays).compile()
    took = time.perf_counter() - began

    def steps(n):
        nonlocal state
        last = ()
        for _ in range(n):
            state, metrics = update(state, *arrays)
            jax.block_until_ready(last)  # more steps on the way can lock a processor's devices up
            last = metrics
        jax.block_until_ready(last)

    return update, steps, took


def train_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """The config's training step, and PyTorch's of the same network."""
    size = config.train.batch_size
    update, ours, compiling = training_step(config, x)
    yield Measured("compiling the training step", "s", [compiling])
    with pytorch.training(config) as others:
        steps, took, others = _compared(ours, others)
    yield Measured("training step", "s", took)
    yield Measured("training", "steps/s", [1 / s for s in took])
    yield Measured("training", "images/s", [size / s for s in took])
    yield from achieved(3 * size * forward_flops(x.net, *x.image_shape), took)
    yield from program(update)
    yield from _ratios(took, others, f"training, {steps} steps a measurement")


def sample_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """The config's sampler, and a solver of 20 steps: a part of the chain and what all would take.

    Images at a time: sample.batch_size. Beside it the network alone, at the same images as often.
    """
    quick = {"sampler.name": "dpmpp_2m", "sampler.steps": 20, "sampler.grid": "logsnr"}
    params = experiment.make_initial_state(config, x)().params
    for changed in ({}, quick):
        flat = flatten(config)
        c = with_overrides(config, {k: v for k, v in changed.items() if k in flat})
        chain = _sampling.compile_sampler(c, x, c.sample.batch_size)
        steps = len(chain.ts) - 1
        part = min(steps, 5 if jax.default_backend() == "cpu" else 50)
        ts = chain.ts[: part + 1]
        indices = np.arange(chain.size, dtype=np.int32)
        keys, label, carry = chain.start(np.uint32(0), np.int32(chain.label), indices)
        advance = chain.advance.lower(params, keys, label, carry, ts).compile()

        def ours(carry=carry, advance=advance, args=(params, keys, label), ts=ts):
            jax.block_until_ready(advance(*args, jax.tree.map(jnp.copy, carry), ts))

        calls = round(part * chain.evaluations / steps)
        alone = _network(x, params, chain.size, np.resize(x.p.model_t[ts[:-1]], calls))
        apart = contextlib.nullcontext({}) if changed else pytorch.network(config, chain.size)
        with apart as torch:
            runs = [lambda f=f, k=calls: f(k) for f in torch.values()]
            took, network, *others = zip(*in_turn(ours, alone, *runs), strict=True)
        whole = [s * steps / part * SAMPLES / chain.size for s in took]
        what = f"{SAMPLES} samples, {c.sampler.name}, {steps} steps"
        yield Measured(f"{what}, from {part} steps of {chain.size}", "s", whole)
        ratio = [a / b for a, b in zip(took, network, strict=True)]
        yield Measured("  its time over that of the network alone", "", ratio)
        flops = calls * chain.size * forward_flops(x.net, *x.image_shape)
        yield from achieved(flops, list(took))
        if not changed:
            yield from program(advance)
        named = dict(zip(torch, others, strict=True))
        yield from _ratios(list(network), named, f"the network alone, {calls} times")


def network_alone(network: Callable, x_0: jax.Array, model_ts: np.ndarray) -> jax.Array:
    """The network at each of the times, one after the other: each needs the last one's output."""

    def one(x_t, t):
        output = network(x_t, jnp.broadcast_to(t, (len(x_t),)))
        return 0.5 * x_t + 0.1 * output[..., : x_0.shape[-1]], None

    return jax.lax.scan(one, x_0, jnp.asarray(model_ts, x_0.dtype))[0]


def _network(x, params, size, model_ts) -> Callable[[], None]:
    whole, split = replicated(x.mesh), batch_sharded(x.mesh)
    images = np.random.default_rng(0).standard_normal((size, *x.image_shape)).astype(np.float32)
    images = make_global_array(images, split, images.shape)

    def chained(params, images):
        def apply(x_t, t):
            return experiment.apply_model(x, params, x_t, t, train=False)

        return network_alone(apply, images, model_ts)

    compiled = jax.jit(chained, in_shardings=(whole, split), out_shardings=split)
    return lambda: jax.block_until_ready(compiled(params, images))


def _compared(ours, theirs):
    """(steps at a time, seconds of a step of ours, {name: of theirs}), all in turn.

    So many steps at a time that the start of the first hardly counts: memory that lay unused while
    the others ran may have been lent away by then.
    """
    ours(1)
    began = time.perf_counter()
    ours(1)
    steps = max(3, min(50, round(0.5 / (time.perf_counter() - began))))
    runs = [lambda f=f: f(steps) for f in (ours, *theirs.values())]
    took, *others = zip(*in_turn(*runs), strict=True)
    per_step = [[s / steps for s in times] for times in (took, *others)]
    return steps, per_step[0], dict(zip(theirs, per_step[1:], strict=True))


def _ratios(ours, others, what) -> Iterator[Measured]:
    for name, theirs in others.items():
        yield Measured(f"{name}: {what}", "s", list(theirs))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        yield Measured(f"  {name} takes so many times as long", "", ratios)
