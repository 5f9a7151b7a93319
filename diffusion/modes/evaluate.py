"""--mode=eval: how near the samples of a checkpoint, or given images, are to real ones.

Samples are kept on disk while they are drawn, so that a killed evaluation resumes. Scores are named
by their features and their count: only 50,000 samples and the published network make a FID.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from etils import epath

from diffusion import experiment, metrics
from diffusion.experiment import Experiment
from diffusion.metrics.extraction import image_set_from_files
from diffusion.modes import _averages, _sampling, _scores, _split_pass
from diffusion.modes._common import load_models
from diffusion.modes._scores import Reference, Scorer, Scores
from diffusion.plotting.image_grid import image_grid, save_png
from diffusion.runtime.config import Run
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError
from diffusion.utils.io import absolute, local_copy, save_json
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import human_time

PACKAGES = ("jax", "flax", "numpy", "scipy")  # whose versions metrics.json notes
GRID = 100  # samples in grid.png


def run(run: Run) -> None:
    """Scores eval.num samples of the last checkpoint, or the images that --input names.

    Where eval.features names Inception's, whose weights are missing, all other scores are computed
    before the DataError that says how to get them.
    """
    exp, inputs = experiment.build(run.config), run.flags.input
    if "weights" in run.overrides:
        found = f"found weights={run.config.weights!r}"
        raise ConfigError(f"eval.weights: expected a tuple for --mode=eval, {found}; give it here")
    if len(inputs) > 2:
        raise ConfigError(f"--input: expected one or two of them, found {len(inputs)}")
    if inputs:
        evaluate_images(run, exp, *inputs)
    else:
        evaluate_samples(run, exp)


def evaluate_samples(run: Run, exp: Experiment) -> None:
    """Draws and scores samples for each of eval.seeds and eval.weights.

    Writes workdir/eval/STEP/metrics.json, and a copy beside each set of samples; average.png where
    averages of several lengths are among the weights.
    """
    config, c = run.config, run.config.eval
    experiment.make_sampler(config, exp)  # a wrong sampler is found before anything is read
    models = [_split_pass.with_analytic(model) for model in load_models(run, exp, c.weights)]
    step, folder = models[0].step, run.workdir / "eval" / f"{models[0].step:08d}"
    scorer = _scores.make_scorer(config, exp, exp.image_shape)
    announce(scorer, c.num, c.references)
    references = [_scores.load_reference(name, scorer) for name in c.references]
    size = min(c.num, c.batch_size)
    # Models share a sampler, unless each has variances of its own.
    exps = {id(model.exp): model.exp for model in models}
    samplers = {key: _sampling.compile_sampler(config, e, size) for key, e in exps.items()}
    what = f"{c.num:,} samples of step {step:,}, {_sampling.describe_sampler(config)}"
    logging.info(f"drawing    {what}")
    sets, first = len(c.seeds) * len(models), samplers[id(models[0].exp)]
    seconds = sets * _sampling.estimate_seconds(first, models[0].params, c.num)
    logging.info(f"           {sets} set{'s' * (sets > 1)}, about {human_time(seconds)} in all")
    results, notes, folders = {}, [], [folder]
    for model in models:
        scores = []
        for seed in c.seeds:
            setting = _sampling.sample_setting(config, step, model.weights, seed)
            path = folder / _sampling.sample_name(setting)
            store = _sampling.SampleStore(path, setting, exp.image_shape)
            logging.info(f"           {store.npz}")
            _sampling.fill(store, samplers[id(model.exp)], model.params, c.num)
            images = image_set_from_files(str(store.npz), exp.image_shape[2], c.num)
            scores.append(
                _scores.score(scorer.read(images, path / "partial.npz"), references, notes)
            )
            folders.append(path)
            if is_primary():
                save_png(path / "grid.png", image_grid(store.read()[:GRID]))
        results[model.weights] = over_seeds(scores)
    content = {"step": step, "samples": c.num, "seeds": list(c.seeds), "sampler": config.sampler}
    content |= {"scores": results, "notes": notes}
    if len(_averages.lengths_of(c.weights)) > 1:
        args = models, results, scorer, references[0], folder / "average.png", notes
        content["bits_per_dim"] = _averages.compare_averages(*args)
    report(content, [f / "metrics.json" for f in folders], references, scorer)


def evaluate_images(run: Run, exp: Experiment, path: str, *others: str) -> None:
    """Scores the images at `path` against those at `others`, or else at eval.references.

    The scores are printed and written to metrics.json. Raises ConfigError, DataError.
    """
    local, names = local_copy(path), others or run.config.eval.references
    images = _scores.open_images(run.config, str(local))
    scorer = _scores.make_scorer(run.config, exp, images.shape)
    announce(scorer, images.n, names)
    references = [_scores.load_reference(name, scorer) for name in names]
    notes = [images.warning] if images.warning else []
    scores = over_seeds([_scores.score(scorer.read(images), references, notes)])
    digest = _scores.digest_of(local)
    content = {"input": path, "sha256": digest, "samples": images.n}
    content |= {"scores": {"input": scores}, "notes": notes}
    c = run.config.data
    form = [f"{images.shape} {c.fit} {tuple(c.background)}"] if run.config.eval.resize else []
    key = "\n".join([*map(str, map(absolute, (path, *others))), *names, *form])
    name = f"{local.stem}_{hashlib.sha256(key.encode()).hexdigest()[:6]}"
    report(content, [run.workdir / "eval" / name / "metrics.json"], references, scorer)


def announce(scorer: Scorer, n: int, references: Sequence[str]) -> None:
    """Says what will be scored."""
    scores = ", ".join(metrics.metric_name("fd", kind, n) for kind in scorer.extractor.kinds)
    against = f"against {' and '.join(references)}"
    logging.info(f"scoring    {scores} and others by the same features, {against}")


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
    paths: list[epath.Path],
    references: list[Reference],
    scorer: Scorer,
) -> None:
    """Prints the scores and writes metrics.json with all that they follow from.

    Raises the error of missing Inception weights, if they were asked for by name.
    """
    about = [f"{r.name}: {r.about['note']}" for r in references if r.about.get("note")]
    notes, config = list(dict.fromkeys([*content["notes"], *about])), scorer.config
    for images, found in content["scores"].items():
        for line in table(images, found):
            logging.info(line)
    for line in notes:
        logging.info(f"note       {line}")
    content |= {
        "notes": notes,
        "data": config.data.name or config.data.source,
        "references": {r.name: r.about for r in references},
        "weights": scorer.extractor.fingerprints,
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
