"""Converts the settings of diffusers' files (Hugging Face) to flat configuration keys, and back.

A `UNet2DModel` can be many networks, ours is one of them, so most fields must have one value each.
The scheduler's file holds the process, the target and the variance. A field missing from a file has
diffusers' default. Fields are those of diffusers 0.42; its older files have some of them.
"""

from collections.abc import Mapping
from typing import Any

from diffusion.utils.errors import one_line

DIFFUSERS_VERSION = "0.42.1"

# {field: (the only value our network can have, diffusers' default)}
DIFFUSERS_FIXED = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attention_head_dim": (None, 8),  # None: one head
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_padding": (0, 1),  # 0: at the bottom and right, as TensorFlow pads
    "downsample_type": ("conv", "conv"),
    "flip_sin_to_cos": (False, True),
    "freq_shift": (1, 0),  # frequencies reach 1/10000: half - 1 in the denominator
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_eps": (1e-6, 1e-5),
    "norm_num_groups": (32, 32),
    "num_train_timesteps": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),  # None: four times the first level's channels
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
DIFFUSERS_SIZES = {  # {field that may vary: diffusers' default}
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
# Block types without and with attention.
DIFFUSERS_DOWN, DIFFUSERS_UP = ("DownBlock2D", "AttnDownBlock2D"), ("UpBlock2D", "AttnUpBlock2D")

# Fields of every scheduler that must have one value, as in DIFFUSERS_FIXED.
DIFFUSERS_FIXED_PROCESS = {
    "rescale_betas_zero_snr": (False, False),
    "thresholding": (False, False),
    "clip_sample_range": (1.0, 1.0),
    "trained_betas": (None, None),
}
# {name here: name in diffusers}
DIFFUSERS_SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}
DIFFUSERS_TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
DIFFUSERS_VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}
# {configuration key: (the scheduler's field, diffusers' default, names of values)}
DIFFUSERS_SCHEDULER_KEYS = {
    "process.T": ("num_train_timesteps", 1000, None),
    "process.beta_start": ("beta_start", 1e-4, None),
    "process.beta_end": ("beta_end", 0.02, None),
    "process.schedule": ("beta_schedule", "linear", DIFFUSERS_SCHEDULES),
    "target": ("prediction_type", "epsilon", DIFFUSERS_TARGETS),
    "variance": ("variance_type", "fixed_small", DIFFUSERS_VARIANCES),
    "sampler.clip": ("clip_sample", True, None),
}
ANCESTRAL = "DDPMScheduler"  # the one scheduler that has a variance


def from_diffusers_config(
    unet: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Converts a UNet2DModel's config.json and a scheduler_config.json to flat keys.

    Keys that the files do not determine are left out: dropout where it is not stated, the variance
    where the scheduler has none, the whole process without a scheduler. The last of
    num_class_embeds rows becomes "no class".
    Raises ValueError naming the field that our network cannot have.
    """
    kind = unet.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"_class_name: expected UNet2DModel, found {one_line(kind, 80)}")
    for field in unet:
        if not field.startswith("_") and field not in DIFFUSERS_FIXED | DIFFUSERS_SIZES:
            version = f"diffusers {DIFFUSERS_VERSION}"
            raise ValueError(f"{one_line(field, 80)}: no field of a UNet2DModel of {version}")
    _check_fixed(unet, DIFFUSERS_FIXED)
    flat = _from_sizes({f: unet.get(f, default) for f, default in DIFFUSERS_SIZES.items()})
    if (dropout := unet.get("dropout")) is not None:
        if type(dropout) not in (int, float):
            raise ValueError(f"dropout: expected a number, found {_shorten(dropout)}")
        flat["model.dropout"] = float(dropout)
    return flat | (_from_scheduler(scheduler) if scheduler is not None else {})


def to_diffusers_config(flat: Mapping[str, Any]) -> dict[str, dict]:
    """Converts flat configuration keys to {file of a DDPMPipeline's folder: its content}.

    Raises ValueError naming the key whose value has no form in diffusers, such as target "mu".
    """
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    scheduler = {field: ours for field, (ours, _) in DIFFUSERS_FIXED_PROCESS.items()}
    for key, (field, _, names) in DIFFUSERS_SCHEDULER_KEYS.items():
        if names is not None and flat[key] not in names:
            known = ", ".join(names)
            raise ValueError(f"{key}: expected one that diffusers has, {known}, found {flat[key]}")
        scheduler[field] = flat[key] if names is None else names[flat[key]]
    scheduler |= {"timestep_spacing": "leading", "steps_offset": 0}
    unet = {field: ours for field, (ours, _) in DIFFUSERS_FIXED.items()} | _to_sizes(flat)
    return {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            **version,
            "scheduler": ["diffusers", ANCESTRAL],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": {"_class_name": "UNet2DModel", **version, **unet},
        "scheduler/scheduler_config.json": {"_class_name": ANCESTRAL, **version, **scheduler},
    }


def _check_fixed(found: Mapping[str, Any], fields: Mapping[str, tuple[Any, Any]]) -> None:
    for field, (ours, default) in fields.items():
        value = found.get(field, default)
        if value != ours:
            source = "" if field in found else " (diffusers' default)"
            raise ValueError(f"{field}: expected {ours!r}, found {_shorten(value)}{source}")


def _from_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    channels = _counts("block_out_channels", sizes["block_out_channels"])
    ch, levels = channels[0], len(channels)
    if ch % 32 or any(c % ch for c in channels):
        expected = "a multiple of 32, and multiples of it"
        raise ValueError(f"block_out_channels: expected {expected}, found {_shorten(channels)}")
    if sizes["out_channels"] != sizes["in_channels"]:
        found = f"expected {sizes['in_channels']} (in_channels), found {sizes['out_channels']}"
        raise ValueError(f"out_channels: {one_line(found)}: diffusers' learned variance is another")
    size = sizes["sample_size"]
    height, width = _counts("sample_size", size if isinstance(size, list) else [size, size], 2)
    classes = sizes["num_class_embeds"]
    down = _attention(sizes, "down_block_types", DIFFUSERS_DOWN, levels)
    if _attention(sizes, "up_block_types", DIFFUSERS_UP, levels) != down[::-1]:
        found = _shorten(list(sizes["up_block_types"]))
        raise ValueError(
            f"up_block_types: expected attention as in down_block_types, found {found}"
        )
    longer = max(height, width)
    return {
        "model.ch": ch,
        "model.ch_mult": tuple(c // ch for c in channels),
        "model.num_res_blocks": _counts("layers_per_block", [sizes["layers_per_block"]])[0],
        "model.attn_resolutions": tuple(longer // 2**i for i in range(levels) if down[i]),
        "model.num_classes": _counts("num_class_embeds", [classes])[0] - 1 if classes else 0,
        "data.image_size": height,
        "data.image_width": 0 if width == height else width,
        "data.channels": _counts("in_channels", [sizes["in_channels"]])[0],
    }


def _counts(field: str, values: Any, n: int | None = None) -> list[int]:
    """Returns the values of a list, of length n if it is given, that must be positive integers."""
    valid = isinstance(values, list | tuple) and values and len(values) == (n or len(values))
    if not valid or not all(type(value) is int and value > 0 for value in values):
        raise ValueError(f"{field}: expected integers above 0, found {_shorten(values)}")
    return list(values)


def _attention(sizes: Mapping, field: str, kinds: tuple[str, str], levels: int) -> list[bool]:
    """Returns whether each level has attention, in the file's order."""
    found = sizes[field]
    valid = isinstance(found, list | tuple) and len(found) == levels
    if not valid or any(kind not in kinds for kind in found):
        expected = f"{levels} of {' or '.join(kinds)}"
        raise ValueError(f"{field}: expected {expected}, found {_shorten(found)}")
    return [kind == kinds[1] for kind in found]


def _from_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    _check_fixed(scheduler, DIFFUSERS_FIXED_PROCESS)
    flat = {}
    for key, (field, default, names) in DIFFUSERS_SCHEDULER_KEYS.items():
        value = scheduler.get(field, default)
        if field == "variance_type" and scheduler.get("_class_name", ANCESTRAL) != ANCESTRAL:
            continue
        if names is None and type(value) is type(default):
            flat[key] = value
        elif names is not None and value in names.values():
            flat[key] = next(ours for ours, theirs in names.items() if theirs == value)
        else:
            known = f"a {type(default).__name__}" if names is None else ", ".join(names.values())
            raise ValueError(f"{field}: expected {known}, found {_shorten(value)}")
    return flat


def _to_sizes(flat: Mapping[str, Any]) -> dict[str, Any]:
    ch, mult = flat["model.ch"], flat["model.ch_mult"]
    if ch % 32 or mult[0] != 1:
        expected = "a multiple of 32 and a first multiplier of 1, as diffusers has them"
        raise ValueError(f"model.ch, model.ch_mult: expected {expected}, found {ch}, {tuple(mult)}")
    height, width = flat["data.image_size"], flat["data.image_width"] or flat["data.image_size"]
    sides = [max(height, width) // 2**i for i in range(len(mult))]
    attention = [side in flat["model.attn_resolutions"] for side in sides]
    classes = flat["model.num_classes"]
    return {
        "block_out_channels": [ch * m for m in mult],
        "down_block_types": [DIFFUSERS_DOWN[has] for has in attention],
        "dropout": flat["model.dropout"],
        "in_channels": flat["data.channels"],
        "layers_per_block": flat["model.num_res_blocks"],
        "num_class_embeds": classes + 1 if classes else None,
        "out_channels": flat["data.channels"],
        "sample_size": height if width == height else [height, width],
        "up_block_types": [DIFFUSERS_UP[has] for has in reversed(attention)],
    }


def _shorten(value: Any) -> str:
    return one_line(repr(value), 80)
