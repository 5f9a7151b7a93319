"""--mode=frontier: quality against network evaluations and seconds, over samplers, grids, steps.

Each sampler draws a set of images from the noise of each of frontier.seeds; the config's own
sampler is one of them. Every set is scored against the training split, and so are as many real
images, the best that a sampler could do. Entries are kept in frontier.json, so that a killed run
resumes, and one with more samplers or steps adds to it.
"""

import csv
import io
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.experiment import Experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained
from diffusion.modes._sampling import CompiledSampler
from diffusion.modes._scores import load_reference, make_fidelity, make_scorer
from diffusion.plotting import curves
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils import logging
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import QUIET_S, Progress, human_time

KEYS = ("sampler.name", "sampler.grid", "sampler.steps")  # what differs between entries
Key = tuple[str, str, int]  # their values


REAL_IMAGES = "real images"  # the name of an entry that no sampler drew
JUDGEMENTS = "precision", "density", "coverage", "unsure"  # beside the first distance
SIGMAS = 2  # scores that differ by fewer standard errors of their difference count as equal


class FrontierEntry(NamedTuple):
    """One sampler, or real images.

    evaluations: of the network per image; seconds: per image; scores: {name: a value a seed}.
    """

    sampler: str
    grid: str
    steps: int
    evaluations: int
    seconds: float
    scores: dict[str, list[float]]


def run(run: Run) -> None:
    """Writes workdir/frontier/STEP/frontier.{json,csv,png}.

    Raises ConfigError before anything is drawn, WorkdirError, DataError.
    """
    c, exp = run.config.frontier, experiment.build(run.config)
    compile_samplers(run, exp)  # a wrong sampler is found before anything is read
    trained = _sampling.load_for_sampling(run, exp)
    samplers = compile_samplers(run, trained.exp)
    scorer = make_scorer(run.config, exp, exp.image_shape)
    fidelity = make_fidelity(scorer, load_reference("train", scorer))
    folder = run.workdir / "frontier" / f"{trained.step:08d}"
    setting = entry_setting(trained, list(scorer.extractor.kinds))
    done = load_entries(folder / "frontier.json", setting) if is_primary() else {}
    todo = [key for key in samplers if broadcast_from_primary(key not in done)]
    sets = f"{len(c.seeds)} sets of {c.num:,} samples" if len(c.seeds) > 1 else f"{c.num:,} samples"
    what = f"{sets} by each of {len(samplers)} samplers, {len(todo)} of them to do"
    logging.info(f"drawing    {what}")
    rest = [samplers[key].evaluations for key in todo]
    if todo:  # the longest one is timed on a few steps, and counts as if it had been drawn
        longest = max((samplers[key] for key in todo), key=lambda sampler: sampler.evaluations)
        began = time.monotonic()
        drew = _sampling.estimate_seconds(longest, trained.params, c.num) * len(c.seeds)
        work, spent = [longest.evaluations], time.monotonic() - began + drew
        left = human_time(seconds_left(spent, drew, work, rest))
        logging.info(f"           {sum(rest):,} evaluations per image, about {left}")
    for key in todo:
        began, scores = time.monotonic(), []
        for seed in c.seeds:
            images, seconds = draw_timed(samplers[key], trained.params, seed, c.num)
            scores.append(fidelity(images))
        if is_primary():  # only there are images scored
            done[key] = FrontierEntry(*key, samplers[key].evaluations, seconds, by_seed(scores))
            spent += time.monotonic() - began
            drew += seconds * c.num * len(c.seeds)
            work.append(rest.pop(0))
            left = seconds_left(spent, drew, work, rest)
            logging.info(f"{line(done[key])}{f'  ETA {human_time(left)}' if left else ''}")
            write(folder, setting, list(done.values()))
    real = real_entry(run.config, exp, fidelity)
    if is_primary():
        report([real, *done.values()], folder)
    logging.info(f"done       {folder}/frontier.png, frontier.csv, frontier.json")
    if scorer.missing:
        raise scorer.missing


def by_seed(scores: list[dict[str, float]]) -> dict[str, list[float]]:
    """Returns {name: [a value a seed]} of the scores of each seed."""
    return {name: [each[name] for each in scores] for name in scores[0]}


def real_entry(
    config: ConfigDict, exp: Experiment, fidelity: Callable[[np.ndarray], dict[str, float]]
) -> FrontierEntry:
    """Scores frontier.num real images for each seed, of the split test where it has as many.

    Images of the split train are in what they are compared with, which makes their scores better
    than those of other real images.
    """
    c = config.frontier
    try:
        split, images = "test", experiment.load_split(config, exp, "test")
    except DataError:
        split, images = "train", experiment.load_split(config, exp)
    if images.n < c.num:
        split, images = "train", experiment.load_split(config, exp)
    n, scores = min(c.num, images.n), []
    for seed in c.seeds:
        chosen = np.random.RandomState(seed).permutation(images.n)[:n]
        scores.append(fidelity(images.read(np.sort(chosen))[0]))
    scores = by_seed(scores) if is_primary() else {}
    return FrontierEntry(REAL_IMAGES, split, n, 0, 0.0, scores)


def report(entries: list[FrontierEntry], folder: pathlib.Path) -> None:
    """Prints the table and what follows from it; writes frontier.csv and frontier.png."""
    for text in [*entry_table(entries), *advice(entries)]:
        logging.info(text)
    write_csv(folder / "frontier.csv", entries)
    curves.plot_frontier(folder / "frontier.png", frontier_panels(entries))


def seconds_left(spent: float, drew: float, work: list[int], rest: list[int]) -> float:
    """Estimates the time of other samplers from the time that some have taken.

    Drawing takes time by evaluations; all else (compiling, scoring) takes the same by any sampler.

    Args:
      spent, drew: seconds in all, and those of drawing.
      work, rest: evaluations per image of the samplers that are done, and of the others.
    """
    return (spent - drew) / len(work) * len(rest) + drew / sum(work) * sum(rest)


def compile_samplers(run: Run, exp: Experiment) -> dict[Key, CompiledSampler]:
    """Builds the sampler of each entry, the config's own among them. Raises ConfigError."""
    c, own = run.config.frontier, run.config.sampler
    steps = [n for n in c.steps if n <= exp.process.T]
    configs = {
        key: with_overrides(run.config, {**dict(zip(KEYS, key, strict=True)), "sampler.times": ()})
        for key in itertools.product(c.samplers, c.grids, steps)
    }
    configs[own.name, own.grid, len(own.times) or own.steps] = run.config
    size = min(c.num, run.config.eval.batch_size)
    return {key: _sampling.compile_sampler(config, exp, size) for key, config in configs.items()}


def draw_timed(
    sampler: CompiledSampler, params: Any, seed: int, n: int
) -> tuple[np.ndarray, float]:
    """Returns n images, and the seconds of one in the batches after the first, which compiles."""
    steps = _sampling.num_steps(sampler, n)
    with Progress(steps, unit="sampling step", quiet_s=QUIET_S) as progress:
        batches = _sampling.draw(sampler, params, seed, n, progress)
        images, began = [next(batches)], time.monotonic()
        images += batches
    if not (timed := len(images) - 1):
        timed = len(list(_sampling.draw(sampler, params, seed, n)))
    return np.concatenate(images), (time.monotonic() - began) / (timed * sampler.size)


def entry_setting(trained: Trained, kinds: list[str]) -> dict[str, Any]:
    """Returns what every entry depends on, besides its own keys."""
    config = trained.config
    setting = _sampling.sample_setting(config, trained.step, "ema", [*config.frontier.seeds])
    rest = {key: value for key, value in setting.items() if key not in KEYS}
    device = jax.devices()[0].device_kind  # seconds of different devices are not comparable
    return {**rest, "frontier.num": config.frontier.num, "features": kinds, "device": device}


def load_entries(path: pathlib.Path, setting: dict[str, Any]) -> dict[Key, FrontierEntry]:
    """Returns the entries of an earlier run of the same setting."""
    try:
        stored = json.loads(path.read_text())
        entries = [FrontierEntry(**entry) for entry in stored["entries"]]
        return {entry[:3]: entry for entry in entries} if stored["setting"] == setting else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(folder: pathlib.Path, setting: dict[str, Any], entries: list[FrontierEntry]) -> None:
    """Writes frontier.json, to resume from."""
    content = {"setting": setting, "entries": [entry._asdict() for entry in entries]}
    save_json(folder / "frontier.json", content)


def write_csv(path: pathlib.Path, entries: list[FrontierEntry]) -> None:
    """Writes the means and the errors of all scores."""
    scores, text = summaries(entries), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    names = [name for score in scores for name in (score, f"{score}_error")]
    rows.writerow([*FrontierEntry._fields[:5], *names])
    for i, entry in enumerate(entries):
        numbers = (x[i] for each in scores.values() for x in (each.mean, each.error))
        rows.writerow([*entry[:5], *(f"{value:.6g}" for value in numbers)])
    save_text(path, text.getvalue())


# What the entries say


class ScoreSummary(NamedTuple):
    """A score of each entry: the mean over seeds and its standard error, float64[n].

    The errors are pooled over the entries, since a few seeds alone say little of a deviation.
    Distances are averaged in logarithms, where their errors are alike. `paired` is the error of the
    difference of two samplers, which draw from the same noise, in the units of `units`.
    """

    mean: np.ndarray
    error: np.ndarray
    units: np.ndarray  # the mean of the values' logarithms, or of the values
    paired: float


def summaries(entries: list[FrontierEntry]) -> dict[str, ScoreSummary]:
    """Returns the summary of each score over the entries. Of one seed all errors are 0."""
    out, drawn = {}, [entry.sampler != REAL_IMAGES for entry in entries]
    for name in entries[0].scores:
        values = np.array([entry.scores[name] for entry in entries], np.float64)
        seeds, log = values.shape[1], is_distance(name)
        z = np.log(np.maximum(values, 1e-12)) if log else values
        mean, variance, residual = z.mean(1), 0.0, z[drawn]
        if seeds > 1:
            variance = z.var(1, ddof=1).mean()
        residual = residual - residual.mean(0) - residual.mean(1)[:, None] + residual.mean()
        freedom = max(1, (len(residual) - 1) * (seeds - 1))
        paired = np.sqrt(2 * (residual**2).sum() / freedom / seeds)
        shown, unit = (np.exp(mean), np.exp(mean)) if log else (mean, np.ones(len(mean)))
        out[name] = ScoreSummary(shown, unit * np.sqrt(variance / seeds), mean, float(paired))
    return out


def is_distance(score: str) -> bool:
    """Returns whether a score is a distance, lower is better, and not a fraction."""
    return score.startswith(("fd", "fid", "sfid"))


def recommended(entries: list[FrontierEntry]) -> int:
    """Returns the cheapest of the samplers that are worse than the best in the fewest judgements.

    Judgements are the first distance, precision, density, coverage and the share of images that a
    classifier is unsure of. Worse is what exceeds the error of a difference.
    """
    drawn = [i for i, entry in enumerate(entries) if entry.sampler != REAL_IMAGES]
    worse = dict.fromkeys(drawn, 0)
    for name, each in judgements(entries).items():
        best = min(drawn, key=lambda i, name=name, each=each: cost(name, each, i))
        for i in drawn:
            worse[i] += is_worse(name, each, i, best)
    distance = next(iter(summaries(entries).values()))
    return min(drawn, key=lambda i: (worse[i], entries[i].evaluations, distance.units[i]))


def judgements(entries: list[FrontierEntry]) -> dict[str, ScoreSummary]:
    """Returns the summaries of the scores that decide."""
    first, *others = summaries(entries).items()
    return dict([first, *(item for item in others if item[0].startswith(JUDGEMENTS))])


def is_better_low(score: str) -> bool:
    """Returns whether lower is better."""
    return is_distance(score) or score == "unsure"


def cost(name: str, each: ScoreSummary, i: int) -> float:
    """Returns the score of entry i in its units, with the sign for which lower is better."""
    return each.units[i] if is_better_low(name) else -each.units[i]


def is_worse(name: str, each: ScoreSummary, i: int, j: int) -> bool:
    """Returns whether sampler i is worse than j by more than the error of their difference."""
    return cost(name, each, i) - cost(name, each, j) > SIGMAS * each.paired


def advice(entries: list[FrontierEntry]) -> list[str]:
    """Returns the best sampler at each cost, a dearer one only if better, and the recommended."""
    (score, each), lines, best = next(iter(summaries(entries).items())), [], None
    drawn = [i for i, entry in enumerate(entries) if entry.sampler != REAL_IMAGES]
    for i in sorted(drawn, key=lambda i: (entries[i].evaluations, each.mean[i])):
        if best is None or is_worse(score, each, best, i):
            best = i
            number = with_error(each, i)
            cost = f"from {entries[i].evaluations:5,} evaluations"
            lines.append(f"{cost}: {score} {number} by {flags(entries[i])}")
    chosen, seeds = entries[recommended(entries)], len(entries[0].scores[score])
    lines.append(f"recommended {flags(chosen)}: {chosen.evaluations:,} evaluations")
    by = f"by {SIGMAS} standard errors over {seeds} seeds" if seeds > 1 else "at all"
    lines.append(
        f"           the cheapest of those that are worse than the best, {by}, in the fewest of"
    )
    lines.append(f"           {', '.join(judgements(entries))}")
    return lines


def flags(entry: FrontierEntry) -> str:
    """Returns the flags of an entry's sampler."""
    return " ".join(f"--config.{k}={value}" for k, value in zip(KEYS, entry[:3], strict=True))


def with_error(each: ScoreSummary, i: int) -> str:
    """Returns the mean of an entry and its error, if there is one."""
    error = f" +- {each.error[i]:.2g}" if each.error[i] else ""
    return f"{each.mean[i]:.4g}{error}"


def line(entry: FrontierEntry) -> str:
    """Returns what is known of an entry as soon as it is drawn."""
    score, values = next(iter(entry.scores.items()))
    cost = f"{entry.evaluations:5} evaluations {entry.seconds:9.3g} s/image"
    return f"{label(entry):36} {cost}  {score} {np.mean(values):.4g}"


def label(entry: FrontierEntry) -> str:
    """Returns a name for an entry."""
    if entry.sampler == REAL_IMAGES:
        return f"{entry.steps:,} {REAL_IMAGES} of {entry.grid}"
    return f"{entry.sampler}, {entry.grid}, {entry.steps} steps"


def entry_table(entries: list[FrontierEntry]) -> list[str]:
    """Returns the judgements of every entry with their errors, by cost."""
    scores = judgements(entries)
    kind = next(iter(scores)).partition("_")[2]
    names = [name.removesuffix(f"_{kind}") for name in scores]
    title = f"by {kind or 'Inception'} features"
    rows = [f"{title:36} evaluations"]
    rows[0] += "".join(f"{name:>18}" for name in names)
    for i in sorted(range(len(entries)), key=lambda i: entries[i].evaluations):
        cells = "".join(f"{with_error(each, i):>18}" for each in scores.values())
        rows.append(f"{label(entries[i]):36} {entries[i].evaluations:11,}{cells}")
    return rows


def frontier_panels(entries: list[FrontierEntry]) -> list[curves.FrontierPanel]:
    """Returns distance, precision and coverage over evaluations, the distance over seconds."""
    several = len({entry.grid for entry in entries if entry.sampler != REAL_IMAGES}) > 1
    panels = []
    found = list(judgements(entries).items())
    others = [item for item in found if item[0].startswith(("precision", "coverage"))]
    for column, (name, each) in [*((3, item) for item in (found[0], *others)), (4, found[0])]:
        lines: dict[str, list[curves.Point]] = {}
        floor = None
        for i in sorted(range(len(entries)), key=lambda i: entries[i].evaluations):
            entry, point = entries[i], (each.mean[i], each.error[i])
            if entry.sampler == REAL_IMAGES:
                floor = point
                continue
            sampler = f"{entry.sampler}, {entry.grid}" if several else entry.sampler
            lines.setdefault(sampler, []).append((entry[column], *point))
        axis = ("network evaluations per image", "seconds per image")[column - 3]
        panels.append(curves.FrontierPanel(name, axis, lines, floor, is_distance(name)))
    return panels
