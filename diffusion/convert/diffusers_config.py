"""Converts the settings of diffusers' files (Hugging Face) to flat configuration keys, and back.

A `UNet2DModel` can be many networks and ours some of them, so many fields must have one value each.
The scheduler's file holds the process, the target, the variance and what happens to x_0. A field
missing from a file has diffusers' default. Fields are those of diffusers 0.42; its older files have
some of them.
"""

from collections.abc import Mapping
from typing import Any

from diffusion.utils.errors import one_line

DIFFUSERS_VERSION = "0.42.1"

# {field: (the only value our network can have, diffusers' default)}
DIFFUSERS_FIXED = {
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "attn_norm_num_groups": (None, None),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "downsample_type": ("conv", "conv"),
    "mid_block_scale_factor": (1, 1),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "norm_num_groups": (32, 32),
    "num_train_timesteps": (None, None),
    "resnet_time_scale_shift": ("default", "default"),
    "time_embedding_dim": (None, None),  # None: four times the first level's channels
    "time_embedding_type": ("positional", "positional"),
    "upsample_type": ("conv", "conv"),
}
# {field that is also a key of `model`: (diffusers' default, the type that it must have)}
DIFFUSERS_MODEL = {
    "attention_head_dim": (8, int),  # None: one head, our 0
    "downsample_padding": (1, int),
    "flip_sin_to_cos": (True, bool),
    "freq_shift": (0, int),
    "norm_eps": (1e-5, float),
}
# {key of ours that the exported network has no form of: its value there}
NOT_IN_DIFFUSERS = {
    "model.fourier": (),
    "model.scale_shift": False,
    "model.normalization": "group",
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
DIFFUSERS_FIXED_PROCESS = {"rescale_betas_zero_snr": (False, False)}
# {name here: name in diffusers}
DIFFUSERS_SCHEDULES = {"linear": "linear", "quad": "scaled_linear", "cosine": "squaredcos_cap_v2"}
DIFFUSERS_SCHEDULES |= {"sigmoid": "sigmoid"}
DIFFUSERS_TARGETS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# Its "learned" is a variance, ours a logarithm of one; the range is the same.
DIFFUSERS_VARIANCES = {name: name for name in ("fixed_small", "fixed_large", "learned_range")}
# {configuration key: (the scheduler's field, diffusers' default, names of values)}
DIFFUSERS_SCHEDULER_KEYS = {
    "process.T": ("num_train_timesteps", 1000, None),
    "process.beta_start": ("beta_start", 1e-4, None),
    "process.beta_end": ("beta_end", 0.02, None),
    "process.schedule": ("beta_schedule", "linear", DIFFUSERS_SCHEDULES),
    "target": ("prediction_type", "epsilon", DIFFUSERS_TARGETS),
    "variance": ("variance_type", "fixed_small", DIFFUSERS_VARIANCES),
    "sampler.clip": ("clip_sample", True, None),
    "sampler.clip_range": ("clip_sample_range", 1.0, None),
    # These two where `thresholding` is on: it is where our sampler.threshold is not 0.
    "sampler.threshold": ("dynamic_thresholding_ratio", 0.995, None),
    "sampler.threshold_max": ("sample_max_value", 1.0, None),
}
NO_MAXIMUM = 1e38  # as sample_max_value: JSON has no infinity
ANCESTRAL = "DDPMScheduler"  # the one scheduler that has a variance


def from_diffusers_config(
    unet: Mapping[str, Any], scheduler: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Converts a UNet2DModel's config.json and a scheduler_config.json to flat keys.

    Keys that the files do not determine are left out: dropout where it is not stated, the variance
    where the scheduler has none, the whole process without a scheduler. No file states that a class
    means "no class".
    Raises ValueError naming the field that our network cannot have.
    """
    kind = unet.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"_class_name: expected UNet2DModel, found {one_line(kind, 80)}")
    for field in unet:
        known = DIFFUSERS_FIXED | DIFFUSERS_SIZES | DIFFUSERS_MODEL
        if not field.startswith("_") and field not in known:
            version = f"diffusers {DIFFUSERS_VERSION}"
            raise ValueError(f"{one_line(field, 80)}: no field of a UNet2DModel of {version}")
    _check_fixed(unet, DIFFUSERS_FIXED)
    flat = _from_sizes({f: unet.get(f, default) for f, default in DIFFUSERS_SIZES.items()})
    for field, (default, kind) in DIFFUSERS_MODEL.items():
        value = unet.get(field, default)
        one_head = field == "attention_head_dim" and value is None
        flat[f"model.{field}"] = 0 if one_head else _typed(field, value, kind)
    if (dropout := unet.get("dropout")) is not None:
        flat["model.dropout"] = _typed("dropout", dropout, float)
    flat |= _from_scheduler(scheduler) if scheduler is not None else {}
    outputs, given = _outputs(flat), unet.get("out_channels", DIFFUSERS_SIZES["out_channels"])
    if given != flat["data.channels"] * outputs:
        wanted = f"expected {outputs} times in_channels for the variance_type of the scheduler"
        raise ValueError(f"out_channels: {wanted}, found {one_line(given, 80)}")
    return flat


def _outputs(flat: Mapping[str, Any]) -> int:
    """Returns the network's channels per image channel."""
    return 2 if flat.get("variance") == "learned_range" else 1


def to_diffusers_config(flat: Mapping[str, Any]) -> dict[str, dict]:
    """Converts flat configuration keys to {file of a DDPMPipeline's folder: its content}.

    Raises ValueError naming the key whose value has no form in diffusers, such as target "mu".
    """
    if flat.get("loss.name") == "consistency":
        wanted = "expected a denoiser, as diffusers' pipeline takes the network for one"
        raise ValueError(f"loss.name: {wanted}, found consistency")
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    unet = {field: ours for field, (ours, _) in DIFFUSERS_FIXED.items()} | _to_sizes(flat)
    unet |= {field: flat[f"model.{field}"] for field in DIFFUSERS_MODEL}
    unet["attention_head_dim"] = unet["attention_head_dim"] or None
    return {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            **version,
            "scheduler": ["diffusers", ANCESTRAL],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": {"_class_name": "UNet2DModel", **version, **unet},
        "scheduler/scheduler_config.json": {
            "_class_name": ANCESTRAL,
            **version,
            **_to_scheduler(flat),
        },
    }


def _typed(field: str, value: Any, kind: type) -> Any:
    """Returns the value, of exactly this type, or an int as a float."""
    if type(value) is not kind and (type(value), kind) != (int, float):
        raise ValueError(f"{field}: expected a {kind.__name__}, found {_shorten(value)}")
    return kind(value)


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
        "model.num_classes": _counts("num_class_embeds", [classes])[0] if classes else 0,
        "model.null_class": -2 if classes else -1,
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
    betas = scheduler.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and betas):
        raise ValueError(f"trained_betas: expected numbers, found {_shorten(betas)}")
    flat: dict[str, Any] = {
        "process.betas": tuple(_typed("trained_betas", beta, float) for beta in betas or ())
    }
    unread = {"beta_schedule"} if betas else set()
    if scheduler.get("_class_name", ANCESTRAL) != ANCESTRAL:
        unread.add("variance_type")
    for key, (field, default, names) in DIFFUSERS_SCHEDULER_KEYS.items():
        value = scheduler.get(field, default)
        if field in unread:
            continue
        if names is None:
            flat[key] = _typed(field, value, type(default))
        elif value in names.values():
            flat[key] = next(ours for ours, theirs in names.items() if theirs == value)
        else:
            known = ", ".join(names.values())
            raise ValueError(f"{field}: expected {known}, found {_shorten(value)}")
    if not _typed("thresholding", scheduler.get("thresholding", False), bool):
        flat |= {"sampler.threshold": 0.0, "sampler.threshold_max": 0.0}
    return flat


def _to_scheduler(flat: Mapping[str, Any]) -> dict[str, Any]:
    betas, threshold = list(flat["process.betas"]), flat["sampler.threshold"] > 0
    fields = {field: ours for field, (ours, _) in DIFFUSERS_FIXED_PROCESS.items()}
    for key, (field, default, names) in DIFFUSERS_SCHEDULER_KEYS.items():
        if names is None:
            fields[field] = flat[key]
        elif flat[key] in names:
            fields[field] = names[flat[key]]
        elif betas and field == "beta_schedule":  # which diffusers does not read then
            fields[field] = default
        else:
            known = ", ".join(names)
            raise ValueError(f"{key}: expected one that diffusers has, {known}, found {flat[key]}")
        if not threshold and key.startswith("sampler.threshold"):
            fields[field] = default
    fields["sample_max_value"] = fields["sample_max_value"] or NO_MAXIMUM
    fields |= {"trained_betas": betas or None, "thresholding": threshold}
    return fields | {"timestep_spacing": "leading", "steps_offset": 0}


def _to_sizes(flat: Mapping[str, Any]) -> dict[str, Any]:
    for key, none in NOT_IN_DIFFUSERS.items():
        if (found := flat.get(key, none)) != none:
            why = "as the exported network has nothing else"
            raise ValueError(f"{key}: expected {none!r}, {why}, found {found!r}")
    ch, mult = flat["model.ch"], flat["model.ch_mult"]
    if ch % 32 or mult[0] != 1:
        expected = "a multiple of 32 and a first multiplier of 1, as diffusers has them"
        raise ValueError(f"model.ch, model.ch_mult: expected {expected}, found {ch}, {tuple(mult)}")
    height, width = flat["data.image_size"], flat["data.image_width"] or flat["data.image_size"]
    sides = [max(height, width) // 2**i for i in range(len(mult))]
    attention = [side in flat["model.attn_resolutions"] for side in sides]
    rows = flat["model.num_classes"] + (flat["model.null_class"] == -1)
    return {
        "block_out_channels": [ch * m for m in mult],
        "down_block_types": [DIFFUSERS_DOWN[has] for has in attention],
        "dropout": flat["model.dropout"],
        "in_channels": flat["data.channels"],
        "layers_per_block": flat["model.num_res_blocks"],
        "num_class_embeds": rows if flat["model.num_classes"] else None,
        "out_channels": flat["data.channels"] * _outputs(flat),
        "sample_size": height if width == height else [height, width],
        "up_block_types": [DIFFUSERS_UP[has] for has in reversed(attention)],
    }


def _shorten(value: Any) -> str:
    return one_line(repr(value), 80)
