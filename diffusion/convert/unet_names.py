"""The parameters of the U-Net: what the official code, this one and diffusers call each of them.

LAYERS and PARTS are the one table, for every direction; a network's names are its rows, once for
every level and block. The arrays themselves tell how many there are, which levels have attention
and which blocks change the number of channels; the rest follows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

PREFIX = "model/"  # the variable scope that the official scripts put the network in

# The words for a layer's parameters: official, Flax. diffusers calls all but a bias `weight`.
NORM = {"gamma": "scale", "beta": "bias"}
LINEAR = {"W": "kernel", "b": "bias"}
EMBEDDING = {"": "embedding"}  # no official network has one
# The layers of each kind of part: official and Flax, diffusers, the words for their parameters.
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
# The parts: official (after PREFIX) and Flax, diffusers, their kind. i counts the levels from the
# fine end, k from the coarse one, as diffusers does on the way up; j counts the blocks of a level.
PARTS = (
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


class Name(NamedTuple):
    """What one array is called: by the official code ('': it has none), here, by diffusers."""

    official: str
    flax: str
    diffusers: str


class Scheme(NamedTuple):
    """How to look into arrays of one naming.

    beginning: (here, diffusers), columns of PARTS -> how such names begin.
    name: Name -> this scheme's. channels: shape of a kernel -> its channels, in and out.
    """

    beginning: Callable[[str, str], str]
    name: Callable[[Name], str]
    channels: Callable[[tuple], tuple]


OFFICIAL = Scheme(lambda here, other: PREFIX + here, lambda n: n.official, lambda shape: shape[-2:])
FLAX = Scheme(lambda here, other: here, lambda n: n.flax, lambda shape: shape[-2:])
DIFFUSERS = Scheme(lambda here, other: other, lambda n: n.diffusers, lambda shape: shape[:2])


class Structure(NamedTuple):
    """What a network consists of. attention: one for each level, as the U-Net's levels count."""

    levels: int
    blocks: int
    attention: tuple[bool, ...]
    classes: bool


def names_of(arrays: Mapping[str, Any], scheme: Scheme) -> list[Name]:
    """The names of all parameters of the network that has these arrays, as far as they tell."""
    found = []
    for part in _parts(structure(arrays, scheme)):
        names = list(_of_part(*part))
        conv1 = next((scheme.name(name) for name in names if "/conv1/kernel" in name.flax), "")
        channels = scheme.channels(np.shape(arrays.get(conv1, 0)))
        if len(set(channels)) < 2:  # in == out, or there is no such layer
            names = [name for name in names if "/nin_shortcut/" not in name.flax]
        found += names
    return found


def structure(arrays: Mapping[str, Any], scheme: Scheme) -> Structure:
    """How many levels and blocks there are, which levels have attention, whether classes."""

    def has(here, diffusers, **at):
        beginning = scheme.beginning(here, diffusers).format(**at)
        return any(name.startswith(beginning) for name in arrays)

    def count(here, diffusers):
        return next(i for i in itertools.count() if not has(here, diffusers, i=i))

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
    """Yields the rows of PARTS, once for each level and block that has them."""
    for here, diffusers, kind in PARTS:
        up = here.startswith("up_")
        # The last level in each direction leads to no other.
        resampled = range(1, s.levels) if up else range(s.levels - 1)
        attended = [i for i in range(s.levels) if s.attention[i]]
        levels = {"attn": attended, "resample": resampled}.get(kind, range(s.levels))
        blocks = range(s.blocks + up) if "{j}" in here else [0]
        if "{i}" not in here:
            levels = [0] if kind != "classes" or s.classes else []
        for i, j in itertools.product(levels, blocks):
            at = {"i": i, "j": j, "k": s.levels - 1 - i}
            yield here.format(**at), diffusers.format(**at), kind


def _of_part(here: str, diffusers: str, kind: str) -> Iterator[Name]:
    """Yields the names of a part's parameters."""
    for layer, other, words in LAYERS[kind]:
        for official, flax in words.items():
            yield Name(
                f"{PREFIX}{here}{layer}/{official}" if official else "",
                f"{here}{layer}/{flax}",
                f"{diffusers}{other}.{'bias' if flax == 'bias' else 'weight'}",
            )
