"""The preconditioning of Karras et al. 2022 (arXiv:2206.00364), Table 1, as a regression target.

A denoiser D(y, sigma) = c_skip y + c_out F(c_in y), y = x_t / sqrt(alpha_bar) and sigma^2 = 1 /
alpha_bar - 1, has a network F whose input and output have unit variance at every noise level, for
data of standard deviation DATA_STD. For one of 1 it is -v. Images are [b, ...] and t is int[b].
"""

import numpy as np
from jax import Array

from diffusion.process import Process, scale_by

DATA_STD = 0.5


def _input_scale(p: Process) -> np.ndarray:
    return 1 / np.sqrt(1 - p.alpha_bar + DATA_STD**2 * p.alpha_bar)


def x0_scale(p: Process) -> np.ndarray:
    """Returns c_out, float64[T+1]."""
    return np.sqrt(1 - p.alpha_bar) * DATA_STD * _input_scale(p)


def scale_input(p: Process, x_t: Array, t: Array) -> Array:
    """Returns c_in y, which F is given."""
    return scale_by(_input_scale(p), t, x_t)


def from_x0(p: Process, x_0: Array, eps: Array, x_t: Array, t: Array) -> Array:
    """Returns the F of x_0 and eps: (x_0 - c_skip y) / c_out."""
    of_x0 = np.sqrt(1 - p.alpha_bar) / DATA_STD * _input_scale(p)
    of_eps = np.sqrt(p.alpha_bar) * DATA_STD * _input_scale(p)
    return scale_by(of_x0, t, x_0) - scale_by(of_eps, t, eps)


def to_x0(p: Process, F: Array, x_t: Array, t: Array) -> Array:
    """Returns c_skip y + c_out F."""
    skip = np.sqrt(p.alpha_bar) * (DATA_STD * _input_scale(p)) ** 2
    return scale_by(skip, t, x_t) + scale_by(x0_scale(p), t, F)
