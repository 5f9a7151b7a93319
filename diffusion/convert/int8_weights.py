"""Weights in 8 bits each, as a set of safetensors files that are small enough to send.

An array of two or more axes becomes int8 values and one float32 scale per output channel, the last
axis: w is about q * scale. Vectors stay as they are. Every file of a set holds the set's digest, so
that missing, damaged and mixed files are found.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Mapping

import numpy as np

from diffusion.convert import safetensors_file
from diffusion.convert.validation import integrity_errors
from diffusion.utils import digests

INT8_FILES = "weights-*-of-*.safetensors"
INT8_NAME = re.compile(r"weights-(\d+)-of-(\d+)\.safetensors")
ARRAY_BYTES = 14_000_000  # of a file at most; with its header it stays below 15 MB
SCALE_SUFFIX = ":scale"
LEAST_SCALE = np.finfo(np.float32).tiny  # of a channel that is 0, or nearly
MOST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))


def quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds w [..., c] to q * scale; an error is at most scale / 2.

    Returns (q int8[..., c] in -127..127, scale float32[c], the largest magnitude / 127).
    """
    w = np.asarray(w, np.float32)
    largest = np.abs(w).max(axis=tuple(range(w.ndim - 1)), initial=0)
    scale = np.clip(largest / np.float32(127), LEAST_SCALE, MOST_SCALE)
    return np.rint(w / scale).astype(np.int8), scale


def dequantize(q: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Returns q * scale, float32[..., c]."""
    return q * scale


def quantize_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns {name: q, name:scale: scale} for the arrays of two or more axes, and the others."""
    packed = {}
    for name, array in arrays.items():
        if np.ndim(array) < 2:
            packed[name] = np.asarray(array)
        else:
            packed[name], packed[name + SCALE_SUFFIX] = quantize(array)
    return packed


def dequantize_arrays(packed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverts `quantize_arrays`, up to rounding. Raises ValueError for scales that do not fit."""
    arrays = {}
    for name, array in packed.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if (scale := packed.get(name + SCALE_SUFFIX)) is None:
            arrays[name] = array
        elif array.dtype == np.int8 and scale.shape == array.shape[-1:]:
            arrays[name] = dequantize(array, scale)
        else:
            found = f"{array.dtype}{list(array.shape)} with {list(scale.shape)} scales"
            raise ValueError(f"{name}: expected int8 and a scale per output channel, found {found}")
    return arrays


def relative_error(arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> float:
    """Returns |others - arrays| / |arrays|, over all of their elements together."""
    error = sum(np.sum((np.float64(others[n]) - arrays[n]) ** 2) for n in arrays)
    return float(np.sqrt(error / sum(np.sum(np.float64(a) ** 2) for a in arrays.values())))


def write_set(
    folder: pathlib.Path, packed: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes folder/weights-1-of-N.safetensors, ..., each with the metadata. Raises OSError."""
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, array in packed.items():
        if sum(a.nbytes for a in parts[-1].values()) + array.nbytes > ARRAY_BYTES and parts[-1]:
            parts.append({})
        parts[-1][name] = array
    metadata = {**metadata, "digest": _digest(packed)}
    for i, part in enumerate(parts):
        path = folder / f"weights-{i + 1}-of-{len(parts)}.safetensors"
        safetensors_file.write(path, part, metadata)


def read_set(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns ({name: array}, the metadata) of the one set in a folder.

    Raises IntegrityError for an incomplete or damaged set, and for files of several.
    """
    paths = sorted(folder.glob(INT8_FILES))
    with integrity_errors(folder):
        names = {path.name for path in paths}
        counts = {int(match[2]) for match in map(INT8_NAME.fullmatch, names) if match}
        n = max(counts, default=0)
        missing = [m for i in range(n) if (m := f"weights-{i + 1}-of-{n}.safetensors") not in names]
        if missing or len(names) != n:
            found = (
                f"found {len(names)}, without {missing[0]}" if missing else f"found {len(names)}"
            )
            raise ValueError(f"expected the {n} files of one set, {found}; copy that set alone")
        packed = {name: a for path in paths for name, a in safetensors_file.read(path).items()}
        metadata = [safetensors_file.read_metadata(path) for path in paths]
        if any(each.get("digest") != _digest(packed) for each in metadata):
            raise ValueError("expected files of one set, found another digest; copy them again")
        return dequantize_arrays(packed), metadata[0]


def _digest(packed: Mapping[str, np.ndarray]) -> str:
    each = json.dumps(digests.sha256(packed), sort_keys=True)
    return hashlib.sha256(each.encode()).hexdigest()
