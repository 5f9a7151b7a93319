"""Handwritten digits, 8x8 grey: the embedded default, trained on a laptop's processor in minutes.

    python main.py

Data: scikit-learn's bundled 1,797 images; nothing is downloaded. Not an experiment of the paper:
its chain (T = 1000, linear, L_simple) with a small network and a short average of the weights.
Variants: `:tiny` (seconds, for tests), `:conditional` (knows the ten classes).
"""

from ml_collections import ConfigDict

from configs._readings import readings

VARIANTS = {
    "tiny": {
        "model.ch": 8,
        "process.T": 20,
        "process.beta_end": 0.4,
        "optim.warmup": 2,
        "train.batch_size": 16,
        "train.steps": 8,
        "train.log_every": 2,
        "train.sample_every": 8,
        "train.save_every": 4,
        "train.num_samples": 4,
        "sampler.steps": 20,
        "sample.num": 6,
        "sample.batch_size": 4,
        "train.eval_every": 4,
        "bpd.batch_size": 4,
        "eval.num": 6,
        "eval.batch_size": 4,
        "eval.quick": 4,
        "figures.num": 4,
        "figures.rows": 2,
        "figures.scored": 4,
        "figures.jump": 4,
        "figures.repeats": 2,
        "frontier.steps": (4, 20),
        "frontier.grids": ("uniform",),
        "frontier.num": 6,
        "bpd.quick": 8,
    },
    "conditional": {"model.num_classes": 10, "train.label_dropout": 0.1},
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "model": {
                "ch": 16,
                "ch_mult": (1, 2),
                "num_res_blocks": 1,
                "attn_resolutions": (4,),
                "dropout": 0.0,
                "num_classes": 0,
                "dtype": "float32",
            },
            "data": {
                "source": "digits",
                "name": "",
                "data_dir": "",
                "image_size": 8,
                "image_width": 0,
                "channels": 1,
                "flip": False,
                "on_device_gib": 4.0,
                "workers": 0,
                "archive": "",
                "accept_incomplete": False,
                "on_error": "skip",
                "holdout": 0.0,
                "holdout_names": "",
                "background": (255, 255, 255),
            },
            "process": {"schedule": "linear", "T": 1000, "beta_start": 1e-4, "beta_end": 0.02},
            "target": "eps",
            "variance": "fixed_large",
            "loss": {"name": "simple"},
            "optim": {
                "lr": 2e-3,
                "warmup": 200,
                "clip": 1.0,
                "clip_groups": 1,
                "accumulate": 1,
                "ema": 0.995,
            },
            "train": {
                "batch_size": 64,
                "steps": 3000,
                "log_every": 50,
                "sample_every": 1500,
                "save_every": 1000,
                "keep": 3,
                "keep_every": 0,
                "keep_best": 0,
                "on_nonfinite": "halt",
                "hang_s": 1800.0,
                "eval_every": 1_000,
                "label_dropout": 0.0,
                "num_samples": 64,
            },
            **readings(
                sample={"num": 100, "batch_size": 100},
                bpd={"quick": 100},
                eval={
                    "num": 1_000,
                    "batch_size": 100,
                    "features": ("random", "pixels"),
                    "quick": 100,
                },
                figures={"scored": 256},
            ),
        }
    )
    for name in filter(None, variant.split(",")):
        config.update_from_flattened_dict(VARIANTS[name])
    return config
