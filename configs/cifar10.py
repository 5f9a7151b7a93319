"""CIFAR-10, unconditional: the paper's experiment (Sections 4 and B) and the rows of its Table 2.

    python main.py --mode=prepare --config=configs/cifar10.py
    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

The first downloads 170 MB into data/ and makes a TFDS data set there. 35,746,307 parameters,
800,000 steps of batch 128; the paper trained 10.6 hours on a TPU v3-8. This repository has no score
of its own yet. The paper's, FID against the training set:

    variant              target  objective                     IS     FID    bits/dim
    (none)               eps     L_simple, fixed variance      9.46   3.17   <= 3.75
    :eps_vlb             eps     L, fixed isotropic variance   7.67   13.51  <= 3.70
    :eps_vlb_learned     eps     L, learned diagonal variance  unstable
    :mu_vlb              mu      L, fixed isotropic variance   8.06   13.22
    :mu_vlb_learned      mu      L, learned diagonal variance  7.28   23.69
    :mu_simple           mu      unweighted squared error      unstable

`unstable` is the paper's verdict: it found scores out of range; these run, at your own risk.
Also `:tiny` (seconds, for tests), `:bfloat16`, `:conditional` (knows the ten classes) and
`:official_clip` (gradients clipped per eighth of the batch, as on the paper's eight cores).
Variants combine: `:tiny,eps_vlb`.
"""

from ml_collections import ConfigDict

from configs._readings import readings

VARIANTS = {
    "eps_vlb": {"loss.name": "vlb"},
    "eps_vlb_learned": {"loss.name": "vlb", "variance": "learned"},
    "mu_vlb": {"target": "mu", "loss.name": "vlb"},
    "mu_vlb_learned": {"target": "mu", "loss.name": "vlb", "variance": "learned"},
    "mu_simple": {"target": "mu"},
    "bfloat16": {"model.dtype": "bfloat16"},
    "conditional": {"model.num_classes": 10, "train.label_dropout": 0.1},
    "official_clip": {"optim.clip_groups": 8},
    "tiny": {
        "model.ch": 8,
        "model.ch_mult": (1, 2),
        "model.num_res_blocks": 1,
        "process.T": 20,
        "process.beta_end": 0.4,
        "optim.warmup": 2,
        "train.batch_size": 16,
        "train.steps": 4,
        "train.log_every": 2,
        "train.sample_every": 4,
        "train.save_every": 2,
        "train.num_samples": 4,
        "sampler.steps": 20,
        "sample.num": 4,
        "sample.batch_size": 4,
        "train.eval_every": 0,
        "bpd.batch_size": 4,
        "eval.num": 4,
        "eval.batch_size": 4,
        "eval.features": ("random", "pixels"),
        "eval.quick": 4,
        "figures.num": 4,
        "figures.rows": 2,
        "figures.scored": 4,
        "figures.jump": 4,
        "figures.repeats": 2,
        "frontier.steps": (4, 20),
        "frontier.grids": ("uniform",),
        "frontier.num": 6,
    },
}


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict(
        {
            "seed": 0,
            "model": {
                "ch": 128,
                "ch_mult": (1, 2, 2, 2),
                "num_res_blocks": 2,
                "attn_resolutions": (16,),
                "dropout": 0.1,
                "num_classes": 0,
                "dtype": "float32",
            },
            "data": {
                "source": "cifar10",
                "name": "cifar10",
                "data_dir": "data",
                "image_size": 32,
                "image_width": 0,
                "channels": 3,
                "flip": True,
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
                "lr": 2e-4,
                "warmup": 5000,
                "clip": 1.0,
                "clip_groups": 1,
                "accumulate": 1,
                "ema": 0.9999,
            },
            "train": {
                "batch_size": 128,
                "steps": 800_000,
                "log_every": 100,
                "sample_every": 20_000,
                "save_every": 5_000,
                "keep": 3,
                "keep_every": 0,
                "keep_best": 0,
                "on_nonfinite": "halt",
                "hang_s": 1800.0,
                "eval_every": 10_000,
                "label_dropout": 0.0,
                "num_samples": 64,
            },
            **readings(eval={"quick": 500}),
        }
    )
    for name in filter(None, variant.split(",")):
        config.update_from_flattened_dict(VARIANTS[name])
    return config
