"""--mode=sample, and the drawing of samples for every other mode: compiled, sharded, kept on disk.

Image i of a seed is a function of the seed, i and the weights: neither batches nor devices have a
say. So a set of samples that was begun can be taken up at any image, and made longer.
"""

import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion import experiment, process
from diffusion.data import augment
from diffusion.experiment import Experiment
from diffusion.runtime.config import FREE, differences, flatten
from diffusion.samplers import base
from diffusion.sharding import batch_sharded, replicated
from diffusion.utils.errors import DDPMError, WorkdirError
from diffusion.utils.io import save_bytes, save_npz, save_text
from diffusion.utils.progress import Progress


class CompiledSampler(NamedTuple):
    """The compiled parts of sampling `size` images, sharded over the devices.

    start:   (seed uint32[], label int32[], indices int32[size]) -> (keys, labels, carry): x_T and
             what goes with it; a label below 0 is all classes in turn.
    advance: (params, keys, label, carry, ts) -> carry, as far along the chain as ts goes.
    finish:  x_0 -> uint8[size, h, w, c].
    ts:      int32[steps + 1], all the times to visit. label: of sample.label.
    size:    images at a time. evaluations: of the network for each of them.
    """

    start: Callable
    advance: Callable
    finish: Callable
    ts: np.ndarray
    size: int
    evaluations: int
    label: int


def compile_sampler(config: ConfigDict, x: Experiment, batch_size: int) -> CompiledSampler:
    """The config's sampler for `batch_size` images at a time, rounded up to the devices."""
    sampler, ts = experiment.make_sampler(config, x)
    predictor = experiment.make_predictor(config, x)
    size = -(-batch_size // x.mesh.size) * x.mesh.size
    classes = config.model.num_classes
    whole, split = replicated(x.mesh), batch_sharded(x.mesh)

    def start(seed, label, indices):
        indices = jax.lax.with_sharding_constraint(indices, split)
        keys = jax.vmap(random.fold_in, (None, 0))(random.key(seed), indices)
        x_T = process.sample_noise(keys, 0, jnp.zeros((size, *x.image_shape)))
        labels = jnp.where(label < 0, indices % max(classes, 1), label)
        return keys, labels, sampler.init(x_T)

    def advance(params, keys, label, carry, ts):
        return base.advance(sampler, predictor(params, label), keys, carry, ts)

    return CompiledSampler(
        jax.jit(start, in_shardings=whole, out_shardings=split),
        jax.jit(
            advance,
            in_shardings=(whole, split, split, split, whole),
            out_shardings=split,
            donate_argnums=3,
        ),
        jax.jit(augment.unscale, in_shardings=split, out_shardings=whole),
        ts,
        size,
        sampler.evaluations(len(ts) - 1),
        config.sample.label,
    )


def steps_of(chain: CompiledSampler, n: int) -> int:
    """How many steps of the chain n samples take, one batch after the other."""
    return -(-n // chain.size) * (len(chain.ts) - 1)


def draw(
    chain: CompiledSampler,
    params: Any,
    seed: int,
    n: int,
    report: Callable[[int], None] = lambda done: None,
    stopped: Callable[[], bool] = lambda: False,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Samples first..n-1 of a seed, uint8[<= size, h, w, c] at a time.

    A chain is walked in up to 25 parts of one length, so that a long wait can be watched: `report`
    is told the steps done, and once `stopped()` is true no more images come.
    """
    steps, done = len(chain.ts) - 1, 0
    length = _part(steps)
    for at in range(first, n, chain.size):
        indices = np.arange(at, at + chain.size, dtype=np.int32)
        keys, label, carry = chain.start(np.uint32(seed), np.int32(chain.label), indices)
        for i in range(0, steps, length):
            carry = chain.advance(params, keys, label, carry, chain.ts[i : i + length + 1])
            jax.block_until_ready(carry)
            report(done := done + length)
            if stopped():
                return
        yield np.asarray(chain.finish(carry.x))[: n - at]


class SampleStore(NamedTuple):
    """A set of samples on its way to folder/samples.npz, which is there when it is complete.

    setting: all that the images follow from. Until then their bytes lie in samples.part, and
    samples.json says how many of them count, with their SHA-256.
    """

    folder: pathlib.Path
    setting: dict[str, Any]
    shape: tuple[int, int, int]

    @property
    def npz(self) -> pathlib.Path:
        return self.folder / "samples.npz"

    @property
    def part(self) -> pathlib.Path:
        return self.folder / "samples.part"

    @property
    def note(self) -> pathlib.Path:
        return self.folder / "samples.json"


def setting_of(config: ConfigDict, step: int, weights: str, seed: int) -> dict[str, Any]:
    """What decides each image: the trained model, its weights, the sampler, the label, the seed."""
    flat = flatten(json.loads(json.dumps(config.to_dict())))
    free = [k for k in flat if k.startswith(FREE) and not k.startswith("sampler.")]
    own = {
        "step": step,
        "weights": weights,
        "sample.seed": seed,
        "sample.label": config.sample.label,
    }
    return {key: value for key, value in flat.items() if key not in free} | own


def name_of(setting: dict[str, Any]) -> str:
    """A name for a set of samples, another one for every setting: ema_seed0_ddim20_3fa9c1."""
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:6]
    times = setting["sampler.times"]
    sampler = f"{setting['sampler.name']}{len(times) or setting['sampler.steps']}"
    label = f"_label{setting['sample.label']}" if setting["sample.label"] >= 0 else ""
    return f"{setting['weights']}_seed{setting['sample.seed']}{label}_{sampler}_{digest}"


def seconds_for(chain: CompiledSampler, params: Any, n: int) -> float:
    """About how long n images take, from a few of the first steps, once these are compiled."""
    length = _part(len(chain.ts) - 1)
    keys, label, carry = chain.start(
        np.uint32(0), np.int32(chain.label), np.arange(chain.size, dtype=np.int32)
    )
    for timed in (False, True):
        began = time.monotonic()
        carry = chain.advance(params, keys, label, carry, chain.ts[: length + 1])
        jax.block_until_ready(carry)
        if timed:
            return (time.monotonic() - began) / length * steps_of(chain, n)
    return 0.0


def _part(steps: int) -> int:
    """Into what equal parts a walk is cut: 25 at most."""
    return min(k for k in range(1, steps + 1) if steps % k == 0 and steps // k <= 25)


def keep(kept: SampleStore, chain: CompiledSampler, params: Any, n: int) -> None:
    """Draws what is missing of n samples and completes samples.npz. Every process takes part.

    Raises DDPMError where what lies there is of another setting, or damaged.
    """
    first = jax.process_index() == 0
    done, digest = _agreed(kept, n)
    if done >= n and kept.npz.exists():
        return
    with (
        _appending(kept, done) if first else open(os.devnull, "wb") as file,
        Progress(max(1, steps_of(chain, n - done)), unit="step", silent=not first) as shown,
    ):
        for images in draw(chain, params, kept.setting["sample.seed"], n, shown, first=done):
            done += len(images)
            if first:
                content = images.tobytes()
                digest.update(content)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the note must not know of more than is there
                _write_note(kept, done, digest.hexdigest())
    if first:
        save_npz(kept.npz, np.memmap(kept.part, np.uint8, "r", shape=(done, *kept.shape)))
        kept.part.unlink()
    multihost_utils.sync_global_devices("samples.npz is there")


def delete(kept: SampleStore) -> None:
    """Removes a set of samples, whole or not."""
    for path in (kept.note, kept.part, kept.npz):
        path.unlink(missing_ok=True)


def is_partial(kept: SampleStore) -> bool:
    """Whether a part of this very set is there."""
    try:
        return kept.part.exists() and json.loads(kept.note.read_text())["setting"] == kept.setting
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _appending(kept: SampleStore, done: int) -> BinaryIO:
    """samples.part, open behind the images that count."""
    kept.folder.mkdir(parents=True, exist_ok=True)
    file = open(kept.part, "r+b" if done else "wb")
    file.seek(done * int(np.prod(kept.shape)))
    file.truncate()
    return file


def _write_note(kept: SampleStore, done: int, digest: str) -> None:
    note = {"images": done, "sha256": digest, "setting": kept.setting}
    save_text(kept.note, json.dumps(note, indent=2) + "\n")


def _agreed(kept: SampleStore, n: int):
    """(images that count, the running SHA-256 of their bytes), as process 0 found them."""
    done, digest, error = -1, None, None
    if jax.process_index() == 0:
        try:
            done, digest = _found(kept, n)
        except DDPMError as fatal:
            error = fatal
    done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    if done < 0:
        raise error or WorkdirError(f"{kept.folder}: process 0 refused it")
    return done, digest


def _found(kept: SampleStore, n: int):
    digest = hashlib.sha256()
    try:
        note = json.loads(kept.note.read_text())
        done, expected, setting = int(note["images"]), note["sha256"], dict(note["setting"])
    except FileNotFoundError:
        return 0, digest
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"cannot be read: {' '.join(str(error).split())}"
        raise WorkdirError(f"{kept.note}: {what}; delete its folder") from error
    if changed := differences(setting, kept.setting, free=()):
        what = f"holds samples of another setting: {'; '.join(changed)}"
        raise WorkdirError(f"{kept.folder} {what}; delete it")
    images = _bytes_of(kept, done)
    for i in range(0, len(images), 1000):
        digest.update(np.ascontiguousarray(images[i : i + 1000]).data)
    if len(images) < done or digest.hexdigest() != expected:
        what = f"expected {done:,} samples of SHA-256 {expected[:16]}, found others"
        raise WorkdirError(f"{kept.folder}: {what}; delete it")
    if done < n and not kept.part.exists():  # a finished set is to grow
        save_bytes(kept.part, images.tobytes())
    return done, digest


def _bytes_of(kept: SampleStore, done: int) -> np.ndarray:
    """uint8[done, h, w, c], or fewer where they are missing."""
    if kept.part.exists():
        width = int(np.prod(kept.shape))
        n = min(done, kept.part.stat().st_size // width)
        return np.memmap(kept.part, np.uint8, "r", shape=(n, *kept.shape)) if n else np.empty(0)
    try:
        with np.load(kept.npz) as file:
            return file["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return np.empty(0)


def describe(config: ConfigDict) -> str:
    """The sampler, for a line of the console."""
    c = config.sampler
    words = [c.name, f"{len(c.times) or c.steps} steps"]
    if c.variance:
        words.append(f"variance {c.variance}")
    if c.guidance:
        words.append(f"guidance {c.guidance:g}")
        if not config.train.label_dropout:
            words.append("by a model that was never trained without a label")
    return ", ".join(words)
