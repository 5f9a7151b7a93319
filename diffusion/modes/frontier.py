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
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from scipy import stats

from diffusion import experiment
from diffusion.experiment import Experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained
from diffusion.modes._sampling import CompiledSampler
from diffusion.modes._scores import Reference, Scorer, load_reference, make_fidelity, make_scorer
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
JUDGEMENTS = "precision", "unsure"  # beside the first distance: they see noise and blur
COLUMNS_BESIDE = (*JUDGEMENTS, "density", "coverage")
CONFIDENCE = 0.95  # of a difference that counts


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
    reference = load_reference("train", scorer)
    fidelity = make_fidelity(scorer, reference, c.num)
    real = real_entry(run.config, exp, fidelity)
    folder = trained.folder("frontier")
    setting = entry_setting(trained, scorer, reference)
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
    """Computes the scores of frontier.num real images for each seed.

    They are of the split test where it has as many. Images of the split train are in what they are
    compared with, which makes their scores better than those of other real images.
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


def report(entries: list[FrontierEntry], folder: epath.Path) -> None:
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


def entry_setting(trained: Trained, scorer: Scorer, reference: Reference) -> dict[str, Any]:
    """Returns what every entry depends on, besides its own keys."""
    config, extractor = trained.config, scorer.extractor
    seeds = [*config.frontier.seeds]
    setting = _sampling.sample_setting(config, trained.step, trained.weights, seeds)
    rest = {key: value for key, value in setting.items() if key not in KEYS}
    device = jax.devices()[0].device_kind  # seconds of different devices are not comparable
    rest |= {"frontier.num": config.frontier.num, "eval.keep": config.eval.keep, "device": device}
    features = {kind: extractor.fingerprints.get(kind, "") for kind in extractor.kinds}
    return rest | {"features": features, "reference": reference.about}


def load_entries(path: epath.Path, setting: dict[str, Any]) -> dict[Key, FrontierEntry]:
    """Returns the entries of an earlier run of the same setting."""
    try:
        stored = json.loads(path.read_text())
        entries = [FrontierEntry(**entry) for entry in stored["entries"]]
        return {entry[:3]: entry for entry in entries} if stored["setting"] == setting else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(folder: epath.Path, setting: dict[str, Any], entries: list[FrontierEntry]) -> None:
    """Writes frontier.json, to resume from."""
    content = {"setting": setting, "entries": [entry._asdict() for entry in entries]}
    save_json(folder / "frontier.json", content)


def write_csv(path: epath.Path, entries: list[FrontierEntry]) -> None:
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

    Attributes:
      cost: float64[n], what is compared, lower is better: the mean square root of a distance, or a
        fraction, which counts as no better than that of real images.
      margin: the least difference of two samplers' costs that counts. They draw from the same
        noise, so it follows from what is left of the costs without the effects of sampler and seed.
    """

    mean: np.ndarray
    error: np.ndarray
    cost: np.ndarray
    margin: float


def summaries(entries: list[FrontierEntry]) -> dict[str, ScoreSummary]:
    """Returns the summary of each score over the entries. Of one seed all errors are 0."""
    out, drawn = {}, np.array([entry.sampler != REAL_IMAGES for entry in entries])
    for name in entries[0].scores:
        values = np.array([entry.scores[name] for entry in entries], np.float64)
        seeds, margin, error = values.shape[1], 0.0, np.zeros(len(values))
        if is_distance(name):
            costs = np.sqrt(np.maximum(values, 0))
        else:
            costs = values if name == "unsure" else -values
            if not drawn.all():
                costs = np.maximum(costs, costs[~drawn].mean())
        if seeds > 1:
            error = values.std(1, ddof=1) / np.sqrt(seeds)
            rest = costs[drawn]
            rest = rest - rest.mean(0) - rest.mean(1)[:, None] + rest.mean()
            if freedom := (len(rest) - 1) * (seeds - 1):
                quantile = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
                margin = quantile * np.sqrt(2 * (rest**2).sum() / freedom / seeds)
        out[name] = ScoreSummary(values.mean(1), error, costs.mean(1), float(margin))
    return out


def is_distance(score: str) -> bool:
    """Returns whether a score is a distance, lower is better, and not a fraction."""
    return score.startswith(("fd", "fid", "sfid"))


def recommended(entries: list[FrontierEntry]) -> int:
    """Returns the cheapest of the samplers that are worse than the best in the fewest judgements.

    Judgements are the first distance, precision and the share of images that a classifier is unsure
    of, which put rising noise and blur in order (tests/metrics/ladders.py). Worse is what exceeds
    the margin of a difference.
    """
    drawn, scores = drawn_entries(entries), judgements(entries)
    distance = next(iter(scores.values()))
    worse = dict.fromkeys(drawn, 0)
    for each in scores.values():
        best = min(drawn, key=lambda i, each=each: each.cost[i])
        for i in drawn:
            worse[i] += is_worse(each, i, best)
    return min(drawn, key=lambda i: (worse[i], entries[i].evaluations, distance.cost[i]))


def drawn_entries(entries: list[FrontierEntry]) -> list[int]:
    """Returns the indices of the entries that samplers drew, by cost and then by distance."""
    distance = next(iter(summaries(entries).values()))
    drawn = (i for i, entry in enumerate(entries) if entry.sampler != REAL_IMAGES)
    return sorted(drawn, key=lambda i: (entries[i].evaluations, distance.cost[i]))


def judgements(
    entries: list[FrontierEntry], beside: tuple[str, ...] = JUDGEMENTS
) -> dict[str, ScoreSummary]:
    """Returns the summaries of the first score and of those beside it, by default what decides."""
    first, *others = summaries(entries).items()
    return dict([first, *(item for item in others if item[0].startswith(beside))])


def is_worse(each: ScoreSummary, i: int, j: int) -> bool:
    """Returns whether sampler i is worse than j by more than the margin of their difference."""
    return each.cost[i] - each.cost[j] > each.margin


def advice(entries: list[FrontierEntry]) -> list[str]:
    """Returns the best sampler at each cost, a dearer one only if better, and the recommended."""
    (score, each), lines, best = next(iter(summaries(entries).items())), [], None
    for i in drawn_entries(entries):
        if best is None or is_worse(each, best, i):
            best = i
            budget = f"from {entries[i].evaluations:5,} evaluations"
            lines.append(f"{budget}: {score} {with_error(each, i)} by {flags(entries[i])}")
    chosen, seeds = entries[recommended(entries)], len(entries[0].scores[score])
    lines.append(f"recommended {flags(chosen)}: {chosen.evaluations:,} evaluations, the cheapest")
    lines.append("           of the samplers that are worse than the best in the fewest of")
    lines.append(f"           {', '.join(judgements(entries))}")
    if seeds > 1:
        limit = f"beyond the {CONFIDENCE:.0%} interval of a difference over {seeds} seeds"
        lines.append(f"           (worse: {limit})")
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
    """Returns the judgements, density and coverage of every entry with their errors, by cost."""
    scores = judgements(entries, COLUMNS_BESIDE)
    kind = next(iter(scores)).partition("_")[2]
    names = [name.removesuffix(f"_{kind}") for name in scores]
    title = f"by {kind or 'Inception'} features"
    rows = [f"{title:36} evaluations"]
    rows[0] += "".join(f"{name:>20}" for name in names)
    for i in sorted(range(len(entries)), key=lambda i: entries[i].evaluations):
        cells = "".join(f"{with_error(each, i):>20}" for each in scores.values())
        rows.append(f"{label(entries[i]):36} {entries[i].evaluations:11,}{cells}")
    return rows


def frontier_panels(entries: list[FrontierEntry]) -> list[curves.FrontierPanel]:
    """Returns distance, precision and coverage over evaluations, the distance over seconds."""
    drawn, panels = drawn_entries(entries), []
    several = len({entries[i].grid for i in drawn}) > 1
    distance, *others = judgements(entries, COLUMNS_BESIDE).items()
    others = [item for item in others if item[0].startswith(("precision", "coverage"))]
    axes = {"evaluations": "network evaluations per image", "seconds": "seconds per image"}
    chosen = [*(("evaluations", *item) for item in (distance, *others)), ("seconds", *distance)]
    for cost, name, each in chosen:
        points = [(float(m), float(e)) for m, e in zip(each.mean, each.error, strict=True)]
        lines: dict[str, list[curves.Point]] = {}
        for i in drawn:
            entry = entries[i]
            sampler = f"{entry.sampler}, {entry.grid}" if several else entry.sampler
            lines.setdefault(sampler, []).append((getattr(entry, cost), *points[i]))
        floor = next((points[i] for i in range(len(entries)) if i not in drawn), None)
        panels.append(curves.FrontierPanel(name, axes[cost], lines, floor, is_distance(name)))
    return panels
