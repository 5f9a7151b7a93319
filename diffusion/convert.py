"""Weights of the U-Net between naming schemes: a plain dict of arrays in, a plain dict out.

The Flax tree is what `variables["params"]` holds: nested dicts whose path is the official variable
scope. So only the last word of a name changes (official `W` is Flax's `kernel`), and no array does:
both keep convolutions as [height, width, in, out] and dense layers as [in, out].
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

PREFIX = "model/"  # the variable scope that the official scripts put the network in

# The layers of each part of the network, and the words for their parameters: official, Flax.
NORM = {"gamma": "scale", "beta": "bias"}
LINEAR = {"W": "kernel", "b": "bias"}
LAYERS = {
    "": {"conv_in": LINEAR, "norm_out": NORM, "conv_out": LINEAR},
    "temb": {"dense0": LINEAR, "dense1": LINEAR},
    "block": {"norm1": NORM, "conv1": LINEAR, "temb_proj": LINEAR, "norm2": NORM, "conv2": LINEAR},
    "widening": {"nin_shortcut": LINEAR},  # of blocks that change the number of channels
    "attn": {"norm": NORM, "q": LINEAR, "k": LINEAR, "v": LINEAR, "proj_out": LINEAR},
    "resample": {"conv": LINEAR},
}


def from_official(arrays: Mapping[str, Any]) -> dict:
    """{TensorFlow variable name: array} -> parameters of `UNet`, nested dicts of numpy arrays.

    Names are those of the official code, as in `model/down_0/block_1/conv1/W`. Values, dtypes and
    shapes stay as they are; the network itself refuses a wrong shape.
    Raises ValueError listing what is missing, and the name and shape of what no network has.
    Source: official `models/unet.py`.
    """
    names = _names(_kernels(arrays, PREFIX, "/W"))
    _check(arrays, names)
    params: dict = {}
    for official, flax in names.items():
        *path, word = flax.split("/")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[word] = np.asarray(arrays[official])
    return params


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_official`: parameters of `UNet` -> {TensorFlow variable name: array}.

    Raises ValueError as it does. A class-conditional network has no official form.
    """
    flat = _flatten(params)
    names = _names(_kernels(flat, "", "/kernel"))
    _check(flat, names.values())
    return {official: np.asarray(flat[flax]) for official, flax in names.items()}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        is_tree = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{name}/") if is_tree else {prefix + name: value}
    return flat


def _check(arrays: Mapping[str, Any], names: Collection[str]):
    """Raises ValueError unless there is exactly one array for each name."""
    missing = [name for name in names if name not in arrays]
    left = [f"{name} {np.shape(arrays[name])}" for name in set(arrays).difference(names)]
    if missing or left:
        raise ValueError(
            f"these are not the parameters of one U-Net: {len(missing)} missing "
            f"({', '.join(missing)}), {len(left)} left over ({', '.join(sorted(left))})"
        )


def _kernels(arrays: Mapping[str, Any], prefix: str, suffix: str) -> dict[str, tuple]:
    """{path of a layer: shape of its kernel}, the same in either scheme."""
    return {
        name[len(prefix) : -len(suffix)]: np.shape(array)
        for name, array in arrays.items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _names(kernels: Mapping[str, tuple]) -> dict[str, str]:
    """{official name: Flax name} of every parameter of the network that has these kernels."""
    return {
        f"{PREFIX}{path}{layer}/{official}": f"{path}{layer}/{flax}"
        for path, part in _parts(kernels)
        for layer, words in LAYERS[part].items()
        for official, flax in words.items()
    }


def _parts(kernels: Mapping[str, tuple]) -> Iterator[tuple[str, str]]:
    """Yields (path, key of LAYERS) for every part of the network that has these kernels.

    They tell how many levels and blocks it has, which levels have attention and which blocks change
    the number of channels; the rest follows.
    """

    def count(stem):
        i = 0
        while any(path.startswith(f"{stem}{i}/") for path in kernels):
            i += 1
        return i

    def block(path):
        yield f"{path}/", "block"
        if len(set(kernels.get(f"{path}/conv1", ())[-2:])) == 2:  # channels in, channels out
            yield f"{path}/", "widening"

    yield from (("", ""), ("temb/", "temb"), ("mid/attn_1/", "attn"))
    yield from block("mid/block_1")
    yield from block("mid/block_2")
    levels, blocks = count("down_"), count("down_0/block_")
    for i in range(levels):
        down, up = f"down_{i}", f"up_{i}"
        attention = any(path.startswith((f"{down}/attn_", f"{up}/attn_")) for path in kernels)
        for level, n in ((down, blocks), (up, blocks + 1)):
            for j in range(n):
                yield from block(f"{level}/block_{j}")
                if attention:
                    yield f"{level}/attn_{j}/", "attn"
        if i < levels - 1:
            yield f"{down}/downsample/", "resample"
        if i > 0:
            yield f"{up}/upsample/", "resample"
