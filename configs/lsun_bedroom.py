"""LSUN bedroom 256x256: the paper's experiment (Section B), FID 6.36 there (large: 4.90).

    python main.py --mode=prepare --config=configs/lsun_bedroom.py --config.data.archive=IMAGES
    python main.py --config=configs/lsun_bedroom.py --workdir=runs/lsun_bedroom

IMAGES: the official LMDB folder, or a folder or zip of its images. CelebA-HQ's network and
settings, 2,400,000 steps of batch 64 at 2.2 steps/s on the paper's TPU v3-8. This repository has no
score of its own yet. Bedroom alone is trained without flips (Section B; a comment in the official
script names cat instead). Variants as in celebahq256.py, and `:large`: half as many filters again,
255.8 M parameters for the paper's "about 256 M", 1,150,000 steps.
"""

from ml_collections import ConfigDict

from configs import celebahq256, default

CHANGES = celebahq256.CHANGES | {
    "data.source": "lsun",
    "data.name": "lsun_bedroom",
    "train.steps": 2_400_000,
    "data.flip": False,
}

VARIANTS = celebahq256.VARIANTS | {"large": {"model.ch": 192, "train.steps": 1_150_000}}


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
