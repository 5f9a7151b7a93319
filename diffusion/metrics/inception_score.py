"""inception_score."""

from typing import NamedTuple

import numpy as np

from diffusion.metrics import SPLITS
from diffusion.metrics.frechet import check_rows


class ClassStats(NamedTuple):
    """Running sums of class probabilities p(y|x), of each of the splits: all an IS reads of them.

    n: int64[s], images; p: float64[s, c], sum of p(y|x); plogp: float64[s], sum of
    sum_y p(y|x) log p(y|x).
    """

    n: np.ndarray
    p: np.ndarray
    plogp: np.ndarray


def empty_class_stats(c: int, splits: int = SPLITS) -> ClassStats:
    """The sums of no images yet, for c classes."""
    return ClassStats(np.zeros(splits, np.int64), np.zeros((splits, c)), np.zeros(splits))


def add_class_stats(classes: ClassStats, logits: np.ndarray, first: int, n: int) -> ClassStats:
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
    return ClassStats(
        classes.n + member.sum(1).astype(np.int64), classes.p + member @ p, classes.plogp + plogp
    )


def inception_score(classes: ClassStats) -> np.ndarray:
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


def merge_class_stats(classes: ClassStats) -> ClassStats:
    """All splits as one."""
    return ClassStats(*(x.sum(0, keepdims=True) for x in classes))
