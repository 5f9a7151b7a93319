"""Noise schedules: how much variance each step of the forward process adds.

Every schedule is `(T, beta_start, beta_end) -> betas`, float64[T] on the host, beta_t = betas[t -
1] the variance of q(x_t | x_{t-1}), 0 < beta_t <= 1. The first six are the official code's
(`get_beta_schedule`, diffusion_utils_2.py); the paper uses `linear` from 1e-4 to 0.02 with T = 1000
(Section 4).
"""

import numpy as np


def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Betas on a straight line: the paper's schedule (Section 4)."""
    return np.linspace(beta_start, beta_end, T, dtype=np.float64)


def quad(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Square roots of the betas on a straight line: gentler at the beginning than `linear`."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2


def const(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """beta_end at every step; beta_start has no part in it."""
    return np.full(T, beta_end, dtype=np.float64)


def _warmup(T: int, beta_start: float, beta_end: float, fraction: float) -> np.ndarray:
    betas = const(T, beta_start, beta_end)
    n = int(T * fraction)
    betas[:n] = np.linspace(beta_start, beta_end, n, dtype=np.float64)
    return betas


def warmup10(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Linear over the first tenth of the steps, constant after."""
    return _warmup(T, beta_start, beta_end, 0.1)


def warmup50(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Linear over the first half of the steps, constant after."""
    return _warmup(T, beta_start, beta_end, 0.5)


def jsd(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """1/T, 1/(T-1), ..., 1: each step destroys an equal share (arXiv 1503.03585, Section 2.4.1).

    The ends are fixed by T, so both bounds are without effect. alpha_bar_T is 0: x_T holds nothing
    of x_0, hence an eps-prediction at t = T cannot be turned into x_0; predict x_0 or v with this
    schedule.
    """
    return 1.0 / np.linspace(T, 1, T, dtype=np.float64)


def cosine(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """alpha_bar a squared cosine of time, betas at most 0.999 (arXiv 2102.09672, eq. 17).

    The ends are fixed by T and the paper's offset 0.008, so both bounds are without effect.
    """
    t = np.arange(T + 1, dtype=np.float64) / T
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


SCHEDULES = {
    "linear": linear,
    "quad": quad,
    "const": const,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "jsd": jsd,
    "cosine": cosine,
}
