"""Regression targets and reverse variances, which turn a network's output into a Prediction.

Every target converts to x_0, and all else follows from x_0. Samplers and likelihood see a model
only as `Predict = (x_t, t) -> Prediction`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion import edm
from diffusion.process import (
    Process,
    beta_between,
    broadcast_right,
    gather,
    half_log_snr,
    posterior,
    q_posterior,
    q_sample,
    scale_by,
)


class Target(NamedTuple):
    """A regression target; images are [b, ...] and t is int[b].

    Attributes:
        from_x0: (p, x_0, eps, x_t, t) -> the network's ideal output at (x_t, t).
        to_x0: (p, output, x_t, t) -> the x_0 that an output stands for.
        is_mean: whether the output is the mean of p_theta(x_{t-1} | x_t) itself.
        x0_scale: p -> |dx_0 / d output| at t = 0..T, float64[T+1], by which errors of x_0 become
            those of the output; entry 0 is not read.
        scale_input: (p, x_t, t) -> what the network is given instead of x_t.
    """

    from_x0: Callable[[Process, Array, Array, Array, Array], Array]
    to_x0: Callable[[Process, Array, Array, Array], Array]
    is_mean: bool = False
    x0_scale: Callable[[Process], np.ndarray] | None = None
    scale_input: Callable[[Process, Array, Array], Array] = lambda p, x_t, t: x_t


def _eps_to_x0(p, eps, x_t, t):
    a = p.alpha_bar
    with np.errstate(divide="ignore"):  # alpha_bar_T may be 0
        return scale_by(np.sqrt(1 / a), t, x_t) - scale_by(np.sqrt(1 / a - 1), t, eps)


def _mu_to_x0(p, mu, x_t, t):
    c = posterior(p, t - 1, t)
    return (mu - broadcast_right(c.weight_t, x_t) * x_t) / broadcast_right(c.weight_0, x_t)


def _mu_x0_scale(p):
    steps = np.arange(1, p.T + 1)
    return np.append(1.0, 1 / posterior(p, steps - 1, steps).weight_0)


TARGETS = {
    "eps": Target(
        lambda p, x_0, eps, x_t, t: eps, _eps_to_x0, x0_scale=lambda p: np.exp(-half_log_snr(p))
    ),
    "x0": Target(
        lambda p, x_0, eps, x_t, t: x_0, lambda p, x_0, *_: x_0, x0_scale=lambda p: np.ones(p.T + 1)
    ),
    "mu": Target(
        lambda p, x_0, eps, x_t, t: q_posterior(p, x_0, x_t, t - 1, t)[0],
        _mu_to_x0,
        is_mean=True,
        x0_scale=_mu_x0_scale,
    ),
    # (x_t, v) is (x_0, eps) rotated by an angle of cosine sqrt(alpha_bar_t).
    "v": Target(
        lambda p, x_0, eps, x_t, t: q_sample(p, eps, t, -x_0),
        lambda p, v, x_t, t: q_sample(p, x_t, t, -v),
        x0_scale=lambda p: np.sqrt(1 - p.alpha_bar),
    ),
    "edm": Target(edm.from_x0, edm.to_x0, x0_scale=edm.x0_scale, scale_input=edm.scale_input),
}


class Variance(NamedTuple):
    """A choice of the variance of p_theta(x_{t-1} | x_t).

    Attributes:
        outputs: the network's channels per image channel: 1 (target) or 2 (and `extra`).
        log_var: (p, extra, t) -> log-variance of p_theta(x_{t-1} | x_t).
        x0_variance: (p, log_var, t) -> the Var[x_0 | x_t] for which log_var is optimal, which
            generalises it to longer steps: 0 for fixed_small, where x_0 is a point, and
            1 - alpha_bar_t for fixed_large, where x_0 is a unit Gaussian (Section 3.2).
        is_range: whether `extra` is a position between the bounds of any step, -1 for log beta~
            and 1 for log beta (a Prediction's `position`).
    """

    outputs: int
    log_var: Callable[[Process, Array | None, Array], Array]
    x0_variance: Callable[[Process, Array, Array], Array]
    is_range: bool = False


def clipped_log_var(p: Process, variance: np.ndarray, t: Array, first=None) -> Array:
    """Returns log variance[t - 1], but log first at t = 1: beta~_2, as beta~_1 = 0 (official)."""
    if first is None:
        first = posterior(p, 1, 2).variance if p.T > 1 else variance[0] or beta_between(p, 0, 1)
    return gather(np.log(np.concatenate([[first, first], variance[1:]])), t)


def posterior_log_var(p: Process, t: Array) -> Array:
    """Returns log beta~_t (eq. 7), clipped at t = 1 (posterior_log_variance_clipped)."""
    steps = np.arange(1, p.T + 1)
    return clipped_log_var(p, posterior(p, steps - 1, steps).variance, t)


def beta_log_var(p: Process, t: Array) -> Array:
    """Returns log beta_t, with the same value at t = 1 as `posterior_log_var`."""
    steps = np.arange(1, p.T + 1)
    return clipped_log_var(p, beta_between(p, steps - 1, steps), t)


def range_log_var(p: Process, position: Array, t: Array) -> Array:
    """Returns the log-variance at a position, -1 for log beta~_t and 1 for log beta_t, or beyond.

    The lower bound is that of `posterior_log_var`; the upper one of t = 1 is log beta_1. Nichol and
    Dhariwal 2021 (arXiv:2102.09672), eq. 15.
    """
    steps = np.arange(p.T + 1)
    lower = np.asarray(posterior_log_var(p, steps))
    upper = np.append(0.0, np.log(beta_between(p, steps[:-1], steps[1:])))
    # As float32 tables the bounds would cancel: they differ by 1e-6 where t is large.
    width = broadcast_right(gather(upper - lower, t), position)
    return broadcast_right(gather(lower, t), position) + 0.5 * (position + 1) * width


def implied_x0_variance(p: Process, log_var: Array, t: Array) -> Array:
    """Solves exp(log_var) = beta~_t + weight_0^2 Var[x_0 | x_t] for Var[x_0 | x_t] >= 0.

    That log_var is the optimal one: Bao et al. 2022 (arXiv:2201.06503), Thm. 1.
    """
    c = posterior(p, t - 1, t)
    excess = jnp.exp(log_var) - broadcast_right(c.variance, log_var)
    return jnp.maximum(excess, 0) / broadcast_right(c.weight_0, log_var) ** 2


VARIANCES = {
    "fixed_small": Variance(
        1,
        lambda p, extra, t: posterior_log_var(p, t),
        lambda p, log_var, t: jnp.zeros_like(log_var),
    ),
    "fixed_large": Variance(
        1,
        lambda p, extra, t: beta_log_var(p, t),
        lambda p, log_var, t: broadcast_right(beta_between(p, 0, t), log_var),
    ),
    "learned": Variance(2, lambda p, extra, t: extra, implied_x0_variance),
    "learned_range": Variance(2, range_log_var, implied_x0_variance, is_range=True),
}


class Prediction(NamedTuple):
    """A model's output at (x_t, t), independent of its target and variance.

    Attributes:
        x_0: [b, ...], the predicted image, clipped to [-1, 1] where clipping is on.
        eps: [b, ...], the noise of x_t given this x_0.
        log_var: [b, 1, ..., 1] or [b, ...], the log-variance of p_theta(x_{t-1} | x_t).
        x0_variance: as log_var, the Var[x_0 | x_t] for steps t -> s < t-1.
        mean: [b, ...], the mean of p_theta(x_{t-1} | x_t) of a mu-network; None: eq. 7 at x_0.
        position: [b, ...], of a learned range, where the log-variance of any step x_t -> x_s lies
            between its bounds; see `range_log_var`. None: x0_variance decides.
    """

    x_0: Array
    eps: Array
    log_var: Array
    x0_variance: Array
    mean: Array | None = None
    position: Array | None = None


Predict = Callable[[Array, Array], Prediction]


def make_predict(
    p: Process,
    apply: Callable[[Array, Array], Array],
    target: Target,
    variance: Variance,
    clip: bool | Callable[[Array], Array] = True,
) -> Predict:
    """Turns a network into `predict: (x_t, t) -> Prediction` for t in 1..T, a scalar or int[b].

    Args:
        p: the process of the training, whose steps target and variance refer to.
        apply: the network, (x_t, model_t[b]) -> output of variance.outputs times x_t's channels.
        clip: whether to clip x_0 to [-1, 1], and eps with it, or a function to apply to x_0
            instead. The mean given by a mu-network is never clipped (official: clip_denoised).
    """

    def predict(x_t: Array, t: Array) -> Prediction:
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        output = apply(target.scale_input(p, x_t, t), gather(p.model_t, t))
        expected = (*x_t.shape[:-1], x_t.shape[-1] * variance.outputs)
        if output.shape != expected:
            raise ValueError(f"network output: expected {expected}, found {output.shape}")
        output, extra = jnp.split(output, 2, axis=-1) if variance.outputs == 2 else (output, None)
        x_0 = target.to_x0(p, output, x_t, t)
        if clip:
            x_0 = clip(x_0) if callable(clip) else jnp.clip(x_0, -1, 1)
        log_var = broadcast_right(variance.log_var(p, extra, t), x_t)
        return Prediction(
            x_0=x_0,
            eps=eps_from_x0(p, x_0, x_t, t),
            log_var=log_var,
            x0_variance=variance.x0_variance(p, log_var, t),
            mean=output if target.is_mean else None,
            position=extra if variance.is_range else None,
        )

    return predict


def eps_from_x0(p: Process, x_0: Array, x_t: Array, t: Array) -> Array:
    """Returns the eps with q_sample(p, x_0, t, eps) = x_t (eq. 4), for t in 1..T."""
    a = p.alpha_bar
    with np.errstate(divide="ignore"):  # the entry of t = 0 is not read
        return scale_by(np.sqrt(1 / (1 - a)), t, x_t) - scale_by(np.sqrt(a / (1 - a)), t, x_0)


def p_mean_log_variance(
    p: Process, prediction: Prediction, x_t: Array, s: Array, t: Array
) -> tuple[Array, Array]:
    """Returns mean [b, ...] and log-variance of p_theta(x_s | x_t) (eq. 1), any 0 <= s < t <= T.

    s and t are scalars or int[b]. The log-variance, which may be -inf, broadcasts with the mean.
    """
    s, t = (jnp.broadcast_to(jnp.asarray(u), x_t.shape[:1]) for u in (s, t))
    one_step = broadcast_right(s == t - 1, x_t) > 0
    mean, variance = q_posterior(p, prediction.x_0, x_t, s, t)
    if prediction.mean is not None:
        mean = jnp.where(one_step, prediction.mean, mean)
    weight_0 = broadcast_right(posterior(p, s, t).weight_0, x_t)
    long_step = jnp.log(variance + weight_0**2 * prediction.x0_variance)
    if prediction.position is not None:
        # log beta - log beta~ = log((1 - alpha_bar_t) / (1 - alpha_bar_s)); at s = 0, -inf.
        width = jnp.log(beta_between(p, 0, t) / beta_between(p, 0, jnp.maximum(s, 1)))
        shift = 0.5 * (prediction.position + 1) * broadcast_right(width, x_t)
        long_step = jnp.log(variance) + shift
    return mean, jnp.where(one_step, prediction.log_var, long_step)
