"""METRICS: scores of generated images, computed from two FeatureSets.

The caller chooses the features (Inception, DINOv2, random convolutions, pixels); `metric_name`
gives a score its public name, so that only the distance of Inception features is called a FID.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion.metrics import frechet, pairwise
from diffusion.metrics.feature_set import FeatureSet
from diffusion.metrics.inception_score import (
    ClassStats,
    class_distance,
    inception_score,
    share_unsure,
)

JACKKNIFE_GROUPS = 10
CLASSIFIER_SCORES = "unsure", "class_distance"  # they have one kind of features only
FID_NUM_IMAGES = 50_000  # names of published distances count fewer images
# {kind of features: name of their Frechet distance}, where others publish it.
PUBLISHED_DISTANCES = {
    "inception": "fid",
    "spatial": "sfid",
    "dinov2_b14": "fd_dinov2_b14",
    "dinov2_l14": "fd_dinov2_l14",
}


class Score(NamedTuple):
    """A number and its standard error, None if unknown."""

    value: float
    error: float | None = None


class Metric(NamedTuple):
    """A comparison of a generated with a reference FeatureSet, giving {name: Score}."""

    scores: Callable[[FeatureSet, FeatureSet | None], dict[str, Score]]
    generated: str  # the field that is read: "stats", "features" or "classes"
    reference: str  # the same; "" if no reference is needed
    lower: bool  # whether lower is better
    # What the scores are computed from, in words, where it is not all of both sets.
    about: Callable[[FeatureSet, FeatureSet | None], str] = lambda generated, reference: ""
    kind: str = ""  # of the only features that it is for; "": of all


def _fd(generated, reference):
    real, stderr = frechet.finalize(reference.stats), None
    if (kept := len(generated.features)) >= 2 * JACKKNIFE_GROUPS:
        kept_stderr = frechet.jackknife_stderr(generated.features, real, JACKKNIFE_GROUPS)
        stderr = kept_stderr * np.sqrt(kept / generated.stats.n)  # scaled to all images
    distance = frechet.frechet_distance(frechet.finalize(generated.stats), real)
    return {"fd": Score(distance, stderr)}


def _fd_infinity(generated, reference):
    real = frechet.finalize(reference.stats)
    return {"fd_infinity": Score(*frechet.frechet_distance_infinity(generated.features, real))}


def _is(generated, _):
    splits = inception_score(generated.classes)
    merged = ClassStats(*(x.sum(0, keepdims=True) for x in generated.classes))
    # The +- of published scores is the population deviation of 10 splits, 3 times this error.
    stderr = splits.std() / np.sqrt(len(splits) - 1)
    unsplit = Score(float(inception_score(merged)[0]))
    return {"is": Score(float(splits.mean()), float(stderr)), "is_1split": unsplit}


def _kid(generated, reference):
    mean, stderr, full_stderr = pairwise.kid(generated.features, reference.features)
    full = pairwise.polynomial_mmd(generated.features, reference.features)
    return {"kid": Score(mean, stderr), "kid_full": Score(full, full_stderr)}


def _about_kid(generated, reference):
    number, size = pairwise.kid_subsets(len(generated.features), len(reference.features))
    of = f"{number} random subsets of {size:,}" if number > 1 else f"all {size:,}"
    fewer = size < pairwise.KID_SUBSET_SIZE
    return f"{of} images" + fewer * f" (torch-fidelity's with --kid-subset-size={size})"


def _mmd(generated, reference):
    bandwidth = pairwise.median_distance(reference.features)
    return {"mmd": Score(*pairwise.gaussian_mmd(generated.features, reference.features, bandwidth))}


def _about_mmd(generated, reference):
    return "the kernel is as wide as the median distance of the reference's features"


def _classes(generated, reference):
    unsure = _fraction(share_unsure(generated.classes), generated.n)
    distance = Score(class_distance(generated.classes, reference.classes))
    return dict(zip(CLASSIFIER_SCORES, (unsure, distance), strict=True))


def _about_classes(generated, reference):
    return f"the classifier is unsure of {share_unsure(reference.classes):.1%} of the real images"


def _precision_recall(generated, reference):
    a, b = generated.features, reference.features
    precision, recall = pairwise.precision_recall(a, b)
    return {"precision": _fraction(precision, len(a)), "recall": _fraction(recall, len(b))}


def _fraction(p: float, n: int) -> Score:
    """Returns a fraction of n features with its binomial error, the balls fixed."""
    return Score(p, float(np.sqrt(p * (1 - p) / n)))


def _density_coverage(generated, reference):
    density, covered = pairwise.density_coverage(generated.features, reference.features)
    score = Score(float(density.mean()), float(density.std() / np.sqrt(len(density))))
    return {"density": score, "coverage": _fraction(float(covered.mean()), len(covered))}


def _has(feature_set: FeatureSet | None, field: str) -> bool:
    if feature_set is None or not field:
        return not field
    value = getattr(feature_set, field)
    return value is not None and len(value) > 0


def applicable_metrics(
    generated: FeatureSet, reference: FeatureSet | None = None, kind: str = ""
) -> list[str]:
    """Returns the names in METRICS that this kind of features has and both sets have fields for."""
    return [
        name
        for name, metric in METRICS.items()
        if metric.kind in ("", kind)
        and _has(generated, metric.generated)
        and _has(reference, metric.reference)
    ]


def evaluate(
    name: str, generated: FeatureSet, reference: FeatureSet | None = None
) -> dict[str, Score]:
    """Returns the scores of METRICS[name] after checking both feature sets.

    Raises ValueError if one is incomplete, too small or lacks a required field, or if their numbers
    of features differ.
    """
    metric = METRICS[name]
    for feature_set, field, role in (
        (generated, metric.generated, "generated"),
        (reference, metric.reference, "reference"),
    ):
        if not _has(feature_set, field):
            raise ValueError(f"{name}: expected {field} of the {role} images, found none kept")
        if field and feature_set.stats.n < feature_set.n:
            found = f"{feature_set.stats.n} of {feature_set.n}"
            raise ValueError(f"{name}: expected all {role} images, found {found}; add the rest")
    sizes = [len(each.stats.sum) for each in (generated, reference) if each]
    if metric.reference and sizes[0] != sizes[1]:
        raise ValueError(f"{name}: expected features of one kind, found {sizes[0]} and {sizes[1]}")
    return metric.scores(generated, reference)


def metric_name(score: str, kind: str, n: int) -> str:
    """Returns the public name of a score of n generated images by the kind of features.

    Kinds are "inception", "spatial" (Inception's map, arXiv:2103.03841), "dinov2_b14",
    "dinov2_l14" (that of the published FD-DINOv2) or any other. Examples: fid, fid@5000 below
    50,000 images, sfid, fid_infinity, kid, kid_spatial, fd_dinov2_l14@5000, fd_random.
    """
    if score in CLASSIFIER_SCORES:
        return score
    if score == "fd" and kind in PUBLISHED_DISTANCES:
        name = PUBLISHED_DISTANCES[kind]
        return name if n >= FID_NUM_IMAGES else f"{name}@{n}"
    if score == "fd_infinity" and kind in ("inception", "spatial"):
        return f"{PUBLISHED_DISTANCES[kind]}_infinity"
    return score if kind == "inception" else f"{score}_{kind}"


METRICS = {
    "fd": Metric(_fd, "stats", "stats", lower=True),
    "fd_infinity": Metric(_fd_infinity, "features", "stats", lower=True),
    "is": Metric(_is, "classes", "", lower=False),
    "kid": Metric(_kid, "features", "features", lower=True, about=_about_kid),
    "mmd": Metric(_mmd, "features", "features", lower=True, about=_about_mmd),
    "precision_recall": Metric(_precision_recall, "features", "features", lower=False),
    "classes": Metric(
        _classes, "classes", "classes", lower=True, about=_about_classes, kind="classifier"
    ),
    "density_coverage": Metric(_density_coverage, "features", "features", lower=False),
}
