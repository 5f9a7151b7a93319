"""FeatureSet: what metrics read of a set of images, accumulated in batches in bounded memory."""

import functools
from typing import NamedTuple

import numpy as np

from diffusion.metrics.frechet import Moments, empty_moments, update
from diffusion.metrics.inception_score import ClassStats, add_class_stats, empty_class_stats


class FeatureSet(NamedTuple):
    """Statistics of a set of n images, of which stats.n were seen."""

    stats: Moments  # of all features seen
    features: np.ndarray  # float32[m, d] of the images `kept_indices(n, m)`; 0 if not seen yet
    classes: ClassStats | None  # for the Inception Score
    n: int


@functools.lru_cache(maxsize=8)
def kept_indices(n: int, m: int) -> np.ndarray:
    """Returns the m of n images whose features are kept, ascending: a fixed function of (n, m).

    Drawn at random, because image sets come sorted by class or with classes in turn.
    """
    indices = np.sort(np.random.RandomState(0).permutation(n)[:m])
    indices.flags.writeable = False
    return indices


def begin(n: int, d: int, keep: int, classes: int = 0) -> FeatureSet:
    """Returns an empty set for n images of d features and `classes` logits, keeping `keep` rows.

    Raises ValueError for n < 1 or keep < 0.
    """
    if n < 1 or keep < 0:
        raise ValueError(f"feature set: expected images to score, found n = {n}, keep = {keep}")
    features = np.zeros((min(n, keep), d), np.float32)
    class_stats = empty_class_stats(classes) if classes else None
    return FeatureSet(empty_moments(d), features, class_stats, n)


def add(
    feature_set: FeatureSet, features: np.ndarray, logits: np.ndarray | None = None
) -> FeatureSet:
    """Adds the features [b, d] and, if the set has classes, logits [b, c] of the next images.

    Consumes `feature_set`: its kept rows are written in place. Raises ValueError as `update`, for
    more than n images, and for logits that are missing, unexpected or not b.
    """
    stats, classes = update(feature_set.stats, features), feature_set.classes
    first, end, n = feature_set.stats.n, stats.n, feature_set.n
    if end > n:
        raise ValueError(f"feature set: expected {n} images, found {end} or more")
    wanted = "none" if classes is None else len(features)
    found = "none" if logits is None else len(logits)
    if found != wanted:
        raise ValueError(f"feature set: expected logits of {wanted} images, found {found}")
    if classes is not None:
        classes = add_class_stats(classes, logits, first, n)
    indices = kept_indices(n, len(feature_set.features))
    low, high = np.searchsorted(indices, [first, end])
    feature_set.features[low:high] = np.asarray(features)[indices[low:high] - first]
    return feature_set._replace(stats=stats, classes=classes)


def from_stats(stats: Moments) -> FeatureSet:
    """Returns a feature set of moments alone, such as a published (mu, sigma)."""
    return FeatureSet(stats, np.zeros((0, len(stats.sum)), np.float32), None, stats.n)


def to_arrays(feature_set: FeatureSet, prefix: str = "") -> dict[str, np.ndarray]:
    """Returns a feature set, complete or not, as arrays to save; their names get the prefix."""
    stats, features, classes, n = feature_set
    arrays = {"n": n, "features": features}
    arrays |= {f"stats.{name}": x for name, x in stats._asdict().items()}
    if classes is not None:
        arrays |= {f"classes.{name}": x for name, x in classes._asdict().items()}
    return {prefix + name: np.asarray(x) for name, x in arrays.items()}


def from_arrays(arrays: dict[str, np.ndarray], prefix: str = "") -> FeatureSet:
    """Inverts `to_arrays`. Raises ValueError for missing arrays or wrong shapes."""
    arrays = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
    wanted = {"n", "features", *(f"stats.{name}" for name in Moments._fields)}
    if not wanted <= arrays.keys():
        raise ValueError(f"feature set: expected {sorted(wanted)}, found {sorted(arrays)}")
    stats = Moments(int(arrays["stats.n"]), arrays["stats.sum"], arrays["stats.outer"])
    features = np.array(arrays["features"], np.float32)  # a copy that `add` may write to
    d = len(stats.sum)
    if stats.outer.shape != (d, d) or features.ndim != 2 or features.shape[1] != d:
        wanted = "features [m, d], sum [d], outer [d, d]"
        found = f"{list(features.shape)}, sum [{d}], outer {list(stats.outer.shape)}"
        raise ValueError(f"feature set: expected {wanted}; found {found}")
    classes = None
    if "classes.n" in arrays:
        arrays.setdefault("classes.unsure", np.zeros_like(arrays["classes.n"]))  # of version 1
        classes = ClassStats(*(arrays[f"classes.{name}"] for name in ClassStats._fields))
    return FeatureSet(stats, features, classes, int(arrays["n"]))


def warnings_for(feature_set: FeatureSet) -> list[str]:
    """Returns one line for each score that is biased because the set has too few images."""
    n, d = feature_set.stats.n, len(feature_set.stats.sum)
    lines = []
    if n <= d:
        bias = "the covariance is singular, and the Frechet distance biased upwards"
        lines.append(f"{n} images for {d} features: {bias}")
    if feature_set.classes is not None and n < 10 * (c := feature_set.classes.p.shape[1]):
        lines.append(f"{n} images for {c} classes: the Inception Score is biased downwards")
    return lines
