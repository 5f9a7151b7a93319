"""Names the arrays of the FID Inception network as PyTorch, TensorFlow and this repository do.

PyTorch's names are torch-fidelity's (and pytorch-fid's), TensorFlow's the scopes of
`classify_image_graph_def.pb` of 2015-12-05. Shapes are [out, in, h, w], as in PyTorch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.convert.validation import check_arrays


# Blocks as towers: (TensorFlow scope, PyTorch name, *convolutions as (channels, height, width)).
def _block_a(pool: int) -> tuple:
    return (
        ("", "branch1x1", (64, 1, 1)),
        ("tower/", "branch5x5", (48, 1, 1), (64, 5, 5)),
        ("tower_1/", "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ("tower_2/", "branch_pool", (pool, 1, 1)),
    )


def _block_c(c: int) -> tuple:
    return (
        ("", "branch1x1", (192, 1, 1)),
        ("tower/", "branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1)),
        ("tower_1/", "branch7x7dbl", (c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)),
        ("tower_2/", "branch_pool", (192, 1, 1)),
    )


BLOCK_B = (
    ("", "branch3x3", (384, 3, 3)),
    ("tower/", "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
)
BLOCK_D = (
    ("tower/", "branch3x3", (192, 1, 1), (320, 3, 3)),
    ("tower_1/", "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3)),
)
BLOCK_E = (  # the two convolutions of a "mixed" scope have the same input
    ("", "branch1x1", (320, 1, 1)),
    ("tower/", "branch3x3_1", (384, 1, 1)),
    ("tower/mixed/", "branch3x3_2", (384, 1, 3), (384, 3, 1)),
    ("tower_1/", "branch3x3dbl", (448, 1, 1), (384, 3, 3)),
    ("tower_1/mixed/", "branch3x3dbl_3", (384, 1, 3), (384, 3, 1)),
    ("tower_2/", "branch_pool", (192, 1, 1)),
)
# (PyTorch name, TensorFlow scope, input channels, towers)
BLOCKS = (
    ("Mixed_5b", "mixed", 192, _block_a(32)),
    ("Mixed_5c", "mixed_1", 256, _block_a(64)),
    ("Mixed_5d", "mixed_2", 288, _block_a(64)),
    ("Mixed_6a", "mixed_3", 288, BLOCK_B),
    ("Mixed_6b", "mixed_4", 768, _block_c(128)),
    ("Mixed_6c", "mixed_5", 768, _block_c(160)),
    ("Mixed_6d", "mixed_6", 768, _block_c(160)),
    ("Mixed_6e", "mixed_7", 768, _block_c(192)),
    ("Mixed_7a", "mixed_8", 768, BLOCK_D),
    ("Mixed_7b", "mixed_9", 1280, BLOCK_E),
    ("Mixed_7c", "mixed_10", 2048, BLOCK_E),
)
# {PyTorch name: (TensorFlow scope, shape of the kernel)}; each has a batch norm.
CONVOLUTIONS = {
    "Conv2d_1a_3x3": ("conv", (32, 3, 3, 3)),
    "Conv2d_2a_3x3": ("conv_1", (32, 32, 3, 3)),
    "Conv2d_2b_3x3": ("conv_2", (64, 32, 3, 3)),
    "Conv2d_3b_1x1": ("conv_3", (80, 64, 1, 1)),
    "Conv2d_4a_3x3": ("conv_4", (192, 80, 3, 3)),
}
for _block, _scope, _in, _towers in BLOCKS:
    for _tower, _name, *_kernels in _towers:
        _channels, _mixed = _in, "mixed" in _tower
        for _i, (_out, _height, _width) in enumerate(_kernels):
            _suffix = "ab"[_i] if _mixed else f"_{_i + 1}" if len(_kernels) > 1 else ""
            CONVOLUTIONS[f"{_block}.{_name}{_suffix}"] = (
                f"{_scope}/{_tower}conv" + (f"_{_i}" if _i else ""),
                (_out, _out if _mixed else _channels, _height, _width),
            )
            _channels = _out
LOGITS = {"fc.weight": ("softmax/weights", (1008, 2048)), "fc.bias": ("softmax/biases", (1008,))}
# {PyTorch's word for an array of a batch norm: (TensorFlow's, this repository's)}
NORM = {
    "weight": ("gamma", "scale"),
    "bias": ("beta", "bias"),
    "running_mean": ("moving_mean", "mean"),
    "running_var": ("moving_variance", "var"),
}
UNUSED = ".num_batches_tracked"  # a counter of PyTorch's batch norms

# {PyTorch name: shape} of every array of the network.
SHAPES: dict[str, tuple[int, ...]] = {}
for _name, (_, _shape) in CONVOLUTIONS.items():
    SHAPES[f"{_name}.conv.weight"] = _shape
    SHAPES |= {f"{_name}.bn.{word}": _shape[:1] for word in NORM}
SHAPES |= {name: shape for name, (_, shape) in LOGITS.items()}


def from_inception(arrays: Mapping[str, Any]) -> dict:
    """Converts {torch-fidelity's name: array} to nested dicts of arrays, for `inception.fold`.

    `Mixed_5b.branch1x1.conv.weight` becomes ["Mixed_5b"]["branch1x1"]["kernel"]; beside it are the
    batch norm's "scale", "bias", "mean" and "var". Kernels [out, in, h, w] become [h, w, in, out],
    that of the logits [in, out].
    Raises ValueError naming what is missing, left over, or of another shape.
    """
    arrays = {name: array for name, array in arrays.items() if not name.endswith(UNUSED)}
    advice = "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
    check_arrays(arrays, SHAPES, "the FID Inception network", advice)
    params: dict = {}
    for name in SHAPES:
        *path, layer, word = name.split(".")
        node = params
        for part in path or [layer]:
            node = node.setdefault(part, {})
        word = NORM[word][1] if layer == "bn" else {"weight": "kernel"}.get(word, word)
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[np.ndim(arrays[name])]
        node[word] = np.asarray(arrays[name]).transpose(axes)
    return params


def from_tensorflow(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts {constant of the frozen graph: array} to {PyTorch name: array}, where present.

    Kernels [h, w, in, out] become [out, in, h, w]. A missing scale (gamma) is 1: the graph's batch
    norms do not scale. Constants of other purposes are left out.
    """
    sources = {name: scope for name, (scope, _) in LOGITS.items()}
    defaults = {}
    for name, (scope, shape) in CONVOLUTIONS.items():
        sources[f"{name}.conv.weight"] = f"{scope}/conv2d_params"
        sources |= {
            f"{name}.bn.{w}": f"{scope}/batchnorm/{theirs}" for w, (theirs, _) in NORM.items()
        }
        defaults[f"{scope}/batchnorm/gamma"] = np.ones(shape[:1], np.float32)
    arrays = defaults | dict(arrays)
    found = {name: arrays[source] for name, source in sources.items() if source in arrays}
    return {n: a.transpose(3, 2, 0, 1) if a.ndim == 4 else a.T for n, a in found.items()}
