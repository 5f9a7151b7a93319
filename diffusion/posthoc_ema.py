"""Averages of the weights of any length, chosen after the training.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models"
(arXiv:2312.02696), Section 3 and Appendix C. A power-function average at step T weighs the
parameters of step t <= T by (t / T)^gamma. It is named by its relative length, the standard
deviation of that profile as a share of T. A few lengths are tracked while training; snapshots of
them then give the average of any other length, by least squares between the profiles.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any
LONGEST = 12**-0.5  # relative length of the plain mean, gamma = 0


def gamma_of(length: float) -> float:
    """Returns the exponent of a relative length in (0, LONGEST) (its Appendix C).

    Raises ValueError for another length.
    """
    if not 0 < length < LONGEST:
        wanted = f"expected a relative length between 0 and {LONGEST:.4f}"
        raise ValueError(f"{wanted}, the plain mean's, found {length}")
    inverse = float(length) ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def length_of(gamma: float) -> float:
    """Returns the relative length of an exponent above -1."""
    return float(np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))))


def update_rate(length: float, t):
    """Returns the weight of the parameters of step t = 1, 2, ... in the average's update.

    It is 1 - (1 - 1 / t)^(gamma + 1) (Section 3.1): 1 at the first step, so that the initial
    parameters leave no trace.
    float64 for a host t, float32 for a device or traced one.
    """
    xp, power = (jnp if isinstance(t, Array) else np), gamma_of(length) + 1
    with np.errstate(divide="ignore"):  # log(0) at t = 1
        kept = xp.log1p(-1 / xp.asarray(t, xp.float32 if xp is jnp else xp.float64))
    return -xp.expm1(power * kept)


def inner_products(t_a, gamma_a, t_b, gamma_b) -> np.ndarray:
    """Returns the integrals of the products of two profiles (Appendix C), elementwise, float64.

    Each profile has integral 1. Times enter as a ratio, since their own powers overflow.
    """
    t_a, gamma_a, t_b, gamma_b = np.broadcast_arrays(t_a, gamma_a, t_b, gamma_b)
    later = np.maximum(t_a, t_b).astype(np.float64)
    ratio = np.minimum(t_a, t_b) / later
    with np.errstate(under="ignore"):
        overlap = ratio ** np.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * overlap / later


def fit(times, lengths, at: float, length: float) -> tuple[np.ndarray, float]:
    """Returns (weights float64[n] of n snapshots, how far their sum is from the wanted profile).

    The weights are those of least squares, divided by their sum. The second value is the distance
    of the profiles as a share of the wanted profile's norm.

    Args:
      times: of the snapshots, steps in 1..at; one is best at `at` itself.
      lengths: their relative lengths.
      at, length: the step and the relative length that are wanted.
    """
    times, wanted = np.asarray(times, np.float64), gamma_of(length)
    gammas = np.array([gamma_of(each) for each in lengths])
    gram = inner_products(times[:, None], gammas[:, None], times, gammas)
    towards = inner_products(times, gammas, at, wanted)
    weights = np.linalg.solve(gram, towards)
    weights /= weights.sum()
    norm = inner_products(at, wanted, at, wanted)
    square = norm - 2 * weights @ towards + weights @ gram @ weights
    return weights, float(np.sqrt(max(square / norm, 0.0)))


def combine(weights: np.ndarray, snapshots: Iterable[Tree]) -> list[Tree]:
    """Returns the weighted sums of snapshots, summed in float64 and rounded to their own types.

    The snapshots are read one after the other. weights: float64[n, m], for m sums.
    """
    sums: list[Tree] = []
    for row, tree in zip(weights, snapshots, strict=True):
        terms = [jax.tree.map(lambda x, w=w: w * np.asarray(x, np.float64), tree) for w in row]
        sums = (
            [jax.tree.map(np.add, *pair) for pair in zip(sums, terms, strict=True)]
            if sums
            else terms
        )
    return [jax.tree.map(lambda s, x: s.astype(x.dtype), total, tree) for total in sums]
