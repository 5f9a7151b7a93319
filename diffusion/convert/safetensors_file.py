"""Reads and writes safetensors files by the library of that name.

The library checks that the arrays cover the file without gaps. Refused here besides: a name given
twice, huge empty shapes, NaN, and types that NumPy lacks.
"""

import json
import os
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from diffusion.convert.validation import check_finite, check_shape, integrity_errors
from diffusion.utils import io

DTYPES = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns {name: array}. Raises IntegrityError for a damaged file."""
    with integrity_errors(path):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                _check_unique(path)
                size = os.stat(path).st_size
                return {name: _read_array(file, name, size) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"not a complete safetensors file: {error}") from error


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Returns the texts of the header. Raises IntegrityError for a damaged file."""
    with integrity_errors(path):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise ValueError(f"not a complete safetensors file: {error}") from error


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes {name: array} atomically, with the texts of `metadata`. Raises OSError."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    io.save_bytes(path, safetensors.numpy.save(contiguous, metadata and dict(metadata)))


def _read_array(file: safetensors.safe_open, name: str, file_size: int) -> np.ndarray:
    header = file.get_slice(name)
    if header.get_dtype() not in DTYPES:
        raise ValueError(
            f"{name}: expected a type of {', '.join(DTYPES)}, found {header.get_dtype()}"
        )
    check_shape(name, header.get_shape(), file_size)
    return check_finite(name, file.get_tensor(name))


def _check_unique(path: str | os.PathLike) -> None:
    """Raises ValueError for a name given twice, of which the library reads the last."""
    with open(path, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    names = json.loads(header, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
