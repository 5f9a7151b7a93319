"""--mode=frontier: quality against network evaluations and seconds, over samplers, grids, steps.

Each sampler draws images from the same noise, which are scored against the training set; the
config's own sampler is one of them. Entries are kept in frontier.json, so that a killed run
resumes, and one with more samplers or steps adds to it.
"""

import csv
import io
import itertools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion import experiment
from diffusion.experiment import Experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained
from diffusion.modes._sampling import CompiledSampler
from diffusion.modes._scores import load_reference, make_distances, make_scorer
from diffusion.plotting import curves
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils import logging
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import QUIET_S, Progress, human_time

KEYS = ("sampler.name", "sampler.grid", "sampler.steps")  # what differs between entries
Key = tuple[str, str, int]  # their values


class FrontierEntry(NamedTuple):
    """One sampler. evaluations: of the network per image; seconds: per image."""

    sampler: str
    grid: str
    steps: int
    evaluations: int
    seconds: float
    scores: dict[str, float]


def run(run: Run) -> None:
    """Writes workdir/frontier/STEP/frontier.{json,csv,png}.

    Raises ConfigError before anything is drawn, WorkdirError, DataError.
    """
    c, exp = run.config.frontier, experiment.build(run.config)
    compile_samplers(run, exp)  # a wrong sampler is found before anything is read
    trained = _sampling.load_for_sampling(run, exp)
    samplers = compile_samplers(run, trained.exp)
    scorer = make_scorer(run.config, exp, exp.image_shape)
    distances = make_distances(scorer, load_reference("train", scorer))
    folder = run.workdir / "frontier" / f"{trained.step:08d}"
    setting = entry_setting(trained, list(scorer.extractor.kinds))
    done = load_entries(folder / "frontier.json", setting) if is_primary() else {}
    todo = [key for key in samplers if broadcast_from_primary(key not in done)]
    what = f"{c.num:,} samples by each of {len(samplers)} samplers, {len(todo)} of them to do"
    logging.info(f"drawing    {what}")
    rest = [samplers[key].evaluations for key in todo]
    if todo:  # the longest one is timed on a few steps, and counts as if it had been drawn
        longest = max((samplers[key] for key in todo), key=lambda sampler: sampler.evaluations)
        began = time.monotonic()
        drew = _sampling.estimate_seconds(longest, trained.params, c.num)
        work, spent = [longest.evaluations], time.monotonic() - began + drew
        left = human_time(seconds_left(spent, drew, work, rest))
        logging.info(f"           {sum(rest):,} evaluations per image, about {left}")
    for key in todo:
        began = time.monotonic()
        images, seconds = draw_timed(samplers[key], trained.params, run.config.sample.seed, c.num)
        scores = distances(images)
        if is_primary():  # only there are images scored
            done[key] = FrontierEntry(*key, samplers[key].evaluations, seconds, scores)
            spent, drew = spent + time.monotonic() - began, drew + seconds * c.num
            work.append(rest.pop(0))
            left = seconds_left(spent, drew, work, rest)
            logging.info(f"{line(done[key])}{f'  ETA {human_time(left)}' if left else ''}")
            write(folder, setting, list(done.values()))
    if is_primary():
        for text in advice(list(done.values())):
            logging.info(text)
        curves.plot_frontier(folder / "frontier.png", *frontier_curves(list(done.values())))
    logging.info(f"done       {folder}/frontier.png, frontier.csv, frontier.json")
    if scorer.missing:
        raise scorer.missing


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
    setting = _sampling.sample_setting(config, trained.step, "ema", config.sample.seed)
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
    """Writes frontier.json, to resume from, and frontier.csv."""
    content = {"setting": setting, "entries": [entry._asdict() for entry in entries]}
    save_json(folder / "frontier.json", content)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*FrontierEntry._fields[:5], *entries[0].scores])
    for entry in entries:
        table.writerow([*entry[:5], *(f"{value:.6g}" for value in entry.scores.values())])
    save_text(folder / "frontier.csv", text.getvalue())


def line(entry: FrontierEntry) -> str:
    """Returns an entry as a row of a table."""
    scores = "  ".join(f"{name} {value:9.4g}" for name, value in entry.scores.items())
    sampler = f"{entry.sampler}, {entry.grid}, {entry.steps} steps"
    return f"{sampler:34} {entry.evaluations:5} evaluations {entry.seconds:9.3g} s/image  {scores}"


def frontier_curves(
    entries: list[FrontierEntry],
) -> tuple[str, dict[str, list[tuple[int, float, float]]]]:
    """Returns (the first score's name, {sampler and grid: (evaluations, seconds, score)...})."""
    score = next(iter(entries[0].scores))
    several = len({entry.grid for entry in entries}) > 1
    out: dict[str, list[tuple[int, float, float]]] = {}
    for entry in sorted(entries, key=lambda entry: entry.evaluations):
        name = f"{entry.sampler}, {entry.grid}" if several else entry.sampler
        point = entry.evaluations, entry.seconds, entry.scores[score]
        out.setdefault(name, []).append(point)
    return score, out


def advice(entries: list[FrontierEntry]) -> list[str]:
    """Returns the best sampler within each budget of evaluations; a larger one only if better."""
    score = next(iter(entries[0].scores))
    best, lines = float("inf"), []
    for entry in sorted(entries, key=lambda entry: (entry.evaluations, entry.scores[score])):
        if entry.scores[score] < best:
            best = entry.scores[score]
            values = zip(KEYS, entry[:3], strict=True)
            flags = " ".join(f"--config.{key}={value}" for key, value in values)
            lines.append(f"from {entry.evaluations:5,} evaluations: {score} {best:.4g} by {flags}")
    return lines
