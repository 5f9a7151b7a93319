"""LSUN cat 256x256: the paper's experiment (Section B), FID 19.75 there.

    python main.py --mode=prepare --config=configs/lsun_cat.py --config.data.archive=IMAGES
    python main.py --config=configs/lsun_cat.py --workdir=runs/lsun_cat

IMAGES: the official LMDB folder, or a folder or zip of its images. CelebA-HQ's network and
settings, 1,800,000 steps of batch 64 at 2.2 steps/s on the paper's TPU v3-8. This repository has no
score of its own yet. With flips, as Section B says; a comment in the official script turns them off
for cat.
Variants as in celebahq256.py.
"""

from ml_collections import ConfigDict

from configs import celebahq256, default

CHANGES = celebahq256.CHANGES | {
    "data.source": "lsun",
    "data.name": "lsun_cat",
    "train.steps": 1_800_000,
}

VARIANTS = celebahq256.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
