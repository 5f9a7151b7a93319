"""Drawing for all modes: compiled samplers, and sets of samples on disk that survive a kill.

Image i is a function of the seed, i, the sampler and the weights. It depends on neither the batch
nor the devices, so that a set can be resumed at any image and extended later.
"""

import functools
import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import random
from ml_collections import ConfigDict

from diffusion import experiment, process
from diffusion.data import augment
from diffusion.experiment import Experiment
from diffusion.modes._common import Trained, load_trained, weights_in_files
from diffusion.runtime import preemption, workdir
from diffusion.runtime.config import (
    TRAINING_KEYS,
    Run,
    differences,
    flatten,
    with_overrides,
    without_younger_defaults,
)
from diffusion.samplers import editing
from diffusion.sharding import batch_sharded, replicated
from diffusion.utils import digests, io, logging, partial_results
from diffusion.utils.errors import one_line
from diffusion.utils.multihost import barrier, broadcast_from_primary, is_primary
from diffusion.utils.progress import Progress

MAX_PARTS = 25  # of a chain; after each, progress is reported and a stop request is followed
PART_S = 0.5  # a part that takes less is followed by one twice as long


def load_for_sampling(run: Run, exp: Experiment) -> Trained:
    """Restores the config's weights, and measures the variance of sampler.variance=analytic.

    Raises ConfigError for a wrong sampler before anything is read, WorkdirError, DataError.
    """
    experiment.make_sampler(run.config, exp)
    trained = load_trained(run, exp)
    if run.config.sampler.variance != experiment.ANALYTIC:
        return trained
    from diffusion.modes import _split_pass  # with the likelihood's code, for this case alone

    return _split_pass.with_analytic(trained)


# Compiled samplers


class CompiledSampler(NamedTuple):
    """Compiled functions that draw `size` images at a time, sharded over the devices.

    Attributes:
      start: (seed uint32[], label int32[] or int32[b], indices int32[b], fork uint32[b] or None,
        x or None) -> (keys, labels, state at x). Label -1 stands for all classes in turn; forks of
        an image differ in the noise after the start; x is x_T by default.
      advance: (params, keys, labels, state, i int32[], j int32[]) -> state taken from ts[i] to
        ts[j], by one program for all i and j. The state is donated.
      finish: x_0 float32[b, h, w, c] -> uint8[b, h, w, c], replicated.
      ts: int32[steps + 1], falling from T to 0.
      evaluations: network evaluations per image.
      label: sample.label.
      x_T: float32[n, h, w, c] that images 0..n-1 start from; None: noise of the seed.
    """

    start: Callable
    advance: Callable
    finish: Callable
    ts: np.ndarray
    size: int
    evaluations: int
    label: int
    x_T: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.ts) - 1


def compile_sampler(config: ConfigDict, exp: Experiment, batch_size: int) -> CompiledSampler:
    """Builds the config's sampler for batch_size images, rounded up to a multiple of the devices.

    Raises ConfigError.
    """
    sampler, ts = experiment.make_sampler(config, exp)
    predictor = experiment.make_predictor(config, exp)
    size = -(-batch_size // exp.mesh.size) * exp.mesh.size
    classes, evaluations = max(config.model.num_classes, 1), sampler.evaluations(len(ts) - 1)
    whole, split = replicated(exp.mesh), batch_sharded(exp.mesh)

    def start(seed, label, indices, fork=None, x=None):
        indices = jax.lax.with_sharding_constraint(indices, split)
        keys = jax.vmap(random.fold_in, (None, 0))(random.key(seed), indices)
        if x is None:
            x = process.sample_noise(keys, 0, jnp.zeros((len(indices), *exp.image_shape)))
        keys = keys if fork is None else jax.vmap(editing.fork_key)(keys, fork)
        return keys, jnp.where(label < 0, indices % classes, label), sampler.init(x)

    def advance(params, keys, labels, state, i, j):
        return editing.advance_between(sampler, predictor(params, labels), keys, state, ts, i, j)

    finish = functools.partial(augment.unscale, levels=exp.levels)
    finish = jax.jit(finish, in_shardings=split, out_shardings=whole)
    start, advance = compile_chain(exp, start, advance)
    return CompiledSampler(start, advance, finish, ts, size, evaluations, config.sample.label)


def compile_chain(exp: Experiment, start: Callable, advance: Callable) -> tuple[Callable, Callable]:
    """Compiles the first two functions of a CompiledSampler."""
    whole, split = replicated(exp.mesh), batch_sharded(exp.mesh)
    shardings = (whole, split, split, split, whole, whole)
    start = jax.jit(start, in_shardings=whole, out_shardings=split)
    return start, jax.jit(advance, in_shardings=shardings, out_shardings=split, donate_argnums=3)


def iterate_states(
    sampler: CompiledSampler,
    params: Any,
    start: tuple[Any, Any, Any],
    positions: Sequence[int],
    report: Callable[[int], None] | None = None,
    done: int = 0,
) -> Iterator[Any]:
    """Yields a batch's state at each position, valid until the next one is asked for.

    All processes take part. Raises preemption.Stopped.

    Args:
      start: (keys, labels, state at positions[0]).
      positions: rising indices of sampler.ts.
      report: called with `done` plus the steps taken, after each part of the chain; None: where
        nobody watches, all steps to a position are one dispatch.
    """
    keys, labels, state = start
    length, i = -(-sampler.steps // MAX_PARTS) if report else sampler.steps, positions[0]
    for position in positions:
        while i < position:
            began, j = time.monotonic(), min(i + length, position)
            state = sampler.advance(params, keys, labels, state, np.int32(i), np.int32(j))
            jax.block_until_ready(state)
            short = j - i == length and time.monotonic() - began < PART_S
            if broadcast_from_primary(short):  # one process decides for all: clocks differ
                length *= 2
            done, i = done + j - i, j
            if report:
                report(done)
            preemption.raise_if_requested()
        yield state


def draw(
    sampler: CompiledSampler,
    params: Any,
    seed: int,
    n: int,
    report: Callable[[int], None] | None = None,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Draws images first..n-1 of a seed, uint8[<= size, h, w, c] at a time.

    All processes take part. report: called with the steps done. Raises preemption.Stopped.
    """
    for batch, at in enumerate(range(first, n, sampler.size)):
        indices, done = np.arange(at, at + sampler.size, dtype=np.int32), batch * sampler.steps
        x = () if sampler.x_T is None else (None, sampler.x_T.take(indices, 0, mode="clip"))
        start = sampler.start(np.uint32(seed), np.int32(sampler.label), indices, *x)
        *_, state = iterate_states(sampler, params, start, (0, sampler.steps), report, done)
        yield np.asarray(sampler.finish(state.x))[: n - at]


def num_steps(sampler: CompiledSampler, n: int) -> int:
    """Returns the steps that n images take, one batch after the other."""
    return -(-n // sampler.size) * sampler.steps


def estimate_seconds(sampler: CompiledSampler, params: Any, n: int) -> float:
    """Returns about how long n images take; times a few steps of one batch, once compiled."""
    indices, few = np.arange(sampler.size, dtype=np.int32), -(-sampler.steps // MAX_PARTS)
    keys, labels, state = sampler.start(np.uint32(0), np.int32(sampler.label), indices)
    for steps in (1, few):  # the first one compiles
        began = time.monotonic()
        state = sampler.advance(params, keys, labels, state, np.int32(0), np.int32(steps))
        jax.block_until_ready(state)
    return (time.monotonic() - began) / few * num_steps(sampler, n)


def preview_config(config: ConfigDict, exp: Experiment) -> ConfigDict:
    """Returns the config with the quick sampler of train.preview."""
    c, p = config.train.preview, exp.process
    noise = p.alpha_bar[-1] == 0  # of which the log SNR is -inf
    grid = "uniform" if noise and c.grid in ("logsnr", "karras") else c.grid
    keys = {"name": c.sampler, "steps": min(c.steps, p.T), "grid": grid, "times": ()}
    return with_overrides(config, {f"sampler.{key}": value for key, value in keys.items()})


def describe_sampler(config: ConfigDict) -> str:
    """Returns the sampler in words, `ddim, 50 steps, guidance 2.0`."""
    c = config.sampler
    words = [c.name, f"{len(c.times) or c.steps} steps"]
    words += [f"{key} {c[key]}" for key in ("variance", "guidance") if c[key]]
    if c.times and max(c.times) < config.process.T:
        words.append(f"from noise at t = {max(c.times):,} in place of T = {config.process.T:,}")
    if c.guidance and config.train.steps and not config.train.label_dropout:
        words.append("by a model that was never trained without labels")
    return ", ".join(words)


# Sets of samples on disk


class SampleStore(NamedTuple):
    """A set of samples in a folder: samples.npz once it is complete, a file per batch until then.

    setting: what the images are a function of, also kept in samples.json; shape: their (h, w, c).
    """

    folder: epath.Path
    setting: dict[str, Any]
    shape: tuple[int, int, int]

    @property
    def npz(self) -> epath.Path:
        return self.folder / "samples.npz"

    def read(self) -> np.ndarray:
        """Returns the images of samples.npz, uint8[n, h, w, c]."""
        with io.open_binary(self.npz) as file:  # np.load leaks one that is damaged
            return np.load(file)["arr_0"]


def sample_setting(config: ConfigDict, step: int, weights: str, seed: int) -> dict[str, Any]:
    """Returns all that an image depends on besides its index, as JSON has it."""
    flat = without_younger_defaults(flatten(config))  # so that folders keep their names
    flat = json.loads(json.dumps(flat))  # tuples become lists
    keys = (*TRAINING_KEYS, "sampler.", "sample.label")
    setting = {key: value for key, value in flat.items() if key.startswith(keys)}
    return setting | {"step": step, "weights": weights, "sample.seed": seed}


def sample_name(setting: dict[str, Any]) -> str:
    """Returns a folder's name, ema_seed0_ddim20_3fa9c1, that ends in the setting's digest.

    The setting of a set that starts from given noise has the noise's SHA-256 as x_T.
    """
    steps = len(setting["sampler.times"]) or setting["sampler.steps"]
    label = f"_label{setting['sample.label']}" if setting["sample.label"] >= 0 else ""
    noise = f"_noise{setting['x_T'][:6]}" if "x_T" in setting else ""
    name = f"{weights_in_files(setting['weights'])}_seed{setting['sample.seed']}{label}{noise}"
    return f"{name}_{setting['sampler.name']}{steps}_{setting_digest(setting)}"


def setting_digest(setting: dict[str, Any]) -> str:
    """Returns six hexadecimal digits that stand for a setting."""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:6]


def fill(store: SampleStore, sampler: CompiledSampler, params: Any, n: int) -> None:
    """Draws what is missing of n images and completes store.npz; a larger set stays as it is.

    All processes take part. Raises WorkdirError for a set of another setting and for a damaged npz;
    a damaged batch is drawn again. Raises preemption.Stopped.
    """
    parts, problem = _load_parts(store) if is_primary() else ([], "")
    workdir.raise_together(problem)
    done = broadcast_from_primary(sum(map(len, parts)))
    if done:
        action = "resuming  " if done < n else "keeping   "
        logging.info(f"{action} {done:,} samples in {store.folder}; {n:,} are asked for")
    if done < n:
        seed, steps = store.setting["sample.seed"], num_steps(sampler, n - done)
        rate = sampler.size / sampler.steps  # images per step
        with Progress(steps, batch_size=rate, unit="sampling step") as progress:
            for images in draw(sampler, params, seed, n, progress, first=done):
                if is_primary():
                    io.save_json(store.folder / "samples.json", {"setting": store.setting})
                    partial_results.save(*_part(store, done), images=images)
                    parts.append(images)
                done += len(images)
    if is_primary():
        if len(parts) > 1:
            io.save_npz(store.npz, np.concatenate(parts))
            note = {"setting": store.setting, "sha256": digests.sha256_of_file(store.npz)}
            io.save_json(store.folder / "samples.json", note)
        for path in store.folder.glob("part_*.npz"):
            path.unlink()
    barrier("samples.npz is complete")


def _part(store: SampleStore, first: int) -> tuple[epath.Path, str]:
    """Returns the file of the batch that begins with image `first`, and the setting inside it."""
    return store.folder / f"part_{first:08d}.npz", json.dumps(store.setting, sort_keys=True)


def _load_parts(store: SampleStore) -> tuple[list[np.ndarray], str]:
    """Returns the images on disk, samples.npz (or nothing) first, and what is wrong with them."""
    complete = np.empty((0, *store.shape), np.uint8)
    try:
        note = json.loads((store.folder / "samples.json").read_text())
        if changed := differences(note["setting"], store.setting, keys=("",)):
            what = f"holds samples of another setting: {'; '.join(changed)}"
            return [], f"{store.folder}: {what}; delete it"
        if store.npz.exists():
            found = digests.sha256_of_file(store.npz)
            if note.get("sha256", found) != found:  # there is none while the set grows
                what = f"expected samples.npz of SHA-256 {note['sha256'][:16]}, found another"
                return [], f"{store.folder}: {what}; delete it"
            complete = store.read()
    except FileNotFoundError:
        return [complete], ""
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        return [], f"{store.folder}: cannot be read: {one_line(error)}; delete it"
    parts = [complete]
    while found := partial_results.load(*_part(store, sum(map(len, parts)))):
        parts.append(found["images"])
    return parts, ""
