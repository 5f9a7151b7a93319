"""What holds for files of weights of every kind, and the error that all that is wrong becomes.

A header's claims are limits, never amounts to trust: nothing is allocated that the file's own size
does not cover.
"""
import math
from collections.abc import Sequence

import numpy as np

from diffusion.utils.errors import IntegrityError

MOST_TEXT = 1000  # characters of an error
MOST_AXIS = 2**24  # elements along an axis of an array that is empty


    def __init__(self, text: object):
        # A file may name its arrays as it likes: with line breaks, without end.
        line = "".join(c if c.isprintable() else " " for c in f"{text}"[:MOST_TEXT])
        super().__init__(" ".join(line.split()))


def covered(name: str, shape: Sequence[int], have: int) -> None:
    """Raises WeightsError unless `shape` is one, of at most `have` elements, which the file holds.

    Axes are bounded one by one, too: (0, 2^40) has no element, and is no shape of weights.
    """
    if type(shape) not in (list, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise IntegrityError(f"{name} claims a shape that is none")
    if max(shape, default=0) > max(have, MOST_AXIS) or math.prod(shape) > have:
        raise IntegrityError(f"{name} claims the shape {list(shape)}, the file holds {have} elements")


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array. Raises WeightsError if it holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        raise IntegrityError(f"{name} holds {array[tuple(where)]} at {where}; the file is damaged")
    return array
