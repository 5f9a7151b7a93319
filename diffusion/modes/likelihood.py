"""--mode=bpd: bits per dimension of a split, term by term, and what better chains make of it."""

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.tree_util import Partial

from diffusion import continuous, experiment, probability_flow
from diffusion.data import augment
from diffusion.likelihood import VLBTerms, rate_distortion, vlb_terms
from diffusion.metrics.baselines import Baseline
from diffusion.modes import _codec
from diffusion.modes._baselines import load_baselines, worse_than
from diffusion.modes._common import Trained, load_trained
from diffusion.modes._paper import TABLE_4
from diffusion.modes._split_pass import (
    ChainModel,
    MeanAndStderr,
    SplitPass,
    accumulate,
    compile_continuous,
    make_pass,
    mean_and_stderr,
    measure_optimal_variance,
    respaced_chain,
    trained_chain,
)
from diffusion.plotting import curves
from diffusion.runtime.config import Run, call_for_key, lookup
from diffusion.samplers import analytic, timesteps
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import Progress


def run(run: Run) -> None:
    """Writes workdir/eval/STEP/{bpd.json, bpd.png, rate_distortion.csv, rate_distortion.png}.

    STEP is STEP_WEIGHTS where `weights` is not "ema".
    """
    exp = experiment.build(run.config)
    check(run, exp)
    trained = load_trained(run, exp)
    folder = trained.folder("eval")
    work = make_pass(trained, run.config.bpd.split, run.config.bpd.num)
    bound, results = read_all(trained, work, folder)
    rows = load_baselines(run.config, exp, run.config.bpd.split, work.n)
    for what, average in results.items():
        number = f"{average.mean:8.4f} +- {average.error:.4f} bits/dim"
        logging.info(f"{number}  {what}{worse_than(average.mean, average.error, rows)}")
    if is_primary():
        write(trained, work, bound, results, rows, folder)
        for partial in folder.glob("bpd_partial*.npz"):
            partial.unlink()
    files = "bpd.json, bpd.png, rate_distortion.csv, rate_distortion.png"
    logging.info(f"done       {folder}/{files}")
    if exp.process.T == 1000 and run.config.data.name == "cifar10":
        print_table_4(bound)


def check(run: Run, exp: experiment.Experiment) -> None:
    """Raises ConfigError for readings that the model cannot have, before hours are spent."""
    if run.config.bpd.estimate and exp.variance.outputs == 2:
        wanted = f"expected 0 for a network that has learned its variance ({run.config.variance})"
        raise ConfigError(f"bpd.estimate: {wanted}, found {run.config.bpd.estimate}")
    if run.config.bpd.ode:
        lookup(probability_flow.TO_EPS, "target", run.config.target)
        call_for_key(probability_flow.log_alpha_bar_spline, "bpd.ode", exp.process)
    for steps in run.config.bpd.steps:
        call_for_key(timesteps.uniform, "bpd.steps", exp.process, steps)


# Readings


class Bound(NamedTuple):
    """Averages over images: total [], bits [T+1], rate and rmse [T] as in likelihood.py."""

    total: MeanAndStderr
    bits: MeanAndStderr
    rate: MeanAndStderr
    rmse: MeanAndStderr


def read_all(
    trained: Trained, work: SplitPass, folder: epath.Path
) -> tuple[Bound, dict[str, MeanAndStderr]]:
    """Returns the bound of the trained chain and every reading that config.bpd asks for."""
    c, exp, split = trained.config.bpd, trained.exp, trained.config.bpd.split
    T, chain = exp.process.T, trained_chain(trained)
    name = f"bound on {split}, {trained.config.variance}, {T} steps"
    bound = read_bound(name, work, chain, trained.params, folder / "bpd_partial.npz")
    results = {name: bound.total}
    if c.estimate:
        sample = make_pass(trained, "train", c.estimate)
        partial = folder / "bpd_partial_variances.npz"
        best = measure_optimal_variance(sample, chain, trained.params, partial).optimum
        variance = analytic.analytic_variance(best.x0_variance, best.decoder)
        costs = analytic.step_costs(exp.process, best)
        for steps in (T, *c.steps):
            ts = timesteps.least_cost(costs, steps)
            name = f"bound on {split}, analytic variance, {steps} least-cost steps"
            shorter = respaced_chain(trained_chain(trained, variance), variance, ts[:-1])
            path = folder / f"bpd_partial_{steps}.npz"
            results[name] = read_bound(name, work, shorter, trained.params, path).total
    for steps in () if c.estimate else c.steps:
        name = f"bound on {split}, {trained.config.variance}, {steps} even steps"
        shorter = respaced_chain(chain, exp.variance, timesteps.uniform(exp.process, steps)[:-1])
        path = folder / f"bpd_partial_{steps}_even.npz"
        results[name] = read_bound(name, work, shorter, trained.params, path).total
    if c.continuous:
        name = f"bound on {split}, continuous time, {c.continuous} noise levels"
        results[name] = read_continuous(name, trained, work, folder / "bpd_partial_continuous.npz")
    if c.ode:
        sample = make_pass(trained, split, c.ode)
        average, evaluations = read_ode(trained, sample)
        results[f"ODE on {split}, {sample.n} images, {evaluations:.0f} evaluations"] = average
    return bound, results


def read_bound(
    name: str, work: SplitPass, chain: ChainModel, params: Any, path: epath.Path
) -> Bound:
    """Returns the bound of the images of a pass, taken apart; shows progress, resumes from path."""
    # The decoder is that of the training.
    read = work.compile(
        chain, continuous.terms_in_discrete_time if work.exp.continuous else vlb_terms
    )

    def run(batch):
        terms = VLBTerms(*jax.device_get(read(params, batch)))
        rate, rmse = rate_distortion(terms)
        bits = terms.bits.astype(np.float64)
        return np.concatenate([bits.sum(1, keepdims=True), bits, rate, rmse], axis=1)

    logging.info(f"reading    {name}: {work.n:,} images")
    with Progress(work.n, unit="image") as progress:
        mean, error = accumulate(work, run, path, progress).mean_and_stderr()
    T = chain.process.T
    cuts = [1, T + 2, 2 * T + 2]
    parts = zip(np.split(mean, cuts), np.split(error, cuts), strict=True)
    total, *rest = (MeanAndStderr(*part) for part in parts)
    return Bound(MeanAndStderr(total.mean[0], total.error[0]), *rest)


def read_continuous(
    name: str, trained: Trained, work: SplitPass, path: epath.Path
) -> MeanAndStderr:
    """Returns the bound in continuous time; shows progress, resumes from path."""
    read = compile_continuous(work, trained, trained.config.bpd.continuous)

    def run(batch):
        return jax.device_get(read(trained.params, batch))[:, None]

    logging.info(f"reading    {name}: {work.n:,} images")
    with Progress(work.n, unit="image") as progress:
        mean, error = accumulate(work, run, path, progress).mean_and_stderr()
    return MeanAndStderr(mean[0], error[0])


def read_ode(trained: Trained, work: SplitPass) -> tuple[MeanAndStderr, float]:
    """Returns bits/dim by the probability-flow ODE, and the mean number of evaluations."""
    exp = trained.exp

    def eps(params, label, x_t, t):
        def apply(x_t, t):
            return experiment.apply_model(exp, params, x_t, t, label)

        return probability_flow.eps_fn(exp.process, apply, trained.config.target)(x_t, t)

    bits, evaluations, done = [], [], 0
    logging.info(f"reading    probability-flow ODE: {work.n:,} images")
    with Progress(work.n, unit="image") as progress:
        for batch, real in work.batches():
            field = Partial(eps, trained.params, batch.label)
            x_0 = augment.scale(batch.image, exp.levels)
            args = exp.process, field, work.keys(batch), x_0, exp.levels
            out = probability_flow.bits_per_dim(*args)
            bits.append(out.bits[:real])
            evaluations.append(out.evaluations)
            progress(done := done + real)
    return mean_and_stderr(np.concatenate(bits)), float(np.mean(evaluations))


# Outputs


def write(
    trained: Trained,
    work: SplitPass,
    bound: Bound,
    results: Mapping[str, MeanAndStderr],
    rows: Sequence[Baseline],
    folder: epath.Path,
) -> None:
    """Writes bpd.json and its bars, rate_distortion.csv and the three panels of Figure 5."""

    def number(average, index=()):
        return {"mean": float(average.mean[index]), "error": float(average.error[index])}

    config = trained.config
    content = {
        "step": trained.step,
        "weights": trained.weights,
        "data": config.data.name or config.data.source,
        "split": config.bpd.split,
        "images": work.n,
        "seed": config.bpd.seed,
        "bits_per_dim": {what: number(average) for what, average in results.items()},
        "levels": trained.exp.levels,
        "baselines": {row.name: {"mean": row.bits, "error": row.error} for row in rows},
        "L_T": number(bound.bits, -1),
        "rate": number(bound.rate, 0),
        "L_0": number(bound.bits, 0),
        "rmse": number(bound.rmse, 0),
        "versions": {name: version(name) for name in ("jax", "flax", "numpy", "scipy")},
        "config": config.to_dict(),
    }
    save_json(folder / "bpd.json", content)
    T, text = trained.exp.process.T, io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["steps", "t", "rate", "rate_error", "rmse", "rmse_error", "L_t-1", "L_error"])
    for t in range(T, 0, -1):
        row = (bound.rate, bound.rmse, bound.bits)
        cells = [f"{a[t - 1]:.6g}" for average in row for a in average]
        table.writerow([T - t + 1, t, *cells])
    save_text(folder / "rate_distortion.csv", text.getvalue())
    bars = [(what, float(a.mean), float(a.error)) for what, a in results.items()]
    lengths = [(row.name, row.bits, row.error or 0.0) for row in rows]
    curves.plot_code_lengths(folder / "bpd.png", bars, lengths)
    path = folder / "rate_distortion.png"
    codecs = _codec.measured_curves(folder)
    curves.plot_rate_distortion(path, bound.rate.mean, bound.rmse.mean, codecs)


class Table4Row(NamedTuple):
    """One row of Table 4: after `step` transmissions, in bits/dim and on the 0-255 scale."""

    step: int
    rate: MeanAndStderr
    rmse: MeanAndStderr


def table_4(rate: MeanAndStderr, rmse: MeanAndStderr) -> list[Table4Row]:
    """Returns the rows after T, 9T/10, ..., T/10 transmissions of averages [T].

    Raises ValueError if 10 does not divide T.
    """
    T = len(rate.mean)
    if T % 10:
        raise ValueError(f"table_4: expected a chain of 10 n steps, found {T}")
    return [
        Table4Row(r, *(MeanAndStderr(a.mean[T - r], a.error[T - r]) for a in (rate, rmse)))
        for r in range(T, 0, -T // 10)
    ]


def print_table_4(bound: Bound) -> None:
    """Prints our Table 4 beside the paper's."""
    logging.info("Table 4    steps      rate      RMSE   the paper's")
    for row, (_, rate, rmse) in zip(table_4(bound.rate, bound.rmse), TABLE_4, strict=True):
        numbers = f"{row.rate.mean:9.5f} {row.rmse.mean:9.5f}   {rate:8.5f} {rmse:8.5f}"
        logging.info(f"           {row.step:5} {numbers}")
