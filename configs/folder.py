"""Images of your own: a folder, zip or tar of pictures of any sizes, cropped and reduced to 64x64.

    python main.py --mode=prepare --config=configs/folder.py --config.data.archive=IMAGES
    python main.py --config=configs/folder.py --workdir=runs/images

Not an experiment of the paper: its CIFAR-10 network and settings, which suit a few thousand images
or more. For both commands: another size, name or kind by `--config.data.image_size=128`,
`--config.data.name=photos`, `--config.data.channels=1`. Sub-folders are classes: a model that knows
N of them has `--config.model.num_classes=N`. Variants: `:tiny` (seconds, for tests), `:bfloat16`.
"""

from ml_collections import ConfigDict

from configs import cifar10, default

CHANGES = {
    "data.source": "folder",
    "data.name": "images",
    "data.image_size": 64,
    "train.steps": 200_000,
    "eval.references": ("train",),
    "eval.quick": 0,
    "figures.split": "train",
}

VARIANTS = {name: cifar10.VARIANTS[name] for name in ("bfloat16", "tiny")}


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
