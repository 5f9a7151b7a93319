"""Passes over a split of the data: what is averaged over images, resumable and sharded.

The noise of an image is a function of the seed and the image's number in its split, so results
depend neither on batches nor on devices.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, random

from diffusion import data, experiment, process, targets
from diffusion.data import augment, loader
from diffusion.experiment import Experiment
from diffusion.modes._common import Trained, batch_size
from diffusion.process import Process
from diffusion.runtime import preemption
from diffusion.runtime.config import with_overrides
from diffusion.samplers import analytic, stratified, timesteps
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils import logging, partial_results
from diffusion.utils.errors import DataError
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import Progress

READ_FRACTION = 10  # a quick reading of the bound evaluates T / READ_FRACTION times


class MeanAndStderr(NamedTuple):
    """A mean over images and its standard error, float64 of an image's shape."""

    mean: np.ndarray
    error: np.ndarray


def mean_and_stderr(values: np.ndarray) -> MeanAndStderr:
    """Returns the mean over axis 0 of n independent images' values [n, ...], and its error.

    The error is of the mean over all possible images, of which these n are a sample. Raises
    ValueError for n < 2.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"mean_and_stderr: expected two or more images, found {len(values)}")
    return MeanAndStderr(values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)))


class ChainModel(NamedTuple):
    """A chain, and (params, label int[b]) -> Predict on it."""

    process: Process
    predictor: Callable[[Any, Array], targets.Predict]


def trained_chain(trained: Trained, variance: targets.Variance | None = None) -> ChainModel:
    """Returns the chain of the training with x_0 clipped as in sampling, without guidance.

    variance: of the reverse steps; None: the trained one.
    """
    config, exp = trained.config, trained.exp
    config = with_overrides(config, {"sampler.guidance": 0.0, "sampler.threshold": 0.0})
    predictor = experiment.make_predictor(config, exp, variance or exp.variance)
    return ChainModel(exp.process, predictor)


def respaced_chain(chain: ChainModel, variance: targets.Variance, ts: np.ndarray) -> ChainModel:
    """Returns the same network on the chain that visits only the times ts."""

    def predictor(params, label):
        return timesteps.respace_predict(
            chain.process, chain.predictor(params, label), variance, ts
        )

    return ChainModel(process.respace(chain.process, ts), predictor)


class SplitBatch(NamedTuple):
    """Images uint8[b, h, w, c], labels int32[b], numbers in the split uint32[b]; sharded."""

    image: Array
    label: Array
    number: Array


class SplitPass(NamedTuple):
    """A pass over the first n images of a split, `size` at a time.

    seed: of the images' noise. setting: identifies what is accumulated, for resuming.
    """

    images: data.ImageDataset
    n: int
    size: int
    seed: int
    exp: Experiment
    setting: str = ""

    def compile(self, chain: ChainModel, reading: Callable) -> Callable:
        """Compiles (params, batch) -> reading(process, predict, keys, x_0), e.g. vlb_terms."""
        whole, sharded = replicated(self.exp.mesh), batch_sharded(self.exp.mesh)

        def on_batch(params, batch):
            predict = chain.predictor(params, batch.label)
            x_0 = augment.scale(batch.image)
            return reading(chain.process, predict, self.keys(batch), x_0)

        return jax.jit(on_batch, in_shardings=(whole, sharded), out_shardings=whole)

    def keys(self, batch: SplitBatch) -> Array:
        """Returns one key per image, a function of its number."""
        return jax.vmap(random.fold_in, (None, 0))(random.key(self.seed), batch.number)

    def batches(self, first: int = 0) -> Iterator[tuple[SplitBatch, int]]:
        """Yields batches from the `first` on, and how many of each one's images count."""
        sharding = batch_sharded(self.exp.mesh)
        rows = local_rows(sharding, self.size)
        images = self.images._replace(n=self.n)
        split = loader.iterate_split(images, self.size, rows, first=first)
        for i, (image, label, _) in enumerate(split, first):
            preemption.raise_if_requested()
            number = (i * self.size + np.arange(self.size)).astype(np.uint32)[rows]
            arrays = (image, label, number)
            shapes = [(self.size, *a.shape[1:]) for a in arrays]
            parts = map(make_global_array, arrays, [sharding] * 3, shapes)
            yield SplitBatch(*parts), min(self.size, self.n - i * self.size)


def make_pass(trained: Trained, split: str, n: int) -> SplitPass:
    """Opens the first n images of a split, 0: all, with config.bpd's batches and seed.

    Raises DataError.
    """
    config, exp = trained.config, trained.exp
    images = experiment.load_split(config, exp, split)
    if n > images.n:
        raise DataError(f"bpd: expected at most the {images.n} images of {split}, found {n}")
    n = n or images.n
    size = batch_size(exp, config.bpd.batch_size, n)
    setting = json.dumps(config.to_dict(), sort_keys=True)
    return SplitPass(images, n, size, config.bpd.seed, exp, f"{n} {size} {setting}")


class RunningSums(NamedTuple):
    """Sums of the values of n images and of their squares, in float64."""

    n: int = 0
    total: Any = 0.0
    square: Any = 0.0

    def add(self, values: np.ndarray) -> "RunningSums":
        """Returns the sums with the values [b, ...] of b more images."""
        values = values.astype(np.float64)
        squares = (values**2).sum(0)
        return RunningSums(self.n + len(values), self.total + values.sum(0), self.square + squares)

    def mean_and_stderr(self) -> MeanAndStderr:
        """Returns the mean and its standard error of each value."""
        mean = self.total / self.n
        variance = np.maximum(self.square / self.n - mean**2, 0)
        return MeanAndStderr(mean, np.sqrt(variance / max(self.n - 1, 1)))


def accumulate(
    work: SplitPass,
    run: Callable[[SplitBatch], np.ndarray],
    path: pathlib.Path,
    progress: Callable[[int], None],
) -> RunningSums:
    """Sums run(batch) -> [b, ...] over a pass, which resumes from `path` after an interruption."""
    stored = partial_results.load(path, work.setting)
    done, sums = 0, RunningSums()
    if stored:
        done = int(stored["done"])
        sums = RunningSums(int(stored["n"]), stored["total"], stored["square"])
        progress(sums.n)
    saved = time.monotonic()
    for batch, real in work.batches(done):
        sums, done = sums.add(run(batch)[:real]), done + 1
        progress(sums.n)
        due = time.monotonic() - saved > partial_results.SAVE_EVERY_S
        if is_primary() and (due or sums.n == work.n):
            partial_results.save(path, work.setting, done=done, **sums._asdict())
            saved = time.monotonic()
    return sums


def measure_optimal_variance(
    work: SplitPass, chain: ChainModel, params: Any
) -> analytic.OptimalVariance:
    """Measures the variances that give these images the least bound; shows progress."""
    read = work.compile(chain, analytic.timestep_errors)

    def errors(progress):
        done = 0
        for batch, real in work.batches():
            out = jax.device_get(read(params, batch))
            yield analytic.TimestepErrors(*(a[:real] for a in out))
            progress(done := done + real)

    logging.info(f"measuring  optimal variances on {work.n:,} training images")
    with Progress(work.n, unit="image") as progress:
        return analytic.optimal_variance(chain.process, errors(progress))


def with_analytic(trained: Trained) -> Trained:
    """Returns the model with the variance that sampler.variance names for its samples.

    "analytic" (Bao et al. 2022, arXiv:2201.06503) is measured on sampler.estimate training images,
    once for each checkpoint, and kept in workdir/eval/STEP/analytic_WEIGHTS.npz. Raises DataError.
    """
    config, exp = trained.config, trained.exp
    if config.sampler.variance != experiment.ANALYTIC:
        return trained
    images = experiment.load_split(config, exp)
    work = make_pass(trained, "train", min(config.sampler.estimate, images.n))
    folder = trained.workdir / "eval" / f"{trained.step:08d}"
    path = folder / f"analytic_{trained.weights}.npz"
    setting = f"{work.n} images, {config.bpd.seed}, {config.sampler.clip}"
    tables = partial_results.load(path, setting)
    if tables is None:
        best = measure_optimal_variance(work, trained_chain(trained), trained.params)
        tables = {"x0_variance": best.x0_variance, "decoder": best.decoder}
        if is_primary():
            partial_results.save(path, setting, **tables)
    variance = analytic.analytic_variance(tables["x0_variance"], tables["decoder"])
    return trained._replace(exp=exp._replace(sample_variance=variance))


def make_bpd_fn(trained: Trained) -> Callable[[Any], MeanAndStderr]:
    """Builds params -> the bound of the first bpd.quick images of bpd.split, in bits/dim.

    It evaluates a tenth of the times, is unbiased (samplers.stratified) and always draws the
    same noise, so that what changes during a training is the model.
    """
    config, T = trained.config, trained.exp.process.T
    available = experiment.load_split(config, trained.exp, config.bpd.split).n
    work = make_pass(trained, config.bpd.split, min(config.bpd.quick, available))
    edges = stratified.timestep_strata(T, max(T // READ_FRACTION, min(2, T)))
    reading = functools.partial(stratified.stratified_vlb, edges=edges)
    read = work.compile(trained_chain(trained), reading)

    def bits_per_dim(params):
        bits = [jax.device_get(read(params, batch))[:real] for batch, real in work.batches()]
        return mean_and_stderr(np.concatenate(bits))

    return bits_per_dim
