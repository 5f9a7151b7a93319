"""The parts of --mode=bench: functions (config, experiment) -> measurements, in one table.

Compare figures of one run only: another machine, or this one an hour later, is another scale.
"""

import collections
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import convert, data, experiment
from diffusion.bench import pytorch
from diffusion.bench.profile import profile_part
from diffusion.bench.speed import network_alone, sample_part, train_part, training_step
from diffusion.bench.timing import Measured, in_turn, ratio, seconds
from diffusion.convert import inception_names
from diffusion.data import augment, loader
from diffusion.data.prepare import image_decoding, pipeline, sources
from diffusion.experiment import Experiment
from diffusion.likelihood import vlb_terms
from diffusion.metrics import inception
from diffusion.process import respace
from diffusion.samplers.timesteps import respace_predict
from diffusion.sharding import batch_sharded, make_global_array, replicated

TIMES = 50  # of the bound


def data_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures streaming of photographs, and what gathering batches on the device costs."""
    for side, n in ((32, 4096), (256, 512)):
        with tempfile.TemporaryDirectory() as folder:
            spec = image_decoding.ImageSpec(side, side, 3)
            pipeline.prepare(_photographs(n, side), spec, folder, "photos")
            images = data.open_dataset("tfds", "train", name="photos", data_dir=folder)

            def read(images=images, steps=range(n // 64)):
                batches = loader.iterate_shuffled(images, 0, steps, 64)
                collections.deque(batches, maxlen=0)

            took = list(seconds(read))
        what = f"streaming {side}x{side} PNG"
        yield Measured(what, "images/s", [n / wall for wall, _ in took])
        yield Measured(f"{what}, a core", "images/s", [n / cpu for _, cpu in took])
    runs = [training_step(config, exp, resident)[1] for resident in (True, False)]
    gathered, given = zip(*in_turn(*(lambda run=run: run(1) for run in runs), n=20), strict=True)
    yield Measured("training step that gathers its batch on the device", "s", list(gathered))
    yield Measured("training step that is given its batch", "s", list(given))
    yield ratio("the first over the second", gathered, given)


def _photographs(n: int, side: int) -> sources.Source:
    """Returns crops of scikit-learn's two photographs: decoding time depends on the content."""
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


def likelihood_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Measures the bound on 50 times of the chain, and the network alone at as many times."""
    size = -(-config.bpd.batch_size // exp.mesh.size) * exp.mesh.size
    ts = np.unique(np.linspace(1, exp.process.T, TIMES).round().astype(int))
    predictor = experiment.make_predictor(config, exp, exp.variance)
    shorter = respace(exp.process, ts)
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)
    params = experiment.make_initial_state(config, exp).params
    image = np.random.default_rng(0).integers(0, 256, (size, *exp.image_shape), np.uint8)
    image = make_global_array(image, sharded, image.shape)

    def bound(params, image):
        predict = predictor(params, jnp.zeros(size, jnp.int32))
        predict = respace_predict(exp.process, predict, exp.variance, ts)
        return vlb_terms(shorter, predict, jax.random.key(0), augment.scale(image))

    def alone(params, image):
        def apply(x_t, t):
            return experiment.apply_model(exp, params, x_t, t, None)

        return network_alone(apply, augment.scale(image), shorter.model_t[1:])

    runs = []
    for function in (bound, alone):
        compiled = jax.jit(function, in_shardings=(everywhere, sharded))
        runs.append(lambda run=compiled: jax.block_until_ready(run(params, image)))
    of_bound, of_network = zip(*in_turn(*runs), strict=True)
    n = size * len(ts)
    yield Measured("bound, images x times", "/s", [n / s for s in of_bound])
    yield Measured("network alone, images x times", "/s", [n / s for s in of_network])
    yield ratio("seconds of the bound over those of the network", of_bound, of_network)


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
        yield ratio("the first over the second", other, took)


PARTS = {
    "train": train_part,
    "sample": sample_part,
    "likelihood": likelihood_part,
    "features": features_part,
    "data": data_part,
    "profile": profile_part,
}
