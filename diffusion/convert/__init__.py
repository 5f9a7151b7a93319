"""Weights between naming schemes: a plain dict of arrays in, a plain dict out.

The Flax tree is what `variables["params"]` holds: nested dicts whose path is the official variable
scope. So only the last word of an official name changes (`W` is Flax's `kernel`), and no array
does: both keep convolutions as [height, width, in, out] and dense layers as [in, out]. diffusers,
like all of PyTorch, keeps [out, in, height, width] and [out, in], and has names of its own.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion.convert import inception_names
from diffusion.convert.unet_names import DIFFUSERS, FLAX, OFFICIAL, Name, names_of, structure

# What diffusers called the layers of an attention before 0.12 (its models/attention_processor.py).
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
WRAPPERS = ("model.", "unet.")  # what others put before every name


def from_official(arrays: Mapping[str, Any]) -> dict:
    """{TensorFlow variable name: array} -> parameters of `UNet`, nested dicts of numpy arrays.

    Names are those of the official code, as in `model/down_0/block_1/conv1/W`. Values, dtypes and
    shapes stay as they are; the network itself refuses a wrong shape.
    Raises ValueError listing what is missing, and the name and shape of what no network has.
    Source: official `models/unet.py`.
    """
    names = [name for name in names_of(arrays, OFFICIAL) if name.official]
    _check(arrays, [name.official for name in names])
    return nested({name.flax: np.asarray(arrays[name.official]) for name in names})


def to_official(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_official`: parameters of `UNet` -> {TensorFlow variable name: array}.

    Raises ValueError as it does. A class-conditional network has no official form.
    """
    flat = flattened(params)
    names = [name for name in names_of(flat, FLAX) if name.official]
    _check(flat, [name.flax for name in names])
    return {name.official: np.asarray(flat[name.flax]) for name in names}


def from_diffusers(arrays: Mapping[str, Any]) -> dict:
    """{name in diffusers' UNet2DModel: array} -> parameters of `UNet`, nested dicts.

    Older names of the attention (query, key, value, proj_attn) are read as well, as are names that
    all begin with `model.` or `unet.`. Values and dtypes stay as they are, axes are moved, and 1x1
    convolutions become dense layers.
    Raises ValueError listing what is missing, and the name and shape of what no network has.
    Source: diffusers 0.42, models/unets/unet_2d.py and unet_2d_blocks.py.
    """
    arrays = _newer(arrays)
    names = names_of(arrays, DIFFUSERS)
    _check(arrays, [name.diffusers for name in names])
    return nested({name.flax: _from_torch(name, arrays[name.diffusers]) for name in names})


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `from_diffusers`, with today's names. Raises ValueError as it does."""
    flat = flattened(params)
    names = names_of(flat, FLAX)
    _check(flat, [name.flax for name in names])
    return {name.diffusers: _to_torch(name, flat[name.flax]) for name in names}


class Sizes(NamedTuple):
    """What the shapes of the parameters tell of a network; see `unet.UNet`.

    attention: whether level i has it: attn_resolutions, but for the size of the images.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    in_ch: int
    out_ch: int
    num_classes: int


def sizes(params: Mapping[str, Any]) -> Sizes:
    """The sizes of the network that has these parameters. Raises ValueError if none has them."""
    flat = flattened(params)
    s, first, last = structure(flat, FLAX), "conv_in/kernel", "conv_out/kernel"
    shapes = {name: np.shape(array) for name, array in flat.items()}
    levels = [f"down_{i}/block_0/conv1/kernel" for i in range(s.levels)]
    if bad := [name for name in (first, *levels, last) if len(shapes.get(name, ())) != 4]:
        raise ValueError(f"{bad[0]}: expected 4 axes, found {shapes.get(bad[0], 'nothing')}")
    in_ch, ch = shapes[first][2:]
    channels = [shapes[name][3] for name in levels]
    if not ch or not channels or any(c % ch for c in channels):
        raise ValueError(f"levels: expected channels that are multiples of {ch}, found {channels}")
    rows = shapes.get("class_emb/embedding") or (1,)  # the last of them is "no class"
    mult = tuple(c // ch for c in channels)
    return Sizes(ch, mult, s.blocks, s.attention, in_ch, shapes[last][3], rows[0] - 1)


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    flat = {}
    for name, value in tree.items():
        is_tree = isinstance(value, Mapping)
        flat |= flattened(value, f"{prefix}{name}/") if is_tree else {prefix + name: value}
    return flat


def nested(flat: Mapping[str, Any]) -> dict:
    """The inverse of `flattened`. Raises ValueError for {"a": x, "a/b": y}."""
    tree: dict = {}
    for name, value in flat.items():
        *path, word = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: expected no array at {part}, found one")
        if word in node:
            raise ValueError(f"{name}: expected one array, found others below it")
        node[word] = value
    return tree


def _newer(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The same arrays, under the names that diffusers gives them today."""
    for wrapper in WRAPPERS:
        if arrays and all(name.startswith(wrapper) for name in arrays):
            arrays = {name.removeprefix(wrapper): array for name, array in arrays.items()}
    renamed: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, layer, word = ("", *name.split("."))
        new = ".".join([*path[1:], OLDER.get(layer, layer), word]) if "attentions" in path else name
        if new in renamed:
            raise ValueError(f"{new} is there twice, by its old and its new name")
        renamed[new] = array
    return renamed


def _from_torch(name: Name, array: Any) -> np.ndarray:
    """[out, in] -> [in, out], [out, in, 1, 1] likewise, [out, in, h, w] -> [h, w, in, out]."""
    array = np.asarray(array)
    if not name.flax.endswith("/kernel"):
        return array
    if array.ndim not in (2, 4):
        raise ValueError(f"{name.diffusers}: expected 2 or 4 axes, found {array.shape}")
    if array.ndim == 4 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    return array.transpose((2, 3, 1, 0) if array.ndim == 4 else (1, 0))


def _to_torch(name: Name, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if not name.flax.endswith("/kernel"):
        return array
    array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
    # Of the products over channels, this one alone is a convolution there.
    return array[:, :, None, None] if "conv_shortcut" in name.diffusers else array


def _check(arrays: Mapping[str, Any], names: Iterable[str]):
    """Raises ValueError unless there is exactly one array for each name."""
    names = list(names)
    missing = [name for name in names if name not in arrays]
    left = sorted(f"{name} {np.shape(arrays[name])}" for name in set(arrays).difference(names))
    if missing or left:
        raise ValueError(
            f"these are not the parameters of one U-Net: {len(missing)} missing "
            f"({_some(missing, 20)}), {len(left)} left over ({_some(left, 20)})"
        )



# PyTorch's words for a layer's arrays, and Flax's.
WORDS = {
    **{"conv.weight": "kernel", "bn.weight": "scale", "bn.bias": "bias"},
    **{"bn.running_mean": "mean", "bn.running_var": "var"},
    **{"fc.weight": "fc.kernel", "fc.bias": "fc.bias"},
}
UNUSED = ".num_batches_tracked"  # how long a batch norm was trained


def from_inception(arrays: Mapping[str, Any]) -> dict:
    """{torch-fidelity's name: array} -> nested dicts of numpy arrays, for `inception.fold`.

    `Mixed_5b.branch1x1.conv.weight` becomes ["Mixed_5b"]["branch1x1"]["kernel"]; beside it lie the
    batch norm's "scale", "bias", "mean" and "var". Kernels [out, in, height, width] become [height,
    width, in, out], that of the logits [in, out].
    Raises ValueError listing what is missing, what is left over and what is of another shape.
    """
    arrays = {name: array for name, array in arrays.items() if not name.endswith(UNUSED)}
    _check_inception(arrays)
    params: dict = {}
    for name in inception_names.SHAPES:
        words = next(words for words in WORDS if name.endswith(words))
        *path, word = f"{name.removesuffix(words)}{WORDS[words]}".split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[np.ndim(arrays[name])]
        node[word] = np.asarray(arrays[name]).transpose(axes)
    return params


def _check_inception(arrays: Mapping[str, Any]):
    """Raises ValueError unless there is exactly one array, of its shape, for each name."""
    shapes = {name: tuple(np.shape(array)) for name, array in arrays.items()}
    missing = [name for name in inception_names.SHAPES if name not in shapes]
    left = [f"{name} {shapes[name]}" for name in shapes if name not in inception_names.SHAPES]
    other = [
        f"{name} {shapes[name]} instead of {shape}"
        for name, shape in inception_names.SHAPES.items()
        if shapes.get(name, shape) != shape
    ]
    if missing or left or other:
        found = {"missing": missing, "left over": left, "of another shape": other}
        parts = (f"{len(of)} {what} ({_some(of)})" for what, of in found.items() if of)
        raise ValueError(
            f"these are not the weights of the FID Inception network: {', '.join(parts)}; give "
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        )


def _some(names: list[str], most: int = 5) -> str:
    """The first few: of another network all 472 would be listed."""
    return ", ".join(names[:most] + (["..."] if len(names) > most else []))
