"""nearest."""

from typing import NamedTuple

import numpy as np


class Neighbours(NamedTuple):
    """The nearest of n images so far: square distances float64[q, k], rising; numbers int64[q, k].

    k is smaller while fewer were seen.
    """

    n: int
    square: np.ndarray
    number: np.ndarray


def no_neighbours(q: int) -> Neighbours:
    """Before any image was seen, for q queries."""
    return Neighbours(0, np.zeros((q, 0)), np.zeros((q, 0), np.int64))


def update_neighbours(best: Neighbours, queries: np.ndarray, block: np.ndarray, k: int) -> Neighbours:
    """The k nearest, by Euclidean distance, of those seen and of another block. Exact.

    queries: [q, ...]; block: [b, ...], numbered on from those seen; bytes or floats. Of two that
    are as near, the first. For bytes every sum is an integer that float64 holds: what is the same
    has the distance 0. Memory: q b numbers, and the block. Raises ValueError for other shapes.
    """
    if block.shape[1:] != queries.shape[1:]:
        wanted, found = list(queries.shape[1:]), list(block.shape[1:])
        raise ValueError(f"nearer: expected images of {wanted} like the queries, found {found}")
    a, b = (np.asarray(x).reshape(len(x), -1).astype(np.float64) for x in (queries, block))
    square = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    number = np.broadcast_to(best.n + np.arange(len(b)), square.shape)
    square = np.concatenate([best.square, square], 1)
    number = np.concatenate([best.number, number], 1)
    first = square.argsort(1, kind="stable")[:, :k]
    square, number = (np.take_along_axis(x, first, 1) for x in (square, number))
    return Neighbours(best.n + len(b), square, number)
