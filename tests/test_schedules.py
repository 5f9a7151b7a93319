"""Tests schedules against the official arrays and the formulas of their papers."""

import math

import numpy as np
import pytest

from diffusion.process import from_betas
from diffusion.schedules import SCHEDULES
from tests.conftest import GOLDEN
from tests.oracle import official


@official("schedules", "betas.*")
def test_official_betas(official):
    for name in ("linear", "quad", "const", "warmup10", "warmup50", "jsd"):
        for T in (100, 1000):
            # Both sides are float64: a few roundings apart.
            official.close(f"betas.{name}.T{T}", SCHEDULES[name](T, 1e-4, 0.02), rtol=1e-14)


@official("diffusion", "betas_T1000", "T20.betas")
def test_official_bounds(official):
    """The defaults are the paper's, and other bounds are passed on."""
    official.close("betas_T1000", SCHEDULES["linear"](1000), rtol=1e-14)  # float64 rounding
    official.close("T20.betas", SCHEDULES["linear"](20, 1e-3, 0.4), rtol=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("T", [1, 2, 7, 1000])
def test_contract(name, T):
    """Any length gives float64 betas in (0, 1] and a decreasing alpha_bar."""
    betas = SCHEDULES[name](T, 1e-3, 0.3)
    assert betas.shape == (T,) and betas.dtype == np.float64
    p = from_betas(betas)
    assert p.alpha_bar[0] == 1 and np.all(np.diff(p.alpha_bar) < 0) and p.alpha_bar[-1] >= 0


@pytest.mark.parametrize("T", [3, 100, 1000, 4000])
def test_cosine(T):
    """alpha_bar_t = f(t) / f(0), betas clipped (arXiv:2102.09672, eq. 17)."""
    betas = SCHEDULES["cosine"](T)

    def f(t):
        return math.cos((t / T + 0.008) / (1 + 0.008) * math.pi / 2) ** 2

    wanted = [f(t) / f(0) for t in range(T)]
    # Each of the T factors of the product adds a rounding, and so does 1 - beta where beta is near
    # 1: 1e-16 of 1 against 1 - beta_{T-1}, which is about a quarter. The last beta is clipped.
    np.testing.assert_allclose(from_betas(betas).alpha_bar[:-1], wanted, rtol=1e-11)
    assert betas.max() == betas[-1] == 0.999


@pytest.mark.parametrize("T", [1, 20, 1000])
def test_jsd(T):
    """1/T, 1/(T-1), ..., 1 multiplies out to alpha_bar_t = (T - t) / T."""
    p = from_betas(SCHEDULES["jsd"](T))
    # T roundings of 1e-16 in a product whose factors 1 - beta lose at most one digit near the end.
    np.testing.assert_allclose(p.alpha_bar, (T - np.arange(T + 1)) / T, rtol=1e-12)
    assert p.alpha_bar[-1] == 0


def test_sigmoid():
    """diffusers 0.42.1 on PyTorch 2.13.0: every hundredth of DDPMScheduler("sigmoid").betas."""
    theirs = np.load(GOLDEN / "diffusers_defaults.npz")["sigmoid.betas"]
    betas = SCHEDULES["sigmoid"](1000)
    np.testing.assert_allclose(betas[::100], theirs, rtol=1e-6)  # theirs are float32
    # The logistic function is symmetric about its middle, at the mean of the bounds.
    np.testing.assert_allclose(betas + betas[::-1], 0.0201, rtol=1e-14)  # float64 rounding


def test_warmups():
    """The first part is linear and as long as the name says; the rest is constant."""
    for name, share in (("warmup10", 10), ("warmup50", 2)):
        betas, n = SCHEDULES[name](200, 0.01, 0.3), 200 // share
        assert np.count_nonzero(betas < 0.3) == n - 1
        np.testing.assert_allclose(np.diff(betas[:n]), 0.29 / (n - 1), rtol=1e-12)  # float64
        assert betas[0] == 0.01 and np.all(betas[n - 1 :] == 0.3)


def test_quad_is_linear_in_the_standard_deviation():
    root = np.sqrt(SCHEDULES["quad"](50, 0.01, 0.25))
    np.testing.assert_allclose(root, np.linspace(0.1, 0.5, 50), rtol=1e-14)  # float64 rounding
