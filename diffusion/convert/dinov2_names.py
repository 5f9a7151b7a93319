"""Names the arrays of DINOv2's ViT-B/14 and ViT-L/14 as their files and this repository do.

Two kinds of files: those of the original code (`dinov2_vitl14_pretrain.pth`), and those of
transformers (`facebook/dinov2-large`), with the names on disk or the newer ones of its version 5.
Shapes are PyTorch's, [out, in, h, w] and [out, in].
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion.convert.validation import check_arrays

DINOV2_LAYERS = {768: 12, 1024: 24}  # {width: layers}
DINOV2_NETWORKS = {768: "ViT-B/14", 1024: "ViT-L/14"}
POSITIONS = 1 + 37 * 37  # of the class token and of the patches of 518x518 pixels
WANTED = "give model.safetensors of facebook/dinov2-base or facebook/dinov2-large"
# {name in transformers 5: name in its files}
NEW_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
MASK_TOKENS = ("mask_token", "embeddings.mask_token")  # in place of patches hidden in training


class Parameter(NamedTuple):
    """An array: path here, shape and name in the original file, names in that of transformers.

    Several names are parts along axis 0. The path is that of all blocks, which are stacked.
    """

    path: str
    shape: tuple[int, ...]
    original: str
    transformers: tuple[str, ...]


def from_dinov2(arrays: Mapping[str, Any]) -> dict:
    """Converts {name in a file of DINOv2: array} to the parameters of `dinov2.DinoV2`, float32.

    The network, ViT-B/14 or ViT-L/14, follows from the width of the class token. Kernels
    [out, in, h, w] become [h, w, in, out], [out, in] become [in, out].
    Raises ValueError naming what is missing, left over or of another shape, and for variants with
    registers or of another width.
    """
    arrays = {_current_name(k): array for k, array in arrays.items() if k not in MASK_TOKENS}
    if registers := [name for name in arrays if name.endswith("register_tokens")]:
        raise ValueError(f"expected DINOv2 without registers, found {registers[0]}; {WANTED}")
    is_original = "cls_token" in arrays
    token = arrays.get("cls_token" if is_original else "embeddings.cls_token", ())
    width = (0, *np.shape(token))[-1]
    if width not in DINOV2_LAYERS:
        found = f"found one of {width}" if width else "found none"
        raise ValueError(f"expected a class token of width 768 or 1024, {found}; {WANTED}")
    shapes, found = {}, {}
    for parameter in _parameters(width):
        names = (parameter.original,) if is_original else parameter.transformers
        rows, *rest = parameter.shape
        shapes |= dict.fromkeys(names, (rows // len(names), *rest))
        found.setdefault(parameter.path, []).append(names)
    check_arrays(arrays, shapes, f"DINOv2 {DINOV2_NETWORKS[width]}", WANTED)
    params: dict = {}
    for path, each in found.items():
        parts = ([np.asarray(arrays[name], np.float32) for name in names] for names in each)
        blocks = [_from_torch(path, np.concatenate(part)) for part in parts]
        *parents, word = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[word] = np.stack(blocks) if parents[:1] == ["blocks"] else blocks[0]
    return params


def _current_name(name: str) -> str:
    for new, old in NEW_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _parameters(d: int) -> Iterator[Parameter]:
    """Yields every array of the network of this width."""
    patch = "embeddings.patch_embeddings.projection"
    yield Parameter("cls_token", (1, 1, d), "cls_token", ("embeddings.cls_token",))
    shape = (1, POSITIONS, d)
    yield Parameter("position", shape, "pos_embed", ("embeddings.position_embeddings",))
    yield from _layer("patch", (d, 3, 14, 14), "patch_embed.proj", (patch,))
    yield from _layer("norm", (d,), "norm", ("layernorm",))
    for i in range(DINOV2_LAYERS[d]):
        theirs, hf = f"blocks.{i}", f"encoder.layer.{i}"
        qkv = tuple(f"{hf}.attention.attention.{name}" for name in ("query", "key", "value"))
        proj = (f"{hf}.attention.output.dense",)
        yield from _layer("blocks/norm1", (d,), f"{theirs}.norm1", (f"{hf}.norm1",))
        yield from _layer("blocks/qkv", (3 * d, d), f"{theirs}.attn.qkv", qkv)
        yield from _layer("blocks/proj", (d, d), f"{theirs}.attn.proj", proj)
        yield from _layer("blocks/norm2", (d,), f"{theirs}.norm2", (f"{hf}.norm2",))
        yield from _layer("blocks/fc1", (4 * d, d), f"{theirs}.mlp.fc1", (f"{hf}.mlp.fc1",))
        yield from _layer("blocks/fc2", (d, 4 * d), f"{theirs}.mlp.fc2", (f"{hf}.mlp.fc2",))
        for k in (1, 2):
            names = f"{theirs}.ls{k}.gamma", (f"{hf}.layer_scale{k}.lambda1",)
            yield Parameter(f"blocks/scale{k}", (d,), *names)


def _layer(
    path: str, shape: tuple[int, ...], original: str, transformers: tuple[str, ...]
) -> Iterator[Parameter]:
    """Yields the weight, of this shape, and the bias of a layer."""
    for word, of, theirs in (
        ("scale" if len(shape) == 1 else "kernel", shape, "weight"),
        ("bias", shape[:1], "bias"),
    ):
        names = tuple(f"{name}.{theirs}" for name in transformers)
        yield Parameter(f"{path}/{word}", of, f"{original}.{theirs}", names)


def _from_torch(path: str, array: np.ndarray) -> np.ndarray:
    if path in ("cls_token", "position"):  # which are of a batch of 1, and of one token
        return array[0, 0] if path == "cls_token" else array[0]
    return array.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim])
