"""The FID Inception network's names, against torch-fidelity's own list of arrays."""

import json

import numpy as np
import pytest

from diffusion import convert
from diffusion.convert import inception_names
from tests.conftest import GOLDEN

# Origin: the state dict of torch-fidelity 0.4.0's FeatureExtractorInceptionV3.
INCEPTION = np.load(GOLDEN / "inception.npz")


def inception():
    """Every array of the Inception network: of its shape, and each with another value."""
    shapes = json.loads(str(INCEPTION["shapes_json"]))
    return {
        str(name): np.broadcast_to(np.float32(i), shape)
        for i, (name, shape) in enumerate(zip(INCEPTION["names"], shapes, strict=True))
    }


def test_arrays_go_where_their_names_say():
    arrays = inception()
    params = convert.from_inception(arrays)
    for name, ours in {
        "Conv2d_1a_3x3.conv.weight": params["Conv2d_1a_3x3"]["kernel"],
        "Conv2d_4a_3x3.bn.running_var": params["Conv2d_4a_3x3"]["var"],
        "Mixed_5b.branch5x5_2.bn.weight": params["Mixed_5b"]["branch5x5_2"]["scale"],
        "Mixed_7c.branch3x3dbl_3a.bn.bias": params["Mixed_7c"]["branch3x3dbl_3a"]["bias"],
        "Mixed_7c.branch_pool.bn.running_mean": params["Mixed_7c"]["branch_pool"]["mean"],
        "fc.bias": params["fc"]["bias"],
    }.items():
        np.testing.assert_array_equal(ours.flat[0], arrays[name].flat[0], err_msg=name)
    leaves = [leaf for layer in _layers(params) for leaf in layer.values()]
    assert len({leaf.flat[0] for leaf in leaves}) == len(leaves) == len(arrays)


def _layers(tree):
    if "kernel" in tree:
        yield tree
    else:
        for part in tree.values():
            yield from _layers(part)


def test_kernels_are_transposed():
    """[out, in, h, w] -> [h, w, in, out], [out, in] -> [in, out]."""
    arrays = inception()
    wide = np.random.RandomState(0).randn(192, 192, 1, 7).astype(np.float32)
    logits = np.random.RandomState(1).randn(1008, 2048).astype(np.float32)
    arrays |= {"Mixed_6e.branch7x7_2.conv.weight": wide, "fc.weight": logits}
    params = convert.from_inception(arrays)
    kernel = params["Mixed_6e"]["branch7x7_2"]["kernel"]
    assert kernel.shape == (1, 7, 192, 192) and kernel[0, 5, 3, 100] == wide[100, 3, 0, 5]
    assert params["fc"]["kernel"][2000, 7] == logits[7, 2000]


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda a: a.pop("fc.bias"), r"1 missing \(fc.bias\)"),
        (lambda a: a.update(extra=np.zeros((3, 7))), r"1 left over \(extra \(3, 7\)\)"),
        (
            lambda a: a.update({"fc.bias": np.zeros(1000)}),
            r"1 of another shape \(fc.bias \(1000,\) instead of \(1008,\)\)",
        ),
        (
            # torchvision's network, of other names and 1000 classes
            lambda a: [a.update({f"AuxLogits.{name}": a.pop(name)}) for name in list(a)],
            r"472 missing \(Conv2d_1a_3x3.conv.weight, .*, \.\.\.\), 472 left over",
        ),
    ],
)
def test_other_networks_are_refused(change, found):
    arrays = inception()
    change(arrays)
    with pytest.raises(ValueError, match=found) as error:
        convert.from_inception(arrays)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_counts_of_training_batches_are_ignored():
    arrays = inception() | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(3)}
    assert convert.from_inception(arrays)["Conv2d_1a_3x3"].keys() == {
        *("kernel", "scale", "bias", "mean", "var")
    }


def test_the_table_names_the_network_of_pytorch():
    """Origin: the state dict of torch-fidelity 0.4.0."""
    truth = np.load(GOLDEN / "inception.npz")
    shapes = map(tuple, json.loads(str(truth["shapes_json"])))
    assert inception_names.SHAPES == dict(zip(map(str, truth["names"]), shapes, strict=True))
    assert len({scope for scope, _ in inception_names.CONVOLUTIONS.values()}) == 94
