"""The measured parts of --mode=bench, each a function (config, experiment) -> measurements.

Compare figures of one run only: another machine, or this one an hour later, is another scale.
FLOPs are counted by formula (`forward_flops`: what the network needs) and by the compiler (what the
program executes). A share of the peak is by the formula, and always of the bfloat16 peak.
"""

import collections
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import convert, data, experiment, unet
from diffusion.bench import pytorch
from diffusion.bench.timing import PEAKS, Measured, in_turn, ratio, seconds
from diffusion.convert import inception_names
from diffusion.data import augment, loader
from diffusion.data.prepare import archives, image_decoding, pipeline
from diffusion.experiment import Experiment
from diffusion.likelihood import vlb_terms
from diffusion.metrics import inception
from diffusion.process import respace
from diffusion.runtime.config import with_overrides
from diffusion.samplers import advance
from diffusion.samplers.timesteps import respace_predict
from diffusion.sharding import batch_sharded, replicated

PAPER_SAMPLES = 256  # that the paper draws in 17 seconds
SOLVER = {"name": "dpmpp_2m", "steps": 20, "grid": "logsnr", "times": ()}
BOUND_STEPS = 50


# What is timed


def forward_flops(net: unet.UNet, height: int, width: int, channels: int) -> int:
    """Returns the FLOPs of the convolutions and products of one image's forward pass.

    A multiplication and an addition count as two. A training step takes three times that per image:
    forward, and the gradients with respect to inputs and weights.
    """
    net = net.clone(conv=jax.lax.conv_general_dilated)  # Winograd's saving is not counted
    init = partial(net.init_with_output, jax.random.key(0), train=False)
    image = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32)
    return _count_flops(jax.make_jaxpr(init)(image, jnp.zeros(1)).jaxpr)


def _count_flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            total += _count_flops(inner) if hasattr(inner, "eqns") else 0
        out = math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "conv_general_dilated":  # with a kernel [h, w, c_in, c_out]
            total += 2 * out * math.prod(eqn.invars[1].aval.shape[:3])
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return total


def round_up(n: int, exp: Experiment) -> int:
    """Returns the least multiple of the number of devices that is at least n."""
    return -(-n // exp.mesh.size) * exp.mesh.size


def training_step(
    config: ConfigDict, exp: Experiment, resident: bool = True
) -> tuple[Any, Callable[[int], None], float]:
    """Compiles a training step on random images, 16 MiB of them on the device if resident.

    Returns (the compiled step, a function that takes n steps, seconds of compiling). As in
    training, one step is in flight while the next is dispatched.
    """
    rng, size = np.random.default_rng(0), config.train.batch_size
    pixels = math.prod(exp.image_shape)
    n = max(size, 2**24 // pixels) if resident else size
    image = rng.integers(0, 256, (n, pixels), np.uint8)
    label = np.zeros(n, np.int32)
    if resident:
        inputs = rng.integers(0, n, size, np.int32), (image, label)
        batch, dataset = jax.device_put(inputs, replicated(exp.mesh))
    else:
        images = image.reshape(n, *exp.image_shape), label
        batch, dataset = jax.device_put(images, batch_sharded(exp.mesh)), ()
    inputs = batch, (experiment.replicated_keys(config.seed, exp), dataset)
    state = experiment.make_initial_state(config, exp)
    began = time.perf_counter()
    update = experiment.make_update(config, exp, resident).lower(state, *inputs).compile()
    compiling = time.perf_counter() - began

    def steps(n):
        nonlocal state
        last = ()
        for _ in range(n):
            state, metrics = update(state, *inputs)
            jax.block_until_ready(last)  # more steps in flight can deadlock CPU devices
            last = metrics
        jax.block_until_ready(last)

    return update, steps, compiling


def jit_chain(config: ConfigDict, exp: Experiment) -> Any:
    """Jits (params, label, keys, x_T, ts) -> x at ts[-1], by the config's sampler from ts[0]."""
    sampler, _ = experiment.make_sampler(config, exp)
    predictor = experiment.make_predictor(config, exp)
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)

    def chain(params, label, keys, x_T, ts):
        return advance(sampler, predictor(params, label), keys, sampler.init(x_T), ts).x

    shardings = (everywhere, sharded, sharded, sharded, everywhere)
    return jax.jit(chain, in_shardings=shardings, out_shardings=sharded)


def jit_network(exp: Experiment) -> Any:
    """Jits (params, x, model_ts) -> x after one network evaluation at each time, in sequence."""
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)

    def network(params, x, model_ts):
        def evaluate(x, t):
            output = experiment.apply_model(exp, params, x, jnp.broadcast_to(t, len(x)), None)
            return 0.5 * x + 0.1 * output[..., : x.shape[-1]], None

        return jax.lax.scan(evaluate, x, model_ts)[0]

    shardings = (everywhere, sharded, everywhere)
    return jax.jit(network, in_shardings=shardings, out_shardings=sharded)


def noise_batch(exp: Experiment, size: int) -> jax.Array:
    """Returns x_T float32[size, h, w, c], sharded."""
    x_T = np.random.default_rng(0).standard_normal((size, *exp.image_shape), np.float32)
    return jax.device_put(x_T, batch_sharded(exp.mesh))


# What is reported


def describe_program(compiled: Any) -> Iterator[Measured]:
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


def achieved(evaluations: int, exp: Experiment, took: list[float]) -> Iterator[Measured]:
    """Yields FLOP/s of all devices, by formula, and their share of the peak where it is known."""
    flops = evaluations * forward_flops(exp.net, *exp.image_shape)
    yield Measured("achieved, by formula", "TFLOP/s", [flops / s / 1e12 for s in took])
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak:
        shares = [flops / s / (peak.flops * jax.device_count()) for s in took]
        yield Measured("share of the bfloat16 peak (MFU)", "", shares)


def compare(
    ours: list[float], names: Iterable[str], others: list[list[float]], what: str
) -> Iterator[Measured]:
    """Yields the seconds of other programs, and their ratios to ours."""
    for name, theirs in zip(names, others, strict=True):
        yield Measured(f"{name}: {what}", "s", theirs)
        yield ratio(f"  {name}'s time over ours", theirs, ours)


# The parts


def train_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures the config's training step, and then in turn with PyTorch's of the same network.

    A measurement takes about half a second of steps, so that its first step, whose memory may have
    been reclaimed while the others ran, hardly counts.
    """
    size = config.train.batch_size
    update, run, compiling = training_step(config, exp)
    yield Measured("compiling the training step", "s", [compiling])
    (took,) = in_turn(lambda: run(1), n=1)
    steps = max(3, min(50, round(0.5 / took[0])))
    took = _seconds_a_step(steps, run)[0]
    yield Measured("training step", "s", took)
    yield Measured("training", "steps/s", [1 / s for s in took])
    yield Measured("training", "images/s", [size / s for s in took])
    yield from achieved(3 * size, exp, took)
    yield from describe_program(update)
    with pytorch.training(config) as torch:  # ours is known before another program is compiled
        if torch:
            took, *others = _seconds_a_step(steps, run, *torch.values())
            yield from compare(took, torch, others, f"training, {steps} steps a measurement")


def _seconds_a_step(steps: int, *runs: Callable[[int], None]) -> list[list[float]]:
    return [[s / steps for s in each] for each in in_turn(*(partial(f, steps) for f in runs))]


def sample_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures a part of the config's chain, and of a solver's, and the network alone as often.

    Then the network alone in turn with PyTorch's.
    """
    params = experiment.make_initial_state(config, exp).params
    size = round_up(config.sample.batch_size, exp)
    batch = np.zeros(size, np.int32), jax.random.split(jax.random.key(0), size)
    label, keys = jax.device_put(batch, batch_sharded(exp.mesh))
    x_T, network = noise_batch(exp, size), jit_network(exp)
    for changes in ({}, {f"sampler.{key}": value for key, value in SOLVER.items()}):
        c = with_overrides(config, changes)
        sampler, ts = experiment.make_sampler(c, exp)
        steps = len(ts) - 1
        part = min(steps, 5 if jax.default_backend() == "cpu" else 50)
        evaluations = round(part * sampler.evaluations(steps) / steps)
        args = params, label, keys, x_T, ts[: part + 1]
        chain = jit_chain(c, exp).lower(*args).compile()
        model_ts = np.float32(np.resize(exp.process.model_t[ts[:part]], evaluations))
        runs = [partial(chain, *args), partial(network, params, x_T, model_ts)]
        took, alone = in_turn(*runs)
        total = [s * steps / part * PAPER_SAMPLES / size for s in took]
        what = f"{PAPER_SAMPLES} samples, {c.sampler.name}, {steps} steps"
        yield Measured(f"{what}, from {part} steps of {size}", "s", total)
        yield ratio("  its time over that of the network alone", took, alone)
        yield from achieved(evaluations * size, exp, took)
        if not changes:
            yield from describe_program(chain)
            ours, passes = runs[1], evaluations
    with pytorch.network(config, size) as torch:
        if torch:
            alone, *others = in_turn(ours, *(partial(f, passes) for f in torch.values()))
            yield from compare(alone, torch, others, f"the network alone, {passes} times")


def likelihood_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures the bound on 50 times of the chain, and the network alone at as many times."""
    size = round_up(config.bpd.batch_size, exp)
    ts = np.unique(np.linspace(1, exp.process.T, BOUND_STEPS).round().astype(int))
    unguided = with_overrides(config, {"sampler.guidance": 0.0, "sampler.threshold": 0.0})
    predictor = experiment.make_predictor(unguided, exp, exp.variance)
    chain = respace(exp.process, ts)
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)

    @partial(jax.jit, in_shardings=(everywhere, sharded))
    def bound(params, image):
        predict = predictor(params, jnp.zeros(size, jnp.int32))
        predict = respace_predict(exp.process, predict, exp.variance, ts)
        x_0 = augment.scale(image, exp.levels)
        return vlb_terms(chain, predict, jax.random.key(0), x_0, exp.levels)

    params = experiment.make_initial_state(config, exp).params
    image = np.random.default_rng(0).integers(0, 256, (size, *exp.image_shape), np.uint8)
    model_ts = np.float32(chain.model_t[1:])
    took, alone = in_turn(
        partial(bound, params, jax.device_put(image, sharded)),
        partial(jit_network(exp), params, noise_batch(exp, size), model_ts),
    )
    n = size * len(ts)
    yield Measured("bound, images x times", "/s", [n / s for s in took])
    yield Measured("network alone, images x times", "/s", [n / s for s in alone])
    yield ratio("seconds of the bound over those of the network", took, alone)


def features_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures the FID network with its resize, on one device, beside torch-fidelity's.

    Both get the same random weights and images; nothing is downloaded.
    """
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, *exp.image_shape[:2], 3), np.uint8)
    weights = {
        name: np.float32(rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:])))
        if len(shape) > 1
        else np.full(shape, not name.endswith(("bias", "mean")), np.float32)
        for name, shape in inception_names.SHAPES.items()
    }
    params = jax.device_put(inception.fold(convert.from_inception(weights)))

    @jax.jit
    def features(params, image):
        taps = inception.Inception().apply({"params": params}, inception.preprocess(image))
        return taps["2048"], taps["logits_unbiased"]

    ours = partial(features, params, image)
    with pytorch.features(weights, image) as torch:
        for theirs in torch.values():
            for a, b in zip(ours(), theirs(), strict=True):  # the same network
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
        took, *others = in_turn(ours, *torch.values())
    what = f"features of images {image.shape[1]}x{image.shape[2]}, batches of {len(image)}"
    yield Measured(what, "images/s", [len(image) / s for s in took])
    for name, other in zip(torch, others, strict=True):
        yield Measured(f"the same by {name}", "images/s", [len(image) / s for s in other])
        yield ratio("the first over the second", other, took)


def data_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures streaming of photographs, and what gathering batches on the device costs."""
    for side, n in ((32, 4096), (256, 512)):
        with tempfile.TemporaryDirectory() as folder:
            spec = image_decoding.ImageSpec(side, side, 3)
            pipeline.prepare(_photographs(n), spec, folder, "photos")
            images = data.open_dataset("tfds", "train", name="photos", data_dir=folder)

            def read(images=images, steps=range(n // 64)):
                batches = loader.iterate_shuffled(images, 0, steps, 64)
                collections.deque(batches, maxlen=0)

            took = list(seconds(read))
        what = f"streaming {side}x{side} PNG"
        yield Measured(what, "images/s", [n / wall for wall, _ in took])
        yield Measured(f"{what}, a core", "images/s", [n / cpu for _, cpu in took])
    runs = [training_step(config, exp, resident)[1] for resident in (True, False)]
    gathered, given = in_turn(*(partial(run, 1) for run in runs), n=20)
    yield Measured("training step that gathers its batch on the device", "s", gathered)
    yield Measured("training step that is given its batch", "s", given)
    yield ratio("the first over the second", gathered, given)


def _photographs(n: int) -> archives.Source:
    """Returns crops of scikit-learn's two photographs: decoding time depends on the content."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # 427 x 640
    rng = np.random.default_rng(0)

    def items():
        for i in range(n):
            photograph = photographs[i % 2]
            y, x = (rng.integers(0, size - 256 + 1) for size in photograph.shape[:2])
            crop = photograph[y : y + 256, x : x + 256]
            yield archives.Item(f"{i}", np.ascontiguousarray(crop), 0, "train")

    return archives.Source(items, (), "crops of photographs", n)
