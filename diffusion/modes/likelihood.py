"""--mode=bpd: bits per dimension of a whole split, and what each step of the chain has of them.

A pass takes the images a batch at a time through one compiled function, sharded over all devices.
What is summed so far is kept on disk, so that a pass that was killed goes on. The noise of an image
is a function of the seed and its number: neither batches nor devices have a say.
"""

import csv
import functools
import io
import json
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, random
from jax.tree_util import Partial
from ml_collections import ConfigDict

from diffusion import data, experiment, likelihood, probability_flow, process, targets
from diffusion.data import augment, loader
from diffusion.experiment import Experiment
from diffusion.plotting.curves import rate_distortion
from diffusion.runtime.config import call_for_key, lookup, with_overrides
from diffusion.samplers import analytic, timesteps
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_bytes, save_text
from diffusion.utils.progress import Progress


class MeanAndStderr(NamedTuple):
    """A mean over images and its standard error, float64 of an image's shape."""

    mean: np.ndarray
    error: np.ndarray


def mean_and_stderr(values: Array | np.ndarray) -> MeanAndStderr:
    """Mean and standard error over axis 0 of [n, ...], n independent images, on the host.

    The error is of the mean over all images that there could be, of which these n are a sample.
    Raises ValueError for n < 2, which says nothing of an error.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"average: expected two or more images, found {len(values)}")
    return MeanAndStderr(values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)))


# Table 4 of the paper, CIFAR-10's test set, T = 1000: (step r, rate, RMSE). After r transmissions,
# x_T the first of them, x_k with k = T - r + 1 is known: in the last row, x_1. (Were it x_0, the
# distortion would be 0. Its rate 1.78 lacks L_0 = 1.97 of the whole 3.75, Section 4.3.)
TABLE_4 = (
    (1000, 1.77581, 0.95136),
    (900, 0.11994, 12.02277),
    (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656),
    (600, 0.01507, 30.80948),
    (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765),
    (300, 0.00081, 54.18826),
    (200, 0.00013, 60.97170),
    (100, 0.00000, 67.60125),
)


class Table4Row(NamedTuple):
    """One row of a Table 4: after `step` transmissions, in bits/dim and on 0-255."""

    step: int
    rate: MeanAndStderr
    rmse: MeanAndStderr


def table_4(rate: MeanAndStderr, rmse: MeanAndStderr) -> list[Table4Row]:
    """The paper's Table 4 from one's own averages [T]: after T, 9T/10, ... T/10 transmissions.

    For T = 1000 these are the rows of TABLE_4. Raises ValueError if 10 does not divide T.
    """
    T = len(rate.mean)
    if T % 10:
        raise ValueError(f"table_4: expected a chain of 10 n steps, found {T}")
    # Column k - 1 = T - r.
    return [
        Table4Row(r, *(MeanAndStderr(a.mean[T - r], a.error[T - r]) for a in (rate, rmse)))
        for r in range(T, 0, -T // 10)
    ]


KEEP_S = 10  # seconds between two writings of what is summed so far


class Chain(NamedTuple):
    """A chain, and (parameters, labels int[b]) -> the network on it."""

    p: process.Process
    predictor: Callable[[Any, Array], targets.Predict]


def trained_chain(config: ConfigDict, x: Experiment, variance: targets.Variance) -> Chain:
    """The chain of the training, x_0 clipped as in sampling."""

    config = with_overrides(config, {"sampler.guidance": 0.0, "sampler.threshold": 0.0})
    return Chain(x.p, experiment.make_predictor(config, x, variance))


def shortened(chain: Chain, variance: targets.Variance, ts: np.ndarray) -> Chain:
    """The same network on the chain that visits only the times ts."""

    def predictor(params, label):
        return targets.respace_predict(chain.p, chain.predictor(params, label), variance, ts)

    return Chain(process.respace(chain.p, ts), predictor)




class RunningSums(NamedTuple):
    """Of n images: all their values, and the squares of these, summed in float64."""

    n: int = 0
    total: Any = 0.0
    square: Any = 0.0

    def plus(self, values: np.ndarray) -> "RunningSums":
        """values: [b, ...]."""
        values = values.astype(np.float64)
        squares = (values**2).sum(0)
        return RunningSums(self.n + len(values), self.total + values.sum(0), self.square + squares)

    def average(self) -> MeanAndStderr:
        """Mean and standard error of each value."""
        mean = self.total / self.n
        variance = np.maximum(self.square / self.n - mean**2, 0)
        return MeanAndStderr(mean, np.sqrt(variance / max(self.n - 1, 1)))


class Batch(NamedTuple):
    """image: uint8[b, h, w, c], label: int32[b], number in the split: uint32[b]; over devices."""

    image: Array
    label: Array
    number: Array


class SplitPass(NamedTuple):
    """The first n images of a split, `size` at a time, and what their reading depends on.

    seed: of their noise. config: all of it, in one line: what is resumed must have had the same.
    """

    images: data.ImageDataset
    n: int
    size: int
    seed: int
    x: Experiment
    config: str

    def compiled(self, chain: Chain, reading: Callable) -> Callable:
        """(params, a batch) -> reading(p, predict, keys, x_0), such as likelihood.terms."""
        whole, split = replicated(self.x.mesh), batch_sharded(self.x.mesh)

        def on_bytes(params, batch):
            predict = chain.predictor(params, batch.label)
            return reading(chain.p, predict, self.keys(batch), augment.scale(batch.image))

        return jax.jit(on_bytes, in_shardings=(whole, split), out_shardings=whole)

    def keys(self, batch: "Batch") -> Array:
        """One for each image, a function of its number."""
        return jax.vmap(random.fold_in, (None, 0))(random.key(self.seed), batch.number)

    def batches(self, first: int = 0) -> Iterator[tuple["Batch", int]]:
        """(a batch, how many of its images count)."""
        split = batch_sharded(self.x.mesh)
        rows = local_rows(split, self.size)
        some = self.images._replace(n=self.n)
        for i, batch in enumerate(loader.iterate_split(some, self.size, rows, first=first), first):
            number = (i * self.size + np.arange(self.size)).astype(np.uint32)[rows]
            parts = (*batch[:2], number)
            parts = (make_global_array(a, split, (self.size, *a.shape[1:])) for a in parts)
            yield Batch(*parts), min(self.size, self.n - i * self.size)


def accumulate(
    work: SplitPass,
    run: Callable[[Batch], np.ndarray],
    kept: pathlib.Path,
    progress: Callable[[int], None],
) -> RunningSums:
    """Sums of run(batch) -> [b, ...] over a pass; `kept` has them, to go on from."""
    first = jax.process_index() == 0
    setting = f"{work.n} {work.size} {work.config}"
    done, sums = _resumed(kept, setting)
    if done:
        progress(sums.n)
    saved = time.monotonic()
    for batch, real in work.batches(done):
        sums, done = sums.plus(run(batch)[:real]), done + 1
        progress(sums.n)
        if first and (time.monotonic() - saved > KEEP_S or sums.n == work.n):
            content = io.BytesIO()
            np.savez(content, setting=setting, done=done, **sums._asdict())
            save_bytes(kept, content.getvalue())
            saved = time.monotonic()
    return sums


def _resumed(kept: pathlib.Path, setting: str) -> tuple[int, RunningSums]:
    """(batches done, their sums) of an earlier pass of the same setting, or of none."""
    try:
        with np.load(io.BytesIO(kept.read_bytes())) as file:
            if str(file["setting"]) == setting:
                return int(file["done"]), RunningSums(int(file["n"]), file["total"], file["square"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    return 0, RunningSums()




class Bound(NamedTuple):
    """Averages over the images. bits: [T+1], rate, rmse: [T], as in likelihood.py; total: []."""

    total: MeanAndStderr
    bits: MeanAndStderr
    rate: MeanAndStderr
    rmse: MeanAndStderr


def bound(work: SplitPass, chain: Chain, params: Any, kept: pathlib.Path, progress: Callable) -> Bound:
    """The bound of every image, taken apart."""
    terms = work.compiled(chain, likelihood.vlb_terms)

    def run(batch):
        out = likelihood.Terms(*jax.device_get(terms(params, batch)))
        rate, rmse = likelihood.rate_distortion(out)
        bits = out.bits.astype(np.float64)
        return np.concatenate([bits.sum(1, keepdims=True), bits, rate, rmse], axis=1)

    T = chain.p.T
    cuts = [1, T + 2, 2 * T + 2]
    mean, error = accumulate(work, run, kept, progress).average()
    parts = zip(np.split(mean, cuts), np.split(error, cuts), strict=True)
    (total, *rest) = (MeanAndStderr(*part) for part in parts)
    return Bound(MeanAndStderr(total.mean[0], total.error[0]), *rest)


def optimum(work: SplitPass, chain: Chain, params: Any, progress: Callable) -> analytic.OptimalVariance:
    """The variances that suit these images best (bounds.optimum)."""
    read = work.compiled(chain, analytic.timestep_errors)

    def readings():
        done = 0
        for batch, real in work.batches():
            out = jax.device_get(read(params, batch))
            yield analytic.TimestepErrors(*(a[:real] for a in out))
            progress(done := done + real)

    return analytic.optimal_variance(chain.p, readings())


def with_analytic(
    config: ConfigDict,
    x: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: Any,
    say: Callable[[str], None],
    name: str = "ema",
) -> Experiment:
    """The experiment whose samples are drawn with the variance that sampler.variance names.

    For "analytic" (Analytic-DPM, arXiv 2201.06503) it is measured on sampler.estimate images of the
    training set, once for each checkpoint: workdir/eval/<step>/analytic_ema.npz. name: of the
    weights, "ema" or "raw". Raises Fatal.
    """
    if config.sampler.variance != experiment.ANALYTIC:
        return x
    images = experiment.load_split(config, x, "train")
    work = make_pass(config, x, "train", min(config.sampler.estimate, images.n))
    path = workdir / "eval" / f"{step:08d}" / f"analytic_{name}.npz"
    setting = f"{work.n} images, {config.bpd.seed}, {config.sampler.clip}"
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            tables = file["var_0"], file["decoder"]
            if str(file["setting"]) == setting:
                return x._replace(reverse=analytic.analytic_variance(*tables))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    say(f"reading    optimal variances from train: {work.n:,} images")
    with Progress(work.n, unit="image", silent=jax.process_index() > 0) as shown:
        best = optimum(work, trained_chain(config, x, x.variance), params, shown)
    if jax.process_index() == 0:
        content = io.BytesIO()
        np.savez(content, var_0=best.var_0, decoder=best.decoder, setting=setting)
        save_bytes(path, content.getvalue())
    return x._replace(reverse=analytic.analytic_variance(best.var_0, best.decoder))


def by_ode(
    work: SplitPass, target: str, params: Any, progress: Callable[[int], None]
) -> tuple[MeanAndStderr, float]:
    """Bits/dim by the probability-flow ODE, and the mean number of evaluations of its field."""
    x = work.x

    def eps(params, label, x_t, t):
        def apply(x_t, t):
            y = label if x.net.num_classes else None
            return experiment.apply_model(x, params, x_t, t, y, train=False)

        return probability_flow.eps_fn(x.p, apply, target)(x_t, t)

    bits, evaluations, done = [], [], 0
    for batch, real in work.batches():
        field = Partial(eps, params, batch.label)
        args = probability_flow.DIVERGENCES["rademacher"], work.keys(batch), augment.scale(batch.image)
        out = probability_flow.bits_per_dim(x.p, field, *args)
        bits.append(out.bits[:real])
        evaluations.append(out.evaluations)
        progress(done := done + real)
    return mean_and_stderr(np.concatenate(bits)), float(np.mean(evaluations))


def make_eval_fn(config: ConfigDict, x: Experiment) -> Callable[[Any], MeanAndStderr]:
    """params -> the bound of the first bpd.quick images of bpd.split, at a tenth of the times.

    Unbiased (bounds.stratified), with its standard error; the same noise each time, so that what
    falls during a training is the model.
    """
    n = min(config.bpd.quick, experiment.load_split(config, x, config.bpd.split).n)
    work = make_pass(config, x, config.bpd.split, n)
    chain = trained_chain(config, x, x.variance)
    edges = analytic.timestep_strata(x.p.T, max(x.p.T // 10, min(2, x.p.T)))
    read = work.compiled(chain, functools.partial(analytic.stratified_vlb, edges=edges))

    def average(params):
        bits = [jax.device_get(read(params, batch))[:real] for batch, real in work.batches()]
        return mean_and_stderr(np.concatenate(bits))

    return average




def run(
    config: ConfigDict,
    x: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: Any,
    say: Callable[[str], None],
) -> None:
    """Every reading that config.bpd asks for; writes workdir/eval/<step>/bpd.json and what it drew.

    params: the averaged weights. say: prints one line. Raises DDPMError, DataError.
    """
    c, first = config.bpd, jax.process_index() == 0
    folder = workdir / "eval" / f"{step:08d}"
    if c.ode:  # what cannot be done is said before hours are spent
        lookup(probability_flow.TO_EPS, "target", config.target)
        call_for_key(probability_flow.log_alpha_bar_spline, "bpd.ode", x.p)
    for steps in c.steps:
        call_for_key(timesteps.uniform, "bpd.steps", x.p, steps)
    work = make_pass(config, x, c.split, c.num)
    chain = trained_chain(config, x, x.variance)

    def progress(what, n):
        say(f"reading    {what}: {n:,} images")
        return Progress(n, unit="image", silent=not first)

    name = f"bound on {c.split}, {config.variance}, {x.p.T} steps"
    with progress(name, work.n) as shown:
        kept = folder / "bpd_partial.npz"
        whole = bound(work, chain, params, kept, shown)
    results = {name: whole.total}
    if c.estimate:
        few = make_pass(config, x, "train", c.estimate)
        with progress("optimal variances from train", few.n) as shown:
            best = optimum(few, chain, params, shown)
        variance = analytic.analytic_variance(best.var_0, best.decoder)
        costs = analytic.step_costs(x.p, best)
        for steps in (x.p.T, *c.steps):
            ts = analytic.least_cost(costs, steps)
            name = f"bound on {c.split}, analytic variance, {steps} least-cost steps"
            shorter = shortened(trained_chain(config, x, variance), variance, ts[:-1])
            with progress(name, work.n) as shown:
                kept = folder / f"bpd_partial_{steps}.npz"
                results[name] = bound(work, shorter, params, kept, shown).total
    if c.ode:
        some = make_pass(config, x, c.split, c.ode)
        with progress("probability-flow ODE", some.n) as shown:
            average, evaluations = by_ode(some, config.target, params, shown)
        results[f"ODE on {c.split}, {some.n} images, {evaluations:.0f} evaluations"] = average
    for what, average in results.items():
        say(f"{average.mean:8.4f} +- {average.error:.4f} bits/dim  {what}")
    if first:
        write(config, folder, step, work, whole, results)
        for kept in folder.glob("bpd_partial*.npz"):
            kept.unlink()
        say(f"done       {folder}/bpd.json, rate_distortion.csv, rate_distortion.png")
    if x.p.T == 1000 and config.data.name == "cifar10":
        say("Table 4    steps      rate      RMSE   the paper's")
        ours = table_4(whole.rate, whole.rmse)
        for row, (_, rate, rmse) in zip(ours, TABLE_4, strict=True):
            numbers = f"{row.rate.mean:9.5f} {row.rmse.mean:9.5f}   {rate:8.5f} {rmse:8.5f}"
            say(f"           {row.step:5} {numbers}")


def make_pass(config: ConfigDict, x: Experiment, split: str, n: int) -> SplitPass:
    """The first n images of a split, 0: all. Raises Fatal."""
    images = experiment.load_split(config, x, split)
    if n > images.n:
        raise DataError(f"bpd: expected at most {images.n} of {split}, found {n}")
    size = -(-min(config.bpd.batch_size, n or images.n) // x.mesh.size) * x.mesh.size
    asked = json.dumps(config.to_dict(), sort_keys=True)
    return SplitPass(images, n or images.n, size, config.bpd.seed, x, asked)


def write(config, folder, step, work, whole, results) -> None:
    """bpd.json, rate_distortion.csv and the three panels of Figure 5."""

    def number(average, index=()):
        return {"mean": float(average.mean[index]), "error": float(average.error[index])}

    out = {
        "step": step,
        "weights": "ema",
        "data": config.data.name or config.data.source,
        "split": config.bpd.split,
        "images": work.n,
        "seed": config.bpd.seed,
        "bits_per_dim": {what: number(average) for what, average in results.items()},
        "L_T": number(whole.bits, -1),
        "rate": number(whole.rate, 0),
        "L_0": number(whole.bits, 0),
        "rmse": number(whole.rmse, 0),
        "versions": {name: version(name) for name in ("jax", "flax", "numpy", "scipy")},
        "config": config.to_dict(),
    }
    save_text(folder / "bpd.json", json.dumps(out, indent=2) + "\n")
    T, text = work.x.p.T, io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["steps", "t", "rate", "rate_error", "rmse", "rmse_error", "L_t-1", "L_error"])
    for t in range(T, 0, -1):
        row = (whole.rate, whole.rmse, whole.bits)
        cells = [f"{a[t - 1]:.6g}" for average in row for a in average]
        table.writerow([T - t + 1, t, *cells])
    save_text(folder / "rate_distortion.csv", text.getvalue())
    path = folder / "rate_distortion.png"
    rate_distortion(path, whole.rate.mean, whole.rmse.mean)
