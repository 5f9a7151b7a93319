"""The layers of the FID Inception network: their names in PyTorch and TensorFlow, their shapes.

One table, of 94 convolutions and the logits. PyTorch's names are torch-fidelity's (and
pytorch-fid's), TensorFlow's the scopes of `classify_image_graph_def.pb` of 2015-12-05. Shapes are
[out, in, height, width], as PyTorch keeps them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    """A convolution with its batch norm."""

    scope: str  # in the TensorFlow graph
    shape: tuple[int, int, int, int]


def _a(c: int, pool: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer("conv", (64, c, 1, 1)),
        "branch5x5_1": Layer("tower/conv", (48, c, 1, 1)),
        "branch5x5_2": Layer("tower/conv_1", (64, 48, 5, 5)),
        "branch3x3dbl_1": Layer("tower_1/conv", (64, c, 1, 1)),
        "branch3x3dbl_2": Layer("tower_1/conv_1", (96, 64, 3, 3)),
        "branch3x3dbl_3": Layer("tower_1/conv_2", (96, 96, 3, 3)),
        "branch_pool": Layer("tower_2/conv", (pool, c, 1, 1)),
    }


def _b() -> dict[str, Layer]:
    return {
        "branch3x3": Layer("conv", (384, 288, 3, 3)),
        "branch3x3dbl_1": Layer("tower/conv", (64, 288, 1, 1)),
        "branch3x3dbl_2": Layer("tower/conv_1", (96, 64, 3, 3)),
        "branch3x3dbl_3": Layer("tower/conv_2", (96, 96, 3, 3)),
    }


def _c(width: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer("conv", (192, 768, 1, 1)),
        "branch7x7_1": Layer("tower/conv", (width, 768, 1, 1)),
        "branch7x7_2": Layer("tower/conv_1", (width, width, 1, 7)),
        "branch7x7_3": Layer("tower/conv_2", (192, width, 7, 1)),
        "branch7x7dbl_1": Layer("tower_1/conv", (width, 768, 1, 1)),
        "branch7x7dbl_2": Layer("tower_1/conv_1", (width, width, 7, 1)),
        "branch7x7dbl_3": Layer("tower_1/conv_2", (width, width, 1, 7)),
        "branch7x7dbl_4": Layer("tower_1/conv_3", (width, width, 7, 1)),
        "branch7x7dbl_5": Layer("tower_1/conv_4", (192, width, 1, 7)),
        "branch_pool": Layer("tower_2/conv", (192, 768, 1, 1)),
    }


def _d() -> dict[str, Layer]:
    return {
        "branch3x3_1": Layer("tower/conv", (192, 768, 1, 1)),
        "branch3x3_2": Layer("tower/conv_1", (320, 192, 3, 3)),
        "branch7x7x3_1": Layer("tower_1/conv", (192, 768, 1, 1)),
        "branch7x7x3_2": Layer("tower_1/conv_1", (192, 192, 1, 7)),
        "branch7x7x3_3": Layer("tower_1/conv_2", (192, 192, 7, 1)),
        "branch7x7x3_4": Layer("tower_1/conv_3", (192, 192, 3, 3)),
    }


def _e(c: int) -> dict[str, Layer]:
    return {
        "branch1x1": Layer("conv", (320, c, 1, 1)),
        "branch3x3_1": Layer("tower/conv", (384, c, 1, 1)),
        "branch3x3_2a": Layer("tower/mixed/conv", (384, 384, 1, 3)),
        "branch3x3_2b": Layer("tower/mixed/conv_1", (384, 384, 3, 1)),
        "branch3x3dbl_1": Layer("tower_1/conv", (448, c, 1, 1)),
        "branch3x3dbl_2": Layer("tower_1/conv_1", (384, 448, 3, 3)),
        "branch3x3dbl_3a": Layer("tower_1/mixed/conv", (384, 384, 1, 3)),
        "branch3x3dbl_3b": Layer("tower_1/mixed/conv_1", (384, 384, 3, 1)),
        "branch_pool": Layer("tower_2/conv", (192, c, 1, 1)),
    }


STEM = {
    "Conv2d_1a_3x3": Layer("conv", (32, 3, 3, 3)),
    "Conv2d_2a_3x3": Layer("conv_1", (32, 32, 3, 3)),
    "Conv2d_2b_3x3": Layer("conv_2", (64, 32, 3, 3)),
    "Conv2d_3b_1x1": Layer("conv_3", (80, 64, 1, 1)),
    "Conv2d_4a_3x3": Layer("conv_4", (192, 80, 3, 3)),
}
BLOCKS = {
    "Mixed_5b": ("mixed", _a(192, 32)),
    "Mixed_5c": ("mixed_1", _a(256, 64)),
    "Mixed_5d": ("mixed_2", _a(288, 64)),
    "Mixed_6a": ("mixed_3", _b()),
    "Mixed_6b": ("mixed_4", _c(128)),
    "Mixed_6c": ("mixed_5", _c(160)),
    "Mixed_6d": ("mixed_6", _c(160)),
    "Mixed_6e": ("mixed_7", _c(192)),
    "Mixed_7a": ("mixed_8", _d()),
    "Mixed_7b": ("mixed_9", _e(1280)),
    "Mixed_7c": ("mixed_10", _e(2048)),
}
CONVOLUTIONS = STEM | {
    f"{block}.{branch}": Layer(f"{scope}/{layer.scope}", layer.shape)
    for block, (scope, branches) in BLOCKS.items()
    for branch, layer in branches.items()
}
# The words for a batch norm's arrays: PyTorch, TensorFlow.
NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
LOGITS = {"fc.weight": ("softmax/weights", (1008, 2048)), "fc.bias": ("softmax/biases", (1008,))}

# PyTorch name -> shape, of every array of the network.
SHAPES = {}
for _name, _layer in CONVOLUTIONS.items():
    SHAPES[f"{_name}.conv.weight"] = _layer.shape
    SHAPES |= {f"{_name}.bn.{word}": _layer.shape[:1] for word in NORM}
SHAPES |= {name: shape for name, (_, shape) in LOGITS.items()}


def from_tensorflow(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{name of a constant of the graph: array} -> {PyTorch name: array}, as far as they are there.

    Kernels [height, width, in, out] become [out, in, height, width]. A scale (gamma) that is not
    there is 1: the graph's batch norms do not scale. Constants of other purposes are left out.
    """
    renamed = {}
    for name, (scope, shape) in CONVOLUTIONS.items():
        renamed[f"{name}.conv.weight"] = arrays.get(f"{scope}/conv2d_params")
        for word, theirs in NORM.items():
            renamed[f"{name}.bn.{word}"] = arrays.get(f"{scope}/batchnorm/{theirs}")
        if renamed[f"{name}.bn.weight"] is None:
            renamed[f"{name}.bn.weight"] = np.ones(shape[:1], np.float32)
    renamed |= {name: arrays.get(theirs) for name, (theirs, _) in LOGITS.items()}
    return {
        name: array.transpose(_AXES[array.ndim]) if name.endswith(_PRODUCTS) else array
        for name, array in renamed.items()
        if array is not None
    }


_PRODUCTS = ("conv.weight", "fc.weight")
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
