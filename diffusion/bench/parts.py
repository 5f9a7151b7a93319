"""--mode=bench: how fast the parts are on this machine, each with its median and its spread.

A part is a function (config, experiment) -> measurements; its line in PARTS is all it takes.
Compare figures of one run only: another machine, or this one an hour later, is another scale.
"""

import collections
import functools
import json
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
from jax import random
from ml_collections import ConfigDict

from diffusion import convert, data, experiment
from diffusion.likelihood import vlb_terms
from diffusion.bench import pytorch
from diffusion.bench.profile import profile_part
from diffusion.bench.speed import network_alone, sample_part, train_part, training_step
from diffusion.bench.timing import Measured, in_turn, seconds
from diffusion.bench.tpu import tpu_part
from diffusion.convert import inception_names
from diffusion.data import loader
from diffusion.data.prepare import archives, image_decoding, pipeline
from diffusion.metrics import inception
from diffusion.modes import likelihood
from diffusion.sharding import batch_sharded, make_global_array
from diffusion.utils import logging


def data_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """Streaming of photographs, and what drawing batches on the device adds to a training step."""
    for side, n in ((32, 4096), (256, 512)):
        with tempfile.TemporaryDirectory() as folder:
            pipeline.prepare(_photographs(n, side), image_decoding.ImageSpec(side, side, 3), folder, "photos")
            images = data.open_dataset("tfds", "train", name="photos", data_dir=folder)

            def read(images=images, steps=range(n // 64)):
                collections.deque(loader.iterate_shuffled(images, random.key(0), steps, 64), maxlen=0)

            took = list(seconds(read))
        what = f"streaming {side}x{side} PNG"
        yield Measured(what, "images/s", [n / wall for wall, _ in took])
        yield Measured(f"{what}, a core", "images/s", [n / cpu for _, cpu in took])
    yield from _steps(config, x)


def _photographs(n: int, side: int) -> archives.Source:
    """Crops of scikit-learn's two photographs: how fast a PNG is depends on what it shows."""
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


def _steps(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """A training step of the config that draws its batch, and one that is handed a batch."""
    runs = [training_step(config, x, streamed)[1] for streamed in (False, True)]
    drawn, handed = zip(*in_turn(*(lambda run=run: run(1) for run in runs), n=20), strict=True)
    yield Measured("training step that draws its batch on the device", "s", list(drawn))
    yield Measured("training step that is handed its batch", "s", list(handed))
    ratios = [a / b for a, b in zip(drawn, handed, strict=True)]
    yield Measured("the first over the second", "", ratios)




def likelihood_part(config: ConfigDict, x: experiment.Experiment) -> Iterator[Measured]:
    """The bound on 50 times of the chain, and the network alone at as many times."""
    size = -(-config.bpd.batch_size // x.mesh.size) * x.mesh.size
    ts = np.unique(np.linspace(1, x.p.T, 50).round().astype(int))
    chain = likelihood.trained_chain(config, x, x.variance)
    chain = likelihood.shortened(chain, x.variance, ts)
    state = experiment.make_initial_state(config, x)()
    images = data.ImageDataset(size, x.image_shape, 0, None)
    work = likelihood.SplitPass(images, size, size, 0, x, "")
    split = batch_sharded(x.mesh)
    image = np.random.default_rng(0).integers(0, 256, (size, *x.image_shape), np.uint8)
    arrays = image, np.zeros(size, np.int32), np.arange(size, dtype=np.uint32)
    batch = likelihood.Batch(*(make_global_array(a, split, a.shape) for a in arrays))

    def apply(params, label):
        return lambda x_t, t: experiment.apply_model(x, params, x_t, t, train=False)

    def alone(p, network, keys, x_0):
        return network_alone(network, x_0, p.model_t[1:])

    runs = []
    for args in ((chain, vlb_terms), (likelihood.Chain(chain.p, apply), alone)):
        compiled = work.compiled(*args)
        runs.append(lambda run=compiled: jax.block_until_ready(run(state.params, batch)))
    pairs = [(a, b) for (a, _), (b, _) in zip(*map(seconds, runs), strict=True)]
    n = size * len(ts)
    yield Measured("bound, images x times", "/s", [n / a for a, _ in pairs])
    yield Measured("network alone, images x times", "/s", [n / b for _, b in pairs])
    yield Measured("seconds of the bound over those of the network", "", [a / b for a, b in pairs])




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
        for name, shape in inception_names.SHAPES.items()
    }
    params = jax.device_put(inception.fold(convert.from_inception(weights)))

    @jax.jit
    def features(params, image):
        taps = inception.Inception().apply({"params": params}, inception.preprocess(image))
        return taps["2048"], taps["logits_unbiased"]

    def ours():
        return jax.block_until_ready(features(params, image))

    what = f"features of images {image.shape[1]}x{image.shape[2]}, batches of {len(image)}"
    with pytorch.features(weights, image) as others:
        for theirs in others.values():
            for a, b in zip(ours(), theirs(), strict=True):  # the same network
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
        took, *theirs = zip(*in_turn(ours, *others.values()), strict=True)
    yield Measured(what, "images/s", [len(image) / s for s in took])
    for name, other in zip(others, theirs, strict=True):
        yield Measured(f"the same by {name}", "images/s", [len(image) / s for s in other])
        ratios = [b / a for a, b in zip(took, other, strict=True)]
        yield Measured("the first over the second", "", ratios)


PARTS = {
    "train": train_part,
    "sample": sample_part,
    "likelihood": likelihood_part,
    "features": features_part,
    "data": data_part,
    "profile": profile_part,
    "tpu": tpu_part,
}
EVERY = [part for part in PARTS if part != "tpu"]  # which takes a compiler of its own, and long


def run(config: ConfigDict, workdir: pathlib.Path, parts: list[str], topology: str) -> None:
    """Measures the parts, says each line as it comes, and writes workdir/bench/PART.json.

    topology: of the part tpu.
    """
    x = experiment.build(config)
    for part in parts:
        logging.info(f"{part}: median (lowest to highest)")
        measure = functools.partial(tpu_part, topology=topology) if part == "tpu" else PARTS[part]
        lines = []
        for measured in measure(config, x):
            logging.info(measured.line())
            lines.append(measured._asdict())
        folder = workdir / "bench"
        folder.mkdir(parents=True, exist_ok=True)
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        device = topology if part == "tpu" else device
        about = {"device": device, "jax": jax.__version__, "measured": lines}
        (folder / f"{part}.json").write_text(json.dumps(about, indent=2) + "\n")
        logging.info(f"done       {folder / part}.json")
