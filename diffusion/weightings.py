"""Weights of the squared error at each time, by which the levels of noise share the training.

A weighting maps a process, and options of its own, to the weight of the squared error of x_0,
float64[T+1] on the host, whose entry 0 is not read; `output_weights` makes it that of any target.
With SNR_t = alpha_bar_t / (1 - alpha_bar_t), an error of eps is sqrt(SNR_t) times one of x_0.
"""

import inspect

import numpy as np

from diffusion.process import Process, half_log_snr, posterior
from diffusion.targets import Target, posterior_log_var


def _snr(p: Process) -> np.ndarray:
    """Returns SNR_t, float64[T+1], inf at t = 0."""
    return np.exp(2 * half_log_snr(p))


def min_snr(p: Process, gamma: float = 5.0) -> np.ndarray:
    """Weighs by min(SNR, gamma): Hang et al. 2023 (arXiv:2303.09556)."""
    return np.minimum(_snr(p), gamma)


def p2(p: Process, gamma: float = 1.0, k: float = 1.0) -> np.ndarray:
    """Weighs errors of eps by (k + SNR)^-gamma: Choi et al. 2022 (arXiv:2204.00227)."""
    return _snr(p) * (k + _snr(p)) ** -gamma


def bound(p: Process) -> np.ndarray:
    """Weighs by the terms of the bound in bits/dim under the posterior's variance (eqs. 5, 12).

    The term of t = 1 has beta~_2, as in the decoder.
    """
    steps = np.arange(1, p.T + 1)
    weight_0 = posterior(p, steps - 1, steps).weight_0
    return np.append(0.0, 0.5 * weight_0**2 / np.exp(posterior_log_var(p, steps)) / np.log(2))


WEIGHTINGS = {"simple": None, "min_snr": min_snr, "p2": p2, "vlb": bound}


def output_weights(
    p: Process, target: Target, weighting: str = "simple", gamma: float = 0.0, k: float = 1.0
) -> np.ndarray | None:
    """Returns the weights of the squared error of the target's output, float64[T+1].

    None stands for "simple": 1 for every target (eq. 14).

    Args:
      p: the process.
      target: what the network predicts.
      weighting: a key of WEIGHTINGS.
      gamma: of min_snr, the largest weight, and of p2, its power; 0: the papers' 5 and 1.
      k: of p2.

    Raises: ValueError for another weighting, for an option that the weighting lacks, for a target
      without x0_scale, and where a weight is not finite.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, found {weighting}")
    make = WEIGHTINGS[weighting]
    known = inspect.signature(make).parameters if make else ()
    for name, value, default in (("gamma", gamma, 0.0), ("k", k, 1.0)):
        if value != default and name not in known:
            raise ValueError(f"{name}: expected {default} for weighting {weighting}, found {value}")
    if not make:
        return None
    if target.x0_scale is None:
        raise ValueError(f"weighting: expected simple for this target, found {weighting}")
    options = {"gamma": gamma} if gamma else {}
    with np.errstate(all="ignore"):  # entry 0 is not read, and others are tested
        weights = make(p, **options | ({"k": k} if "k" in known else {})) * target.x0_scale(p) ** 2
    weights[0] = 0.0
    if not np.all(np.isfinite(weights)):
        wanted = "expected simple for this target, as alpha_bar_T = 0"
        raise ValueError(f"weighting: {wanted}, found {weighting}; or use the target x0 or v")
    return weights
