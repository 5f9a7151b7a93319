"""--mode=eval: how near the samples of a checkpoint, or given images, are to real ones.

Samples are kept on disk while they are drawn, so that a killed evaluation resumes. Scores are named
by their features and their count: only 50,000 samples and the published network make a FID.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from diffusion import experiment
from diffusion.experiment import ANALYTIC, Experiment
from diffusion.metrics.extraction import image_set_from_files
from diffusion.modes import _sampling
from diffusion.modes._common import Trained, load_state
from diffusion.modes._scores import (
    Reference,
    Scorer,
    Scores,
    digest_of,
    load_reference,
    make_scorer,
    score,
)
from diffusion.plotting.image_grid import image_grid, save_png
from diffusion.runtime.config import Run
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError
from diffusion.utils.io import save_json
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import human_time

PACKAGES = ("jax", "flax", "numpy", "scipy")
GRID = 100  # samples in grid.png


def run(run: Run) -> None:
    """Scores eval.num samples of the last checkpoint, or the images that --input names.

    Without Inception weights all other scores are computed before the DataError that says how to
    get them.
    """
    exp, inputs = experiment.build(run.config), run.flags.input
    if len(inputs) > 2:
        raise ConfigError(f"--input: expected one or two of them, found {len(inputs)}")
    if inputs:
        evaluate_images(run, exp, *inputs)
    else:
        evaluate_samples(run, exp)


def evaluate_samples(run: Run, exp: Experiment) -> None:
    """Draws and scores samples for each of eval.seeds and eval.weights.

    Writes workdir/eval/STEP/metrics.json, and a copy beside each set of samples.
    """
    config, c = run.config, run.config.eval
    _sampling.compile_sampler(config, exp, 1)  # finds what is wrong with the sampler
    models = list(load_models(run, exp))
    folder = run.workdir / "eval" / f"{models[0].step:08d}"
    scorer = make_scorer(models[0], exp.image_shape)
    references = [load_reference(name, scorer) for name in c.references]
    logging.info(
        f"drawing    {c.num:,} samples of step {models[0].step:,}, "
        f"{_sampling.describe_sampler(config)}"
    )
    sampler = _sampling.compile_sampler(config, models[0].exp, min(c.num, c.batch_size))
    seconds = _sampling.estimate_seconds(sampler, models[0].params, c.num)
    sets = len(c.seeds) * len(models)
    logging.info(f"           {sets} sets, about {human_time(seconds * sets)} in all")
    results, notes, folders = {}, [], [folder]
    for model in models:
        sampler = _sampling.compile_sampler(config, model.exp, min(c.num, c.batch_size))
        each = []
        for seed in c.seeds:
            setting = _sampling.sample_setting(config, model.step, model.weights, seed)
            path = folder / _sampling.sample_name(setting)
            store = _sampling.SampleStore(path, setting, exp.image_shape)
            logging.info(f"           {store.npz}")
            _sampling.fill(store, sampler, model.params, c.num)
            images = image_set_from_files(str(store.npz), exp.image_shape[2], c.num)
            found = scorer.read(images, path / "partial.npz")
            each.append(score(found, references, notes))
            folders.append(path)
            if is_primary():
                with np.load(store.npz) as file:
                    save_png(path / "grid.png", image_grid(file["arr_0"][:GRID]))
        results[model.weights] = over_seeds(each)
    content = {"step": models[0].step, "samples": c.num, "seeds": list(c.seeds)}
    content |= {"sampler": config.sampler, "scores": results, "notes": notes}
    report(content, [f / "metrics.json" for f in folders], references, scorer)


def load_models(run: Run, exp: Experiment) -> Iterator[Trained]:
    """Yields the model with each of eval.weights of the last checkpoint."""
    state = load_state(run, exp)
    for name in run.config.eval.weights:
        params = {"ema": state.ema, "raw": state.params}[name]
        model = Trained(run.config, exp, run.workdir, int(state.step), params, name)
        if run.config.sampler.variance == ANALYTIC:
            from diffusion.modes._split_pass import with_analytic

            model = with_analytic(model)
        yield model


def evaluate_images(run: Run, exp: Experiment, path: str, *others: str) -> None:
    """Scores the images at `path` against those of the other, or against eval.references."""
    images, names = image_set_from_files(path), list(others or run.config.eval.references)
    trained = Trained(run.config, exp, run.workdir, 0, None)
    scorer = make_scorer(trained, images.shape)
    references = [load_reference(name, scorer) for name in names]
    notes = [images.warning] if images.warning else []
    found = scorer.read(images)
    digest = digest_of(pathlib.Path(path).expanduser())
    content: dict[str, Any] = {"input": path, "sha256": digest, "samples": images.n}
    content |= {"scores": {"input": over_seeds([score(found, references, notes)])}, "notes": notes}
    key = "\n".join([*map(os.path.abspath, (path, *others)), *names])
    name = f"{pathlib.Path(path).stem}_{hashlib.sha256(key.encode()).hexdigest()[:6]}"
    report(content, [run.workdir / "eval" / name / "metrics.json"], references, scorer)


def over_seeds(each: list[Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the scores for metrics.json: of several sets their mean and its error."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for against, named in each[0].items():
        for name in named:
            found = [scores[against][name] for scores in each]
            values = [s.value for s in found]
            if len(found) == 1:
                entry = {"value": values[0], "error": found[0].error, "error_over": "one set"}
            else:
                error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
                entry = {"value": float(np.mean(values)), "error": error}
                entry |= {"error_over": f"{len(values)} seeds", "each": values}
            out.setdefault(against, {})[name] = entry
    return out


def report(
    content: dict[str, Any],
    paths: list[pathlib.Path],
    references: list[Reference],
    scorer: Scorer,
) -> None:
    """Prints the scores and writes metrics.json with all that they follow from.

    Raises the error of missing Inception weights, if they were asked for.
    """
    content["notes"] = list(dict.fromkeys(content["notes"]))
    for images, found in content["scores"].items():
        for line in table(images, found):
            logging.info(line)
    for line in content["notes"]:
        logging.info(f"note       {line}")
    config = scorer.trained.config
    content |= {
        "data": config.data.name or config.data.source,
        "references": {r.name: r.about for r in references},
        "inception": scorer.extractor.fingerprint,
        "versions": {name: version(name) for name in PACKAGES},
        "config": config,
    }
    for path in paths if is_primary() else ():
        save_json(path, content)
    logging.info(f"done       {paths[0]}")
    if scorer.missing:
        raise scorer.missing


def table(images: str, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Returns the lines of a table: a score a row, a reference a column."""

    def cell(entry):
        if entry is None:
            return ""
        error = "" if entry["error"] is None else f" +- {entry['error']:.2g}"
        return f"{entry['value']:.4g}{error}"

    columns = [against for against in found if against]
    rows = [[images, *(f"against {against}" for against in columns)]]
    rows += [[name, cell(entry)] for name, entry in found.get("", {}).items()]
    for name in dict.fromkeys(name for against in columns for name in found[against]):
        rows.append([name, *(cell(found[against].get(name)) for against in columns)])
    return [f"{name:26}" + "".join(f"{text:>24}" for text in cells) for name, *cells in rows]
