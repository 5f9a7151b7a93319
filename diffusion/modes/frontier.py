"""--mode=frontier: quality against network evaluations and seconds, over samplers, grids, steps.

Each entry draws samples from the same noise in another way and scores them against the training
set; the config's own way is one of them. Entries are kept in frontier.json, so that a killed run
resumes, and one with more samplers or steps adds to it.
"""

import csv
import io
import itertools
import json
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion import experiment
from diffusion.experiment import ANALYTIC, Experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained, load_trained
from diffusion.modes._sampling import CompiledSampler
from diffusion.modes._scores import load_reference, make_distances, make_scorer
from diffusion.plotting import curves
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils import logging
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import human_time

KEYS = ("sampler.name", "sampler.grid", "sampler.steps")  # what differs between entries
Way = tuple[str, str, int]  # their values


class Entry(NamedTuple):
    """One way of sampling. evaluations: of the network per image; seconds: per image."""

    sampler: str
    grid: str
    steps: int
    evaluations: int
    seconds: float
    scores: dict[str, float]


def run(run: Run) -> None:
    """Writes workdir/frontier/STEP/frontier.{json,csv,png}. Raises ConfigError, DataError."""
    c, exp = run.config.frontier, experiment.build(run.config)
    compile_samplers(run, exp)  # finds what cannot be done before anything is drawn
    trained = load_trained(run, exp)
    if run.config.sampler.variance == ANALYTIC:
        from diffusion.modes._split_pass import with_analytic

        trained = with_analytic(trained)
    folder = run.workdir / "frontier" / f"{trained.step:08d}"
    samplers = compile_samplers(run, trained.exp)
    scorer = make_scorer(trained, exp.image_shape)
    distances = make_distances(scorer, load_reference("train", scorer))
    setting = entry_setting(trained, list(scorer.extractor.kinds))
    done = load_entries(folder / "frontier.json", setting) if is_primary() else {}
    todo = [way for way in samplers if broadcast_from_primary(way not in done)]
    logging.info(
        f"drawing    {c.num:,} samples in each of {len(samplers)} ways, {len(todo)} of them to do"
    )
    began, work = time.monotonic(), [samplers[way].evaluations for way in todo]
    for i, way in enumerate(todo):
        sampler = samplers[way]
        images, seconds = draw_timed(sampler, trained.params, run.config.sample.seed, c.num)
        drawn = -(-c.num // sampler.size) * sampler.size
        found = distances(images)
        if is_primary():  # only there are images scored
            done[way] = Entry(*way, sampler.evaluations, seconds / drawn, found)
            left = (time.monotonic() - began) / sum(work[: i + 1]) * sum(work[i + 1 :])
            eta = f"  ETA {human_time(left)}" if left else ""
            logging.info(f"{line(done[way])}{eta}")
            write(folder, setting, done.values())
    if is_primary():
        for text in advice(list(done.values())):
            logging.info(text)
        curves.frontier(folder / "frontier.png", *frontier_curves(list(done.values())))
    logging.info(f"done       {folder}/frontier.png, frontier.csv, frontier.json")
    if scorer.missing:
        raise scorer.missing


def compile_samplers(run: Run, exp: Experiment) -> dict[Way, CompiledSampler]:
    """Returns the sampler of each way, the config's own among them. Raises ConfigError."""
    c, own = run.config.frontier, run.config.sampler
    steps = [n for n in c.steps if n <= exp.process.T]
    ways = (*itertools.product(c.samplers, c.grids, steps), (own.name, own.grid, own.steps))
    samplers = {}
    for way in ways:
        keys = dict(zip(KEYS, way, strict=True)) | {"sampler.times": ()}
        config = with_overrides(run.config, keys)
        size = min(c.num, config.eval.batch_size)
        samplers[way] = _sampling.compile_sampler(config, exp, size)
    return samplers


def draw_timed(
    sampler: CompiledSampler, params: Any, seed: int, n: int
) -> tuple[np.ndarray, float]:
    """Returns n images and the seconds that they took after compilation."""
    next(_sampling.draw(sampler, params, seed, 1))
    began = time.monotonic()
    images = np.concatenate(list(_sampling.draw(sampler, params, seed, n)))
    return images, time.monotonic() - began


def entry_setting(trained: Trained, kinds: list[str]) -> dict[str, Any]:
    """Returns what every entry depends on, besides its own keys."""
    config = trained.config
    setting = _sampling.sample_setting(config, trained.step, "ema", config.sample.seed)
    rest = {key: value for key, value in setting.items() if key not in KEYS}
    device = jax.devices()[0].device_kind  # seconds of different devices are not comparable
    return {**rest, "frontier.num": config.frontier.num, "features": kinds, "device": device}


def load_entries(path: pathlib.Path, setting: dict[str, Any]) -> dict[Way, Entry]:
    """Returns the entries of an earlier run of the same setting."""
    try:
        stored = json.loads(path.read_text())
        entries = [Entry(**entry) for entry in stored["entries"]]
        return {entry[:3]: entry for entry in entries} if stored["setting"] == setting else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(folder: pathlib.Path, setting: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Writes frontier.json, to resume from, and frontier.csv."""
    entries = list(entries)
    content = {"setting": setting, "entries": [entry._asdict() for entry in entries]}
    save_json(folder / "frontier.json", content)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*Entry._fields[:5], *entries[0].scores])
    for entry in entries:
        table.writerow([*entry[:5], *(f"{value:.6g}" for value in entry.scores.values())])
    save_text(folder / "frontier.csv", text.getvalue())


def line(entry: Entry) -> str:
    """Returns an entry as a row of a table."""
    scores = "  ".join(f"{name} {value:9.4g}" for name, value in entry.scores.items())
    way = f"{entry.sampler}, {entry.grid}, {entry.steps} steps"
    return f"{way:34} {entry.evaluations:5} evaluations {entry.seconds:9.3g} s/image  {scores}"


def frontier_curves(
    entries: list[Entry],
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


def advice(entries: list[Entry]) -> list[str]:
    """Returns the best way within each budget of evaluations; a larger budget only if better."""
    score = next(iter(entries[0].scores))
    best, lines = float("inf"), []
    for entry in sorted(entries, key=lambda entry: (entry.evaluations, entry.scores[score])):
        if entry.scores[score] < best:
            best = entry.scores[score]
            way = f"--config.sampler.name={entry.sampler} --config.sampler.grid={entry.grid}"
            way += f" --config.sampler.steps={entry.steps}"
            lines.append(f"from {entry.evaluations:5,} evaluations: {score} {best:.4g} by {way}")
    return lines
