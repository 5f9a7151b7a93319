"""--mode=bench: how fast the parts are on this machine, each with its median and its spread.

A part is a function (config, experiment) -> measurements; its line in PARTS is all it takes.
Compare figures of one run only: another machine, or this one an hour later, is another scale.
"""

import collections
import importlib.util
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from ml_collections import ConfigDict

import experiment
import likelihoods
import sampling
import settings
from diffusion import convert, data, inception, likelihood, log, samplers, train
from diffusion.ingest import pictures, prepare, sources
from diffusion.weights import layers

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


# ------------------------------------------------------------------------------------------- data


def data_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """Streaming of photographs, and what drawing batches on the device adds to a training step."""
    for side, n in ((32, 4096), (256, 512)):
        with tempfile.TemporaryDirectory() as folder:
            prepare.prepare(_photographs(n, side), pictures.Rule(side, side, 3), folder, "photos")
            images = data.find("tfds", "train", name="photos", data_dir=folder)

            def read(images=images, steps=range(n // 64)):
                collections.deque(data.stream(images, random.key(0), steps, 64), maxlen=0)

            took = list(seconds(read))
        what = f"streaming {side}x{side} PNG"
        yield Measured(what, "images/s", [n / wall for wall, _ in took])
        yield Measured(f"{what}, a core", "images/s", [n / cpu for _, cpu in took])
    yield from _steps(config, x)


def _photographs(n: int, side: int) -> sources.Source:
    """Crops of scikit-learn's two photographs: how fast a PNG is depends on what it shows."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images  # 427 x 640
    rng = np.random.default_rng(0)

    def items():
        for i in range(n):
            photograph = photographs[i % 2]
            y, x = (rng.integers(0, size - 256 + 1) for size in photograph.shape[:2])
            crop = photograph[y : y + 256, x : x + 256]
            yield sources.Item(f"{i}", np.ascontiguousarray(crop), 0, "train")

    return sources.Source(items, (), "crops of photographs", n)


def _steps(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """A training step of the config that draws its batch, and one that is handed a batch."""
    size, shape = config.train.batch_size, x.image_shape
    n = max(size, 2**24 // int(np.prod(shape)))  # 16 MiB of random bytes: content has no part in it
    image = np.random.default_rng(0).integers(0, 256, (n, *shape), np.uint8)
    label = np.zeros(n, np.int32)

    def stepper(update, sharding, k):
        arrays = [train.spread(a[:k], sharding, a[:k].shape) for a in (image, label)]
        state = experiment.make_initial_state(config, x)()
        update = update.lower(state, *arrays).compile()

        def run():
            nonlocal state
            state, metrics = update(state, *arrays)
            jax.block_until_ready(metrics)

        return run

    draws = stepper(experiment.make_update(config, x), train.replicated(x.mesh), n)
    handed = stepper(experiment.make_streamed_update(config, x), train.sharded(x.mesh), size)
    # In turn, so that what else the machine does falls on both.
    pairs = [(a, b) for (a, _), (b, _) in zip(seconds(draws, 20), seconds(handed, 20), strict=True)]
    yield Measured("training step that draws its batch on the device", "s", [a for a, _ in pairs])
    yield Measured("training step that is handed its batch", "s", [b for _, b in pairs])
    yield Measured("the first over the second", "", [a / b for a, b in pairs])
    yield Measured("training", "images/s", [size / a for a, _ in pairs])


def _network_alone(network: Callable, x_0: jax.Array, model_ts: np.ndarray) -> jax.Array:
    """The network at each of the times, one after the other: each needs the last one's output."""

    def one(x_t, t):
        output = network(x_t, jnp.broadcast_to(t, (len(x_t),)))
        return 0.5 * x_t + 0.1 * output[..., : x_0.shape[-1]], None

    return jax.lax.scan(one, x_0, jnp.asarray(model_ts, x_0.dtype))[0]


# --------------------------------------------------------------------------------------- sampling


def sample_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """50 steps of two samplers, each one compiled program, and the network alone as often."""
    steps = min(50, x.p.T)
    size = -(-config.sample.batch_size // x.mesh.size) * x.mesh.size
    params = experiment.make_initial_state(config, x)().params
    ts = samplers.uniform(x.p, steps)
    whole, split = train.replicated(x.mesh), train.sharded(x.mesh)

    def network(params, x_t):
        def apply(x_t, t):
            return x.net.apply({"params": params}, x_t, t, train=False)

        return _network_alone(apply, x_t, x.p.model_t[ts[:-1]])

    alone = jax.jit(network, in_shardings=(whole, split), out_shardings=split)
    x_t = jax.jit(
        lambda: random.normal(random.key(0), (size, *x.image_shape)), out_shardings=split
    )()
    runs = {"network alone": lambda: jax.block_until_ready(alone(params, x_t))}
    for name in ("ancestral", "dpmpp_2m"):
        changes = {"sampler.name": name, "sampler.grid": "uniform", "sampler.steps": steps}
        chain = sampling.make_chain(settings.changed(config, changes), x, size)

        def run(chain=chain):
            numbers = np.arange(size, dtype=np.int32)
            keys, label, carry = chain.start(np.uint32(0), np.int32(-1), numbers)
            jax.block_until_ready(chain.advance(params, keys, label, carry, chain.ts))

        runs[name] = run
    taken = {name: [] for name in runs}
    for each in zip(*(seconds(run, 2 * REPETITIONS) for run in runs.values()), strict=True):
        for name, (wall, _) in zip(runs, each, strict=True):
            taken[name].append(wall)
    base = taken.pop("network alone")
    yield Measured("network alone, images x steps", "/s", [size * steps / t for t in base])
    for name, walls in taken.items():
        yield Measured(f"{name}, images x steps", "/s", [size * steps / t for t in walls])
        ratios = [a / b for a, b in zip(walls, base, strict=True)]
        yield Measured(f"seconds of {name} over those of the network", "", ratios)


# ------------------------------------------------------------------------------------- likelihood


def likelihood_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """The bound on 50 times of the chain, and the network alone at as many times."""
    size = -(-config.bpd.batch_size // x.mesh.size) * x.mesh.size
    ts = np.unique(np.linspace(1, x.p.T, 50).round().astype(int))
    chain = likelihoods.trained_chain(config, x, x.variance)
    chain = likelihoods.shortened(chain, x.variance, ts)
    state = experiment.make_initial_state(config, x)()
    images = data.Images(size, x.image_shape, 0, None)
    work = likelihoods.Pass(images, size, size, 0, x, "")
    split = train.sharded(x.mesh)
    image = np.random.default_rng(0).integers(0, 256, (size, *x.image_shape), np.uint8)
    arrays = image, np.zeros(size, np.int32), np.arange(size, dtype=np.uint32)
    batch = likelihoods.Batch(*(train.spread(a, split, a.shape) for a in arrays))

    def apply(params, label):
        return lambda x_t, t: x.net.apply({"params": params}, x_t, t, train=False)

    def alone(p, network, keys, x_0):
        return _network_alone(network, x_0, p.model_t[1:])

    runs = []
    for args in ((chain, likelihood.terms), (likelihoods.Chain(chain.p, apply), alone)):
        compiled = work.compiled(*args)
        runs.append(lambda run=compiled: jax.block_until_ready(run(state.params, batch)))
    pairs = [(a, b) for (a, _), (b, _) in zip(*map(seconds, runs), strict=True)]
    n = size * len(ts)
    yield Measured("bound, images x times", "/s", [n / a for a, _ in pairs])
    yield Measured("network alone, images x times", "/s", [n / b for _, b in pairs])
    yield Measured("seconds of the bound over those of the network", "", [a / b for a, b in pairs])


# --------------------------------------------------------------------------------------- features


def features_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """The FID network with its resize, on one device; and torch-fidelity's where it is installed.

    Both get the same random weights and images; nothing is downloaded.
    """
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, *x.image_shape[:2], 3), np.uint8)
    weights = {
        name: np.float32(rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:])))
        if len(shape) > 1
        else np.full(shape, not name.endswith(("bias", "mean")), np.float32)
        for name, shape in layers.SHAPES.items()
    }
    params = jax.device_put(inception.fold(convert.from_inception(weights)))

    @jax.jit
    def features(params, image):
        taps = inception.Inception().apply({"params": params}, inception.preprocess(image))
        return taps["2048"], taps["logits_unbiased"]

    def ours():
        return jax.block_until_ready(features(params, image))

    what = f"features of images {image.shape[1]}x{image.shape[2]}, batches of {len(image)}"
    theirs = _torch_features(weights, image)
    if theirs is None:
        yield Measured(what, "images/s", [len(image) / took for took, _ in seconds(ours)])
        return
    for a, b in zip(ours(), theirs(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())  # the same network
    pairs = [(a, b) for (a, _), (b, _) in zip(*map(seconds, (ours, theirs)), strict=True)]
    yield Measured(what, "images/s", [len(image) / a for a, _ in pairs])
    yield Measured("the same by torch-fidelity", "images/s", [len(image) / b for _, b in pairs])
    yield Measured("the first over the second", "", [b / a for a, b in pairs])


def _torch_features(weights: dict[str, np.ndarray], image: np.ndarray) -> Callable | None:
    """() -> (features, logits) by PyTorch on its GPU if it has one; None if it is not installed."""
    if not all(map(importlib.util.find_spec, ("torch", "torch_fidelity"))):
        return None
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.backends.cudnn.allow_tf32 = False  # it is float32 that is compared
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/weights.pth"
        torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
        taps = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3(
            "inception", taps, feature_extractor_weights_path=path
        )
    network = network.to(device).eval()
    batch = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))

    def run():
        with torch.inference_mode():
            return [tap.cpu().numpy() for tap in network(batch.to(device))]

    return run


PARTS = {
    "data": data_part,
    "sample": sample_part,
    "likelihood": likelihood_part,
    "features": features_part,
}


def run(config: ConfigDict, workdir: pathlib.Path, parts: list[str]) -> None:
    """Measures the parts, says each line as it comes, and writes workdir/bench/PART.json."""
    x = experiment.build(config)
    for part in parts:
        log.say(f"{part}: median (lowest to highest)")
        lines = []
        for measured in PARTS[part](config, x):
            log.say(measured.line())
            lines.append(measured._asdict())
        folder = workdir / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        about = {"device": device, "jax": jax.__version__, "measured": lines}
        (folder / f"{part}.json").write_text(json.dumps(about, indent=2) + "\n")
        log.say(f"done       {folder / part}.json")
