"""The official names of the U-Net's parameters: against the official lists of variables."""

import json

import numpy as np
import pytest

from diffusion import convert
from diffusion.convert import unet_names
from tests.conftest import GOLDEN

# Origin: variable names and shapes of the official TensorFlow 1 code,
# github.com/hojonathanho/diffusion, commit 1e0dceb.
OFFICIAL = np.load(GOLDEN / "unet.npz")
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
def test_round_trip(config):
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


def test_an_empty_dict_is_refused():
    for function in (convert.from_official, convert.to_official):
        with pytest.raises(ValueError, match="missing"):
            function({})


def test_classes_have_no_official_name():
    params = convert.from_official(official("tiny"))
    params["class_emb"] = {"embedding": np.zeros((11, 128), np.float32)}
    with pytest.raises(ValueError, match=r"left over \(class_emb/embedding \(11, 128\)\)"):
        convert.to_official(params)
