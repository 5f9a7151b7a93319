"""--mode=eval: how near the samples of a checkpoint, or the images of a folder, are to real ones.

What is compared is a set of images with a reference: splits of the data, published statistics, or
other images. Samples are kept on disk while they are drawn, so that a killed evaluation goes on.
Numbers are called by their features and their count: only 50,000 samples and the published network
make a FID.
"""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import convert, data, experiment, metrics
from diffusion.convert import files
from diffusion.experiment import Experiment
from diffusion.metrics import Score, extraction, feature_set, features, frechet, inception
from diffusion.metrics.extraction import FeatureExtractor
from diffusion.metrics.feature_set import FeatureSet
from diffusion.modes import _sampling
from diffusion.plotting import image_grid
from diffusion.runtime.config import cache_dir, with_overrides
from diffusion.utils.errors import DataError, DDPMError, IntegrityError
from diffusion.utils.io import save_bytes, save_text
from diffusion.utils.multihost import all_processes, broadcast_from_primary
from diffusion.utils.progress import human_time

PACKAGES = ("jax", "flax", "numpy", "scipy")
QUICK = {"sampler.name": "ddim", "sampler.grid": "uniform", "sampler.times": (), "sampler.eta": 0.0}
QUICK_STEPS = 20




class Reference(NamedTuple):
    """What sets are compared with. about: what metrics.json says of it."""

    name: str
    samples: dict[str, FeatureSet]
    about: dict[str, Any]


def reference(
    name: str, config: ConfigDict, x: Experiment, extractor: FeatureExtractor, say: Callable[[str], None]
) -> Reference:
    """A split of the data, an npz of statistics (mu, sigma), or other images. Says what it reads.

    Statistics of splits are kept between runs, by a hash of their images (data.mark). Raises DDPMError,
    DataError.
    """
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".npz" and (found := statistics(path, extractor)):
        return Reference(name, found, {"statistics": name, "sha256": mark_of_files(path)})
    if path.exists() and (path.suffix or len(path.parts) > 1):  # a bare word is a split
        some = extraction.image_set_from_files(name, extractor.shape[2], config.eval.reference_num)
        check_shape(name, some.shape, extractor)
        about = {"images": some.n, "sha256": mark_of_files(path)}
        return Reference(name, _read(some, config, x, extractor, None, say), about)
    images = experiment.load_split(config, x, name)
    check_shape(name, images.shape, extractor)
    some = extraction.image_set_from_split(images, name, config.eval.reference_num, config.data.workers)
    mark = data.fingerprint(images)
    about = {"split": name, "images": some.n, "hash": mark}
    stem = f"{config.data.name or config.data.source}_{name}_{some.n}_{mark}".replace("/", "_")
    folder = cache_dir() / "statistics"
    of = {
        k: f"{k}{extractor.mark if k in extraction.KINDS['inception'] else ''}"
        for k in extractor.kinds
    }
    paths = {k: folder / f"{stem}_{of[k]}_{config.eval.keep}.npz" for k in extractor.kinds}
    known: dict[str, FeatureSet] = {}
    for path in paths.values() if jax.process_index() == 0 else ():
        known |= statistics(path, extractor) or {}
    if not broadcast_from_primary(known.keys() == extractor.kinds.keys()):
        partial = folder / f"{stem}_partial.npz"
        known = _read(some, config, x, extractor, partial, say)
        if jax.process_index() == 0:
            for kind, path in paths.items():
                save_statistics(path, kind, known[kind])
    return Reference(name, known, about)


def _read(some, config, x, extractor, kept, say) -> dict[str, FeatureSet]:
    kinds = ", ".join(extractor.kinds)
    say(f"reading    {some.n:,} images of {some.name}: {kinds}")
    if some.concern:
        say(f"           {some.concern}")
    size = -(-min(config.eval.batch_size, some.n) // x.mesh.size) * x.mesh.size
    return extraction.extract(some, extractor, size, config.eval.keep, x.mesh, kept)


def save_statistics(path: pathlib.Path, kind: str, sample: FeatureSet) -> None:
    """An npz whose `mu` and `sigma` other programs read, beside all else that is kept."""
    mu, sigma = frechet.finalize(sample.stats)
    content = io.BytesIO()
    np.savez(content, mu=mu, sigma=sigma, kind=kind, **feature_set.to_arrays(sample))
    save_bytes(path, content.getvalue())


def statistics(path: pathlib.Path, extractor: FeatureExtractor) -> dict[str, FeatureSet] | None:
    """{kind: what an npz of statistics holds}; None if it is none of statistics, or not there.

    Published files have `mu` and `sigma` alone: their kind is the one of as many features. Raises
    DDPMError for statistics of no kind that was asked for, and for numbers that can be none.
    """
    try:
        with np.load(path) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            arrays = {key: file[key] for key in file.files}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    try:
        if "kind" in arrays and str(arrays["kind"]) in extractor.kinds:
            return {str(arrays["kind"]): feature_set.from_arrays(arrays)}
        d = np.shape(arrays["mu"])[-1]
        kind = next((k for k, (size, _) in extractor.kinds.items() if size == d), None)
        if kind is None:
            kinds = ", ".join(f"{k} {size}" for k, (size, _) in extractor.kinds.items())
            raise ValueError(f"expected statistics of {kinds} features, found {d}")
        stats = frechet.moments_from(arrays["mu"], arrays["sigma"], metrics.FULL)
        return {kind: feature_set.from_stats(stats)}
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def mark_of_files(path: pathlib.Path) -> str:
    """The SHA-256 of a file; of a folder that of its files' names and sizes."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(p for p in path.rglob("*") if p.is_file())
    names = [f"{p.relative_to(path)} {p.stat().st_size}" for p in files]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def check_shape(name: str, shape: tuple[int, int, int], extractor: FeatureExtractor) -> None:
    """Raises DDPMError unless images of this shape can be compared with the extractor's."""
    if shape != extractor.shape:
        wanted, found = ("x".join(map(str, s)) for s in (extractor.shape, shape))
        message = f"{name}: expected images of {wanted} like those that are scored, found {found}"
        raise DataError(f"{message}; give --config of their data, or resize them alike")



Scores = dict[str, dict[str, Score]]  # {reference, "" for none: {what it is called: the number}}


def scores(
    samples: dict[str, FeatureSet], references: list[Reference], notes: list[str] | None = None
) -> Scores:
    """Every score that can be had of a set, against every reference, called by its right name.

    notes: is told of those that cannot.
    """
    out: Scores = {}
    for kind, sample in samples.items():  # none but in the first process
        for against in (None, *references):
            real = against.samples.get(kind) if against else None
            if against and real is None:
                continue
            for name in metrics.applicable_metrics(sample, real):
                if bool(metrics.METRICS[name].reference) != bool(against):
                    continue
                try:
                    found = metrics.evaluate(name, sample, real)
                except ValueError as error:  # the others are still worth having
                    if notes is not None:
                        notes.append(f"{kind}: {error}")
                    continue
                named = {metrics.metric_name(k, kind, sample.n): score for k, score in found.items()}
                out.setdefault(against.name if against else "", {}).update(named)
    return out


def concerns_of(samples: dict[str, FeatureSet], references: list[Reference]) -> list[str]:
    """What a reader of the scores should know of the sets."""
    sets = [("", samples), *((f" of {r.name}", r.samples) for r in references)]
    return [
        f"{kind}{name}: {line}"
        for name, each in sets
        for kind, sample in each.items()
        for line in feature_set.warnings_for(sample)
    ]


def over_seeds(each: list[Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """For metrics.json: the scores of one set; of several the mean, its error over the seeds."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for against, named in each[0].items():
        for name in named:
            found = [s[against][name] for s in each]
            values = [score.value for score in found]
            if len(found) == 1:
                entry = {"value": values[0], "error": found[0].error, "error_over": "one set"}
            else:
                error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
                entry = {"value": float(np.mean(values)), "error": error}
                entry |= {"error_over": f"{len(values)} seeds", "each": values}
            out.setdefault(against, {})[name] = entry
    return out




def run(
    config: ConfigDict,
    workdir: pathlib.Path,
    step: int,
    weights: dict[str, tuple[Experiment, Any]],
    say: Callable[[str], None],
) -> None:
    """Draws and scores eval.num samples for each of eval.seeds and of weights.

    weights: {"ema": (experiment, parameters), ...}. Writes workdir/eval/<step>/metrics.json, and
    the same beside each set of samples. Without the Inception weights the rest is done before the
    DDPMError that tells how to get them. Also raises DDPMError for what cannot be scored, DataError.
    """
    c = config.eval
    folder = workdir / "eval" / f"{step:08d}"
    x, params = next(iter(weights.values()))
    chain = _sampling.compile_sampler(config, x, min(c.num, c.batch_size))
    extractor, trouble = make_extractor(config, x, x.image_shape, say)
    references = [reference(name, config, x, extractor, say) for name in c.references]
    total = _sampling.seconds_for(chain, params, c.num) * len(c.seeds) * len(weights)
    say(f"drawing    {c.num:,} samples of step {step:,}, {_sampling.describe(config)}")
    say(f"           {len(c.seeds) * len(weights)} sets, about {human_time(total)} in all")
    results, notes, places = {}, [], [folder]
    for name, (x, params) in weights.items():
        chain = _sampling.compile_sampler(config, x, min(c.num, c.batch_size))
        each = []
        for seed in c.seeds:
            setting = _sampling.setting_of(config, step, name, seed)
            kept = _sampling.SampleStore(folder / _sampling.name_of(setting), setting, x.image_shape)
            say(f"           {kept.npz}")
            _sampling.keep(kept, chain, params, c.num)
            some = extraction.image_set_from_files(str(kept.npz), x.image_shape[2], c.num)
            samples = _read(some, config, x, extractor, kept.folder / "partial.npz", say)
            each.append(scores(samples, references, notes))
            notes += concerns_of(samples, references)
            places.append(kept.folder)
            if jax.process_index() == 0:
                with np.load(kept.npz) as file:
                    image_grid.save_png(kept.folder / "grid.png", image_grid.image_grid(file["arr_0"][:100]))
        results[name] = over_seeds(each)
    about = {"step": step, "samples": c.num, "seeds": list(c.seeds), "sampler": config.sampler}
    about |= {"scores": results, "notes": list(dict.fromkeys(notes))}
    report(about, say)
    save([p / "metrics.json" for p in places], about, config, references, extractor, say)
    if trouble:
        raise trouble


def run_input(
    config: ConfigDict, x: Experiment, workdir: pathlib.Path, inputs: list[str], say: Callable
) -> None:
    """Scores the images of inputs[0] against those of inputs[1], or against eval.references."""
    c = config.eval
    some = extraction.image_set_from_files(inputs[0])
    others = list(c.references) if len(inputs) == 1 else inputs[1:]
    extractor, trouble = make_extractor(config, x, some.shape, say)
    references = [reference(name, config, x, extractor, say) for name in others]
    samples = _read(some, config, x, extractor, None, say)
    concerns = concerns_of(samples, references) + [some.concern] * bool(some.concern)
    mark = mark_of_files(pathlib.Path(inputs[0]).expanduser())
    about = {"input": inputs[0], "sha256": mark, "samples": some.n}
    which = hashlib.sha256("\n".join([*map(os.path.abspath, inputs), *others]).encode())
    stem = pathlib.Path(inputs[0]).stem
    path = workdir / "eval" / f"{stem}_{which.hexdigest()[:6]}" / "metrics.json"
    about["scores"] = {"input": over_seeds([scores(samples, references, concerns)])}
    about["notes"] = list(dict.fromkeys(concerns))
    report(about, say)
    save([path], about, config, references, extractor, say)
    if trouble:
        raise trouble


def make_extractor(
    config: ConfigDict, x: Experiment, shape: tuple[int, int, int], say: Callable[[str], None]
) -> tuple[FeatureExtractor, DDPMError | None]:
    """The features of eval.features; without the Inception weights the others, and that trouble."""
    names, weights, trouble = list(config.eval.features), None, None
    if "inception" in names:
        for turn in (True, False):  # the first process downloads; the others may find it there
            if turn == (jax.process_index() == 0):
                weights, trouble = _inception(config)
            all_processes(True)
        if not all_processes(weights is not None):
            trouble = trouble or "another process has no Inception weights"
            names = [name for name in names if name != "inception"] or list(features.FEATURES)
            what = " and ".join(f"fd_{name}" for name in names)
            trouble = DataError(f"{trouble}; without them only {what} can be scored")
            say(f"warning    no Inception weights: only {what} will be scored")
    return extraction.make_extractor(names, shape, x.mesh, weights), trouble


def _inception(config: ConfigDict) -> tuple[Any, str]:
    """(the published network's weights, folded; "") or (None, why there are none)."""
    cache = str(cache_dir() / "weights")
    try:
        arrays = convert.from_inception(files.inception(config.eval.inception, cache))
        return jax.device_get(inception.fold(arrays)), ""
    except (IntegrityError, ValueError) as error:
        return None, str(error)


def report(about: dict[str, Any], say: Callable[[str], None]) -> None:
    """Every number as a table, and what should be known of them."""
    for which, found in about["scores"].items():
        for line in table(which, found):
            say(line)
    for line in about["notes"]:
        say(f"note       {line}")


def save(
    paths: list[pathlib.Path],
    about: dict[str, Any],
    config: ConfigDict,
    references: list[Reference],
    extractor: FeatureExtractor,
    say: Callable[[str], None],
) -> None:
    """Writes metrics.json: every number with all that it follows from."""
    if jax.process_index() == 0:
        out = {
            **about,
            "data": config.data.name or config.data.source,
            "references": {r.name: r.about for r in references},
            "inception": extractor.mark,
            "versions": {name: version(name) for name in PACKAGES},
            "config": config,
        }
        text = json.dumps(out, indent=2, default=lambda section: section.to_dict())
        for path in paths:
            save_text(path, text + "\n")
    say(f"done       {paths[0]}")


def table(which: str, found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Lines of a table: a score a row, a reference a column; `which` images they are of."""

    def cell(entry):
        if entry is None:
            return ""
        error = "" if entry["error"] is None else f" +- {entry['error']:.2g}"
        return f"{entry['value']:.4g}{error}"

    columns = [against for against in found if against]
    rows = [[which, *(f"against {against}" for against in columns)]]
    alone = found.get("", {})
    rows += [[name, cell(entry)] for name, entry in alone.items()]
    for name in dict.fromkeys(name for against in columns for name in found[against]):
        rows.append([name, *(cell(found[against].get(name)) for against in columns)])
    return [f"{name:26}" + "".join(f"{text:>24}" for text in cells) for name, *cells in rows]




def distances_to(real: Reference, extractor: FeatureExtractor, size: int, mesh: Any) -> Callable:
    """uint8[n, h, w, c] -> {fd_random, ...: the Frechet distances to the reference}."""

    def distances(images: np.ndarray) -> dict[str, float]:
        some = extraction.image_set_from_array("samples", images)
        samples = extraction.extract(some, extractor, size, 0, mesh, silent=True)
        return {
            metrics.metric_name(name, kind, len(images)): score.value
            for kind, sample in samples.items()
            for name, score in metrics.evaluate("fd", sample, real.samples[kind]).items()
        }

    return distances


def measures(config: ConfigDict, x: Experiment, say: Callable[[str], None]):
    """(uint8[n, h, w, c] -> {distance to train}, {kind: uint8[b, h, w, c] -> float32[b, d]}).

    The second is for neighbours: Inception's features, where its weights are.
    """
    extractor, _ = make_extractor(config, x, x.image_shape, say)
    real = reference("train", config, x, extractor, say)
    size = -(-config.eval.batch_size // x.mesh.size) * x.mesh.size

    def features_of(images):
        some = extraction.image_set_from_array("images", images)
        return extraction.features_of(some, extractor, size, x.mesh)["inception"]

    spaces = {"inception": features_of} if "inception" in extractor.kinds else {}
    return distances_to(real, extractor, size, x.mesh), spaces


def quick(
    config: ConfigDict, x: Experiment, say: Callable[[str], None]
) -> Callable[[Any], dict[str, float]]:
    """params -> {fd_random, fd_pixels} of eval.quick samples, drawn in 20 steps, against train.

    The same noise each time, so that what falls during a training is the model. Raises Fatal.
    """
    n = config.eval.quick
    keys = {"sampler.steps": min(QUICK_STEPS, x.p.T), "eval.reference_num": 10_000}
    config = with_overrides(config, QUICK | keys)
    chain = _sampling.compile_sampler(config, x, min(n, config.eval.batch_size))
    extractor = extraction.make_extractor(tuple(features.FEATURES), x.image_shape, x.mesh)
    real = reference("train", config, x, extractor, say)
    distances = distances_to(real, extractor, chain.size, x.mesh)

    def of(params):
        return distances(np.concatenate(list(_sampling.draw(chain, params, config.sample.seed, n))))

    return of
