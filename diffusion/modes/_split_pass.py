"""Passes over a split of the data: what is averaged over images, resumable and sharded.

The noise of an image is a function of the seed and the image's number in its split, so results
depend neither on batches nor on devices.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import Array, random

from diffusion import continuous, data, experiment, process, targets
from diffusion.data import augment, loader
from diffusion.experiment import Experiment
from diffusion.modes._common import Trained, batch_size, weights_in_files
from diffusion.process import Process
from diffusion.runtime import preemption
from diffusion.runtime.config import with_overrides
from diffusion.samplers import analytic, stratified, timesteps
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils import logging, partial_results
from diffusion.utils.errors import DataError
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import QUIET_S, Progress, human_time

READ_FRACTION = 10  # a quick reading of the bound evaluates T / READ_FRACTION times
# Of sampler.variance=analytic. An error of 5% in a variance costs a step 0.05^2 / 4 nats/dim.
TOLERANCE, CHECK_EVERY = 0.05, 32  # asked after so many images
STOPS = 25  # of a batch, in between its times, where a stop request is followed


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

    def compile(self, chain: ChainModel, reading: Callable, more: int = 0) -> Callable:
        """Compiles (params, batch, *more) -> reading(process, predict, keys, x_0, *more).

        The reading gets the number of levels by name.
        """
        whole, sharded = replicated(self.exp.mesh), batch_sharded(self.exp.mesh)

        def on_batch(params, batch, *more):
            predict = chain.predictor(params, batch.label)
            x_0, levels = augment.scale(batch.image, self.exp.levels), self.exp.levels
            return reading(chain.process, predict, self.keys(batch), x_0, *more, levels=levels)

        shardings = (whole, sharded, *[whole] * more)
        return jax.jit(on_batch, in_shardings=shardings, out_shardings=whole)

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
    path: epath.Path,
    progress: Callable[[int], None],
    enough: Callable[[RunningSums], bool] = lambda sums: False,
) -> RunningSums:
    """Adds up run(batch) -> [b, ...] over a pass, which resumes from `path` after an interruption.

    progress: called with the images done; enough: whether the pass may end after so many.
    """
    stored = partial_results.load(path, work.setting)
    done, sums = 0, RunningSums()
    if stored:
        done = int(stored["done"])
        sums = RunningSums(int(stored["n"]), stored["total"], stored["square"])
        progress(sums.n)
    saved = time.monotonic()
    for batch, real in () if stored and enough(sums) else work.batches(done):
        sums, done = sums.add(run(batch)[:real]), done + 1
        progress(sums.n)
        due, last = time.monotonic() - saved > partial_results.SAVE_EVERY_S, enough(sums)
        if is_primary() and (due or last or sums.n == work.n):
            partial_results.save(path, work.setting, done=done, **sums._asdict())
            saved = time.monotonic()
        if last:
            break
    return sums


class MeasuredVariance(NamedTuple):
    """Optimal variances, of how many images, and their largest relative standard error over t."""

    optimum: analytic.OptimalVariance
    images: int
    error: float

    def __str__(self) -> str:
        return f"of {self.images:,} training images, standard error {self.error:.1%} at most"


def measure_optimal_variance(
    work: SplitPass, chain: ChainModel, params: Any, path: epath.Path, tolerance: float = 0.0
) -> MeasuredVariance:
    """Measures the variances that give these images the least bound; resumes from `path`.

    It says how long it will take, shows progress, and ends before all images are read where the
    standard error of each variance is within `tolerance` of it. Raises preemption.Stopped.
    """
    T, seen = chain.process.T, 0
    read = work.compile(chain, analytic.timestep_errors, 1)
    first, _ = next(work.batches())
    for _ in range(2):  # the first one compiles
        began = time.monotonic()
        jax.block_until_ready(read(params, first, np.array([1], np.int32)))
    seconds = (time.monotonic() - began) * T * -(-work.n // work.size)
    most = f"{'at most ' if tolerance else ''}{work.n:,} training images"
    logging.info(f"measuring  optimal variances on {most}, about {human_time(seconds)}")

    def run(batch):
        parts = []
        for t in range(1, T + 1):
            parts.append(jax.device_get(read(params, batch, np.array([t], np.int32))))
            progress(seen * T + min(work.size, work.n - seen) * t)
            if t % -(-T // STOPS) == 0:
                preemption.raise_if_requested()
        mse, decoder = (np.concatenate(part, 1) for part in zip(*parts, strict=True))
        return np.concatenate([mse[..., None], decoder], 2)

    def on_images(n):
        nonlocal seen
        seen = n
        progress(n * T)

    def relative_error(sums):
        mean, error = (table[:, 0] for table in sums.mean_and_stderr())
        return float((error / np.maximum(mean, np.finfo(np.float32).tiny)).max())

    def enough(sums):
        return sums.n % CHECK_EVERY == 0 and relative_error(sums) <= tolerance

    with Progress(work.n * T, unit="evaluation") as progress:
        sums = accumulate(work, run, path, on_images, enough)
    mean = sums.mean_and_stderr().mean[None]
    errors = analytic.TimestepErrors(mean[..., 0], mean[..., 1:])
    optimum = analytic.optimal_variance(chain.process, [errors])
    measured = MeasuredVariance(optimum, sums.n, relative_error(sums))
    logging.info(f"measured   optimal variances {measured}")
    return measured


def with_analytic(trained: Trained) -> Trained:
    """Returns the model with the variance that sampler.variance names for its samples.

    "analytic" is that of `kept_variances`. Raises DataError.
    """
    if trained.config.sampler.variance != experiment.ANALYTIC:
        return trained
    optimum = kept_variances(trained)
    variance = analytic.analytic_variance(optimum.x0_variance, optimum.decoder)
    return trained._replace(exp=trained.exp._replace(sample_variance=variance))


def kept_variances(trained: Trained) -> analytic.OptimalVariance:
    """Returns the optimal variances of Bao et al. 2022 (arXiv:2201.06503), measured if need be.

    They are measured on at most sampler.estimate training images, once for each checkpoint, and
    kept in workdir/eval/STEP/analytic_WEIGHTS.npz. Their noise follows from the training's seed.
    Raises DataError.
    """
    config, exp, c = trained.config, trained.exp, trained.config.sampler
    images = experiment.load_split(config, exp)
    n = min(c.estimate, images.n)
    size = batch_size(exp, min(config.bpd.batch_size, CHECK_EVERY), n)
    work = make_pass(trained, "train", n)._replace(size=size, seed=config.seed)
    folder = trained.workdir / "eval" / f"{trained.step:08d}"
    path = folder / f"analytic_{weights_in_files(trained.weights)}.npz"
    setting = f"{n} images, {TOLERANCE}, {c.clip and c.clip_range}"
    if kept := partial_results.load(path, setting):
        optimum = analytic.OptimalVariance(*map(kept.get, analytic.OptimalVariance._fields))
        measured = MeasuredVariance(optimum, int(kept["images"]), float(kept["error"]))
        logging.info(f"keeping    optimal variances {measured}")
        return optimum
    partial, chain = path.with_name(f"{path.stem}_partial.npz"), trained_chain(trained)
    measured = measure_optimal_variance(work, chain, trained.params, partial, TOLERANCE)
    if is_primary():
        more = {"images": measured.images, "error": measured.error}
        partial_results.save(path, setting, **more, **measured.optimum._asdict())
        partial.unlink(missing_ok=True)
    return measured.optimum


def compile_continuous(work: SplitPass, trained: Trained, levels: int) -> Callable:
    """Compiles (params, batch) -> the bound in continuous time by so many noise levels [b]."""
    exp = trained.exp
    chain = trained_chain(
        trained._replace(exp=exp._replace(process=continuous.cells(exp.process, levels)))
    )
    ends = continuous.gamma_ends(exp.process)

    def reading(*args, levels):
        return continuous.continuous_vlb(*args, levels, ends).sum(1)

    return work.compile(chain, reading)


def make_bpd_fn(trained: Trained) -> Callable[[Any], np.ndarray]:
    """Builds params -> bounds float[n] of the first bpd.quick images of bpd.split, in bits/dim.

    Each evaluates a tenth of the times, is unbiased (samplers.stratified) and always draws the
    same noise, so that what changes between two of them is the model.
    """
    config, T = trained.config, trained.exp.process.T
    available = experiment.load_split(config, trained.exp, config.bpd.split).n
    work = make_pass(trained, config.bpd.split, min(config.bpd.quick, available))
    times = max(T // READ_FRACTION, min(2, T))
    if trained.exp.continuous:
        read = compile_continuous(work, trained, times)
    else:
        edges = stratified.timestep_strata(T, times)
        reading = functools.partial(stratified.stratified_vlb, edges=edges)
        read = work.compile(trained_chain(trained), reading)

    def bits_per_dim(params):
        bits, done = [], 0
        with Progress(work.n, unit="image", quiet_s=QUIET_S) as progress:
            for batch, real in work.batches():
                bits.append(jax.device_get(read(params, batch))[:real])
                progress(done := done + real)
        return np.concatenate(bits)

    return bits_per_dim
