"""Running sums of class probabilities, and the Inception Score (arXiv:1606.03498)."""

from typing import NamedTuple

import numpy as np

from diffusion.metrics.frechet import check_rows

NUM_SPLITS = 10  # of the published score


class ClassStats(NamedTuple):
    """Sums over the images of each of s splits."""

    n: np.ndarray  # int64[s], number of images
    p: np.ndarray  # float64[s, c], sum of p(y|x)
    plogp: np.ndarray  # float64[s], sum of sum_y p(y|x) log p(y|x)


def empty_class_stats(c: int, splits: int = NUM_SPLITS) -> ClassStats:
    """Returns the sums of no images, for c classes."""
    return ClassStats(np.zeros(splits, np.int64), np.zeros((splits, c)), np.zeros(splits))


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
    member = (np.arange(splits)[:, None] == split).astype(np.float64)
    count, plogp = member.sum(1).astype(np.int64), member @ (p * log_p).sum(1)
    return ClassStats(classes.n + count, classes.p + member @ p, classes.plogp + plogp)


def inception_score(classes: ClassStats) -> np.ndarray:
    """Returns exp E KL(p(y|x) || p(y)) of each split, float64[s]; ValueError for an empty split."""
    if not np.all(classes.n):
        found = f"{len(classes.n)}, found {int(classes.n.sum())}"
        raise ValueError(f"is: expected an image or more per split of {found}")
    p = classes.p / classes.n[:, None]
    log_p = np.log(np.where(p > 0, p, 1))
    return np.exp(classes.plogp / classes.n - (p * log_p).sum(1))
