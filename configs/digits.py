"""Handwritten digits, 8x8 grey: the embedded default, trained on a laptop's processor in minutes.

    python main.py

Data: scikit-learn's bundled 1,797 images; nothing is downloaded. Not an experiment of the paper:
its chain (T = 1000, linear, L_simple) with a small network, a short average of the weights, and
Muon at a rate that falls to 0, since 3,000 steps are few. Variants: `:tiny` (seconds, for tests),
`:adam` (the paper's optimiser), `:conditional` (knows the ten classes), `:likelihood` (fewer
bits/dim: 1.757 +- 0.014 on the 296 test digits where the default takes 2.85; docs/likelihood.md has
what each of its settings does), `:edm` (the design of Karras et al. 2022), `:ect` (tunes a model of
the target v for samples of two steps; docs/training.md).
"""

from ml_collections import ConfigDict

from configs import default

CHANGES = {
    "model.ch": 16,
    "model.ch_mult": (1, 2),
    "model.num_res_blocks": 1,
    "model.attn_resolutions": (4,),
    "model.dropout": 0.0,
    "optim.name": "muon",
    "optim.lr": 4e-3,
    "optim.warmup": 200,
    "optim.schedule": "cosine",
    "optim.ema": 0.995,
    "train.batch_size": 64,
    "train.steps": 3000,
    "train.log_every": 50,
    "train.sample_every": 1500,
    "train.save_every": 1000,
    "train.eval_every": 1500,
    "train.preview.sampler": "unipc",
    "train.preview.grid": "uniform",
    "data.source": "digits",
    "data.name": "",
    "data.data_dir": "",
    "data.image_size": 8,
    "data.channels": 1,
    "data.levels": 17,
    "data.flip": False,
    "sample.num": 100,
    "sample.batch_size": 100,
    "bpd.quick": 100,
    "codec.candidates": 21,
    "codec.group": 512,
    "codec.batch_size": 64,
    "eval.num": 1000,
    "eval.batch_size": 100,
    "eval.features": ("classifier", "random", "pixels"),
    "eval.quick": 100,
    "figures.scored": 256,
    "frontier.num": 200,
}

ADAM = {"optim.name": "adam", "optim.lr": 2e-3, "optim.schedule": "constant"}

TUNING = {
    **default.CONSISTENCY,
    "loss.stage": 7,
    "loss.stage_steps": 2800,
    "loss.c": 0.05,
    "loss.log_mean": 0.0,
    "loss.log_std": 1.6,
    "optim.ema": 0.998,
    "train.steps": 32_000,
}

VARIANTS = {
    "tiny": default.TINY,
    "adam": ADAM,
    "edm": {**default.EDM, **ADAM},
    "ect": {**TUNING, "target": "v"},
    "edm_ect": {**default.EDM, **TUNING},
    "conditional": {"model.num_classes": 10, "train.label_dropout": 0.1},
    "likelihood": {
        **default.LIKELIHOOD,
        "process.gamma_min": -7.0,
        "model.fourier": (1, 2, 3),
        "optim.schedule": "constant",
    },
}


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
