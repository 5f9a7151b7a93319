"""What figures show: trajectories of images along a chain, and real images."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.data import augment
from diffusion.experiment import Experiment
from diffusion.modes._common import Trained, batch_size
from diffusion.modes._sampling import CompiledSampler, compile_sampler, iterate_states
from diffusion.samplers import base
from diffusion.sharding import batch_sharded, replicated
from diffusion.utils.errors import DataError
from diffusion.utils.progress import Progress


class FigureContext(NamedTuple):
    """What a figure is drawn with.

    Attributes:
      score: uint8[n, h, w, c] -> {name: distance to the data}; None: nothing is measured.
      features: {name: function from uint8[b, h, w, c] to float32[b, d]}, besides pixels.
    """

    trained: Trained
    sampler: CompiledSampler
    score: Callable[[np.ndarray], dict[str, float]] | None
    features: dict[str, Callable[[np.ndarray], np.ndarray]]

    @property
    def config(self) -> ConfigDict:
        return self.trained.config


class Trajectories(NamedTuple):
    """n images that are advanced together.

    Attributes:
      positions: rising indices of ts: the start, and where else they are recorded.
      index: int[n], the numbers of the samples; equal ones have the same x_T.
      fork: uint32[n]; another fork draws other noise after the start. None: 0.
      label: int32[n]; None: those that --mode=sample gives to the numbers.
      x: float32[n, h, w, c] to start from; None: x_T.
    """

    positions: Sequence[int]
    index: Sequence[int]
    fork: np.ndarray | None = None
    label: np.ndarray | None = None
    x: np.ndarray | None = None


def make_context(trained: Trained, score=None, features=None) -> FigureContext:
    """Builds the context of all figures. Raises ConfigError."""
    config = trained.config
    sampler = compile_sampler(config, trained.exp, config.sample.batch_size)
    return FigureContext(trained, sampler, score, features or {})


def read_real(config: ConfigDict, exp: Experiment, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads n images uint8[n, h, w, c] of figures.split, chosen by figures.seed, and their labels.

    Raises DataError.
    """
    c = config.figures
    images = experiment.load_split(config, exp, c.split)
    if n > images.n:
        message = f"figures: expected {n} images in {c.split} to choose from, found {images.n}"
        raise DataError(f"{message}; lower figures.rows")
    return images.read(np.random.default_rng(c.seed).permutation(images.n)[:n])


def observe_images(levels: int, state: base.SamplerState) -> tuple[Array, Array]:
    """Returns x_t and the predicted x_0 as uint8[n, h, w, c]."""
    return augment.unscale(state.x, levels), augment.unscale(state.x_0, levels)


def rollout(
    context: FigureContext,
    starts: Sequence[Trajectories],
    observe: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Advances trajectories and records them; all processes take part.

    Args:
      observe: state -> arrays [n, ...], what is recorded; None: `observe_images`.

    Returns:
      The recorded arrays of each of `starts`, [positions, n, ...], in every process.
    """
    trained, sampler, seed = context.trained, context.sampler, context.config.figures.seed
    split, whole = batch_sharded(trained.exp.mesh), replicated(trained.exp.mesh)
    observe = observe or functools.partial(observe_images, context.trained.exp.levels)
    observe = jax.jit(observe, in_shardings=split, out_shardings=whole)
    batches = [list(_batches(context, start)) for start in starts]
    steps = [start.positions[-1] - start.positions[0] for start in starts]
    results, done, total = [], 0, sum(len(b) * k for b, k in zip(batches, steps, strict=True))
    with Progress(max(1, total), unit="step") as progress:
        for start, parts, length in zip(starts, batches, steps, strict=True):
            records = []
            for part in parts:
                begun, at = sampler.start(np.uint32(seed), *part), start.positions
                states = iterate_states(sampler, trained.params, begun, at, progress, done)
                record = [jax.device_get(observe(state)) for state in states]
                records.append(jax.tree.map(lambda *a: np.stack(a), *record))
                done += length
            n = len(start.index)
            results.append(jax.tree.map(lambda *a, n=n: np.concatenate(a, 1)[:, :n], *records))
    return results


def _batches(context: FigureContext, start: Trajectories) -> Iterator[tuple]:
    """Yields (label, indices, fork, x) of batches of one size, padded with the last image."""
    n, label = len(start.index), start.label
    size = batch_size(context.trained.exp, context.sampler.size, n)
    label = np.full(n, context.sampler.label) if label is None else label
    for at in range(0, n, size):
        rows = np.minimum(at + np.arange(size), n - 1)
        fork, x = (a if a is None else a[rows] for a in (start.fork, start.x))
        yield label[rows].astype(np.int32), np.asarray(start.index, np.int32)[rows], fork, x


def first_samples(context: FigureContext, n: int, positions: Sequence[int]):
    """Returns x_t and predicted x_0 of the seed's first n samples, uint8[positions, n, h, w, c]."""
    return rollout(context, [Trajectories(positions, np.arange(n))])[0]
