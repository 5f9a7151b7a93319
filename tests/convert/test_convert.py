"""The names of weights: against the official lists of variables, and there and back again."""

import json
import pathlib

import numpy as np
import pytest

from diffusion import convert
from diffusion.convert import unet_names

# Origin: variable names and shapes of the official TensorFlow 1 code,
# github.com/hojonathanho/diffusion, commit 1e0dceb.
OFFICIAL = np.load(pathlib.Path(__file__).parent / "golden" / "unet.npz")
NETWORKS = ("tiny", "cifar10", "cifar10_outch6", "c256")


def official(config):
    """Every variable of an official network: of its shape, and each with another value."""
    names = OFFICIAL[f"{config}.var_names"]
    of_shape = json.loads(str(OFFICIAL[f"{config}.var_shapes_json"]))
    return {
        str(name): np.broadcast_to(np.float32(i), shape)
        for i, (name, shape) in enumerate(zip(names, of_shape, strict=True))
    }


@pytest.mark.parametrize("config", NETWORKS)
def test_there_and_back_again(config):
    arrays = official(config)
    back = convert.to_official(convert.from_official(arrays))
    assert back.keys() == arrays.keys()
    for name in arrays:
        assert back[name].dtype == np.float32 and back[name].shape == arrays[name].shape
        np.testing.assert_array_equal(back[name], arrays[name], err_msg=name)


def test_each_array_goes_where_its_name_says():
    arrays = official("cifar10")
    params = convert.from_official(arrays)
    for name, ours in {
        "model/conv_in/W": params["conv_in"]["kernel"],
        "model/temb/dense1/b": params["temb"]["dense1"]["bias"],
        "model/down_2/block_1/norm2/gamma": params["down_2"]["block_1"]["norm2"]["scale"],
        "model/mid/attn_1/proj_out/W": params["mid"]["attn_1"]["proj_out"]["kernel"],
        "model/up_0/block_2/nin_shortcut/b": params["up_0"]["block_2"]["nin_shortcut"]["bias"],
        "model/up_3/upsample/conv/W": params["up_3"]["upsample"]["conv"]["kernel"],
        "model/norm_out/beta": params["norm_out"]["bias"],
    }.items():
        np.testing.assert_array_equal(ours, arrays[name], err_msg=name)
    assert type(params) is type(params["up_0"]["block_2"]) is dict
    assert type(params["conv_in"]["kernel"]) is np.ndarray


def test_every_missing_variable_is_named():
    for name in official("tiny"):
        arrays = official("tiny")
        params = convert.from_official(arrays)
        del arrays[name]
        with pytest.raises(ValueError, match=f"1 missing \\({name}\\)") as error:
            convert.from_official(arrays)
        assert "\n" not in str(error.value)

        *path, word = name.removeprefix("model/").split("/")
        node = params
        for part in path:
            node = node[part]
        del node[(unet_names.NORM | unet_names.LINEAR)[word]]
        with pytest.raises(ValueError, match=f"1 missing \\({'/'.join(path)}/"):
            convert.to_official(params)


@pytest.mark.parametrize(
    "name",
    [
        "model/conv_in/gamma",
        "model/conv_in/kernel",
        "model/down_0/block_0/nin_shortcut/W",  # the block keeps its 32 channels
        "model/down_0/block_7/conv1/W",
        "model/up_0/upsample/conv/W",
        "model/conv_in/W/ExponentialMovingAverage",
        "conv_in/W",
        "global_step",
    ],
)
def test_what_is_left_over_is_listed_with_its_shape(name):
    arrays = official("tiny") | {name: np.zeros((3, 7), np.float32)}
    with pytest.raises(ValueError, match=f"0 missing.*1 left over.*{name} \\(3, 7\\)") as error:
        convert.from_official(arrays)
    assert "\n" not in str(error.value)


def test_all_that_is_left_over_is_listed():
    extra = {"lr": np.zeros(()), "model/extra/b": np.zeros(5)}
    with pytest.raises(ValueError, match=r"2 left over \(lr \(\), model/extra/b \(5,\)\)"):
        convert.from_official(official("tiny") | extra)


def test_without_its_prefix_nothing_is_recognised():
    arrays = {name.removeprefix("model/"): array for name, array in official("tiny").items()}
    with pytest.raises(ValueError, match="144 left over"):
        convert.from_official(arrays)


def test_nothing_is_no_network():
    for function in (convert.from_official, convert.to_official):
        with pytest.raises(ValueError, match="missing"):
            function({})


def test_classes_have_no_official_name():
    params = convert.from_official(official("tiny"))
    params["class_emb"] = {"embedding": np.zeros((11, 128), np.float32)}
    with pytest.raises(ValueError, match=r"left over \(class_emb/embedding \(11, 128\)\)"):
        convert.to_official(params)



# Origin: the state dict of torch-fidelity 0.4.0's FeatureExtractorInceptionV3.
INCEPTION = np.load(pathlib.Path(__file__).parent / "golden" / "inception.npz")


def inception():
    """Every array of the Inception network: of its shape, and each with another value."""
    shapes = json.loads(str(INCEPTION["shapes_json"]))
    return {
        str(name): np.broadcast_to(np.float32(i), shape)
        for i, (name, shape) in enumerate(zip(INCEPTION["names"], shapes, strict=True))
    }


def test_inception_s_arrays_go_where_their_names_say():
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


def test_inception_s_kernels_are_turned():
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
def test_what_is_another_network(change, found):
    arrays = inception()
    change(arrays)
    with pytest.raises(ValueError, match=found) as error:
        convert.from_inception(arrays)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_counts_of_training_batches_are_passed_over():
    arrays = inception() | {"Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(3)}
    assert convert.from_inception(arrays)["Conv2d_1a_3x3"].keys() == {
        *("kernel", "scale", "bias", "mean", "var")
    }
