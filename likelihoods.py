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

import experiment
import settings
from diffusion import (
    batches,
    bounds,
    data,
    figures,
    likelihood,
    log,
    ode,
    plots,
    process,
    samplers,
    targets,
    train,
)
from experiment import Experiment
from settings import Fatal

KEEP_S = 10  # seconds between two writings of what is summed so far


class Chain(NamedTuple):
    """A chain, and (parameters, labels int[b]) -> the network on it."""

    p: process.Process
    predictor: Callable[[Any, Array], targets.Predict]


def trained_chain(config: ConfigDict, x: Experiment, variance: targets.Variance) -> Chain:
    """The chain of the training, x_0 clipped as in sampling."""

    config = settings.changed(config, {"sampler.guidance": 0.0, "sampler.threshold": 0.0})
    return Chain(x.p, experiment.make_predictor(config, x, variance))


def shortened(chain: Chain, variance: targets.Variance, ts: np.ndarray) -> Chain:
    """The same network on the chain that visits only the times ts."""

    def predictor(params, label):
        return targets.respaced(chain.p, chain.predictor(params, label), variance, ts)

    return Chain(process.respace(chain.p, ts), predictor)


# ------------------------------------------------------------------------------------------ passes


class Sums(NamedTuple):
    """Of n images: all their values, and the squares of these, summed in float64."""

    n: int = 0
    total: Any = 0.0
    square: Any = 0.0

    def plus(self, values: np.ndarray) -> "Sums":
        """values: [b, ...]."""
        values = values.astype(np.float64)
        squares = (values**2).sum(0)
        return Sums(self.n + len(values), self.total + values.sum(0), self.square + squares)

    def average(self) -> likelihood.Average:
        """Mean and standard error of each value."""
        mean = self.total / self.n
        variance = np.maximum(self.square / self.n - mean**2, 0)
        return likelihood.Average(mean, np.sqrt(variance / max(self.n - 1, 1)))


class Batch(NamedTuple):
    """image: uint8[b, h, w, c], label: int32[b], number in the split: uint32[b]; over devices."""

    image: Array
    label: Array
    number: Array


class Pass(NamedTuple):
    """The first n images of a split, `size` at a time, and what their reading depends on.

    seed: of their noise. config: all of it, in one line: what is resumed must have had the same.
    """

    images: data.Images
    n: int
    size: int
    seed: int
    x: Experiment
    config: str

    def compiled(self, chain: Chain, reading: Callable) -> Callable:
        """(params, a batch) -> reading(p, predict, keys, x_0), such as likelihood.terms."""
        whole, split = train.replicated(self.x.mesh), train.sharded(self.x.mesh)

        def on_bytes(params, batch):
            predict = chain.predictor(params, batch.label)
            return reading(chain.p, predict, self.keys(batch), batches.scale(batch.image))

        return jax.jit(on_bytes, in_shardings=(whole, split), out_shardings=whole)

    def keys(self, batch: "Batch") -> Array:
        """One for each image, a function of its number."""
        return jax.vmap(random.fold_in, (None, 0))(random.key(self.seed), batch.number)

    def batches(self, first: int = 0) -> Iterator[tuple["Batch", int]]:
        """(a batch, how many of its images count)."""
        split = train.sharded(self.x.mesh)
        rows = train.rows_here(split, self.size)
        some = self.images._replace(n=self.n)
        for i, batch in enumerate(data.in_order(some, self.size, rows, first=first), first):
            number = (i * self.size + np.arange(self.size)).astype(np.uint32)[rows]
            parts = (*batch[:2], number)
            parts = (train.spread(a, split, (self.size, *a.shape[1:])) for a in parts)
            yield Batch(*parts), min(self.size, self.n - i * self.size)


def summed(
    work: Pass,
    run: Callable[[Batch], np.ndarray],
    kept: pathlib.Path,
    progress: Callable[[int], None],
) -> Sums:
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
            figures.save_bytes(kept, content.getvalue())
            saved = time.monotonic()
    return sums


def _resumed(kept: pathlib.Path, setting: str) -> tuple[int, Sums]:
    """(batches done, their sums) of an earlier pass of the same setting, or of none."""
    try:
        with np.load(io.BytesIO(kept.read_bytes())) as file:
            if str(file["setting"]) == setting:
                return int(file["done"]), Sums(int(file["n"]), file["total"], file["square"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    return 0, Sums()


# ---------------------------------------------------------------------------------------- readings


class Bound(NamedTuple):
    """Averages over the images. bits: [T+1], rate, rmse: [T], as in likelihood.py; total: []."""

    total: likelihood.Average
    bits: likelihood.Average
    rate: likelihood.Average
    rmse: likelihood.Average


def bound(work: Pass, chain: Chain, params: Any, kept: pathlib.Path, progress: Callable) -> Bound:
    """The bound of every image, taken apart."""
    terms = work.compiled(chain, likelihood.terms)

    def run(batch):
        out = likelihood.Terms(*jax.device_get(terms(params, batch)))
        rate, rmse = likelihood.rate_distortion(out)
        bits = out.bits.astype(np.float64)
        return np.concatenate([bits.sum(1, keepdims=True), bits, rate, rmse], axis=1)

    T = chain.p.T
    cuts = [1, T + 2, 2 * T + 2]
    mean, error = summed(work, run, kept, progress).average()
    parts = zip(np.split(mean, cuts), np.split(error, cuts), strict=True)
    (total, *rest) = (likelihood.Average(*part) for part in parts)
    return Bound(likelihood.Average(total.mean[0], total.error[0]), *rest)


def optimum(work: Pass, chain: Chain, params: Any, progress: Callable) -> bounds.Optimum:
    """The variances that suit these images best (bounds.optimum)."""
    read = work.compiled(chain, bounds.readings)

    def readings():
        done = 0
        for batch, real in work.batches():
            out = jax.device_get(read(params, batch))
            yield bounds.Readings(*(a[:real] for a in out))
            progress(done := done + real)

    return bounds.optimum(chain.p, readings())


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
    images = experiment.find_images(config, x, "train")
    work = make_pass(config, x, "train", min(config.sampler.estimate, images.n))
    path = workdir / "eval" / f"{step:08d}" / f"analytic_{name}.npz"
    setting = f"{work.n} images, {config.bpd.seed}, {config.sampler.clip}"
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            tables = file["var_0"], file["decoder"]
            if str(file["setting"]) == setting:
                return x._replace(reverse=targets.analytic(*tables))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    say(f"reading    optimal variances from train: {work.n:,} images")
    with log.Progress(work.n, unit="image", silent=jax.process_index() > 0) as shown:
        best = optimum(work, trained_chain(config, x, x.variance), params, shown)
    if jax.process_index() == 0:
        content = io.BytesIO()
        np.savez(content, var_0=best.var_0, decoder=best.decoder, setting=setting)
        figures.save_bytes(path, content.getvalue())
    return x._replace(reverse=targets.analytic(best.var_0, best.decoder))


def by_ode(
    work: Pass, target: str, params: Any, progress: Callable[[int], None]
) -> tuple[likelihood.Average, float]:
    """Bits/dim by the probability-flow ODE, and the mean number of evaluations of its field."""
    x = work.x

    def eps(params, label, x_t, t):
        def apply(x_t, t):
            y = label if x.net.num_classes else None
            return experiment.output(x, params, x_t, t, y, train=False)

        return ode.noise_of(x.p, apply, target)(x_t, t)

    bits, evaluations, done = [], [], 0
    for batch, real in work.batches():
        field = Partial(eps, params, batch.label)
        args = ode.DIVERGENCES["rademacher"], work.keys(batch), batches.scale(batch.image)
        out = ode.bits(x.p, field, *args)
        bits.append(out.bits[:real])
        evaluations.append(out.evaluations)
        progress(done := done + real)
    return likelihood.average(np.concatenate(bits)), float(np.mean(evaluations))


def quick(config: ConfigDict, x: Experiment) -> Callable[[Any], likelihood.Average]:
    """params -> the bound of the first bpd.quick images of bpd.split, at a tenth of the times.

    Unbiased (bounds.stratified), with its standard error; the same noise each time, so that what
    falls during a training is the model.
    """
    n = min(config.bpd.quick, experiment.find_images(config, x, config.bpd.split).n)
    work = make_pass(config, x, config.bpd.split, n)
    chain = trained_chain(config, x, x.variance)
    edges = bounds.strata(x.p.T, max(x.p.T // 10, min(2, x.p.T)))
    read = work.compiled(chain, functools.partial(bounds.stratified, edges=edges))

    def average(params):
        bits = [jax.device_get(read(params, batch))[:real] for batch, real in work.batches()]
        return likelihood.average(np.concatenate(bits))

    return average


# -------------------------------------------------------------------------------------- the mode


def run(
    config: ConfigDict,
    x: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: Any,
    say: Callable[[str], None],
) -> None:
    """Every reading that config.bpd asks for; writes workdir/eval/<step>/bpd.json and what it drew.

    params: the averaged weights. say: prints one line. Raises Fatal, DataError.
    """
    c, first = config.bpd, jax.process_index() == 0
    folder = workdir / "eval" / f"{step:08d}"
    if c.ode:  # what cannot be done is said before hours are spent
        settings.choose(ode.TO_EPS, "target", config.target)
        settings.call(ode.log_alpha_bar, "bpd.ode", x.p)
    for steps in c.steps:
        settings.call(samplers.uniform, "bpd.steps", x.p, steps)
    work = make_pass(config, x, c.split, c.num)
    chain = trained_chain(config, x, x.variance)

    def progress(what, n):
        say(f"reading    {what}: {n:,} images")
        return log.Progress(n, unit="image", silent=not first)

    name = f"bound on {c.split}, {config.variance}, {x.p.T} steps"
    with progress(name, work.n) as shown:
        kept = folder / "bpd_partial.npz"
        whole = bound(work, chain, params, kept, shown)
    results = {name: whole.total}
    if c.estimate:
        few = make_pass(config, x, "train", c.estimate)
        with progress("optimal variances from train", few.n) as shown:
            best = optimum(few, chain, params, shown)
        variance = targets.analytic(best.var_0, best.decoder)
        costs = bounds.step_costs(x.p, best)
        for steps in (x.p.T, *c.steps):
            ts = bounds.least_cost(costs, steps)
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
        ours = likelihood.table_4(whole.rate, whole.rmse)
        for row, (_, rate, rmse) in zip(ours, likelihood.TABLE_4, strict=True):
            numbers = f"{row.rate.mean:9.5f} {row.rmse.mean:9.5f}   {rate:8.5f} {rmse:8.5f}"
            say(f"           {row.step:5} {numbers}")


def make_pass(config: ConfigDict, x: Experiment, split: str, n: int) -> Pass:
    """The first n images of a split, 0: all. Raises Fatal."""
    images = experiment.find_images(config, x, split)
    if n > images.n:
        raise Fatal(settings.DATA, f"bpd: expected at most {images.n} of {split}, found {n}")
    size = -(-min(config.bpd.batch_size, n or images.n) // x.mesh.size) * x.mesh.size
    asked = json.dumps(config.to_dict(), sort_keys=True)
    return Pass(images, n or images.n, size, config.bpd.seed, x, asked)


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
    figures.save_text(folder / "bpd.json", json.dumps(out, indent=2) + "\n")
    T, text = work.x.p.T, io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["steps", "t", "rate", "rate_error", "rmse", "rmse_error", "L_t-1", "L_error"])
    for t in range(T, 0, -1):
        row = (whole.rate, whole.rmse, whole.bits)
        cells = [f"{a[t - 1]:.6g}" for average in row for a in average]
        table.writerow([T - t + 1, t, *cells])
    figures.save_text(folder / "rate_distortion.csv", text.getvalue())
    path = folder / "rate_distortion.png"
    plots.rate_distortion(path, whole.rate.mean, whole.rmse.mean)
