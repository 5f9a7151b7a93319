"""How near generated images are to real ones: what is kept of a set's features, and its scores.

A `Sample` is collected batch by batch, in memory that does not depend on how many images there are,
and can be saved and continued. Every entry of METRICS then compares two of them. Which features
they are of - Inception's, random convolutions', pixels - is the caller's; `label` names the result
so that no other distance is ever called a FID.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from diffusion.moments import (
    Stats,
    check_rows,
    extrapolated,
    finalize,
    frechet,
    init,
    jackknife,
    update,
)
from diffusion.moments import merge as merge  # with these, a caller needs this module alone
from diffusion.moments import moments_from as moments_from
from diffusion.pairs import balls, mmd, mmd_of_parts, precision_recall

GROUPS = 10  # that the error of a Frechet distance is read from
SPLITS = 10  # of the Inception Score
KEEP = 10_000  # rows of features: 80 MB of Inception's
FULL = 50_000  # images of a FID without a count behind its name

# ------------------------------------------------------------------------------- Inception Score


class Classes(NamedTuple):
    """Running sums of class probabilities p(y|x), of each of the splits: all an IS reads of them.

    n: int64[s], images; p: float64[s, c], sum of p(y|x); plogp: float64[s], sum of
    sum_y p(y|x) log p(y|x).
    """

    n: np.ndarray
    p: np.ndarray
    plogp: np.ndarray


def no_classes(c: int, splits: int = SPLITS) -> Classes:
    """The sums of no images yet, for c classes."""
    return Classes(np.zeros(splits, np.int64), np.zeros((splits, c)), np.zeros(splits))


def add_classes(classes: Classes, logits: np.ndarray, first: int, n: int) -> Classes:
    """Takes in logits [b, c] of the images first, first + 1, ... of n.

    Image r belongs to the split whose images n i // splits <= r < n (i + 1) // splits are, as in
    the official code of the score. Raises ValueError as `check_rows`.
    """
    splits, c = classes.p.shape
    z = check_rows(logits, c, first, "logits").astype(np.float64)
    z -= z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    p = np.exp(log_p)
    split = (splits * (np.arange(first, first + len(z)) + 1) - 1) // n
    member = (np.arange(splits)[:, None] == split).astype(np.float64)
    plogp = member @ (p * log_p).sum(1)
    return Classes(
        classes.n + member.sum(1).astype(np.int64), classes.p + member @ p, classes.plogp + plogp
    )


def inception_score(classes: Classes) -> np.ndarray:
    """exp E KL(p(y|x) || p(y)) of each split, natural log: float64[s] (arXiv 1606.03498).

    The published score is the mean over 10 splits, behind its +- their population deviation; sums
    over the splits give the score of all images at once. Raises ValueError if a split is empty.
    """
    if not np.all(classes.n):
        found = int(classes.n.sum())
        raise ValueError(
            f"is: expected an image or more per split of {len(classes.n)}, found {found}"
        )
    p = classes.p / classes.n[:, None]
    log_p = np.log(np.where(p > 0, p, 1))
    return np.exp(classes.plogp / classes.n - (p * log_p).sum(1))


def together(classes: Classes) -> Classes:
    """All splits as one."""
    return Classes(*(x.sum(0, keepdims=True) for x in classes))


# -------------------------------------------------------------------------------- what is kept


class Sample(NamedTuple):
    """What is kept of a set of images.

    stats:    of all features seen.
    features: float32[m, d], of the images `rows(n, m)`; those not yet seen are 0.
    classes:  for the Inception Score, or None.
    n:        how many images the whole set has; stats.n of them were seen.
    """

    stats: Stats
    features: np.ndarray
    classes: Classes | None
    n: int


@functools.lru_cache(maxsize=8)
def rows(n: int, m: int) -> np.ndarray:
    """Which m of n images keep their features, rising: drawn once and for all by n and m.

    At random, since sets come sorted, or with classes in turn.
    """
    chosen = np.sort(np.random.RandomState(0).permutation(n)[:m])
    chosen.flags.writeable = False
    return chosen


def begin(n: int, d: int, keep: int = KEEP, classes: int = 0) -> Sample:
    """An empty sample for n images with d features, and logits if there are `classes`.

    keep: how many rows of features at most. Raises ValueError for n < 1 or keep < 0.
    """
    if n < 1 or keep < 0:
        raise ValueError(f"sample: expected images to score, found n = {n}, keep = {keep}")
    features = np.zeros((min(n, keep), d), np.float32)
    return Sample(init(d), features, no_classes(classes) if classes else None, n)


def add(sample: Sample, features: np.ndarray, logits: np.ndarray | None = None) -> Sample:
    """Takes in the next images: features [b, d] and, where the sample has classes, logits [b, c].

    Uses `sample` up: the kept rows are written into its own array. Raises ValueError as
    `check_rows`, for more images than n, and if the logits are missing, or too many.
    """
    first, n = sample.stats.n, sample.n
    features = check_rows(features, sample.features.shape[1], first)
    last = first + len(features)
    if last > n:
        raise ValueError(f"sample: expected {n} images, found {last} or more")
    if (logits is None) != (sample.classes is None) or (
        logits is not None and len(logits) != len(features)
    ):
        found = "none" if logits is None else len(logits)
        wanted = "none" if sample.classes is None else len(features)
        raise ValueError(f"sample: expected logits of {wanted} images, found {found}")
    classes = sample.classes
    if classes is not None:
        classes = add_classes(classes, logits, first, n)
    chosen = rows(n, len(sample.features))
    low, high = np.searchsorted(chosen, [first, last])
    sample.features[low:high] = features[chosen[low:high] - first]
    return sample._replace(stats=update(sample.stats, features), classes=classes)


def collect(
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]], n: int, keep: int = KEEP
) -> Sample:
    """The sample of (features [b, d], logits [b, c] or None), in batches of any sizes, n images.

    Raises ValueError as `add`, and if there are not n.
    """
    sample = None
    for features, logits in batches:
        if sample is None:
            c = 0 if logits is None else np.shape(logits)[-1]
            sample = begin(n, np.shape(features)[-1], keep, c)
        sample = add(sample, features, logits)
    found = 0 if sample is None else sample.stats.n
    if sample is None or found < n:
        raise ValueError(f"sample: expected {n} images, found {found}")
    return sample


def of_stats(stats: Stats) -> Sample:
    """A sample of which only mean and covariance are known, such as a published (mu, sigma)."""
    return Sample(stats, np.zeros((0, len(stats.sum)), np.float32), None, stats.n)


def to_arrays(sample: Sample) -> dict[str, np.ndarray]:
    """A sample, complete or not, as arrays by name: to be saved."""
    parts = {"": {"n": sample.n, "features": sample.features}, "stats.": sample.stats._asdict()}
    if sample.classes is not None:
        parts["classes."] = sample.classes._asdict()
    return {
        prefix + name: np.asarray(x) for prefix, part in parts.items() for name, x in part.items()
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> Sample:
    """The sample of `to_arrays`, to go on with. Raises ValueError for missing or unfit arrays."""
    wanted = {"n", "features", *(f"stats.{name}" for name in Stats._fields)}
    if not wanted <= arrays.keys():
        raise ValueError(f"sample: expected {sorted(wanted)}, found {sorted(arrays)}")
    stats = Stats(int(arrays["stats.n"]), arrays["stats.sum"], arrays["stats.outer"])
    # A copy that `add` may write into.
    features = np.array(arrays["features"], np.float32)
    d = len(stats.sum)
    if stats.outer.shape != (d, d) or features.ndim != 2 or features.shape[1] != d:
        found = f"{list(features.shape)}, sum [{d}], outer {list(stats.outer.shape)}"
        raise ValueError(f"sample: expected features [m, d], sum [d], outer [d, d]; found {found}")
    classes = None
    if "classes.n" in arrays:
        classes = Classes(*(arrays[f"classes.{name}"] for name in Classes._fields))
    return Sample(stats, features, classes, int(arrays["n"]))


def concerns(sample: Sample) -> list[str]:
    """What a reader of the scores should know of this set, one line each; often nothing."""
    n, d = sample.stats.n, len(sample.stats.sum)
    lines = []
    if n <= d:
        lines.append(
            f"{n} images for {d} features: the covariance is singular, and the Frechet distance"
            " biased upwards"
        )
    if sample.classes is not None and n < 10 * sample.classes.p.shape[1]:
        lines.append(
            f"{n} images for {sample.classes.p.shape[1]} classes: the Inception Score is biased"
            " downwards"
        )
    return lines


# --------------------------------------------------------------------------------------- scores


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

    scores: Callable[[Sample, Sample | None], dict[str, Score]]
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
    return {"fd": Score(frechet(finalize(generated.stats), real), error)}


def _fd_infinity(generated, reference):
    return {"fd_infinity": Score(*extrapolated(generated.features, finalize(reference.stats)))}


def _is(generated, reference):
    splits = inception_score(generated.classes)
    at_once = inception_score(together(generated.classes))
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


def _holds(sample: Sample | None, need: str) -> bool:
    if sample is None:
        return not need
    absent = {"features": not len(sample.features), "classes": sample.classes is None}
    return not absent.get(need, False)


def possible(generated: Sample, reference: Sample | None = None) -> list[str]:
    """The names in METRICS for which both samples hold what is needed."""
    return [
        name
        for name, metric in METRICS.items()
        if _holds(generated, metric.generated) and _holds(reference, metric.reference)
    ]


def evaluate(name: str, generated: Sample, reference: Sample | None = None) -> dict[str, Score]:
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


def label(score: str, space: str, n: int) -> str:
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
