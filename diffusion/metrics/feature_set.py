"""feature_set."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from diffusion.metrics import KEEP, rows
from diffusion.metrics.frechet import Stats, check_rows, init, update
from diffusion.metrics.inception_score import ClassStats, add_class_stats, empty_class_stats


class FeatureSet(NamedTuple):
    """What is kept of a set of images.

    stats:    of all features seen.
    features: float32[m, d], of the images `rows(n, m)`; those not yet seen are 0.
    classes:  for the Inception Score, or None.
    n:        how many images the whole set has; stats.n of them were seen.
    """

    stats: Stats
    features: np.ndarray
    classes: ClassStats | None
    n: int


def begin(n: int, d: int, keep: int = KEEP, classes: int = 0) -> FeatureSet:
    """An empty sample for n images with d features, and logits if there are `classes`.

    keep: how many rows of features at most. Raises ValueError for n < 1 or keep < 0.
    """
    if n < 1 or keep < 0:
        raise ValueError(f"sample: expected images to score, found n = {n}, keep = {keep}")
    features = np.zeros((min(n, keep), d), np.float32)
    return FeatureSet(init(d), features, empty_class_stats(classes) if classes else None, n)


def add(sample: FeatureSet, features: np.ndarray, logits: np.ndarray | None = None) -> FeatureSet:
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
        classes = add_class_stats(classes, logits, first, n)
    chosen = rows(n, len(sample.features))
    low, high = np.searchsorted(chosen, [first, last])
    sample.features[low:high] = features[chosen[low:high] - first]
    return sample._replace(stats=update(sample.stats, features), classes=classes)


def collect(
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]], n: int, keep: int = KEEP
) -> FeatureSet:
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


def from_stats(stats: Stats) -> FeatureSet:
    """A sample of which only mean and covariance are known, such as a published (mu, sigma)."""
    return FeatureSet(stats, np.zeros((0, len(stats.sum)), np.float32), None, stats.n)


def to_arrays(sample: FeatureSet) -> dict[str, np.ndarray]:
    """A sample, complete or not, as arrays by name: to be saved."""
    parts = {"": {"n": sample.n, "features": sample.features}, "stats.": sample.stats._asdict()}
    if sample.classes is not None:
        parts["classes."] = sample.classes._asdict()
    return {
        prefix + name: np.asarray(x) for prefix, part in parts.items() for name, x in part.items()
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> FeatureSet:
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
        classes = ClassStats(*(arrays[f"classes.{name}"] for name in ClassStats._fields))
    return FeatureSet(stats, features, classes, int(arrays["n"]))


def warnings_for(sample: FeatureSet) -> list[str]:
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
