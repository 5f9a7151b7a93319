"""Scores of images against references: features, cached statistics, distances."""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from diffusion import data, experiment, metrics
from diffusion.data.prepare.image_decoding import ImageSpec
from diffusion.experiment import Experiment
from diffusion.metrics import Score, extraction, feature_set, features, frechet
from diffusion.metrics.extraction import FeatureExtractor, ImageSet
from diffusion.metrics.feature_set import FeatureSet
from diffusion.modes import _sampling
from diffusion.modes._common import Trained, batch_size
from diffusion.modes._feature_networks import (
    has_classes,
    load_classifier,
    load_dinov2,
    load_inception,
)
from diffusion.runtime import preemption
from diffusion.runtime.config import cache_dir, call_for_key, with_overrides
from diffusion.utils import digests, logging
from diffusion.utils.errors import ConfigError, DataError
from diffusion.utils.io import files_in, local_copy, save_npz
from diffusion.utils.multihost import all_processes, broadcast_from_primary, is_primary
from diffusion.utils.progress import QUIET_S, Progress

# The sampler of a quick reading, the same at every step of a training.
QUICK = {"sampler.name": "ddim", "sampler.grid": "uniform", "sampler.times": (), "sampler.eta": 0.0}
QUICK_STEPS, QUICK_REFERENCE_NUM = 20, 10_000
BESIDE = ("precision_recall", "density_coverage", "classes")  # a distance, in frontiers
RANKING = ("inception", "classifier")  # features that frontiers judge by, if they are there
AVAILABLE = "available"  # in eval.features: all that need no weights, and others with theirs
PRETRAINED = {"inception": "Inception", "dinov2": "DINOv2"}  # {features: their network}


class Scorer(NamedTuple):
    """Extracts the features of images. missing: why features asked for by name are missing."""

    config: ConfigDict
    exp: Experiment
    extractor: FeatureExtractor
    missing: DataError | None = None

    def batch_size(self, n: int) -> int:
        """Returns eval.batch_size, or n where that is less, for whole devices."""
        return batch_size(self.exp, self.config.eval.batch_size, n)

    def read(self, images: ImageSet, partial: pathlib.Path | None = None) -> dict[str, FeatureSet]:
        """Extracts the features of an image set, with progress, resuming from `partial`."""
        kinds = ", ".join(self.extractor.kinds)
        logging.info(f"reading    {images.n:,} images of {images.name}: {kinds}")
        size, keep = self.batch_size(images.n), self.config.eval.keep
        with Progress(images.n, unit="image") as progress:

            def on_batch(done):
                progress(done)
                preemption.raise_if_requested()

            args = images, self.extractor, size, keep, self.exp.mesh, partial, on_batch
            return extraction.extract(*args)


def make_scorer(config: ConfigDict, exp: Experiment, shape: tuple[int, int, int]) -> Scorer:
    """Builds the extractor of eval.features for images (h, w, c).

    Without the weights of Inception or DINOv2 the other features are used; `missing` says so where
    the config names these features or their file. A classifier is left out for images of another
    shape than the data's. Raises ConfigError; DataError if all that it names is missing, or if it
    names a classifier, for which the data have no classes.
    """
    named, missing = list(config.eval.features), None
    weights, fingerprints = {}, {}
    names = [*extraction.NETWORKS, *features.FEATURES] if AVAILABLE in named else named
    if "classifier" in names:
        weights["classifier"], problem = _find_classifier(config, exp, shape)
        if problem:
            names = [name for name in names if name != "classifier"]
            logging.info(f"warning    no classifier: {problem}")
        if not names:
            raise DataError(f"eval.features: expected other features than 'classifier'; {problem}")
    if "dinov2" not in named and not config.eval.dinov2:
        names = [name for name in names if name != "dinov2"]
    for name, network in PRETRAINED.items():
        if name not in names:
            continue
        if name == "inception":
            weights[name], problem = load_inception(config.eval.inception)
        else:
            weights[name], fingerprints[name], problem = load_dinov2(config.eval.dinov2)
        if all_processes(weights[name] is not None):
            continue
        error = DataError(problem or f"another process has no {network} weights")
        names = [each for each in names if each != name]
        is_asked_for = name in named or name == "dinov2"  # by its name or by its file
        missing = missing or (error if is_asked_for else None)
        if not names:
            raise missing
        why = "the error follows the other scores" if missing is error else error
        logging.info(f"warning    no {network} weights: {why}")
    args = names, shape, exp.mesh, weights, fingerprints
    extractor = call_for_key(extraction.make_extractor, "eval.features", *args)
    return Scorer(config, exp, extractor, missing)


def _find_classifier(config: ConfigDict, exp: Experiment, shape: tuple) -> tuple[Any, str]:
    """Returns (the classifier's weights, "") or (None, why there is none)."""
    if shape != exp.image_shape:
        sizes = ("x".join(map(str, s)) for s in (shape, exp.image_shape))
        return None, "the images are {}, the data's {}".format(*sizes)
    try:
        return load_classifier(config, exp), ""
    except (ConfigError, DataError) as error:
        if "classifier" in config.eval.features:
            raise
        return None, str(error)


# References


class Reference(NamedTuple):
    """What images are compared with. about: its description in metrics.json."""

    name: str
    feature_sets: dict[str, FeatureSet]
    about: dict[str, Any]


def load_reference(name: str, scorer: Scorer) -> Reference:
    """Reads a split of the data, an npz of statistics (mu, sigma), or other images.

    Raises DataError.
    """
    config, extractor, path = scorer.config, scorer.extractor, local_copy(name)
    n = config.eval.reference_num
    if path.suffix == ".npz" and (found := load_statistics(path, extractor)):
        return Reference(name, found, {"statistics": name, "sha256": digest_of(path)})
    if path.exists() and (path.suffix or len(path.parts) > 1):  # a bare word is a split
        images = open_images(config, str(path), extractor.shape[2], n)
        _check_shape(name, images.shape, extractor)
        about = {"images": images.n, "sha256": digest_of(path), "note": images.warning}
        return Reference(name, scorer.read(images), about)
    split = experiment.load_split(config, scorer.exp, name)
    _check_shape(name, split.shape, extractor)
    images = extraction.image_set_from_split(split, name, n, config.data.workers)
    fingerprint = data.fingerprint(split)
    about = {"split": name, "images": images.n, "hash": fingerprint}
    return Reference(name, _read_cached(images, fingerprint, scorer), about)


def open_images(config: ConfigDict, path: str, channels: int = 0, n: int = 0) -> ImageSet:
    """Opens images of files; eval.resize brings them to the data's shape, as --mode=prepare."""
    c = config.data
    form = ImageSpec(*experiment.image_shape(config), tuple(c.background), c.fit)
    return extraction.image_set_from_files(path, channels, n, form if config.eval.resize else None)


def _read_cached(images: ImageSet, fingerprint: str, scorer: Scorer) -> dict[str, FeatureSet]:
    """Reads a split as Scorer.read, through the statistics that earlier runs left in the cache."""
    c, extractor, folder = scorer.config, scorer.extractor, cache_dir() / "statistics"
    stem = f"{c.data.name or c.data.source}_{images.name}_{images.n}_{fingerprint}"
    stem = stem.replace("/", "_")
    paths = {}
    for kind in extractor.kinds:
        weights = extractor.fingerprints.get(kind, "")
        paths[kind] = folder / f"{stem}_{kind}{weights}_{c.eval.keep}.npz"
    found: dict[str, FeatureSet] = {}
    for path in paths.values() if is_primary() else ():
        found |= load_statistics(path, extractor) or {}
    if not broadcast_from_primary(found.keys() == extractor.kinds.keys()):
        found = scorer.read(images, folder / f"{stem}_partial.npz")
        for kind, each in found.items():
            save_statistics(paths[kind], kind, each, extractor.fingerprints.get(kind, ""))
    return found


def save_statistics(path: pathlib.Path, kind: str, each: FeatureSet, weights: str = "") -> None:
    """Writes an npz with all of a feature set, and `mu` and `sigma`, which other programs read.

    weights: the fingerprint of the network that computed the features.
    """
    mu, sigma = frechet.finalize(each.stats)
    arrays = feature_set.to_arrays(each)
    save_npz(path, mu=mu, sigma=sigma, kind=kind, weights=weights, **arrays)


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
        if (kind := str(arrays.get("kind", ""))) in extractor.kinds:
            network = str(arrays.get("weights", ""))
            if network and network != extractor.fingerprints.get(kind, ""):
                found = f"{network}, expected {extractor.fingerprints.get(kind)}"
                raise ValueError(f"its {kind} features are of other weights, {found}")
            return {kind: feature_set.from_arrays(arrays)}
        d = np.shape(arrays["mu"])[-1]
        if kind:
            raise ValueError(f"expected {' or '.join(extractor.kinds)} features, found {kind}")
        kinds = {k: size for k, (size, _) in extractor.kinds.items() if k != "classifier"}
        kind = next((k for k, size in kinds.items() if size == d), None)
        if kind is None:
            known = ", ".join(f"{k} {size}" for k, size in kinds.items())
            raise ValueError(f"expected statistics of {known} features, found {d}")
        stats = frechet.moments_from(arrays["mu"], arrays["sigma"], metrics.FID_NUM_IMAGES)
        return {kind: feature_set.from_stats(stats)}
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def digest_of(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file; of a folder, that of its files' names and sizes."""
    if path.is_file():
        return digests.sha256_of_file(path)
    names = [f"{name} {(path / name).stat().st_size}" for name in files_in(path)]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def _check_shape(name: str, shape: tuple[int, ...], extractor: FeatureExtractor) -> None:
    if shape != extractor.shape:
        wanted, found = ("x".join(map(str, s)) for s in (extractor.shape, shape))
        message = f"{name}: expected images of {wanted} like those that are scored, found {found}"
        raise DataError(f"{message}; give --config of their data, or --config.eval.resize=True")


# Scores

Scores = dict[str, dict[str, Score]]  # {reference, or "" for none: {public name: score}}


def score(
    generated: dict[str, FeatureSet], references: list[Reference], notes: list[str]
) -> Scores:
    """Computes every applicable score of a set of images against every reference.

    notes: gets a line for each score that fails, that has too few images, or that is computed from
    a part of them.
    """
    scores: Scores = {}
    nothing = Reference("", dict.fromkeys(generated), {})  # of scores that need no reference
    for kind, images in generated.items():
        for reference in (nothing, *(r for r in references if kind in r.feature_sets)):
            real = reference.feature_sets[kind]
            for name in metrics.applicable_metrics(images, real, kind):
                if real is not None and not metrics.METRICS[name].reference:
                    continue
                try:
                    found = metrics.evaluate(name, images, real)
                except ValueError as error:  # the others are still worth having
                    notes.append(f"{kind}: {error}")
                    continue
                public = {metrics.metric_name(k, kind, images.n): s for k, s in found.items()}
                scores.setdefault(reference.name, {}).update(public)
                if about := metrics.METRICS[name].about(images, real):
                    notes.append(f"{name} against {reference.name}: {about}")
    for kind in generated:
        if kind in extraction.NETWORKS["dinov2"]:
            notes.append(f"{kind}: the weights' SHA-256 is not compared with a published one")
    sets = [("", generated), *((f" of {r.name}", r.feature_sets) for r in references)]
    for name, each in sets:
        for kind, images in each.items():
            notes += [f"{kind}{name}: {line}" for line in feature_set.warnings_for(images)]
    return scores


def make_distances(scorer: Scorer, real: Reference) -> Callable[[np.ndarray], dict[str, float]]:
    """Builds uint8[n, h, w, c] -> {fd_random, ...}: Frechet distances to the reference."""

    def distances(images: np.ndarray) -> dict[str, float]:
        size, mesh = scorer.batch_size(len(images)), scorer.exp.mesh
        image_set = extraction.image_set_from_array("samples", images)
        found = extraction.extract(image_set, scorer.extractor, size, 0, mesh)
        return {
            metrics.metric_name(name, kind, len(images)): each.value
            for kind, generated in found.items()
            for name, each in metrics.evaluate("fd", generated, real.feature_sets[kind]).items()
        }

    return distances


def make_fidelity(
    scorer: Scorer, real: Reference, num: int
) -> Callable[[np.ndarray], dict[str, float]]:
    """Builds uint8[n, h, w, c] -> {a Frechet distance, what follows from neighbours, others}.

    The first ones are of Inception's features, a classifier's, or the first of eval.features.
    Others are the distances by all other features. The names are those of scores of `num` images.
    What is built raises ConfigError for too few images.
    """
    first = next((kind for kind in RANKING if kind in scorer.extractor.kinds), None)
    first = first or next(iter(scorer.extractor.kinds))
    kinds = [first, *(kind for kind in scorer.extractor.kinds if kind != first)]

    def fidelity(images: np.ndarray) -> dict[str, float]:
        n, mesh = len(images), scorer.exp.mesh
        image_set = extraction.image_set_from_array("samples", images)
        found = extraction.extract(image_set, scorer.extractor, scorer.batch_size(n), n, mesh)
        scores: dict[str, float] = {}
        for kind in kinds if found else ():
            generated, reference = found[kind], real.feature_sets[kind]
            beside = BESIDE if kind == first else ("classes",)
            for name in metrics.applicable_metrics(generated, reference, kind):
                if name == "fd" or name in beside:
                    values = call_for_key(metrics.evaluate, "frontier", name, generated, reference)
                    scores |= {
                        metrics.metric_name(k, kind, num): s.value for k, s in values.items()
                    }
        return scores

    return fidelity


def make_measures(trained: Trained) -> tuple[Callable, dict[str, Callable]]:
    """Builds the measures of figures: (distances to `train`, {space: features of a batch}).

    The spaces are Inception's features, where its weights are.
    """
    scorer = make_scorer(trained.config, trained.exp, trained.exp.image_shape)
    args = scorer.extractor, scorer.batch_size(2**31), trained.exp.mesh

    def inception_features(images):
        image_set = extraction.image_set_from_array("images", images)
        return extraction.features_of(image_set, *args)["inception"]

    spaces = {"inception": inception_features} if "inception" in scorer.extractor.kinds else {}
    return make_distances(scorer, load_reference("train", scorer)), spaces


def make_quick_distances(trained: Trained) -> Callable[[Any], dict[str, float]]:
    """Builds params -> {fd_random, ...} of eval.quick samples against the training split.

    The samples are drawn in 20 steps from the same noise each time, so that what changes during a
    training is the model. Raises ConfigError, DataError.
    """
    exp, n = trained.exp, trained.config.eval.quick
    keys = {"sampler.steps": min(QUICK_STEPS, exp.process.T)}
    classes = has_classes(experiment.load_split(trained.config, exp))
    names = ("classifier",) * classes + tuple(features.FEATURES)
    keys |= {"eval.reference_num": QUICK_REFERENCE_NUM, "eval.features": names}
    config = with_overrides(trained.config, QUICK | keys)
    sampler = _sampling.compile_sampler(config, exp, min(n, config.eval.batch_size))
    scorer = make_scorer(config, exp, exp.image_shape)
    distances = make_distances(scorer, load_reference("train", scorer))

    def of(params):
        steps = _sampling.num_steps(sampler, n)
        with Progress(steps, unit="sampling step", quiet_s=QUIET_S) as progress:
            images = list(_sampling.draw(sampler, params, config.sample.seed, n, progress))
        return distances(np.concatenate(images))

    return of
