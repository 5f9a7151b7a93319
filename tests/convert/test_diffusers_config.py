"""diffusers' settings: against those of published files, and converted both ways."""

import json
import math

import jax
import numpy as np
import pytest

from diffusion import process, schedules
from diffusion.convert.diffusers_config import (
    DIFFUSERS_FIXED,
    from_diffusers_config,
    to_diffusers_config,
)
from diffusion.samplers import ancestral, base
from diffusion.targets import TARGETS, VARIANCES, make_predict
from diffusion.unet import UNet
from tests.conftest import GOLDEN
from tests.convert.test_diffusers import DIFFUSERS_DEFAULTS, unet_json
from tests.test_unet import shapes

# Origin: diffusers 0.42.1 on torch 2.13.0, steps of DDPMScheduler(variance_type="learned_range")
# with its settings, from given x, network outputs (c channels of the target, c of the position) and
# noise; each on its own.
LEARNED_RANGE = np.load(GOLDEN / "diffusers_learned_range.npz")
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
        "model.null_class": -1,
        "model.attention_head_dim": 0,
        "model.downsample_padding": 0,
        "model.flip_sin_to_cos": False,
        "model.freq_shift": 1,
        "model.norm_eps": 1e-6,
        "data.image_size": 32,
        "data.image_width": 0,
        "data.channels": 3,
        "process.schedule": "linear",
        "process.T": 1000,
        "process.beta_start": 1e-4,
        "process.beta_end": 0.02,
        "process.betas": (),
        "target": "eps",
        "variance": "fixed_large",
        "sampler.clip": True,
        "sampler.clip_range": 1.0,
        "sampler.threshold": 0.0,
        "sampler.threshold_max": 0.0,
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
        {"data_channels": 1, "model_num_classes": 10, "model_null_class": -2},
        {"process_schedule": "quad", "target": "x0", "variance": "fixed_small"},
        {"process_schedule": "cosine", "target": "v", "process_T": 50, "sampler_clip": False},
        {"process_schedule": "sigmoid", "sampler_clip_range": 2.5, "model_norm_eps": 1e-3},
        {"model_attention_head_dim": 16, "model_downsample_padding": 1, "model_freq_shift": 0},
        {"model_flip_sin_to_cos": True, "sampler_threshold": 0.9, "sampler_threshold_max": 1.5},
        {"process_betas": (0.1, 0.25, 0.5), "process_T": 3},
        {"variance": "learned_range", "data_channels": 1},
    ],
)
def test_round_trip(changes):
    keys = flat(**changes)
    folder = json.loads(json.dumps(to_diffusers_config(keys)))  # through files
    unet, scheduler = folder["unet/config.json"], folder["scheduler/scheduler_config.json"]
    if keys["process.betas"]:  # the schedule is then of no account
        del keys["process.schedule"]
    assert from_diffusers_config(unet, scheduler) == keys


def test_a_threshold_without_maximum_stays_without():
    """JSON has no infinity: the maximum is a number that no image reaches."""
    folder = to_diffusers_config(flat(sampler_threshold=0.9))
    scheduler = folder["scheduler/scheduler_config.json"]
    assert scheduler["thresholding"] is True and scheduler["dynamic_thresholding_ratio"] == 0.9
    assert 1e30 < scheduler["sample_max_value"] < np.finfo(np.float32).max


@pytest.mark.parametrize("field", DIFFUSERS_FIXED)
def test_a_network_that_ours_cannot_be_is_refused(field):
    for other in ("other", 7):
        with pytest.raises(ValueError, match=f"^{field}: expected .*, found {other!r}$"):
            from_diffusers_config(unet_json("cifar10") | {field: other})


def test_a_silent_file_means_diffusers_defaults():
    """UNet2DModel() and DDPMScheduler(), whose network is another than the paper's."""
    found = from_diffusers_config({"sample_size": 32}, {})
    fields = ("attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift")
    assert [found[f"model.{field}"] for field in fields] == [8, 1, True, 0]
    assert (found["model.ch"], found["model.norm_eps"]) == (224, 1e-5)
    assert found["variance"] == "fixed_small" and found["sampler.threshold"] == 0
    net = {key[6:]: value for key, value in found.items() if key.startswith("model.")}
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(shapes(UNet(**net), 32, 32)))
    assert count == DIFFUSERS_DEFAULTS["default.parameters"]


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
        ("attention_head_dim", [8, 8]),
        ("downsample_padding", None),
        ("flip_sin_to_cos", 1),
        ("freq_shift", 0.5),
        ("norm_eps", "1e-5"),
    ],
)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        from_diffusers_config(unet_json("cifar10") | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("variance_type", "learned"),
        ("beta_schedule", "laplace"),
        ("prediction_type", "flow"),
        ("rescale_betas_zero_snr", True),
        ("trained_betas", [str(0.001 * i) for i in range(1000)]),
        ("trained_betas", []),
        ("thresholding", 1),
        ("clip_sample_range", "1"),
        ("sample_max_value", None),
        ("num_train_timesteps", "1000"),
    ],
)
def test_a_wrong_field_of_the_scheduler_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        from_diffusers_config(unet_json("tiny"), SCHEDULER | {field: value})
    assert len(str(error.value)) < 200


def test_the_outputs_are_those_of_the_variance():
    """Six channels of colours are a learned range's, and nothing else's."""
    unet, learned = unet_json("tiny"), SCHEDULER | {"variance_type": "learned_range"}
    found = from_diffusers_config(unet | {"out_channels": 6}, learned)
    assert (found["variance"], found["data.channels"]) == ("learned_range", 3)
    other = learned | {"_class_name": "DDIMScheduler"}  # which has no variance
    for outputs, scheduler in ((6, SCHEDULER), (6, None), (6, other), (3, learned), (9, learned)):
        with pytest.raises(ValueError, match=f"^out_channels: expected .*, found {outputs}$"):
            from_diffusers_config(unet | {"out_channels": outputs}, scheduler)


@pytest.mark.parametrize("name", ["long", "each"])
def test_steps_of_a_learned_range(name, monkeypatch):
    """Of the whole chain, and of 12 long steps.

    Theirs multiplies alphas in float32, so that its first betas, 1e-4, are good to three digits.
    """
    scheduler = json.loads(str(LEARNED_RANGE[f"{name}.scheduler_json"]))
    keys = from_diffusers_config(unet_json("tiny") | {"out_channels": 6}, scheduler)
    schedule = schedules.SCHEDULES[keys["process.schedule"]]
    betas = schedule(*(keys[f"process.{key}"] for key in ("T", "beta_start", "beta_end")))
    p, model = process.from_betas(betas), (TARGETS[keys["target"]], VARIANCES[keys["variance"]])
    x, output, noise = (LEARNED_RANGE[f"{name}.{key}"] for key in ("x", "output", "noise"))
    t = LEARNED_RANGE[f"{name}.timesteps"] + 1
    s = np.maximum(t - (1 if name == "each" else 1000 // len(t)), 0)

    @jax.jit
    @jax.vmap
    def step(x, output, noise, s, t):
        monkeypatch.setattr(process, "sample_noise", lambda *_: noise[None])
        predict = make_predict(p, lambda *_: output[None], *model)
        state = ancestral.ancestral(p).step(predict, None, base.init_state(x[None]), t, s)
        return state.x[0], state.x_0[0]

    for ours, key in zip(step(x, output, noise, s, t), ("prev", "pred_original"), strict=True):
        theirs = LEARNED_RANGE[f"{name}.{key}_sample"]
        np.testing.assert_allclose(ours, theirs, atol=5e-4, err_msg=key)


def test_only_the_ancestral_scheduler_tells_the_variance():
    found = from_diffusers_config(unet_json("tiny"), SCHEDULER | {"_class_name": "DDIMScheduler"})
    assert "variance" not in found and found["target"] == "eps"


@pytest.mark.parametrize(
    "key, changes",
    [
        ("target", {"target": "mu"}),
        ("target", {"target": "edm"}),
        ("loss.name", {"loss_name": "consistency"}),
        ("variance", {"variance": "learned"}),
        ("process.schedule", {"process_schedule": "jsd"}),
        ("model.ch", {"model_ch": 16}),
        ("model.ch", {"model_ch_mult": (2, 2)}),
        ("model.fourier", {"model_fourier": (1, 2)}),
        ("model.scale_shift", {"model_scale_shift": True}),
        ("model.normalization", {"model_normalization": "rms"}),
    ],
)
def test_what_diffusers_has_no_form_for_is_named(key, changes):
    with pytest.raises(ValueError, match=f"^{key}[:,]"):
        to_diffusers_config(flat(**changes))
