"""The U-Net in diffusers' names: against diffusers' own lists of parameters and its outputs."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import convert
from diffusion.unet import UNet
from tests.conftest import GOLDEN
from tests.test_unet import NETWORKS, ROUNDING

# Origin: diffusers 0.42.1 on torch 2.13.0, UNet2DModel of these configurations, on a CPU in
# float32; cifar10's is the one of google/ddpm-cifar10-32. `out` is the output at (x, t).
DIFFUSERS = np.load(GOLDEN / "diffusers_unet.npz")
CONFIGS = ("tiny", "cifar10", "c256")
# Of the same versions: a UNet2DModel of sample_size 8, block_out_channels (32, 64),
# layers_per_block 1 and attention in the second level, with diffusers' defaults else, and the
# weights of `recipe`; its output `out` at (x, t), and for two DDPMSchedulers the end of ten steps
# of the DDIMScheduler with their fields and betas, step(..., use_clipped_model_output=True), from
# x. default.parameters: of UNet2DModel().
DIFFUSERS_DEFAULTS = np.load(GOLDEN / "diffusers_defaults.npz")


def recipe(name, shape):
    """The weights that diffusers' network was run with."""
    z = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).randn(*shape)
    if name.endswith(".bias"):
        w = 0.1 * z
    elif len(shape) == 1:
        w = 1 + 0.1 * z
    else:
        w = z / np.sqrt(np.prod(shape[1:]))
    return w.astype(np.float32)


def listed(config, fill, file=DIFFUSERS):
    """{name: fill(name, shape)} of every parameter of diffusers' network."""
    names = map(str, file[f"{config}.names"])
    of_shape = json.loads(str(file[f"{config}.shapes_json"]))
    return {name: fill(name, shape) for name, shape in zip(names, of_shape, strict=True)}


def marked(config):
    """Each array with another value in every row, so that a lost transposition shows."""

    def fill(name, shape):
        start = zlib.crc32(name.encode()) % 2**16
        rows = np.arange(start, start + shape[0], dtype=np.float32)
        return np.broadcast_to(rows.reshape(-1, *(1,) * (len(shape) - 1)), shape)

    return listed(config, fill)


def unet_json(config, file=DIFFUSERS):
    return json.loads(str(file[f"{config}.config_json"]))


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip(config):
    arrays = marked(config)
    back = convert.to_diffusers(convert.from_diffusers(arrays))
    assert back.keys() == arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(back[name], arrays[name], err_msg=name, strict=True)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_tree_is_the_network(config):
    """Every parameter is filled, and of the shape that the network itself gives it."""
    options, size, _ = NETWORKS[config]
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    net, key = UNet(**options), jax.random.key(0)
    expected = jax.eval_shape(lambda x, t: net.init(key, x, t, train=False), x, t)["params"]
    found = convert.from_diffusers(marked(config))
    assert jax.tree.map(lambda a: a.shape, found) == jax.tree.map(lambda a: a.shape, expected)


def test_each_array_goes_where_its_name_says():
    arrays = listed("cifar10", recipe)
    params = convert.from_diffusers(arrays)
    for name, ours in {
        "time_embedding.linear_2.weight": params["temb"]["dense1"]["kernel"].T,
        "down_blocks.2.resnets.1.norm2.weight": params["down_2"]["block_1"]["norm2"]["scale"],
        "down_blocks.1.attentions.1.to_k.weight": params["down_1"]["attn_1"]["k"]["kernel"].T,
        "mid_block.attentions.0.to_out.0.bias": params["mid"]["attn_1"]["proj_out"]["bias"],
        "mid_block.resnets.1.conv1.bias": params["mid"]["block_2"]["conv1"]["bias"],
        # On the way up the coarsest level is the first; all but the finest lead to another.
        "up_blocks.3.resnets.2.conv_shortcut.bias": params["up_0"]["block_2"]["nin_shortcut"][
            "bias"
        ],
        "up_blocks.0.upsamplers.0.conv.bias": params["up_3"]["upsample"]["conv"]["bias"],
        "up_blocks.2.attentions.2.group_norm.bias": params["up_1"]["attn_2"]["norm"]["bias"],
        "conv_norm_out.bias": params["norm_out"]["bias"],
    }.items():
        np.testing.assert_array_equal(ours, arrays[name], err_msg=name)
    kernel, theirs = params["conv_in"]["kernel"], arrays["conv_in.weight"]
    assert kernel[0, 2, 1, 7] == theirs[7, 1, 0, 2]  # [h, w, in, out] of [out, in, h, w]


def output(config, params):
    x, t = (DIFFUSERS[f"{config}.{key}"] for key in ("x", "t"))
    apply = jax.jit(UNet(**NETWORKS[config][0]).apply, static_argnames="train")
    found = apply({"params": params}, x.transpose(0, 2, 3, 1), t.astype(np.int32), train=False)
    return np.asarray(found).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("config", ["tiny", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_the_output_is_that_of_diffusers(config):
    params = convert.from_diffusers(listed(config, recipe))
    np.testing.assert_allclose(output(config, params), DIFFUSERS[f"{config}.out"], **ROUNDING)


def older(arrays):
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, array in arrays.items():
        for new, old in words.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = array
    return renamed


def as_convolutions(arrays):
    """The attention's products as 1x1 convolutions, as in files of other authors."""
    return {
        name: array[:, :, None, None] if ".attentions." in name and array.ndim == 2 else array
        for name, array in arrays.items()
    }


@pytest.mark.parametrize(
    "change",
    [
        older,
        as_convolutions,
        lambda arrays: {f"model.{name}": array for name, array in arrays.items()},
        lambda arrays: {f"unet.{name}": array for name, array in arrays.items()},
    ],
    ids=["older names", "1x1 convolutions", "model.", "unet."],
)
def test_other_ways_to_write_the_same(change):
    arrays = listed("tiny", recipe)
    changed = change(arrays)
    assert changed.keys() != arrays.keys() or change is as_convolutions
    found, expected = convert.from_diffusers(changed), convert.from_diffusers(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_every_missing_array_is_named():
    for name in marked("tiny"):
        arrays = marked("tiny")
        del arrays[name]
        with pytest.raises(ValueError, match=f"1 missing \\({name}\\)") as error:
            convert.from_diffusers(arrays)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "conv_in.scale",
        "down_blocks.0.resnets.0.conv_shortcut.weight",  # the block keeps its channels
        "down_blocks.1.downsamplers.0.conv.weight",  # of the last level
        "up_blocks.1.upsamplers.0.conv.weight",
        "mid_block.attentions.0.to_out.1.weight",
        "model.conv_in.weight",  # one prefix alone is none
        "encoder.weight",
    ],
)
def test_left_over_arrays_are_listed_with_their_shape(name):
    arrays = marked("tiny") | {name: np.zeros((3, 7), np.float32)}
    with pytest.raises(ValueError, match=f"0 missing.*1 left over.*{name} \\(3, 7\\)") as error:
        convert.from_diffusers(arrays)
    assert "\n" not in str(error.value)


def test_an_array_under_two_names_and_one_of_other_axes():
    arrays = marked("tiny")
    twice = arrays | older(arrays)
    with pytest.raises(ValueError, match=r"attentions\.0\.to_q\.weight is there twice"):
        convert.from_diffusers(twice)
    arrays["conv_in.weight"] = np.zeros((32, 3, 3), np.float32)
    with pytest.raises(
        ValueError, match=r"conv_in.weight: expected 2 or 4 axes, found \(32, 3, 3\)"
    ):
        convert.from_diffusers(arrays)


def test_only_the_first_of_the_left_over_are_listed():
    with pytest.raises(ValueError, match="1000 left over") as error:
        convert.from_diffusers({f"x{i}": np.zeros(1) for i in range(1000)})
    assert len(str(error.value)) < 2000


def test_class_embeddings_have_a_diffusers_name():
    params = convert.from_diffusers(marked("tiny"))
    params["class_emb"] = {"embedding": np.arange(11 * 128, dtype=np.float32).reshape(11, 128)}
    arrays = convert.to_diffusers(params)
    np.testing.assert_array_equal(  # as torch.nn.Embedding: [classes, features]
        arrays["class_embedding.weight"], params["class_emb"]["embedding"]
    )
    assert "class_emb" in convert.from_diffusers(arrays)
