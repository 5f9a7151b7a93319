"""Every config in the repository can be built, says the size that it claims, and runs when tiny."""

import importlib
import math
import os

import jax
import pytest

from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.runtime.config import with_overrides
from diffusion.runtime.validation import validate
from tests.conftest import ROOT

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py") if path.stem != "default")
VARIANTS = [
    (name, variant)
    for name in NAMES
    for variant in ("", *importlib.import_module(f"configs.{name}").VARIANTS)
]


def config_of(name, variant=""):
    return importlib.import_module(f"configs.{name}").get_config(variant)


@pytest.fixture(scope="module", autouse=True)
def each_network_once():
    """Traces a network once for all of the configs and variants that share it."""
    shapes, trace = {}, experiment._abstract_state

    def abstract_state(exp):
        names = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "num_classes")
        names += ("out_ch", "fourier", "scale_shift")
        key = (*(getattr(exp.net, name) for name in names), exp.image_shape)
        if key not in shapes:
            shapes[key] = trace(exp)
        return shapes[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "_abstract_state", abstract_state)
        yield


def parameters(name, variant=""):
    exp = experiment.build(config_of(name, variant))
    return sum(math.prod(a.shape) for a in jax.tree.leaves(exp.abstract_state.params))


@pytest.mark.parametrize(
    "name, changes, expected",
    [
        ("digits", {}, 1),
        ("cifar10", {}, 4),
        ("cifar10", {"train.batch_size": 6}, 3),
        ("cifar10", {"train.batch_size": 12, "optim.accumulate": 2}, 3),
        ("cifar10", {"train.batch_size": 7}, 1),
    ],
)
def test_cpu_cores_share_a_batch(name, changes, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert experiment.cpu_devices(with_overrides(config_of(name, ""), changes)) == expected


def test_the_configs_of_the_paper_are_there():
    assert {"digits", "cifar10", "celebahq256", "lsun_bedroom", "lsun_church", "lsun_cat"} <= set(
        NAMES
    )
    table_2 = {"eps_vlb", "eps_vlb_learned", "mu_vlb", "mu_vlb_learned", "mu_simple"}
    assert table_2 <= set(importlib.import_module("configs.cifar10").VARIANTS)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_every_variant_can_be_built(name, variant):
    config = config_of(name, variant)
    validate(config, devices=1)
    exp = experiment.build(config)
    _sampling.compile_sampler(config, exp, config.sample.batch_size)
    _sampling.compile_sampler(_sampling.preview_config(config, exp), exp, 4)


def test_the_default_config_is_the_paper_s_and_valid():
    default = importlib.import_module("configs.default").get_config()
    validate(default)
    assert default.to_dict() == config_of("cifar10").to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_tiny_variant(name):
    assert "tiny" in importlib.import_module(f"configs.{name}").VARIANTS


# Appendix B of the paper: 35.7, 114 and "approximately 256" million; exact counts from the official
# code (github.com/hojonathanho/diffusion, commit 1e0dceb).
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10", 35_746_307),
        ("celebahq256", 113_673_219),
        ("lsun_bedroom", 113_673_219),
        ("lsun_church", 113_673_219),
        ("lsun_cat", 113_673_219),
    ],
)
def test_the_networks_have_the_size_of_the_papers(name, count):
    assert parameters(name) == count


def test_the_large_bedroom_network_has_about_256_million_parameters():
    assert abs(parameters("lsun_bedroom", "large") / 256e6 - 1) < 0.01


def test_a_learned_variance_doubles_the_outputs():
    assert parameters("cifar10", "eps_vlb_learned") == 35_749_766  # official cifar10_outch6


# The settings of Section 4 and Appendix B.
@pytest.mark.parametrize(
    ("name", "lr", "batch", "steps", "dropout", "flip", "variance"),
    [
        ("cifar10", 2e-4, 128, 800_000, 0.1, True, "fixed_large"),
        ("celebahq256", 2e-5, 64, 500_000, 0.0, True, "fixed_small"),
        ("lsun_bedroom", 2e-5, 64, 2_400_000, 0.0, False, "fixed_small"),
        ("lsun_church", 2e-5, 64, 1_200_000, 0.0, True, "fixed_small"),
        ("lsun_cat", 2e-5, 64, 1_800_000, 0.0, True, "fixed_small"),
    ],
)
def test_the_settings_are_the_papers(name, lr, batch, steps, dropout, flip, variance):
    c = config_of(name)
    assert (c.optim.lr, c.train.batch_size, c.train.steps) == (lr, batch, steps)
    assert (c.model.dropout, c.data.flip, c.variance) == (dropout, flip, variance)
    assert (c.optim.warmup, c.optim.clip, c.optim.ema) == (5000, 1.0, 0.9999)
    assert c.process.to_dict() == {
        "schedule": "linear",
        "T": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "betas": (),
        "gamma_min": -13.3,  # which no schedule of the paper reads
        "gamma_max": 5.0,
    }


def test_the_rows_of_table_2():
    rows = {
        "": ("eps", "fixed_large", "simple"),
        "eps_vlb": ("eps", "fixed_large", "vlb"),
        "eps_vlb_learned": ("eps", "learned", "vlb"),
        "mu_vlb": ("mu", "fixed_large", "vlb"),
        "mu_vlb_learned": ("mu", "learned", "vlb"),
        "mu_simple": ("mu", "fixed_large", "simple"),
    }
    for variant, row in rows.items():
        c = config_of("cifar10", variant)
        assert (c.target, c.variance, c.loss.name) == row
