"""What the arrays of a checkpoint are: their names, types and SHA-256, to be compared later.

Files on a disk change without telling, and the library that reads them restores a flipped bit as
if nothing had happened. A digest of every array, made from memory before anything is written, is
what every later reading is held against.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

Tree = Any
THREADS = min(16, os.cpu_count() or 1)  # hashlib lets go of the interpreter: 1.5 GB/s each


def named(tree: Tree) -> dict[str, Any]:
    """{'state/params/kernel': leaf, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def types(tree: Tree) -> dict[str, str]:
    """{'state/params/kernel': 'float32[3, 3, 8, 8]', ...}; of arrays or their shapes."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named(tree).items()}


def on_host(tree: Tree) -> Tree:
    """NumPy arrays for the JAX arrays of a tree, which lie whole on every device. Waits for them.

    On a processor these are views: to be used, or copied, before the arrays are donated.
    """
    # Through a second handle: NumPy's view of the array itself would hold up its donation.
    return jax.device_get(
        jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)
    )


def sha256(tree: Tree) -> dict[str, str]:
    """{'state/params/kernel': 64 hexadecimal digits, ...}, of the bytes in memory.

    tree: of NumPy arrays, or of JAX arrays that lie whole on every device. Waits for them.
    """
    leaves = named(on_host(tree))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(leaves, pool.map(_sha256, leaves.values()), strict=True))


def differing(found: dict[str, str], expected: dict[str, str]) -> str | None:
    """The first name, in their order, under which two such tables differ; None if they do not."""
    return next((k for k in sorted(found | expected) if found.get(k) != expected.get(k)), None)


def _sha256(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8)).hexdigest()
