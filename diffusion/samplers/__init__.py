"""Samplers, which turn noise into images, and grids of the timesteps that they visit.

`SAMPLERS[name](p, **options)` builds a Sampler for `sample`; `GRIDS[name](p, steps)` its times.
"""

from diffusion.samplers import (
    analytic,
    ancestral,
    consistency,
    dpm_solver,
    heun_langevin,
    timesteps,
)
from diffusion.samplers.base import Sampler, SamplerState, advance, sample, trajectory

__all__ = ["GRIDS", "SAMPLERS", "Sampler", "SamplerState", "advance", "sample", "trajectory"]

SAMPLERS = {
    "ancestral": ancestral.ancestral,
    "ddim": ancestral.ddim,
    "analytic_ddim": analytic.analytic_ddim,
    "dpmpp_2m": dpm_solver.dpmpp_2m,
    "dpmpp_3m": dpm_solver.dpmpp_3m,
    "dpmpp_2s": dpm_solver.dpmpp_2s,
    "unipc": dpm_solver.unipc,
    "heun": heun_langevin.heun,
    "predictor_corrector": heun_langevin.predictor_corrector,
    "consistency": consistency.consistency,
}

GRIDS = {
    "uniform": timesteps.uniform,
    "quadratic": timesteps.quadratic,
    "logsnr": timesteps.logsnr,
    "karras": timesteps.karras,
    "angle": timesteps.angle,
}
