"""safetensors: files of arrays by name, read and written with the library of that name.

The library checks that the arrays lie in the file without gaps. What it lets pass is refused here:
a name given twice, shapes of nothing, NaN, types that NumPy has not (safetensors 0.8).
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from diffusion.convert.validation import covered, finite
from diffusion.utils.errors import IntegrityError

DTYPES = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"},
    **{"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?"},
}
MOST_HEADER = 2**24  # bytes: 100,000 arrays take less


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """{name: array}. Raises WeightsError for a file that is not whole or not what it says."""
    header, size = _header(path)
    for name, entry in header.items():
        if entry.get("dtype") not in DTYPES:
            known = ", ".join(DTYPES)
            raise IntegrityError(f"{name}: expected a type of {known}, found {entry.get('dtype')}")
        covered(name, entry.get("shape", [-1]), size // np.dtype(DTYPES[entry["dtype"]]).itemsize)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: finite(name, file.get_tensor(name)) for name in header}
    except safetensors.SafetensorError as error:
        raise IntegrityError(f"not a whole safetensors file: {error}") from error


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The file of these arrays: the old one or the new, never half of it. Raises OSError."""
    path = pathlib.Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        safetensors.numpy.save_file(contiguous, part, dict(metadata or {}) or None)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _header(path: str | os.PathLike) -> tuple[dict[str, dict], int]:
    """What the file says of its arrays, and how many bytes it has for them."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, size - 8):
            raise IntegrityError(f"its header claims {length:,} bytes, the file has {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"its header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise IntegrityError("its header is not a table of arrays")
    header.pop("__metadata__", None)
    if bad := [name for name, entry in header.items() if not isinstance(entry, dict)]:
        raise IntegrityError(f"its header says of {bad[0]} what is no array")
    return header, size - 8 - length


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise IntegrityError(f"{next(n for n in names if names.count(n) > 1)} is there twice")
    return entries
