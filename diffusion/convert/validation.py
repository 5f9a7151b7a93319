"""Checks that files of weights of every format share.

What a header claims is a limit, never a size to allocate: nothing is allocated that the file's own
size does not cover.
"""

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.utils.errors import IntegrityError, error_text, one_line

MAX_EMPTY_AXIS = 2**24  # length of an axis of an array without elements


@contextlib.contextmanager
def integrity_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError or ValueError of parsing a file into an IntegrityError that names it."""
    try:
        yield
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error_text(error)}") from error
    except ValueError as error:
        raise IntegrityError(f"{path}: {one_line(error)}") from error


def check_shape(name: str, shape: Sequence[int], available: int) -> None:
    """Raises ValueError unless `shape` is valid and has at most `available` elements.

    Axes are bounded one by one as well: (0, 2^40) has no elements, but no network has such a shape.
    """
    if type(shape) not in (list, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{one_line(name, 100)}: expected a shape, found none")
    if max(shape, default=0) > max(available, MAX_EMPTY_AXIS) or math.prod(shape) > available:
        claim = f"{one_line(name, 100)} claims the shape {one_line(list(shape), 100)}"
        raise ValueError(f"{claim}, the file holds {available} elements")


def check_finite(name: str, array: np.ndarray) -> np.ndarray:
    """Returns the array. Raises ValueError if it holds NaN or infinity."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0].tolist()
        found = f"{one_line(name, 100)} holds {array[tuple(where)]} at {where}"
        raise ValueError(f"{found}; the file is damaged")
    return array


def summarize(names: Iterable[str], most: int = 3) -> str:
    """Returns the first names in one short line; another network would list hundreds."""
    names = list(names)
    return one_line(", ".join(names[:most]), 200) + (", ..." if len(names) > most else "")


def check_arrays(
    arrays: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], network: str, advice: str
) -> None:
    """Raises ValueError unless there is exactly one array, of its shape, for each wanted name.

    network: whose weights they are; advice: how to get these.
    """
    shapes = {name: tuple(np.shape(array)) for name, array in arrays.items()}
    problems = {
        "missing": [name for name in wanted if name not in shapes],
        "left over": [f"{name} {shapes[name]}" for name in shapes if name not in wanted],
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        found = (f"{len(of)} {what} ({summarize(of, 2)})" for what, of in problems.items() if of)
        raise ValueError(f"expected the weights of {network}, found {', '.join(found)}; {advice}")
