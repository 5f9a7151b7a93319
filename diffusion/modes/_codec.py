"""What compress and decompress share: the model as a codec sees it, and what a file says of it."""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import AxisType, Mesh

from diffusion import experiment
from diffusion.codec import channel
from diffusion.codec.container import DIGEST, Header
from diffusion.codec.plan import Codec, Denoise
from diffusion.modes._common import Trained, load_trained
from diffusion.modes._split_pass import trained_chain
from diffusion.runtime.config import Run, flatten, with_overrides
from diffusion.utils import digests
from diffusion.utils.errors import ConfigError

MODEL_KEYS = ("model.", "process.", "target", "variance", "data.levels", "sampler.clip")
PROBE_SEED = 0xD0D0
CURVES = ("bits", "rmse"), ("bound", "bound_rmse")  # of codec.json


class Model(NamedTuple):
    """A trained model for files: what it predicts, and the digests that name it."""

    trained: Trained
    weights: bytes
    config: bytes


def load_model(run: Run) -> Model:
    """Restores the weights. Raises ConfigError where there are several processes, WorkdirError."""
    if jax.process_count() > 1:
        found = f"found {jax.process_count()}"
        raise ConfigError(f"--mode={run.mode}: expected one process, of any devices, {found}")
    plain = {"sampler.guidance": 0.0, "sampler.threshold": 0.0}
    config = with_overrides(run.config, plain | {"sampler.clip": True, "sampler.clip_range": 1.0})
    exp = experiment.build(config, mesh_of(jax.devices()[0]))
    trained = load_trained(run._replace(config=config), exp)
    flat = {k: v for k, v in flatten(config).items() if k.startswith(MODEL_KEYS)}
    tree = digests.sha256(trained.params)
    return Model(trained, _digest(sorted(tree.items())), _digest(sorted(flat.items())))


def mesh_of(device: jax.Device) -> Mesh:
    """Returns a mesh of one device."""
    return jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=[device])


def _digest(content: object) -> bytes:
    return hashlib.sha256(json.dumps(content, default=list).encode()).digest()[:DIGEST]


def no_class(exp: experiment.Experiment, n: int) -> Array:
    """Returns n labels int32 that mean "no class", or class 0 where no label means that."""
    return jnp.full(n, exp.net.null_label or 0, jnp.int32)


def make_denoise(model: Model, batch: int) -> Denoise:
    """Compiles the network for calls of `batch` images: (x_t float32[n, h, w, c], t) -> x_0.

    Each call runs on one device, so that the numbers of devices and images do not change a bit.
    """
    trained, devices = model.trained, jax.local_devices()
    host = jax.device_get(trained.params)

    @functools.cache
    def program(i):
        one = experiment.build(trained.config, mesh_of(devices[i]))
        chain = trained_chain(trained._replace(exp=one._replace(process=trained.exp.process)))
        label = no_class(one, batch)
        params = jax.device_put(host, devices[i])
        run = jax.jit(lambda params, x, t: chain.predictor(params, label)(x, t).x_0)
        return lambda x, t: run(params, jax.device_put(x, devices[i]), t)

    def denoise(x: np.ndarray, t: int) -> np.ndarray:
        parts = []
        for i, first in enumerate(range(0, len(x), batch)):
            part = x[first : first + batch]
            part = np.pad(part, [(0, batch - len(part)), *[(0, 0)] * 3])
            parts.append(program(i % len(devices))(part, np.int32(t)))
        return np.concatenate([np.asarray(part) for part in parts])[: len(x)]

    return denoise


def probe(codec: Codec, batch: int) -> bytes:
    """Returns a digest of the network's output on known input: whether two machines compute alike.

    The input is noise of a seed at half of the file's first time.
    """
    noise = channel.normals(
        PROBE_SEED, (0, channel.NOISE), np.arange(batch), int(np.prod(codec.shape))
    )
    t = (codec.plan.ts[0] + 1) // 2
    x_0 = codec.denoise(noise.reshape(batch, *codec.shape), t)
    return hashlib.sha256(np.ascontiguousarray(x_0).tobytes()).digest()[:DIGEST]


def make_codec(model: Model, header: Header) -> Codec:
    """Returns the codec of a file, which the model can read."""
    exp, h = model.trained.exp, header
    denoise = make_denoise(model, h.batch)
    return Codec(exp.process, denoise, h.plan, h.shape, h.levels, h.group, h.seed)


def measured_curves(folder: epath.Path) -> dict[str, list[tuple[float, float]]]:
    """Returns the curves of a checkpoint's codec.json, what plotting.curves.plot_codecs draws.

    Empty where --mode=compress has not written a progressive file yet.
    """
    try:
        report = json.loads((folder / "codec.json").read_text())
        sent, bound = ([(p[x], p[y]) for p in report["points"]] for x, y in CURVES)
        return {"file": sent, "its bound": bound} | report["lossy"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Block(NamedTuple):
    """Whole groups of images that go through the network together."""

    first_image: int
    images: int
    first_group: int
    groups: int


def blocks(header: Header) -> Iterator[Block]:
    """Yields the blocks of a file: a group, or as many as fill a batch."""
    groups = -(-header.images // header.group)
    each = max(1, header.batch // header.group)
    for first in range(0, groups, each):
        n = min(each, groups - first)
        start = first * header.group
        yield Block(start, min(n * header.group, header.images - start), first, n)


def to_pixels(index: np.ndarray, levels: int) -> np.ndarray:
    """Returns pixels int[...] of 0..levels - 1 as uint8, evenly spaced over 0..255."""
    return np.rint(index * (255 / (levels - 1))).astype(np.uint8)
