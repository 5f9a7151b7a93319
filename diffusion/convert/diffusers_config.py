"""Settings of diffusers' files (Hugging Face, PyTorch) as flat config keys, and back.

A `UNet2DModel` can be many networks; this one is one of them, so most fields must have one value
each (FIXED). The scheduler's file holds the chain, the target and the variance. A file that is
silent on a field means diffusers' own default. Fields are those of diffusers 0.42, whose older
files have some of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

VERSION = "0.42.1"


class Field(NamedTuple):
    """ours: the only value that the network here can be; default: diffusers', of a silent file."""

    ours: Any
    default: Any


FIXED = {
    "act_fn": Field("silu", "silu"),
    "add_attention": Field(True, True),
    "attention_head_dim": Field(None, 8),  # None: one head
    "attn_norm_num_groups": Field(None, None),
    "center_input_sample": Field(False, False),
    "class_embed_type": Field(None, None),
    "downsample_padding": Field(0, 1),  # 0: at the bottom and right, as TensorFlow pads
    "downsample_type": Field("conv", "conv"),
    "flip_sin_to_cos": Field(False, True),
    "freq_shift": Field(1, 0),  # frequencies reach 1/10000: half - 1 in the denominator
    "mid_block_scale_factor": Field(1, 1),
    "mid_block_type": Field("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": Field(1e-6, 1e-5),
    "norm_num_groups": Field(32, 32),
    "num_train_timesteps": Field(None, None),
    "resnet_time_scale_shift": Field("default", "default"),
    "time_embedding_dim": Field(None, None),  # None: four times the first level's channels
    "time_embedding_type": Field("positional", "positional"),
    "upsample_type": Field("conv", "conv"),
}
SIZES = {  # fields of the network that may have other values, and diffusers' defaults
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *3 * ("AttnDownBlock2D",)),
    "dropout": 0.0,
    "in_channels": 3,
    "layers_per_block": 2,
    "num_class_embeds": None,
    "out_channels": 3,
    "sample_size": None,
    "up_block_types": (*3 * ("AttnUpBlock2D",), "UpBlock2D"),
}
DOWN, UP = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")

# Of the scheduler: what the chain needs to be the one here, whatever draws the samples.
CHAIN = {
    "rescale_betas_zero_snr": Field(False, False),
    "thresholding": Field(False, False),
    "clip_sample_range": Field(1.0, 1.0),
    "trained_betas": Field(None, None),
}
SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}
# Per config key: the scheduler's field, diffusers' default, the values' names (here -> there).
SCHEDULER = {
    "process.T": ("num_train_timesteps", 1000, None),
    "process.beta_start": ("beta_start", 1e-4, None),
    "process.beta_end": ("beta_end", 0.02, None),
    "process.schedule": ("beta_schedule", "linear", SCHEDULES),
    "target": ("prediction_type", "epsilon", TARGETS),
    "variance": ("variance_type", "fixed_small", VARIANCES),
    "sampler.clip": ("clip_sample", True, None),
}
ANCESTRAL = "DDPMScheduler"  # the one scheduler that has a variance
PIPELINE = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": VERSION,
    "scheduler": ["diffusers", ANCESTRAL],
    "unet": ["diffusers", "UNet2DModel"],
}


def config_of_diffusers(
    unet: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of a UNet2DModel, and scheduler_config.json -> {"model.ch": 128, ...}.

    Keys that the files say nothing of are left out: dropout where it is not stated, the variance
    where the scheduler has none, all of the chain without a scheduler. The last of num_class_embeds
    rows becomes "no class". Raises ValueError naming the field that the network here cannot have.
    """
    kind = unet.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"_class_name: expected UNet2DModel, found {kind}")
    for field in unet:
        if not field.startswith("_") and field not in FIXED | SIZES:
            raise ValueError(f"{field}: no field of a UNet2DModel of diffusers {VERSION}")
    _check_fixed(unet, FIXED)
    sizes = SIZES | {field: unet[field] for field in SIZES if field in unet}
    flat = _sizes(sizes) | ({"model.dropout": unet["dropout"]} if "dropout" in unet else {})
    return flat | (_chain(scheduler) if scheduler is not None else {})


def to_diffusers_config(flat: Mapping[str, Any]) -> dict[str, dict]:
    """Flat config keys -> {file of the folder: its content}, for DDPMPipeline.

    Raises ValueError naming the key whose value has no form in diffusers, such as target "mu".
    """
    network = {field: value.ours for field, value in FIXED.items()} | _to_sizes(flat)
    chain = {field: value.ours for field, value in CHAIN.items()}
    for key, (field, _, names) in SCHEDULER.items():
        if names is not None and flat[key] not in names:
            known = ", ".join(names)
            raise ValueError(f"{key}: diffusers has {known}; it has nothing like {flat[key]!r}")
        chain[field] = flat[key] if names is None else names[flat[key]]
    spacing = {"timestep_spacing": "leading", "steps_offset": 0}
    version = {"_diffusers_version": VERSION}
    return {
        "model_index.json": PIPELINE,
        "unet/config.json": {"_class_name": "UNet2DModel", **version, **network},
        "scheduler/scheduler_config.json": {
            "_class_name": ANCESTRAL,
            **version,
            **chain,
            **spacing,
        },
    }


def _check_fixed(found: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    for field, (ours, default) in fields.items():
        value = found.get(field, default)
        if value != ours:
            stated = "" if field in found else " (diffusers' default, the file is silent)"
            raise ValueError(f"{field}: the network here has {ours!r}, found {value!r}{stated}")


def _sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    channels = _counts("block_out_channels", sizes["block_out_channels"])
    ch, levels = channels[0], len(channels)
    if ch % 32 or any(c % ch for c in channels):
        wanted = "multiples of the first, that one of 32"
        raise ValueError(f"block_out_channels: expected {wanted}, found {channels}")
    if sizes["out_channels"] != sizes["in_channels"]:
        there = f"expected {sizes['in_channels']} (in_channels), found {sizes['out_channels']}"
        raise ValueError(
            f"out_channels: {there}: diffusers' learned variances are others than ours"
        )
    size = sizes["sample_size"]
    height, width = _counts("sample_size", size if isinstance(size, list) else [size, size])
    classes = sizes["num_class_embeds"]
    (blocks,) = _counts("layers_per_block", [sizes["layers_per_block"]])
    down = _attention(sizes, "down_block_types", DOWN, levels)
    if _attention(sizes, "up_block_types", UP, levels) != down[::-1]:
        up = list(sizes["up_block_types"])
        raise ValueError(f"up_block_types: expected attention where the way down has it: {up}")
    longer = max(height, width)
    return {
        "model.ch": ch,
        "model.ch_mult": tuple(c // ch for c in channels),
        "model.num_res_blocks": blocks,
        "model.attn_resolutions": tuple(longer // 2**i for i in range(levels) if down[i]),
        "model.num_classes": _counts("num_class_embeds", [classes])[0] - 1 if classes else 0,
        "data.image_size": height,
        "data.image_width": 0 if width == height else width,
        "data.channels": _counts("in_channels", [sizes["in_channels"]])[0],
    }


def _counts(field: str, values: Any) -> list[int]:
    if (
        isinstance(values, list | tuple)
        and values
        and all(type(n) is int and n > 0 for n in values)
    ):
        return list(values)
    raise ValueError(f"{field}: expected whole numbers above 0, found {values!r}")


def _attention(sizes, field: str, kinds: tuple[str, str], levels: int) -> list[bool]:
    """Whether each level has attention, in the file's order."""
    found = sizes[field]
    if not isinstance(found, list | tuple) or len(found) != levels or not set(found) <= set(kinds):
        raise ValueError(f"{field}: expected {levels} of {' or '.join(kinds)}, found {found!r}")
    return [kind == kinds[1] for kind in found]


def _chain(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    _check_fixed(scheduler, CHAIN)
    flat = {}
    for key, (field, default, names) in SCHEDULER.items():
        value = scheduler.get(field, default)
        if field == "variance_type" and scheduler.get("_class_name", ANCESTRAL) != ANCESTRAL:
            continue
        here = {there: here for here, there in (names or {}).items()}
        if names is not None and value not in here:
            raise ValueError(f"{field}: expected one of {', '.join(here)}, found {value!r}")
        if names is None and type(value) is not type(default):
            raise ValueError(f"{field}: expected a {type(default).__name__}, found {value!r}")
        flat[key] = value if names is None else here[value]
    return flat


def _to_sizes(flat: Mapping[str, Any]) -> dict[str, Any]:
    ch, mult = flat["model.ch"], flat["model.ch_mult"]
    if ch % 32 or mult[0] != 1:
        wanted = "diffusers normalises all levels in 32 groups and begins with the first's channels"
        raise ValueError(f"model.ch, model.ch_mult: {wanted}; it has no {ch} x {tuple(mult)}")
    height, width = flat["data.image_size"], flat["data.image_width"] or flat["data.image_size"]
    sides = [max(height, width) // 2**i for i in range(len(mult))]
    attention = [side in flat["model.attn_resolutions"] for side in sides]
    classes = flat["model.num_classes"]
    return {
        "block_out_channels": [ch * m for m in mult],
        "down_block_types": [DOWN[has] for has in attention],
        "dropout": flat["model.dropout"],
        "in_channels": flat["data.channels"],
        "layers_per_block": flat["model.num_res_blocks"],
        "num_class_embeds": classes + 1 if classes else None,
        "out_channels": flat["data.channels"],
        "sample_size": height if width == height else [height, width],
        "up_block_types": [UP[has] for has in reversed(attention)],
    }
