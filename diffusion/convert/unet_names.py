"""Names the U-Net's parameters as the official code, this repository and diffusers do.

LAYERS and NETWORK_PARTS are the one table for every direction; a network's names are its rows,
repeated for every level and block. The arrays themselves say how many there are, which levels have
attention and which blocks change the number of channels.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

PREFIX = "model/"  # the variable scope that the official scripts put the network in

# Per kind of layer {official: Flax} parameter names. diffusers calls all but a bias `weight`.
NORM = {"gamma": "scale", "beta": "bias"}
LINEAR = {"W": "kernel", "b": "bias"}
EMBEDDING = {"": "embedding"}  # no official network has one
# Per kind of part its layers: (official and Flax, diffusers, parameter names).
LAYERS = {
    "ends": (
        ("conv_in", "conv_in", LINEAR),
        ("norm_out", "conv_norm_out", NORM),
        ("conv_out", "conv_out", LINEAR),
    ),
    "temb": (("dense0", "linear_1", LINEAR), ("dense1", "linear_2", LINEAR)),
    "classes": (("class_emb", "class_embedding", EMBEDDING),),
    "block": (
        ("norm1", "norm1", NORM),
        ("conv1", "conv1", LINEAR),
        ("temb_proj", "time_emb_proj", LINEAR),
        ("norm2", "norm2", NORM),
        ("conv2", "conv2", LINEAR),
        ("nin_shortcut", "conv_shortcut", LINEAR),  # where the number of channels changes
    ),
    "attn": (
        ("norm", "group_norm", NORM),
        ("q", "to_q", LINEAR),
        ("k", "to_k", LINEAR),
        ("v", "to_v", LINEAR),
        ("proj_out", "to_out.0", LINEAR),
    ),
    "resample": (("conv", "conv", LINEAR),),
}
# (official after PREFIX and Flax, diffusers, kind of part). i counts the levels from the finest, k
# from the coarsest, as diffusers does in its up blocks; j counts the blocks of a level.
NETWORK_PARTS = (
    ("", "", "ends"),
    ("temb/", "time_embedding.", "temb"),
    ("", "", "classes"),
    ("down_{i}/block_{j}/", "down_blocks.{i}.resnets.{j}.", "block"),
    ("down_{i}/attn_{j}/", "down_blocks.{i}.attentions.{j}.", "attn"),
    ("down_{i}/downsample/", "down_blocks.{i}.downsamplers.0.", "resample"),
    ("mid/block_1/", "mid_block.resnets.0.", "block"),
    ("mid/attn_1/", "mid_block.attentions.0.", "attn"),
    ("mid/block_2/", "mid_block.resnets.1.", "block"),
    ("up_{i}/block_{j}/", "up_blocks.{k}.resnets.{j}.", "block"),
    ("up_{i}/attn_{j}/", "up_blocks.{k}.attentions.{j}.", "attn"),
    ("up_{i}/upsample/", "up_blocks.{k}.upsamplers.0.", "resample"),
)
MAX_COUNT = 100  # of levels, and of blocks in a level: a file's names may claim any number


class Name(NamedTuple):
    """The names of one array, by naming scheme; official is "" where it has none."""

    official: str
    flax: str
    diffusers: str


class Structure(NamedTuple):
    """The parts of a network; attention: whether level i, from the finest, has it."""

    levels: int
    blocks: int
    attention: tuple[bool, ...]
    classes: bool


def parameter_names(arrays: Mapping[str, Any], scheme: str) -> list[Name]:
    """Returns the names of all parameters of the network that has these arrays.

    scheme: the field of `Name` that the arrays are named by.
    """
    found = []
    for part in _parts(network_structure(arrays, scheme)):
        names = list(_part_names(*part))
        conv1 = next((getattr(n, scheme) for n in names if "/conv1/kernel" in n.flax), "")
        shape = np.shape(arrays.get(conv1, 0))
        channels = shape[:2] if scheme == "diffusers" else shape[-2:]
        if len(set(channels)) < 2:  # in == out, or there is no such layer
            names = [name for name in names if "/nin_shortcut/" not in name.flax]
        found += names
    return found


def network_structure(arrays: Mapping[str, Any], scheme: str) -> Structure:
    """Infers the parts of a network from the names of its arrays."""

    def has(flax, diffusers, **indices):
        prefix = {"official": PREFIX + flax, "flax": flax, "diffusers": diffusers}[scheme]
        return any(name.startswith(prefix.format(**indices)) for name in arrays)

    def count(flax, diffusers):
        found = (i for i in range(MAX_COUNT) if not has(flax, diffusers, i=i))
        return next(found, MAX_COUNT)

    def attention(i):
        down = has("down_{i}/attn_", "down_blocks.{i}.attentions.", i=i)
        return down or has("up_{i}/attn_", "up_blocks.{k}.attentions.", i=i, k=levels - 1 - i)

    levels = count("down_{i}/", "down_blocks.{i}.")
    return Structure(
        levels=levels,
        blocks=count("down_0/block_{i}/", "down_blocks.0.resnets.{i}."),
        attention=tuple(map(attention, range(levels))),
        classes=has("class_emb/", "class_embedding."),
    )


def _parts(s: Structure) -> Iterator[tuple[str, str, str]]:
    """Yields the rows of NETWORK_PARTS, once for each level and block that has them."""
    for flax, diffusers, kind in NETWORK_PARTS:
        up = flax.startswith("up_")
        # The last level in each direction is followed by no other.
        resampled = range(1, s.levels) if up else range(s.levels - 1)
        attended = [i for i in range(s.levels) if s.attention[i]]
        levels = {"attn": attended, "resample": resampled}.get(kind, range(s.levels))
        blocks = range(s.blocks + up) if "{j}" in flax else [0]
        if "{i}" not in flax:
            levels = [0] if kind != "classes" or s.classes else []
        for i, j in itertools.product(levels, blocks):
            indices = {"i": i, "j": j, "k": s.levels - 1 - i}
            yield flax.format(**indices), diffusers.format(**indices), kind


def _part_names(flax: str, diffusers: str, kind: str) -> Iterator[Name]:
    """Yields the names of a part's parameters."""
    for layer, other_layer, words in LAYERS[kind]:
        for official, word in words.items():
            yield Name(
                f"{PREFIX}{flax}{layer}/{official}" if official else "",
                f"{flax}{layer}/{word}",
                f"{diffusers}{other_layer}.{'bias' if word == 'bias' else 'weight'}",
            )
