"""Names, types and SHA-256 digests of the arrays of a tree, to compare them later.

A digest is made from memory before anything is written, so that every later reading can be held
against it.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from diffusion.utils import io

Tree = Any
THREADS = min(16, os.cpu_count() or 1)  # hashlib releases the interpreter's lock


def named(tree: Tree) -> dict[str, Any]:
    """Returns {'state/params/kernel': leaf, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def types(tree: Tree) -> dict[str, str]:
    """Returns {'state/params/kernel': 'float32[3, 3, 8, 8]', ...} of arrays or their shapes."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named(tree).items()}


def on_host(tree: Tree) -> Tree:
    """Returns NumPy arrays for the replicated JAX arrays of a tree, after waiting for them.

    On a CPU these are views, to be used before the arrays are donated.
    """
    # Through a second handle, because NumPy's view of the array itself would prevent its donation.
    return jax.device_get(
        jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)
    )


def sha256(tree: Tree) -> dict[str, str]:
    """Returns {'state/params/kernel': 64 hexadecimal digits, ...} of replicated or NumPy arrays."""
    leaves = named(on_host(tree))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(leaves, pool.map(_sha256, leaves.values()), strict=True))


def sha256_of_file(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with io.open_binary(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differing(found: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Returns the first name, in sorted order, whose values differ or that one side lacks."""
    names = sorted({*found, *expected})
    return next((name for name in names if found.get(name) != expected.get(name)), None)


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8)).hexdigest()
