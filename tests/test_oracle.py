"""Tests that no golden array is forgotten, and that the oracle's truths agree with each other."""

import fnmatch

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from diffusion import process, schedules
from diffusion.targets import TARGETS
from tests import oracle
from tests.oracle import Gaussian

LINEAR = process.from_betas(schedules.linear(1000))
SHORT = process.from_betas(schedules.linear(20, 1e-3, 0.4))

# The arrays that no test compares: what the official functions and the schedulers were given.
INPUTS = {
    "schedules": [],
    "diffusion": [
        *(
            "k",
            "x_start",
            "noise",
            "p_noise",
            "t",
            "cdf.x",
            "dgll_all.x",
            "dgll_all.?.mean_logscale",
        ),
        *("dgll.k", "dgll.x", "dgll.means", "dgll.log_scales"),
        *("T20.init", "T20.step_noise", "T20.q_noise", "T20.x_start"),
    ],
    "ect": [
        *("k", "images", "eps", "rnd_normal", "P_mean", "P_std", "t", "t.f64", "theta"),
        *("r.t", "r.stage", "r.adj", "r.q", "r.k", "r.b", "r.ratio"),
        *("case.adj", "case.q", "case.stage", "case.c"),
    ],
    "iddpm": [
        *("toy.params", "k", "x_start", "noise", "p_noise", "c?.schedule", "c?.T", "c?.t"),
        *("sched.?.T", "spaced.schedule", "spaced.T", "spaced.spec", "spaced.?.t*"),
        *("bpd.q_noise", "bpd.T", "bpd.batch", "bpd.?.betas"),
        *("lsm.T", "lsm.*_per_term", "lsm.uniform_prob", "lsm.ts", "lsm.losses"),
        *("lsm.batch", "lsm.sample_idx"),
        "space*",  # their ways to choose times: ours are samplers.GRIDS
    ],
    "codec": [],
    "weights": ["s?.schedule", "s?.T", "gamma.?", "p2.?.gamma_k", "loss.[!evx]*", "loss.x_start"],
    "phema": [
        *("std", "exp", "beta.std", "beta.t_*", "resp.ofs", "resp.len", "resp.std", "corr.?_*"),
        *("solve.?.in_*", "solve.?.out_*", "e2e.freq", "e2e.theta", "e2e.snap_t", "e2e.snap_std"),
        *("e2e.out_std", "e2e.out_t", "trad.*"),  # trad: an average by half-life, which is not ours
    ],
    "schedulers": ["x_T", "noise", "*timesteps"],
    "schedulers_full": [
        *("x_T", "noise", "*timesteps", "*mid_step", "*traj_steps", "*sigmas", "add_noise/*"),
    ],
    "vdm": [
        *("toy.params", "images", "eps_0", "eps", "t0", "u", "gamma_min_max", "gamma.t"),
        *("nnet.*", "scalar.*", "fourier.z", "temb.t", "dec.?.gamma_0", "v.gamma_type"),
        *("v.n_timesteps", "v.antithetic", "samp.z_t", "samp.noise", "samp.T", "samp.i"),
        *("gen.z_0", "anti.n", "anti.t0"),
        "encode*",  # its pixels are not ours, which are the official DDPM's
        "anti.bad_n*",  # a list of batches for which the original fails
    ],
}


@pytest.mark.parametrize("file", INPUTS)
def test_every_golden_array_is_compared(file):
    from tests import (  # noqa: F401 (each registers what it compares)
        test_consistency,
        test_continuous,
        test_iddpm,
        test_likelihood,
        test_losses,
        test_posthoc_ema,
        test_process,
        test_schedules,
        test_targets,
        test_timestep_samplers,
        test_weightings,
    )
    from tests.codec import test_codec, test_entropy  # noqa: F401
    from tests.samplers import test_ancestral, test_schedulers  # noqa: F401

    rest = set(oracle.arrays(file)) - oracle.COMPARED[file]
    matched = {pattern: set(fnmatch.filter(rest, pattern)) for pattern in INPUTS[file]}
    assert rest == set().union(*matched.values())
    assert all(matched.values()), matched  # a pattern of none is out of date


@pytest.mark.parametrize("target", TARGETS)
def test_perfect_networks_are_means_of_the_target(target, x64):
    """Every target is linear in x_0 and eps, so its mean given x_t is that of their means."""
    known, t = Gaussian(0.3, 0.4), jnp.arange(1, 21)
    x_t = random.normal(random.key(0), (20, 2, 2, 1))
    x_0, eps = (known.network(SHORT, name, learned=False)(x_t, t - 1) for name in ("x0", "eps"))
    wanted = TARGETS[target].from_x0(SHORT, x_0, eps, x_t, t)
    given = TARGETS[target].scale_input(SHORT, x_t, t)
    ours = known.network(SHORT, target, learned=False)(given, t - 1)
    np.testing.assert_allclose(ours, wanted, rtol=1e-9, atol=1e-12)  # float64
