"""CelebA-HQ 256x256: the paper's experiment (Section B).

    python main.py --mode=prepare --config=configs/celebahq256.py --config.data.archive=IMAGES
    python main.py --config=configs/celebahq256.py --workdir=runs/celebahq256

IMAGES: a folder, zip, tar or npz of the 30,000 images, of any size. 113,673,219 parameters, 500,000
steps of batch 64; the paper trained at 2.2 steps/s on a TPU v3-8 and publishes pictures, no score.
This repository has no score of its own yet. The base of the LSUN configs too.
Variants: `:tiny` (seconds, for tests), `:bfloat16`; they combine with a comma.
"""

from ml_collections import ConfigDict

from configs._readings import readings

VARIANTS = {
    "bfloat16": {"model.dtype": "bfloat16"},
    "tiny": {
        "model.ch": 8,
        "model.ch_mult": (1, 2),
        "model.num_res_blocks": 1,
        "data.image_size": 32,
        "process.T": 20,
        "process.beta_end": 0.4,
        "optim.warmup": 2,
        "train.batch_size": 8,
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
                "ch_mult": (1, 1, 2, 2, 4, 4),
                "num_res_blocks": 2,
                "attn_resolutions": (16,),
                "dropout": 0.0,
                "num_classes": 0,
                "dtype": "float32",
            },
            "data": {
                "source": "celebahq",
                "name": "celebahq256",
                "data_dir": "data",
                "image_size": 256,
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
            "variance": "fixed_small",
            "loss": {"name": "simple"},
            "optim": {
                "lr": 2e-5,
                "warmup": 5000,
                "clip": 1.0,
                "clip_groups": 1,
                "accumulate": 1,
                "ema": 0.9999,
            },
            "train": {
                "batch_size": 64,
                "steps": 500_000,
                "log_every": 100,
                "sample_every": 20_000,
                "save_every": 5_000,
                "keep": 3,
                "keep_every": 0,
                "keep_best": 0,
                "on_nonfinite": "halt",
                "hang_s": 1800.0,
                "eval_every": 0,
                "label_dropout": 0.0,
                "num_samples": 16,
            },
            **readings(
                sample={"num": 16, "batch_size": 16},
                bpd={"quick": 32, "batch_size": 8},
                eval={"batch_size": 32, "references": ("train",)},
                figures={"num": 16, "rows": 4, "split": "train", "scored": 256},
            ),
        }
    )
    for name in filter(None, variant.split(",")):
        config.update_from_flattened_dict(VARIANTS[name])
    return config
