"""Scores of images against references: features, statistics that are kept, distances."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion import convert, data, experiment
from diffusion.convert import files
from diffusion.metrics import (
    FID_NUM_IMAGES,
    METRICS,
    Score,
    applicable_metrics,
    evaluate,
    feature_set,
    features,
    frechet,
    inception,
    metric_name,
)
from diffusion.metrics.extraction import (
    INCEPTION_KINDS,
    FeatureExtractor,
    ImageSet,
    extract,
    features_of,
    image_set_from_array,
    image_set_from_files,
    image_set_from_split,
    make_extractor,
)
from diffusion.metrics.feature_set import FeatureSet, warnings_for
from diffusion.modes import _sampling
from diffusion.modes._common import Trained, batch_size
from diffusion.runtime import preemption
from diffusion.runtime.config import cache_dir, call_for_key, with_overrides
from diffusion.utils import logging
from diffusion.utils.errors import DataError, DDPMError
from diffusion.utils.io import save_npz
from diffusion.utils.multihost import all_processes, barrier, is_primary
from diffusion.utils.progress import Progress

# How the samples of a quick reading are drawn, at every step of a training alike.
QUICK = {"sampler.name": "ddim", "sampler.grid": "uniform", "sampler.times": (), "sampler.eta": 0.0}
QUICK_STEPS, QUICK_REFERENCE_NUM = 20, 10_000


class Scorer(NamedTuple):
    """What scores are computed with. missing: the error of missing Inception weights, or None."""

    trained: Trained
    extractor: FeatureExtractor
    missing: DataError | None = None

    def read(self, images: ImageSet, partial: pathlib.Path | None = None) -> dict[str, FeatureSet]:
        """Extracts the features of a set of images, with progress, resuming from `partial`."""
        config, exp = self.trained.config, self.trained.exp
        logging.info(f"reading    {images.n:,} images of {images.name}: {self.kinds}")
        if images.warning:
            logging.info(f"           {images.warning}")
        size = batch_size(exp, config.eval.batch_size, images.n)
        with Progress(images.n, unit="image") as progress:

            def on_batch(done):
                progress(done)
                preemption.raise_if_requested()

            args = images, self.extractor, size, config.eval.keep, exp.mesh, partial
            return extract(*args, on_batch)

    @property
    def kinds(self) -> str:
        """The kinds of features in words."""
        return ", ".join(self.extractor.kinds)


def make_scorer(trained: Trained, shape: tuple[int, int, int]) -> Scorer:
    """Builds the extractor of eval.features for images (h, w, c).

    Without Inception weights the other features are used, and `missing` says how to get them.
    Raises ConfigError.
    """
    names, weights, missing = list(trained.config.eval.features), None, None
    if "inception" in names:
        for turn in (True, False):  # process 0 downloads; the others then find the file
            if turn == is_primary():
                weights, missing = _load_inception(trained.config.eval.inception)
            barrier("inception weights")
        if not all_processes(weights is not None):
            missing = missing or "another process has no Inception weights"
            names = [name for name in names if name != "inception"] or list(features.FEATURES)
            what = " and ".join(f"fd_{name}" for name in names)
            missing = DataError(f"{missing}; without them only {what} can be scored")
            logging.info(f"warning    no Inception weights: only {what} will be scored")
    args = names, shape, trained.exp.mesh, weights
    return Scorer(trained, call_for_key(make_extractor, "eval.features", *args), missing)


def _load_inception(path: str) -> tuple[Any, str]:
    """Returns (the folded weights, "") or (None, why there are none)."""
    try:
        arrays = convert.from_inception(files.inception(path, str(cache_dir() / "weights")))
        return jax.device_get(inception.fold(arrays)), ""
    except (DDPMError, ValueError) as error:
        return None, str(error)


# References


class Reference(NamedTuple):
    """What images are compared with. about: its description in metrics.json."""

    name: str
    feature_sets: dict[str, FeatureSet]
    about: dict[str, Any]


def load_reference(name: str, scorer: Scorer) -> Reference:
    """Reads a split of the data, an npz of statistics (mu, sigma), or other images.

    Statistics of splits are cached between runs under a fingerprint of their images. Raises
    DataError.
    """
    config, extractor = scorer.trained.config, scorer.extractor
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".npz" and (found := load_statistics(path, extractor)):
        return Reference(name, found, {"statistics": name, "sha256": digest_of(path)})
    if path.exists() and (path.suffix or len(path.parts) > 1):  # a bare word is a split
        images = image_set_from_files(name, extractor.shape[2], config.eval.reference_num)
        _check_shape(name, images.shape, extractor)
        about = {"images": images.n, "sha256": digest_of(path)}
        return Reference(name, scorer.read(images), about)
    split = experiment.load_split(config, scorer.trained.exp, name)
    _check_shape(name, split.shape, extractor)
    c = config.eval
    images = image_set_from_split(split, name, c.reference_num, config.data.workers)
    fingerprint = data.fingerprint(split)
    stem = f"{config.data.name or config.data.source}_{name}_{images.n}_{fingerprint}"
    folder, stem = cache_dir() / "statistics", stem.replace("/", "_")
    paths = {}
    for kind in extractor.kinds:
        weights = extractor.fingerprint if kind in INCEPTION_KINDS else ""
        paths[kind] = folder / f"{stem}_{kind}{weights}_{c.keep}.npz"
    known: dict[str, FeatureSet] = {}
    for path in paths.values() if is_primary() else ():
        known |= load_statistics(path, extractor) or {}
    complete = not is_primary() or known.keys() == extractor.kinds.keys()
    if not all_processes(complete):
        known = scorer.read(images, folder / f"{stem}_partial.npz")
        for kind, path in paths.items() if is_primary() else ():
            save_statistics(path, kind, known[kind])
    return Reference(name, known, {"split": name, "images": images.n, "hash": fingerprint})


def save_statistics(path: pathlib.Path, kind: str, features: FeatureSet) -> None:
    """Writes an npz whose `mu` and `sigma` other programs read, beside all that is kept."""
    mu, sigma = frechet.finalize(features.stats)
    save_npz(path, mu=mu, sigma=sigma, kind=kind, **feature_set.to_arrays(features))


def load_statistics(
    path: pathlib.Path, extractor: FeatureExtractor
) -> dict[str, FeatureSet] | None:
    """Returns {kind: feature set} of an npz of statistics; None if the file is no such npz.

    Published files have `mu` and `sigma` alone: their kind is the one of as many features. Raises
    DataError for statistics of other features, and for values that are no statistics.
    """
    try:
        with np.load(path) as file:
            if not {"mu", "sigma"} <= set(file.files):
                return None
            arrays = {key: file[key] for key in file.files}
    except Exception:  # NumPy raises anything for a file that is no npz
        return None
    try:
        if "kind" in arrays and str(arrays["kind"]) in extractor.kinds:
            return {str(arrays["kind"]): feature_set.from_arrays(arrays)}
        d = np.shape(arrays["mu"])[-1]
        kind = next((k for k, (size, _) in extractor.kinds.items() if size == d), None)
        if kind is None:
            kinds = ", ".join(f"{k} {size}" for k, (size, _) in extractor.kinds.items())
            raise ValueError(f"expected statistics of {kinds} features, found {d}")
        stats = frechet.moments_from(arrays["mu"], arrays["sigma"], FID_NUM_IMAGES)
        return {kind: feature_set.from_stats(stats)}
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def digest_of(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file; of a folder, that of its files' names and sizes."""
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    paths = sorted(p for p in path.rglob("*") if p.is_file())
    names = [f"{p.relative_to(path)} {p.stat().st_size}" for p in paths]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def _check_shape(name: str, shape: tuple[int, ...], extractor: FeatureExtractor) -> None:
    if shape != extractor.shape:
        wanted, found = ("x".join(map(str, s)) for s in (extractor.shape, shape))
        message = f"{name}: expected images of {wanted} like those that are scored, found {found}"
        raise DataError(f"{message}; give --config of their data, or resize them alike")


# Scores

Scores = dict[str, dict[str, Score]]  # {reference, or "" for none: {public name: score}}


def score(
    feature_sets: dict[str, FeatureSet], references: list[Reference], notes: list[str]
) -> Scores:
    """Computes every applicable score of a set of images against every reference.

    notes: gets a line for each score that fails, and what limits the comparability of the sets.
    """
    out: Scores = {}
    for kind, generated in feature_sets.items():
        for against in (None, *references):
            real = against.feature_sets.get(kind) if against else None
            if against and real is None:
                continue
            for name in applicable_metrics(generated, real):
                if bool(METRICS[name].reference) != bool(against):
                    continue
                try:
                    found = evaluate(name, generated, real)
                except ValueError as error:  # the others are still worth having
                    notes.append(f"{kind}: {error}")
                    continue
                named = {metric_name(k, kind, generated.n): s for k, s in found.items()}
                out.setdefault(against.name if against else "", {}).update(named)
    sets = [("", feature_sets), *((f" of {r.name}", r.feature_sets) for r in references)]
    for name, each in sets:
        for kind, features_ in each.items():
            notes += [f"{kind}{name}: {line}" for line in warnings_for(features_)]
    return out


def make_distances(scorer: Scorer, real: Reference) -> Callable[[np.ndarray], dict[str, float]]:
    """Builds uint8[n, h, w, c] -> {fd_random, ...}: Frechet distances to the reference."""
    exp = scorer.trained.exp

    def distances(images: np.ndarray) -> dict[str, float]:
        size = batch_size(exp, scorer.trained.config.eval.batch_size, len(images))
        image_set = image_set_from_array("samples", images)
        found = extract(image_set, scorer.extractor, size, 0, exp.mesh)
        return {
            metric_name(name, kind, len(images)): each.value
            for kind, generated in found.items()
            for name, each in evaluate("fd", generated, real.feature_sets[kind]).items()
        }

    return distances


def make_measures(trained: Trained) -> tuple[Callable, dict[str, Callable]]:
    """Builds the measures of figures: (distances to `train`, {space: features of a batch}).

    The spaces are Inception's features, where its weights are.
    """
    scorer = make_scorer(trained, trained.exp.image_shape)
    size = batch_size(trained.exp, trained.config.eval.batch_size, 2**31)

    def inception_features(images):
        image_set = image_set_from_array("images", images)
        return features_of(image_set, scorer.extractor, size, trained.exp.mesh)["inception"]

    spaces = {"inception": inception_features} if "inception" in scorer.extractor.kinds else {}
    return make_distances(scorer, load_reference("train", scorer)), spaces


def make_quick_distances(trained: Trained) -> Callable[[Any], dict[str, float]]:
    """Builds params -> {fd_random, fd_pixels} of eval.quick samples against the training split.

    The samples are drawn in 20 steps from the same noise each time, so that what changes during a
    training is the model. Raises ConfigError, DataError.
    """
    steps = min(QUICK_STEPS, trained.exp.process.T)
    keys = {"sampler.steps": steps, "eval.reference_num": QUICK_REFERENCE_NUM}
    keys["eval.features"] = tuple(features.FEATURES)
    config, n = with_overrides(trained.config, QUICK | keys), trained.config.eval.quick
    trained = trained._replace(config=config)
    sampler = _sampling.compile_sampler(config, trained.exp, min(n, config.eval.batch_size))
    scorer = make_scorer(trained, trained.exp.image_shape)
    distances = make_distances(scorer, load_reference("train", scorer))

    def of(params):
        images = _sampling.draw(sampler, params, config.sample.seed, n)
        return distances(np.concatenate(list(images)))

    return of
