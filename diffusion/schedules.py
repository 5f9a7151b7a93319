"""Noise schedules: the variances beta_t of the forward process.

A schedule maps (T, beta_start, beta_end) to betas, float64[T] on the host, where betas[t - 1] in
(0, 1] is the variance of q(x_t | x_{t-1}). The first six are the official code's
(get_beta_schedule); the paper uses `linear` with the default bounds and T = 1000 (Section 4).
"""

import numpy as np


def linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Spaces the betas evenly: the paper's schedule (Section 4)."""
    return np.linspace(beta_start, beta_end, T, dtype=np.float64)


def quad(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Spaces the square roots of the betas evenly."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2


def const(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Uses beta_end at every step and ignores beta_start."""
    return np.full(T, beta_end, dtype=np.float64)


def _warmup(T: int, beta_start: float, beta_end: float, fraction: float) -> np.ndarray:
    betas = const(T, beta_start, beta_end)
    n = int(T * fraction)
    betas[:n] = np.linspace(beta_start, beta_end, n, dtype=np.float64)
    return betas


def warmup10(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Rises linearly over the first tenth of the steps, then stays at beta_end."""
    return _warmup(T, beta_start, beta_end, 0.1)


def warmup50(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Rises linearly over the first half of the steps, then stays at beta_end."""
    return _warmup(T, beta_start, beta_end, 0.5)


def jsd(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Returns 1/T, 1/(T-1), ..., 1 and ignores both bounds (arXiv:1503.03585, Section 2.4.1).

    As alpha_bar_T = 0, eps at t = T does not determine x_0: predict x_0 or v with this schedule.
    """
    return 1.0 / np.linspace(T, 1, T, dtype=np.float64)


def cosine(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Makes alpha_bar a squared cosine of t and ignores both bounds (arXiv:2102.09672, eq. 17)."""
    t = np.arange(T + 1, dtype=np.float64) / T
    alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def sigmoid(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Makes the betas a logistic function of t from -6 to 6 (arXiv:2203.02923, its code)."""
    weight = 1 / (1 + np.exp(-np.linspace(-6, 6, T, dtype=np.float64)))
    return beta_start + weight * (beta_end - beta_start)


def even_log_snr(
    T: int,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    gamma_min: float = -13.3,
    gamma_max: float = 5.0,
) -> np.ndarray:
    """Spaces gamma_t = log((1 - alpha_bar_t) / alpha_bar_t) evenly and ignores the first bounds.

    Source: arXiv:2107.00630, Appendix H.
    """
    alpha_bar = 1 / (1 + np.exp(np.linspace(gamma_min, gamma_max, T, dtype=np.float64)))
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def edm(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> np.ndarray:
    """Spaces sigma^(1/7) evenly from 0.002 to 80, where sigma^2 = 1 / alpha_bar - 1.

    Ignores both bounds. Karras et al. 2022 (arXiv:2206.00364), eq. 5 and Table 1.
    """
    sigma = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), T, dtype=np.float64) ** 7
    alpha_bar = 1 / (1 + sigma**2)
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


SCHEDULES = {
    "linear": linear,
    "quad": quad,
    "const": const,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "jsd": jsd,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "logsnr": even_log_snr,
    "edm": edm,
}
