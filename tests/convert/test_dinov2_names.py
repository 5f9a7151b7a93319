"""DINOv2's names, against the state dicts of transformers and of timm."""

import json

import jax
import numpy as np
import pytest

from diffusion import convert
from tests.conftest import GOLDEN

# Origin: transformers 5.24.0, Dinov2Model in memory and as save_pretrained names its arrays;
# timm 1.0.31, vit_base_patch14_dinov2 and vit_large_patch14_dinov2, which has the original names.
# With weights given by these names its features of 518x518 pixels were ours, to 1e-6.
TRUTH = np.load(GOLDEN / "dinov2.npz")
KINDS = ("dinov2_b14", "dinov2_l14")


def arrays_of(kind, naming):
    """Every array of a file of this naming: of its shape, and each with another value."""
    shapes = json.loads(str(TRUTH[f"{kind}.shapes_json"]))[naming]
    return {
        name: np.broadcast_to(np.float32(i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_go_where_their_names_say(kind):
    for naming in ("file", "memory", "original") if kind == "dinov2_b14" else ("original",):
        arrays = arrays_of(kind, naming)
        blocks, last = convert.from_dinov2(arrays)["blocks"], {"dinov2_b14": 11}.get(kind, 23)
        assert len(blocks["qkv"]["kernel"]) == last + 1
        value = {
            "file": f"encoder.layer.{last}.attention.attention.value.bias",
            "memory": f"encoder.layer.{last}.attention.v_proj.bias",
            "original": f"blocks.{last}.attn.qkv.bias",
        }[naming]
        assert blocks["qkv"]["bias"][last, -1] == arrays[value].flat[0]
        block = f"blocks.{last}" if naming == "original" else f"encoder.layer.{last}"
        for name, ours in {
            f"{block}.norm1.weight": blocks["norm1"]["scale"],
            f"{block}.norm2.bias": blocks["norm2"]["bias"],
            f"{block}.mlp.fc1.weight": blocks["fc1"]["kernel"],
            f"{block}.mlp.fc2.bias": blocks["fc2"]["bias"],
        }.items():
            assert ours[last].flat[0] == arrays[name].flat[0], name


def test_all_namings_give_the_same_parameters():
    """The original's one array of queries, keys and values is theirs one below the other."""
    file = arrays_of(KINDS[0], "file")
    new = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output.dense": "o_proj"}
    memory, original = {}, {}
    old = {
        "embeddings.cls_token": "cls_token",
        "embeddings.mask_token": "mask_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "encoder.layer": "blocks",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    for name, array in file.items():
        *rest, word = name.split(".")
        stem = ".".join(rest)
        for theirs, now in new.items():
            stem = stem.replace(f".attention.attention.{theirs}", f".attention.{now}")
            stem = stem.replace(f".attention.{theirs}", f".attention.{now}")
        memory[f"{stem}.{word}"] = array
        if ".attention.attention." in name:
            block, part = rest[2], rest[-1]
            original.setdefault(f"blocks.{block}.attn.qkv.{word}", {})[part] = array
        else:
            for theirs, now in old.items():
                name = name.replace(theirs, now)
            original[name] = array
    original = {
        name: np.concatenate([a["query"], a["key"], a["value"]]) if isinstance(a, dict) else a
        for name, a in original.items()
    }
    expected = convert.from_dinov2(file)
    for naming, arrays in (("memory", memory), ("original", original)):
        known = arrays_of(KINDS[0], naming).keys()
        assert arrays.keys() - {"mask_token"} == known - {"mask_token"}
        jax.tree.map(np.testing.assert_array_equal, convert.from_dinov2(arrays), expected)


def test_kernels_are_transposed_and_stacked():
    """[out, in, h, w] -> [h, w, in, out], [out, in] -> [block, in, out]; floats become float32."""
    arrays = arrays_of("dinov2_b14", "original")
    rng = np.random.RandomState(0)
    patch = arrays["patch_embed.proj.weight"] = rng.randn(768, 3, 14, 14)
    fc1 = arrays["blocks.7.mlp.fc1.weight"] = rng.randn(3072, 768).astype(np.float16)
    position = arrays["pos_embed"] = rng.randn(1, 1370, 768)
    params = convert.from_dinov2(arrays)
    kernel = params["patch"]["kernel"]
    assert kernel.shape == (14, 14, 3, 768) and kernel.dtype == np.float32
    assert kernel[2, 5, 1, 700] == np.float32(patch[700, 1, 2, 5])
    kernel = params["blocks"]["fc1"]["kernel"]
    assert kernel.shape == (12, 768, 3072) and kernel.dtype == np.float32
    assert kernel[7, 3, 2000] == fc1[2000, 3]
    np.testing.assert_array_equal(params["position"], position[0].astype(np.float32))
    assert params["cls_token"].shape == (768,)


@pytest.mark.parametrize(
    "naming, change, found",
    [
        (
            "file",
            lambda a: a.pop("encoder.layer.3.attention.attention.key.bias"),
            r"ViT-B/14, found 1 missing \(encoder.layer.3.attention.attention.key.bias\); give",
        ),
        ("original", lambda a: a.pop("norm.bias"), r"found 1 missing \(norm.bias\)"),
        (
            "original",
            lambda a: a.update({"blocks.12.norm1.bias": np.zeros(768)}),
            r"1 left over \(blocks.12.norm1.bias \(768,\)\)",
        ),
        (
            "file",
            lambda a: a.update({"embeddings.position_embeddings": np.zeros((1, 257, 768))}),
            r"1 of another shape \(embeddings.position_embeddings \(1, 257, 768\) instead",
        ),
        (
            "original",
            lambda a: a.update(register_tokens=np.zeros((1, 4, 768))),
            "without registers, found register_tokens; give",
        ),
        (
            "file",
            lambda a: a.update({"embeddings.register_tokens": np.zeros((1, 4, 768))}),
            "without registers, found embeddings.register_tokens; give",
        ),
        (
            "original",
            lambda a: a.update(cls_token=np.zeros((1, 1, 384))),
            "a class token of width 768 or 1024, found one of 384; give",
        ),
        ("original", lambda a: a.pop("cls_token"), "width 768 or 1024, found none; give model"),
        ("file", lambda a: a.clear(), "width 768 or 1024, found none; give model"),
        ("file", lambda a: a.update({"embeddings.cls_token": np.float32(1)}), "found none"),
    ],
)
def test_other_networks_are_refused(naming, change, found):
    arrays = arrays_of("dinov2_b14", naming)
    change(arrays)
    with pytest.raises(ValueError, match=found) as error:
        convert.from_dinov2(arrays)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
