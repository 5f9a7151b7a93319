"""Running sums of class probabilities, and the scores of these: Inception Score and others."""

from typing import NamedTuple

import numpy as np

from diffusion.metrics.frechet import check_rows

NUM_SPLITS = 10  # of the published score
UNSURE = 0.9  # a largest p(y|x) below this one is no certain answer


class ClassStats(NamedTuple):
    """Sums over the images of each of s splits."""

    n: np.ndarray  # int64[s], number of images
    p: np.ndarray  # float64[s, c], sum of p(y|x)
    plogp: np.ndarray  # float64[s], sum of sum_y p(y|x) log p(y|x)
    unsure: np.ndarray  # int64[s], number of images whose largest p(y|x) is below UNSURE


def empty_class_stats(c: int, splits: int = NUM_SPLITS) -> ClassStats:
    """Returns the sums of no images, for c classes."""
    counts = np.zeros((2, splits), np.int64)
    return ClassStats(counts[0], np.zeros((splits, c)), np.zeros(splits), counts[1])


def add_class_stats(classes: ClassStats, logits: np.ndarray, first: int, n: int) -> ClassStats:
    """Adds logits [b, c] of images first, first + 1, ... of n. Raises ValueError as `check_rows`.

    Split i of s has images n i // s to n (i + 1) // s - 1, as in the official code.
    """
    splits, c = classes.p.shape
    z = check_rows(logits, c, first, "logits").astype(np.float64)
    z -= z.max(1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    p = np.exp(log_p)
    split = (splits * (np.arange(first, first + len(z)) + 1) - 1) // n
    member = np.arange(splits)[:, None] == split
    count, unsure = member.sum(1), (member & (p.max(1) < UNSURE)).sum(1)
    member = member.astype(np.float64)
    sums = count, member @ p, member @ (p * log_p).sum(1), unsure
    return ClassStats(*(a + b for a, b in zip(classes, sums, strict=True)))


def inception_score(classes: ClassStats) -> np.ndarray:
    """Returns exp E KL(p(y|x) || p(y)) of each split, float64[s] (arXiv:1606.03498).

    Raises ValueError for an empty split.
    """
    if not np.all(classes.n):
        found = f"{len(classes.n)}, found {int(classes.n.sum())}"
        raise ValueError(f"is: expected an image or more per split of {found}")
    p = classes.p / classes.n[:, None]
    log_p = np.log(np.where(p > 0, p, 1))
    return np.exp(classes.plogp / classes.n - (p * log_p).sum(1))


def share_unsure(classes: ClassStats) -> float:
    """Returns the share of the images of which the classifier is not certain."""
    return float(classes.unsure.sum() / classes.n.sum())


def class_distance(a: ClassStats, b: ClassStats) -> float:
    """Returns the total variation between the mean class probabilities of two sets, in 0..1.

    It is the share of images that one set would have to exchange to have the other's classes.
    """
    p, q = (each.p.sum(0) / each.n.sum() for each in (a, b))
    return float(np.abs(p - q).sum() / 2)
