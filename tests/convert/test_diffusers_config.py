"""diffusers' settings: against those of published files, and converted both ways."""

import json

import pytest

from diffusion.convert.diffusers_config import (
    DIFFUSERS_FIXED,
    from_diffusers_config,
    to_diffusers_config,
)
from tests.convert.test_diffusers import unet_json

# What the official scheduler files hold; google/ddpm-cifar10-32.
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "variance_type": "fixed_large",
}


def test_the_config_of_google_ddpm_cifar10_32():
    """Its network and chain are the paper's (Sections 4 and B)."""
    assert from_diffusers_config(unet_json("cifar10"), SCHEDULER) == {
        "model.ch": 128,
        "model.ch_mult": (1, 2, 2, 2),
        "model.num_res_blocks": 2,
        "model.attn_resolutions": (16,),
        "model.num_classes": 0,
        "data.image_size": 32,
        "data.image_width": 0,
        "data.channels": 3,
        "process.schedule": "linear",
        "process.T": 1000,
        "process.beta_start": 1e-4,
        "process.beta_end": 0.02,
        "target": "eps",
        "variance": "fixed_large",
        "sampler.clip": True,
    }


def flat(**changes):
    """Flat config keys of a small network; a_b=1 stands for {"a.b": 1}, at the first `_`."""
    keys = from_diffusers_config(unet_json("tiny"), SCHEDULER) | {"model.dropout": 0.1}
    return keys | {key.replace("_", ".", 1): value for key, value in changes.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data_image_size": 16, "data_image_width": 8, "model_attn_resolutions": (16,)},
        {"data_channels": 1, "model_num_classes": 10},
        {"process_schedule": "quad", "target": "x0", "variance": "fixed_small"},
        {"process_schedule": "cosine", "target": "v", "process_T": 50, "sampler_clip": False},
    ],
)
def test_round_trip(changes):
    keys = flat(**changes)
    folder = json.loads(json.dumps(to_diffusers_config(keys)))  # through files
    unet, scheduler = folder["unet/config.json"], folder["scheduler/scheduler_config.json"]
    assert from_diffusers_config(unet, scheduler) == keys


@pytest.mark.parametrize("field", DIFFUSERS_FIXED)
def test_a_network_that_ours_cannot_be_is_refused(field):
    for other in ("other", 7):
        with pytest.raises(ValueError, match=f"^{field}: expected .*, found {other!r}$"):
            from_diffusers_config(unet_json("cifar10") | {field: other})


@pytest.mark.parametrize(
    "field",
    ["attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps"],
)
def test_a_silent_file_means_diffusers_default(field):
    """Which in these is another network than the paper's."""
    unet = unet_json("cifar10")
    del unet[field]
    with pytest.raises(ValueError, match=f"^{field}: .*diffusers' default"):
        from_diffusers_config(unet)


@pytest.mark.parametrize(
    "field, value",
    [
        ("_class_name", "UNet2DConditionModel"),
        ("block_out_channels", [48, 96]),
        ("block_out_channels", [64, 96, 64, 64]),
        ("block_out_channels", "many"),
        ("cross_attention_dim", 768),
        ("down_block_types", ["SkipDownBlock2D"] * 4),
        ("up_block_types", ["UpBlock2D"] * 4),
        ("out_channels", 6),
        ("sample_size", None),
        ("layers_per_block", 0),
        ("num_class_embeds", -1),
        ("dropout", "much"),
    ],
)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        from_diffusers_config(unet_json("cifar10") | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("variance_type", "learned_range"),
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [0.001 * i for i in range(1000)]),
        ("num_train_timesteps", "1000"),
    ],
)
def test_a_wrong_field_of_the_scheduler_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        from_diffusers_config(unet_json("tiny"), SCHEDULER | {field: value})
    assert len(str(error.value)) < 200


def test_only_the_ancestral_scheduler_tells_the_variance():
    found = from_diffusers_config(unet_json("tiny"), SCHEDULER | {"_class_name": "DDIMScheduler"})
    assert "variance" not in found and found["target"] == "eps"


@pytest.mark.parametrize(
    "key, changes",
    [
        ("target", {"target": "mu"}),
        ("variance", {"variance": "learned"}),
        ("process.schedule", {"process_schedule": "jsd"}),
        ("model.ch", {"model_ch": 16}),
        ("model.ch", {"model_ch_mult": (2, 2)}),
    ],
)
def test_what_diffusers_has_no_form_for_is_named(key, changes):
    with pytest.raises(ValueError, match=f"^{key}[:,]"):
        to_diffusers_config(flat(**changes))
