"""--mode=frontier: quality against network evaluations and seconds, over samplers, steps and grids.

Every entry draws samples from the same noise in another way and scores them against the training
set; the config's own way is one of them. What is done is kept in frontier.json beside the picture,
so that a killed run goes on, and one with more samplers or steps adds to it.
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

from diffusion.experiment import Experiment
from diffusion.modes import _sampling, evaluate
from diffusion.plotting.curves import frontier
from diffusion.runtime.config import with_overrides
from diffusion.utils.io import save_text
from diffusion.utils.multihost import broadcast_from_primary
from diffusion.utils.progress import human_time

KEYS = ("sampler.name", "sampler.grid", "sampler.steps")  # of one way of drawing


class Entry(NamedTuple):
    """One way of drawing: how often an image asks the network, how long it takes, its scores."""

    sampler: str
    grid: str
    steps: int
    evaluations: int
    seconds: float
    scores: dict[str, float]


def run(
    config: ConfigDict,
    x: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: Any,
    say: Callable[[str], None],
) -> None:
    """Writes workdir/frontier/<step>/frontier.json, .csv and .png; params: the averaged weights.

    Raises DDPMError before the first is drawn where a way cannot be done, DataError.
    """
    c, first = config.frontier, jax.process_index() == 0
    folder = workdir / "frontier" / f"{step:08d}"
    chains = make_chains(config, x)
    extractor, trouble = evaluate.make_extractor(config, x, x.image_shape, say)
    real = evaluate.reference("train", config, x, extractor, say)
    distances = evaluate.distances_to(real, extractor, next(iter(chains.values())).size, x.mesh)
    setting = setting_of(config, step, list(extractor.kinds))
    done = taken_up(folder / "frontier.json", setting) if first else {}
    todo = [w for w in chains if broadcast_from_primary(w not in done)]
    say(f"drawing    {c.num:,} samples in each of {len(chains)} ways, {len(todo)} of them to do")
    began, work = time.monotonic(), sum(chains[way].evaluations for way in todo)
    for way in todo:
        images, seconds = draw(chains[way], params, config.sample.seed, c.num)
        drawn = -(-c.num // chains[way].size) * chains[way].size
        done[way] = Entry(*way, chains[way].evaluations, seconds / drawn, distances(images))
        work -= chains[way].evaluations
        share = sum(chains[w].evaluations for w in todo) - work
        left = human_time((time.monotonic() - began) / share * work)
        if first:  # only there images are scored
            say(f"{line(done[way])}  ETA {left}" if work else line(done[way]))
            write(folder, setting, done)
    if first:
        entries = list(done.values())
        for text in advice(entries):
            say(text)
        frontier(folder / "frontier.png", *curves(entries))
    say(f"done       {folder}/frontier.png, frontier.csv, frontier.json")
    if trouble:
        raise trouble


def make_chains(config: ConfigDict, x: Experiment) -> dict[tuple[str, str, int], _sampling.CompiledSampler]:
    """{(sampler, grid, steps): its chain}, the config's own among them. Raises Fatal."""
    c, own = config.frontier, config.sampler
    chains = {}
    steps = [n for n in c.steps if n <= x.p.T]
    for way in (*itertools.product(c.samplers, c.grids, steps), (own.name, own.grid, own.steps)):
        keys = dict(zip(KEYS, way, strict=True)) | {"sampler.times": ()}
        changed = with_overrides(config, keys)
        chains[way] = _sampling.compile_sampler(changed, x, min(c.num, config.eval.batch_size))
    return chains


def draw(chain: _sampling.CompiledSampler, params: Any, seed: int, n: int) -> tuple[np.ndarray, float]:
    """(n images, the seconds that they took once all was compiled)."""
    for images in _sampling.draw(chain, params, seed, 1):
        del images
    began = time.monotonic()
    images = np.concatenate(list(_sampling.draw(chain, params, seed, n)))
    return images, time.monotonic() - began


def setting_of(config: ConfigDict, step: int, kinds: list[str]) -> dict[str, Any]:
    """What every entry depends on, but for the way itself."""
    setting = _sampling.setting_of(config, step, "ema", config.sample.seed)
    rest = {key: value for key, value in setting.items() if key not in KEYS}
    device = jax.devices()[0].device_kind  # seconds of another are not to be mixed with these
    return {**rest, "frontier.num": config.frontier.num, "features": kinds, "device": device}


def taken_up(path: pathlib.Path, setting: dict[str, Any]) -> dict[tuple[str, str, int], Entry]:
    """What an earlier run of the same setting did."""
    try:
        kept = json.loads(path.read_text())
        entries = (
            [Entry(**entry) for entry in kept["entries"]] if kept["setting"] == setting else []
        )
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {entry[:3]: entry for entry in entries}


def write(folder: pathlib.Path, setting: dict[str, Any], done: dict[tuple, Entry]) -> None:
    """frontier.json, to go on from, and frontier.csv."""
    out = {"setting": setting, "entries": [entry._asdict() for entry in done.values()]}
    save_text(folder / "frontier.json", json.dumps(out, indent=2) + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = list(next(iter(done.values())).scores)
    table.writerow([*Entry._fields[:5], *names])
    for entry in done.values():
        table.writerow([*entry[:5], *(f"{entry.scores[name]:.6g}" for name in names)])
    save_text(folder / "frontier.csv", text.getvalue())


def line(entry: Entry) -> str:
    """An entry as a row of a table."""
    scores = "  ".join(f"{name} {value:9.4g}" for name, value in entry.scores.items())
    way = f"{entry.sampler}, {entry.grid}, {entry.steps} steps"
    return f"{way:34} {entry.evaluations:5} evaluations {entry.seconds:9.3g} s/image  {scores}"


def curves(entries: list[Entry]) -> tuple[str, dict[str, list[tuple[int, float, float]]]]:
    """(the score, {sampler and grid: (evaluations, seconds, score) by rising evaluations})."""
    score = next(iter(entries[0].scores))
    several = len({entry.grid for entry in entries}) > 1
    out: dict[str, list[tuple[int, float, float]]] = {}
    for entry in sorted(entries, key=lambda entry: entry.evaluations):
        name = f"{entry.sampler}, {entry.grid}" if several else entry.sampler
        point = entry.evaluations, entry.seconds, entry.scores[score]
        out.setdefault(name, []).append(point)
    return score, out


def advice(entries: list[Entry]) -> list[str]:
    """The best way within each budget of evaluations; a larger budget only where it pays."""
    score = next(iter(entries[0].scores))
    best, lines = float("inf"), []
    for entry in sorted(entries, key=lambda entry: (entry.evaluations, entry.scores[score])):
        if entry.scores[score] < best:
            best = entry.scores[score]
            way = f"--config.sampler.name={entry.sampler} --config.sampler.grid={entry.grid}"
            way += f" --config.sampler.steps={entry.steps}"
            lines.append(f"from {entry.evaluations:5,} evaluations: {score} {best:.4g} by {way}")
    return lines
