"""CelebA-HQ 256x256: the paper's experiment (Section B).

    python main.py --mode=prepare --config=configs/celebahq256.py --config.data.archive=IMAGES
    python main.py --config=configs/celebahq256.py --workdir=runs/celebahq256

IMAGES: a folder, zip, tar or npz of the 30,000 images, of any size. 113,673,219 parameters, 500,000
steps of batch 64; the paper trained at 2.2 steps/s on a TPU v3-8 and publishes pictures, no score.
This repository has no score of its own yet. The base of the LSUN configs too.
Variants: `:tiny` (seconds, for tests), `:bfloat16`; they combine with a comma.
"""

from ml_collections import ConfigDict

from configs import default

CHANGES = {
    "model.ch_mult": (1, 1, 2, 2, 4, 4),
    "model.dropout": 0.0,
    "variance": "fixed_small",
    "optim.lr": 2e-5,
    "train.batch_size": 64,
    "train.steps": 500_000,
    "train.eval_every": 0,
    "train.preview.num": 16,
    "data.source": "celebahq",
    "data.name": "celebahq256",
    "data.image_size": 256,
    "sample.num": 16,
    "sample.batch_size": 16,
    "bpd.quick": 32,
    "bpd.batch_size": 8,
    "eval.batch_size": 32,
    "eval.references": ("train",),
    "eval.quick": 0,
    "figures.num": 16,
    "figures.rows": 4,
    "figures.split": "train",
    "figures.scored": 256,
}

VARIANTS = {
    "bfloat16": default.BFLOAT16,
    "tiny": default.TINY | {"data.image_size": 32, "train.batch_size": 8},
}


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
