"""LSUN church 256x256: the paper's experiment (Section B), FID 7.89 there.

    python main.py --mode=prepare --config=configs/lsun_church.py --config.data.archive=IMAGES
    python main.py --config=configs/lsun_church.py --workdir=runs/lsun_church

IMAGES: the official LMDB folder, or a folder or zip of its images. CelebA-HQ's network and
settings, 1,200,000 steps of batch 64 at 2.2 steps/s on the paper's TPU v3-8. This repository has no
score of its own yet. Variants as in celebahq256.py.
"""

from ml_collections import ConfigDict

from configs import celebahq256, default

CHANGES = celebahq256.CHANGES | {
    "data.source": "lsun",
    "data.name": "lsun_church",
    "train.steps": 1_200_000,
}

VARIANTS = celebahq256.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
