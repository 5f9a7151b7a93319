"""LSUN church 256x256: the paper's experiment (Section B), FID 7.89 there.

    python main.py --mode=prepare --config=configs/lsun_church.py --config.data.archive=IMAGES
    python main.py --config=configs/lsun_church.py --workdir=runs/lsun_church

IMAGES: the official LMDB folder, or a folder or zip of its images. CelebA-HQ's network and
settings, 1,200,000 steps of batch 64 at 2.2 steps/s on the paper's TPU v3-8. This repository has no
score of its own yet. Variants as in celebahq256.py.
"""

from ml_collections import ConfigDict

from configs import celebahq256

VARIANTS = celebahq256.VARIANTS


def get_config(variant: str = "") -> ConfigDict:
    config = celebahq256.get_config()
    config.data.source = "lsun"
    config.data.name = "lsun_church"
    config.train.steps = 1_200_000
    for name in filter(None, variant.split(",")):
        config.update_from_flattened_dict(VARIANTS[name])
    return config
