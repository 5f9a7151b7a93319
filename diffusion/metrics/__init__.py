"""How near generated images are to real ones: what is kept of a set's features, and its scores.

A `Sample` is collected batch by batch, in memory that does not depend on how many images there are,
and can be saved and continued. Every entry of METRICS then compares two of them. Which features
they are of - Inception's, random convolutions', pixels - is the caller's; `label` names the result
so that no other distance is ever called a FID.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from diffusion.metrics.feature_set import FeatureSet
from diffusion.metrics.frechet import extrapolated, finalize, frechet_distance, jackknife
from diffusion.metrics.inception_score import inception_score, merge_class_stats
from diffusion.metrics.pairwise import balls, mmd, mmd_of_parts, precision_recall

GROUPS = 10  # that the error of a Frechet distance is read from


SPLITS = 10  # of the Inception Score


KEEP = 10_000  # rows of features: 80 MB of Inception's


FULL = 50_000  # images of a FID without a count behind its name


@functools.lru_cache(maxsize=8)
def rows(n: int, m: int) -> np.ndarray:
    """Which m of n images keep their features, rising: drawn once and for all by n and m.

    At random, since sets come sorted, or with classes in turn.
    """
    chosen = np.sort(np.random.RandomState(0).permutation(n)[:m])
    chosen.flags.writeable = False
    return chosen


class Score(NamedTuple):
    """A number and its standard error over splits, parts or a fit; None where nothing tells it."""

    value: float
    error: float | None = None


class Metric(NamedTuple):
    """One way of comparing two sets.

    scores:    (generated, reference) -> {name: Score}.
    generated, reference: what it reads of each: "stats", "features", "classes", or "" for nothing.
    lower:     less is better.
    """

    scores: Callable[[FeatureSet, FeatureSet | None], dict[str, Score]]
    generated: str
    reference: str
    lower: bool


def _fd(generated, reference):
    real = finalize(reference.stats)
    error = None
    if len(generated.features) >= 2 * GROUPS:
        # The error of the kept rows alone, and that of as many as there are.
        share = len(generated.features) / generated.stats.n
        error = jackknife(generated.features, real, GROUPS) * np.sqrt(share)
    return {"fd": Score(frechet_distance(finalize(generated.stats), real), error)}


def _fd_infinity(generated, reference):
    return {"fd_infinity": Score(*extrapolated(generated.features, finalize(reference.stats)))}


def _is(generated, reference):
    splits = inception_score(generated.classes)
    at_once = inception_score(merge_class_stats(generated.classes))
    # Of 10 splits; the +- of published scores is their population deviation, 3 times this error.
    error = splits.std() / np.sqrt(len(splits) - 1)
    return {"is": Score(float(splits.mean()), float(error)), "is_1split": Score(float(at_once[0]))}


def _kid(generated, reference):
    mean, error, whole = mmd_of_parts(generated.features, reference.features)
    full = mmd(generated.features, reference.features)
    return {"kid": Score(mean, error), "kid_full": Score(full, whole)}


def _precision_recall(generated, reference):
    precision, recall = precision_recall(generated.features, reference.features)
    return {
        "precision": _share(precision, len(generated.features)),
        "recall": _share(recall, len(reference.features)),
    }


def _share(p: float, n: int) -> Score:
    """A share of n features, with its error if they were drawn anew and the balls stayed."""
    return Score(p, float(np.sqrt(p * (1 - p) / n)))


def _density_coverage(generated, reference):
    held, covered = balls(generated.features, reference.features)
    error = float(held.std() / np.sqrt(len(held)))  # of other balls of as many real images
    return {
        "density": Score(float(held.mean()), error),
        "coverage": _share(float(covered.mean()), len(covered)),
    }


def _holds(sample: FeatureSet | None, need: str) -> bool:
    if sample is None:
        return not need
    absent = {"features": not len(sample.features), "classes": sample.classes is None}
    return not absent.get(need, False)


def applicable_metrics(generated: FeatureSet, reference: FeatureSet | None = None) -> list[str]:
    """The names in METRICS for which both samples hold what is needed."""
    return [
        name
        for name, metric in METRICS.items()
        if _holds(generated, metric.generated) and _holds(reference, metric.reference)
    ]


def evaluate(name: str, generated: FeatureSet, reference: FeatureSet | None = None) -> dict[str, Score]:
    """METRICS[name] of two samples, after looking at them: {name of a score: Score}.

    Raises ValueError for samples that are not complete, lack what the metric needs, are of
    different features, or too small.
    """
    metric = METRICS[name]
    for sample, need, who in (
        (generated, metric.generated, "generated"),
        (reference, metric.reference, "reference"),
    ):
        if not _holds(sample, need):
            raise ValueError(f"{name}: expected {need} of the {who} images, found none kept")
        if need and sample.stats.n < sample.n:
            seen = f"{sample.stats.n} of {sample.n}"
            raise ValueError(f"{name}: expected all {who} images, found {seen}; collect the rest")
    if metric.reference:
        d, d_reference = len(generated.stats.sum), len(reference.stats.sum)
        if d != d_reference:
            raise ValueError(f"{name}: expected features of one kind, found {d} and {d_reference}")
    return metric.scores(generated, reference)


def metric_name(score: str, space: str, n: int) -> str:
    """What a score is called: by its features, and a FID by its number of generated images too.

    score: a name that METRICS gives; space: "inception", "spatial" (the map of arXiv 2103.03841),
    or any other kind of features; n: how many images were generated.
        fd:        fid, fid@5000 below 50,000 images; sfid, sfid@5000; fd_random, fd_pixels
        fd_infinity: fid_infinity; sfid_infinity; fd_infinity_random
        others:    kid; kid_spatial, kid_random
    """
    family, _, kind = score.partition("_")
    if family != "fd" or space not in ("inception", "spatial"):
        return score if space == "inception" else f"{score}_{space}"
    name = {"inception": "fid", "spatial": "sfid"}[space]
    if kind:
        return f"{name}_{kind}"
    return name if n >= FULL else f"{name}@{n}"


METRICS = {
    "fd": Metric(_fd, "stats", "stats", lower=True),
    "fd_infinity": Metric(_fd_infinity, "features", "stats", lower=True),
    "is": Metric(_is, "classes", "", lower=False),
    "kid": Metric(_kid, "features", "features", lower=True),
    "precision_recall": Metric(_precision_recall, "features", "features", lower=False),
    "density_coverage": Metric(_density_coverage, "features", "features", lower=False),
}
