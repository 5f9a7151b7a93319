"""Converts weights between naming schemes: a plain dict of arrays in, a plain dict out.

The Flax tree is `variables["params"]`: nested dicts whose path is the official variable scope. So
only the last word of an official name changes (`W` is Flax's `kernel`) and no array does: both keep
convolutions as [h, w, in, out] and dense layers as [in, out]. diffusers, like all of PyTorch, keeps
[out, in, h, w] and [out, in], and has names of its own.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion.convert.dinov2_names import from_dinov2
from diffusion.convert.inception_names import from_inception
from diffusion.convert.unet_names import Name, parameter_names
from diffusion.convert.validation import summarize

__all__ = [
    "from_diffusers",
    "from_dinov2",
    "from_inception",
    "from_official",
    "to_diffusers",
    "to_official",
]

# What diffusers called the layers of an attention before 0.12 (its models/attention_processor.py).
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MODULE_PREFIXES = ("model.", "unet.")  # of a network saved inside another module


def from_official(arrays: Mapping[str, Any]) -> dict:
    """Converts {TensorFlow variable name: array} to the parameters of `UNet`.

    Names are those of the official code, as in `model/down_0/block_1/conv1/W`. Values, dtypes and
    shapes stay as they are; the network itself refuses a wrong shape.
    Raises ValueError naming what is missing and what no network has.
    Source: official `models/unet.py`.
    """
    names = [name for name in parameter_names(arrays, "official") if name.official]
    _check_names(arrays, [name.official for name in names])
    return unflatten_params({name.flax: np.asarray(arrays[name.official]) for name in names})


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverts `from_official`. A class-conditional network has no official form: ValueError."""
    flat = flatten_params(params)
    names = [name for name in parameter_names(flat, "flax") if name.official]
    _check_names(flat, [name.flax for name in names])
    return {name.official: np.asarray(flat[name.flax]) for name in names}


def from_diffusers(arrays: Mapping[str, Any]) -> dict:
    """Converts {name in diffusers' UNet2DModel: array} to the parameters of `UNet`.

    Also reads the attention's older names (query, key, value, proj_attn), and names that all begin
    with `model.` or `unet.`. Values and dtypes stay as they are, axes are moved, and 1x1
    convolutions become dense layers.
    Raises ValueError as `from_official` does.
    Source: diffusers 0.42, models/unets/unet_2d.py and unet_2d_blocks.py.
    """
    arrays = _current_names(arrays)
    names = parameter_names(arrays, "diffusers")
    _check_names(arrays, [name.diffusers for name in names])
    return unflatten_params({n.flax: _from_torch(n, arrays[n.diffusers]) for n in names})


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverts `from_diffusers`, with current names."""
    flat = flatten_params(params)
    names = parameter_names(flat, "flax")
    _check_names(flat, [name.flax for name in names])
    return {name.diffusers: _to_torch(name, flat[name.flax]) for name in names}


def flatten_params(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flattens nested dicts: {"a": {"b": x}} becomes {"a/b": x}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): a for path, a in leaves}


def unflatten_params(flat: Mapping[str, Any]) -> dict:
    """Inverts `flatten_params`. Raises ValueError for {"a": x, "a/b": y}."""
    tree: dict = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: expected a subtree at {part}, found an array")
        if last in node:
            raise ValueError(f"{name}: expected an array, found a subtree")
        node[last] = value
    return tree


def _current_names(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Renames arrays to diffusers' current names."""
    for prefix in MODULE_PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    renamed: dict[str, Any] = {}
    for name, array in arrays.items():
        parts = name.split(".")
        if "attentions" in parts[:-2]:
            parts[-2] = OLD_ATTENTION_NAMES.get(parts[-2], parts[-2])
        new = ".".join(parts)
        if new in renamed:
            raise ValueError(f"{new} is there twice, by its old and its new name")
        renamed[new] = array
    return renamed


def _from_torch(name: Name, array: Any) -> np.ndarray:
    """Converts [out, in] and [out, in, 1, 1] to [in, out], [out, in, h, w] to [h, w, in, out]."""
    array = np.asarray(array)
    if not name.flax.endswith("/kernel"):
        return array
    if array.ndim == 2 or array.shape[2:] == (1, 1):
        return array.reshape(array.shape[:2]).T
    if array.ndim != 4:
        raise ValueError(f"{name.diffusers}: expected 2 or 4 axes, found {array.shape}")
    return array.transpose(2, 3, 1, 0)


def _to_torch(name: Name, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if not name.flax.endswith("/kernel"):
        return array
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    # Of the dense layers over channels, this one alone is a convolution in diffusers.
    return array[:, :, None, None] if "conv_shortcut" in name.diffusers else array


def _check_names(arrays: Mapping[str, Any], names: list[str]) -> None:
    """Raises ValueError unless there is exactly one array for each name."""
    missing = [name for name in names if name not in arrays]
    extra = sorted(f"{name} {np.shape(arrays[name])}" for name in set(arrays).difference(names))
    if missing or extra:
        raise ValueError(
            f"expected the parameters of one U-Net, found {len(missing)} missing "
            f"({summarize(missing)}), {len(extra)} left over ({summarize(extra)})"
        )
