"""Exact k nearest neighbours over a stream of image blocks."""

from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The nearest of the n images seen so far, nearest first, k = min(n, requested number)."""

    n: int
    squared_distances: np.ndarray  # float64[q, k]
    indices: np.ndarray  # int64[q, k], positions in the stream


def no_neighbours(q: int) -> Neighbours:
    """Returns the neighbours of q queries before any image was seen."""
    return Neighbours(0, np.zeros((q, 0)), np.zeros((q, 0), np.int64))


def update_neighbours(
    best: Neighbours, queries: np.ndarray, block: np.ndarray, k: int
) -> Neighbours:
    """Returns the k nearest neighbours of queries [q, ...] after one more block of images [b, ...].

    Euclidean distance, ties to the earlier image; exact for uint8, whose sums float64 holds.
    Raises ValueError if the shapes of the images differ.
    """
    if block.shape[1:] != queries.shape[1:]:
        wanted, found = list(queries.shape[1:]), list(block.shape[1:])
        raise ValueError(f"nearest: expected images of {wanted} like the queries, found {found}")
    a, b = (np.asarray(x).reshape(len(x), -1).astype(np.float64) for x in (queries, block))
    squared = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    indices = np.broadcast_to(best.n + np.arange(len(b)), squared.shape)
    squared = np.concatenate([best.squared_distances, squared], 1)
    indices = np.concatenate([best.indices, indices], 1)
    order = squared.argsort(1, kind="stable")[:, :k]
    squared, indices = (np.take_along_axis(x, order, 1) for x in (squared, indices))
    return Neighbours(best.n + len(b), squared, indices)
