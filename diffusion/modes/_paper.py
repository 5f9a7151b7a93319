"""What the paper (arXiv:2006.11239) has published, and how a number of ours compares with it."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion.plotting.report_page import NO_ERROR, OUTSIDE, WITHIN, Grade, Number
from diffusion.runtime.config import TRAINING_KEYS, fill_defaults, flatten
from diffusion.utils.errors import one_line

ARXIV = "arXiv:2006.11239"


class PaperRow(NamedTuple):
    """A row of a table.

    Attributes:
      config: NAME:VARIANT of configs/, which trains it.
      name: what the paper calls it.
      scores: {score: the number with its ±, as printed}; none where the paper calls it unstable.
    """

    config: str
    name: str
    scores: Mapping[str, str]


# The paper took 50,000 samples, and published the least FID of a training.
FID, FID_TEST, IS = "FID against train", "FID against test", "Inception Score"
BPD, BPD_TRAIN = "bits/dim on test", "bits/dim on train"
SAMPLES = 50_000
PLACES = {IS: ("", "is"), FID: ("train", "fid"), FID_TEST: ("test", "fid")}  # in metrics.json

TABLES: dict[str, Sequence[PaperRow]] = {
    # CIFAR-10, the paper's own models; the FID against test is of Section 4.1.
    "Table 1": (
        PaperRow(
            "cifar10:eps_vlb",
            "L, fixed isotropic Σ",
            {IS: "7.67 ± 0.13", FID: "13.51", BPD: "≤ 3.70", BPD_TRAIN: "≤ 3.69"},
        ),
        PaperRow(
            "cifar10",
            "L_simple",
            {IS: "9.46 ± 0.11", FID: "3.17", FID_TEST: "5.24", BPD: "≤ 3.75", BPD_TRAIN: "≤ 3.72"},
        ),
    ),
    "Table 2": (
        PaperRow("cifar10:mu_vlb_learned", "μ, L, learned Σ", {IS: "7.28 ± 0.10", FID: "23.69"}),
        PaperRow("cifar10:mu_vlb", "μ, L, fixed Σ", {IS: "8.06 ± 0.09", FID: "13.22"}),
        PaperRow("cifar10:mu_simple", "μ, squared error", {}),
        PaperRow("cifar10:eps_vlb_learned", "ε, L, learned Σ", {}),
        PaperRow("cifar10:eps_vlb", "ε, L, fixed Σ", {IS: "7.67 ± 0.13", FID: "13.51"}),
        PaperRow("cifar10", "ε, L_simple", {IS: "9.46 ± 0.11", FID: "3.17"}),
    ),
    "Table 3": (
        PaperRow("lsun_bedroom", "LSUN Bedroom", {FID: "6.36"}),
        PaperRow("lsun_bedroom:large", "LSUN Bedroom, large", {FID: "4.90"}),
        PaperRow("lsun_church", "LSUN Church", {FID: "7.89"}),
        PaperRow("lsun_cat", "LSUN Cat", {FID: "19.75"}),
    ),
}
TITLES = {
    "Table 1": "Table 1: CIFAR-10",
    "Table 2": "Table 2: CIFAR-10, what is predicted and which objective",
    "Table 3": "Table 3: LSUN at 256x256",
}
# Section 4.3, of the L_simple model: {what: (key of bpd.json, printed)}.
SECTION_4_3 = {
    "rate (bits/dim)": ("rate", "1.78"),
    "distortion (bits/dim)": ("L_0", "1.97"),
    "RMSE (0-255)": ("rmse", "0.95"),
}
# Table 4 of the paper, CIFAR-10 test set, T = 1000: (step r, rate, RMSE). After r transmissions,
# x_T the first of them, x_k with k = T - r + 1 is known: in the last row, x_1. (Were it x_0, the
# distortion would be 0. Its rate 1.78 lacks L_0 = 1.97 of the 3.75 in total, Section 4.3.)
TABLE_4 = (
    (1000, 1.77581, 0.95136),
    (900, 0.11994, 12.02277),
    (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656),
    (600, 0.01507, 30.80948),
    (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765),
    (300, 0.00081, 54.18826),
    (200, 0.00013, 60.97170),
    (100, 0.00000, 67.60125),
)
# FID against the training set at steps of an independent training of the CIFAR-10 model.
FID_CURVE = ((46_800, 9.16), (93_600, 5.78), (187_000, 4.08), (421_000, 3.31), (796_000, 3.19))

# What does not decide whether a training is the paper's: chance, and how the work is cut up.
IRRELEVANT_KEYS = ("seed", "data.source", "optim.clip_groups", "optim.accumulate", "model.remat")
IRRELEVANT_KEYS += ("train.init_weights",)
SAMPLING = ("sampler.name", "sampler.grid", "sampler.steps", "sampler.times", "sampler.clip")
SAMPLING += ("sampler.threshold", "sampler.variance", "sampler.guidance", "eval.reference_num")
SAMPLING += ("eval.resize", "sample.label")


def printed(text: str, where: str) -> Number:
    """Returns a number as the paper prints it, "9.46 ± 0.11" or "≤ 3.75"; where: "Table 1/IS"."""
    value, _, error = text.removeprefix("≤ ").partition(" ± ")
    source = f"{ARXIV}#/{where}"
    return Number(float(value), source, float(error) if error else None, source, text)


def compare_with_paper(ours: Number, paper: Number) -> Grade:
    """Returns the grade of a number that was measured in the paper's setting.

    It is within where the difference is at most the paper's ±; without one, the difference is said.
    """
    difference = ours.value - paper.value
    if paper.error is not None:
        return Grade(WITHIN if abs(difference) <= paper.error else OUTSIDE, f"{difference:+.2g}")
    errors = f", {abs(difference) / ours.error:.1f} of our errors" if ours.error else ""
    return Grade(NO_ERROR, f"{difference:+.2g}{errors}")


def paper_config(name: str) -> ConfigDict:
    """Returns the config NAME:VARIANT of configs/."""
    module, _, variant = name.partition(":")
    return importlib.import_module(f"configs.{module}").get_config(variant)


def other_setting(config: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> list[str]:
    """Returns how a config, nested, differs from NAME:VARIANT: `process.T 4000 for 1000`, ..."""
    own, paper = flatten(fill_defaults(config)), flatten(paper_config(name))
    return [
        f"{key} {one_line(own[key], 40)} for {one_line(value, 40)}"
        for key, value in paper.items()
        if key.startswith(keys) and not key.startswith(IRRELEVANT_KEYS) and own[key] != value
    ]


def experiment_of(config: Mapping[str, Any]) -> str:
    """Returns the paper's experiment, NAME:VARIANT, that a training is; "" for another one."""
    names = dict.fromkeys(row.config for rows in TABLES.values() for row in rows)
    return next((n for n in names if not other_setting(config, n, TRAINING_KEYS)), "")
