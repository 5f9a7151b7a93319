"""Samplers: ways from noise to images, each a line of SAMPLERS, all driven by `base.sample`."""

from diffusion.samplers.analytic import analytic_ddim
from diffusion.samplers.ancestral import ancestral, ddim
from diffusion.samplers.base import Sampler, SamplerState, advance, sample, trajectory
from diffusion.samplers.dpm_solver import dpmpp_2m, dpmpp_2s, dpmpp_3m, unipc
from diffusion.samplers.heun_langevin import heun, predictor_corrector
from diffusion.samplers.timesteps import GRIDS

__all__ = ["GRIDS", "SAMPLERS", "Sampler", "SamplerState", "advance", "sample", "trajectory"]

SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "analytic_ddim": analytic_ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "unipc": unipc,
    "heun": heun,
    "predictor_corrector": predictor_corrector,
}
