"""Colour pictures that two cores can learn: the 1,906 emoji of Noto, 32x32 on white.

    npm pack emoji-datasource-google@16.0.0
    python main.py --mode=prepare --config=configs/emoji.py
    python main.py --config=configs/emoji.py --workdir=runs/emoji

The first downloads 74 MB, a tarball that the second reads as it is; skin-tone variants, which are
the same pictures in other colours, are left out, and every tenth picture is held out. The pictures
are Google's Noto Emoji, Apache-2.0. Not an experiment of the paper: a network of 1.1 million
parameters that predicts v, since after three thousand steps eps still has arbitrary colours. What
came of it is in docs/data.md. Also `:tiny` (seconds, for tests).
"""

from ml_collections import ConfigDict

from configs import default

CHANGES = {
    "process.schedule": "cosine",
    "target": "v",
    "model.ch": 32,
    "model.ch_mult": (1, 2, 2),
    "model.num_res_blocks": 1,
    "model.dropout": 0.0,
    "optim.name": "muon",
    "optim.lr": 2e-3,
    "optim.warmup": 200,
    "optim.schedule": "cosine",
    "optim.ema": 0.995,
    "train.batch_size": 16,
    "train.steps": 9000,
    "train.log_every": 100,
    "train.sample_every": 3000,
    "train.save_every": 500,
    "train.eval_every": 9000,
    "data.source": "folder",
    "data.name": "emoji",
    "data.archive": "emoji-datasource-google-16.0.0.tgz",
    "data.include": ("*/img/google/64/*",),
    "data.exclude": ("*1f3f[b-f]*",),  # skin tones
    "data.holdout": 0.1,
    "data.flip": False,
    "bpd.quick": 64,
    "eval.references": ("train",),
    "eval.features": ("random", "pixels"),
    "eval.num": 1000,
    "eval.quick": 64,
    "sample.num": 64,
}

VARIANTS = {"tiny": default.TINY}


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
