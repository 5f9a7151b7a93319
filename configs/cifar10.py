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
Also `:tiny` (seconds, for tests), `:bfloat16`, `:conditional` (knows the ten classes),
`:official_clip` (gradients clipped per eighth of the batch, as on the paper's eight cores) and
`:likelihood` (the objective, schedule and features of Kingma et al. 2021, arXiv:2107.00630, with
this network; not trained yet). On these images after JPEG a small network, 1,200 steps of 16: the
objective and schedule took 3.64 +- 0.03 bits/dim for the default's 4.04 +- 0.04, and 3.77 +- 0.03
with the Fourier features, which pay off after longer trainings if at all (docs/likelihood.md).
Variants combine: `:tiny,eps_vlb`.
"""

from ml_collections import ConfigDict

from configs import default

CHANGES = {}  # the default is this experiment

# Geng et al. 2024 (arXiv:2406.14548), with Adam.
TUNING = {
    **default.CONSISTENCY,
    "loss.stage": 8,
    "loss.stage_steps": 10_000,
    "model.dropout": 0.2,
    "optim.lr": 1e-4,
    "optim.warmup": 0,
    "optim.ema": 0.9993,
    "train.steps": 100_000,
}

VARIANTS = {
    "eps_vlb": {"loss.name": "vlb"},
    "eps_vlb_learned": {"loss.name": "vlb", "variance": "learned"},
    "mu_vlb": {"target": "mu", "loss.name": "vlb"},
    "mu_vlb_learned": {"target": "mu", "loss.name": "vlb", "variance": "learned"},
    "mu_simple": {"target": "mu"},
    "edm": default.EDM,
    "ect": {**TUNING, "target": "v"},
    "edm_ect": {**default.EDM, **TUNING},
    "bfloat16": default.BFLOAT16,
    "conditional": {"model.num_classes": 10, "train.label_dropout": 0.1},
    "official_clip": {"optim.clip_groups": 8},
    "likelihood": default.LIKELIHOOD | {"model.fourier": (6, 7)},
    "tiny": default.TINY,
}


def get_config(variant: str = "") -> ConfigDict:
    return default.make_config(CHANGES, VARIANTS, variant)
