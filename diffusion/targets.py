"""What the network predicts, and with which variance: network output -> Prediction.

The targets form a star, not an N x N table: whatever is predicted is turned into x_0, and
everything else follows from x_0. Samplers, likelihood and codec know a model only through `Predict
= (x_t, t) -> Prediction`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion.process import (
    Process,
    beta_between,
    broadcast_right,
    gather,
    posterior,
    q_posterior,
    respace,
)


class Target(NamedTuple):
    """One choice of regression target.

    of:    (p, x_0, eps, x_t, t) -> what the network should output at (x_t, t); all images [b, ...],
           t int[b].
    to_x0: (p, output, x_t, t) -> the x_0 that this output says.
    is_mean: the output is itself the mean of p_theta(x_{t-1} | x_t).
    """

    of: Callable[[Process, Array, Array, Array, Array], Array]
    to_x0: Callable[[Process, Array, Array, Array], Array]
    is_mean: bool = False


def _scaled(table: np.ndarray, t: Array, x: Array) -> Array:
    return broadcast_right(gather(table, t), x) * x


def _eps_of(p, x_0, eps, x_t, t):
    return eps


def _eps_to_x0(p, output, x_t, t):
    a = p.alpha_bar
    with np.errstate(divide="ignore"):
        return _scaled(np.sqrt(1 / a), t, x_t) - _scaled(np.sqrt(1 / a - 1), t, output)


def _x0_of(p, x_0, eps, x_t, t):
    return x_0


def _x0_to_x0(p, output, x_t, t):
    return output


def _mu_of(p, x_0, eps, x_t, t):
    return q_posterior(p, x_0, x_t, t - 1, t)[0]


def _mu_to_x0(p, output, x_t, t):
    c = posterior(p, t - 1, t)
    return (output - broadcast_right(c.weight_t, x_t) * x_t) / broadcast_right(c.weight_0, x_t)


def _v_of(p, x_0, eps, x_t, t):
    a = p.alpha_bar
    return _scaled(np.sqrt(a), t, eps) - _scaled(np.sqrt(1 - a), t, x_0)


def _v_to_x0(p, output, x_t, t):
    a = p.alpha_bar
    return _scaled(np.sqrt(a), t, x_t) - _scaled(np.sqrt(1 - a), t, output)


class Variance(NamedTuple):
    """One choice of the variance of p_theta(x_{t-1} | x_t).

    outputs: how many numbers per pixel and channel the network gives, 1 (the target) or 2 (and the
             log-variance).
    log_var: (p, extra, t) -> log-variance of the step t -> t-1; extra is the network's second half,
             or None.
    var_0:   (p, log_var, t) -> the variance of x_0 given x_t which that choice amounts to: none if
             x_0 is taken as known (fixed small), 1 - alpha_bar_t if x_0 is taken as unit Gaussian
             (fixed large; Section 3.2). It carries the choice over to longer steps, t -> s < t-1.
    """

    outputs: int
    log_var: Callable[[Process, Array | None, Array], Array]
    var_0: Callable[[Process, Array, Array], Array]


def _log_table(p: Process, variance: np.ndarray) -> np.ndarray:
    """log variance[t] for t = 0..T; t = 1 takes beta~_2, the smallest posterior variance above 0.

    The official code does so for both fixed variances: no noise is drawn at t = 1, only the decoder
    reads it.
    """
    table = variance.copy()
    table[:2] = posterior(p, 1, 2).variance if p.T > 1 else variance[1] or beta_between(p, 0, 1)
    return np.log(table)


def posterior_log_var(p: Process, t: Array) -> Array:
    """log beta~_t of eq. 7, at t = 1 that of t = 2 (posterior_log_variance_clipped)."""
    steps = np.arange(1, p.T + 1)
    return gather(_log_table(p, np.append(0, posterior(p, steps - 1, steps).variance)), t)


def beta_log_var(p: Process, t: Array) -> Array:
    """log beta_t, with t = 1 as in `posterior_log_var`."""
    steps = np.arange(1, p.T + 1)
    return gather(_log_table(p, np.append(0, beta_between(p, steps - 1, steps))), t)


def implied_var_0(p: Process, log_var: Array, t: Array) -> Array:
    """The variance of x_0 given x_t that makes `log_var` the optimal one for t -> t-1, at least 0.

    sigma^2 = beta~ + weight_0^2 Var[x_0 | x_t] (Bao et al. 2022, arXiv 2201.06503, Theorem 1),
    solved for Var.
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
    "learned": Variance(2, lambda p, extra, t: extra, implied_var_0),
}


class Prediction(NamedTuple):
    """What a model says of (x_t, t): the only thing samplers, likelihood and codec know of it.

    x_0:     [b, ...] the image it sees behind the noise, clipped to [-1, 1] where clipping is on.
    eps:     [b, ...] the noise that goes with this x_0.
    log_var: [b, 1, ..., 1] or [b, ...], the log-variance of p(x_{t-1} | x_t).
    var_0:   the same choice as a variance of x_0 given x_t, for steps longer than one; None:
             derived from log_var.
    mean:    [b, ...] of p(x_{t-1} | x_t), where the network gives it itself (mu); None: eq. 7 at
             x_0.
    """

    x_0: Array
    eps: Array
    log_var: Array
    var_0: Array | None = None
    mean: Array | None = None


Predict = Callable[[Array, Array], Prediction]


CLIPS = {True: lambda x_0: jnp.clip(x_0, -1, 1), False: lambda x_0: x_0}


def make_predict(
    p: Process,
    apply: Callable[[Array, Array], Array],
    target: Target,
    variance: Variance,
    clip: bool | Callable[[Array], Array] = True,
) -> Predict:
    """Turns a network `apply: (x_t, model_t[b]) -> output` into `predict: (x_t, t) -> Prediction`.

    p must be the process of the training: the targets mean its steps. t is an int scalar or int[b]
    in 1..T. With `clip`, x_0 is clipped to [-1, 1] and eps follows from it (official code:
    clip_denoised); the mean that a mu-network gives is left as it is, as there. A function in its
    place, such as `threshold()`, is applied to x_0 instead. Raises ValueError if the network's
    channels do not match the variance.
    """

    limit = clip if callable(clip) else CLIPS[bool(clip)]

    def predict(x_t: Array, t: Array) -> Prediction:
        t = jnp.broadcast_to(jnp.asarray(t), x_t.shape[:1])
        output = apply(x_t, gather(p.model_t, t))
        expected = (*x_t.shape[:-1], x_t.shape[-1] * variance.outputs)
        if output.shape != expected:
            raise ValueError(f"network output: expected {expected}, found {output.shape}")
        output, extra = jnp.split(output, 2, axis=-1) if variance.outputs == 2 else (output, None)
        x_0 = limit(target.to_x0(p, output, x_t, t))
        log_var = variance.log_var(p, extra, t)
        log_var = broadcast_right(log_var, x_t) if extra is None else log_var
        return Prediction(
            x_0=x_0,
            eps=eps_from_x0(p, x_0, x_t, t),
            log_var=log_var,
            var_0=variance.var_0(p, log_var, t),
            mean=output if target.is_mean else None,
        )

    return predict


def eps_from_x0(p: Process, x_0: Array, x_t: Array, t: Array) -> Array:
    """The eps of eq. 4 that leads from x_0 to x_t. t: int[b] in 1..T."""
    a = p.alpha_bar
    with np.errstate(divide="ignore"):  # t = 0 has no noise; it is never asked for
        return _scaled(np.sqrt(1 / (1 - a)), t, x_t) - _scaled(np.sqrt(a / (1 - a)), t, x_0)


def p_mean_log_variance(p: Process, prediction: Prediction, x_t: Array, s, t) -> tuple[Array, Array]:
    """Mean and log-variance of p_theta(x_s | x_t): eq. 1 for s = t - 1, and any 0 <= s < t <= T.

    s, t: ints, scalar or [b]. Returns the mean [b, ...] and the log-variance, which broadcasts to
    it; -inf where the step is certain.
    """
    s, t = (jnp.broadcast_to(jnp.asarray(u), x_t.shape[:1]) for u in (s, t))
    one_step = broadcast_right(s == t - 1, x_t) > 0
    mean, variance = q_posterior(p, prediction.x_0, x_t, s, t)
    if prediction.mean is not None:
        mean = jnp.where(one_step, prediction.mean, mean)
    var_0 = prediction.var_0
    if var_0 is None:
        var_0 = implied_var_0(p, prediction.log_var, t)
    weight_0 = broadcast_right(posterior(p, s, t).weight_0, x_t)
    long_step = jnp.log(variance + weight_0**2 * var_0)
    return mean, jnp.where(one_step, prediction.log_var, long_step)


def respace_predict(p: Process, predict: Predict, variance: Variance, ts: np.ndarray) -> Predict:
    """The same model on the chain `process.respace(p, ts)`, for every target: (x, i) -> Prediction.

    predict: the model on p, asked at the trained time ts[i], from which a step of the shorter chain
             goes down to ts[i - 1].
    variance: the choice for the longer steps. One that the network does not give is that of the
             shorter chain's own tables, whatever `predict` was built with. A learned one is carried
             over by what it says of x_0, except where the step is a trained one; at the first step
             not below the shorter chain's clipped variance, as x_0 may count as known there.
    Where the network gives the mean, it is kept for trained steps. All of p's times: all the same.
    ts: distinct ints in 1..T, in any order. Raises ValueError for others.
    """
    q = respace(p, ts)
    times = np.append(0, np.sort(np.asarray(ts)))

    def shorter(x_t: Array, i: Array) -> Prediction:
        i = jnp.broadcast_to(jnp.asarray(i), x_t.shape[:1])
        s, t = gather(times, i - 1), gather(times, i)
        prediction = predict(x_t, t)
        mean, log_var = p_mean_log_variance(p, prediction, x_t, s, t)
        var_0 = prediction.var_0
        if variance.outputs == 1:
            log_var = broadcast_right(variance.log_var(q, None, i), x_t)
            var_0 = variance.var_0(q, log_var, i)
        else:
            floor = jnp.maximum(log_var, broadcast_right(posterior_log_var(q, i), x_t))
            log_var = jnp.where(broadcast_right(s == t - 1, x_t) > 0, log_var, floor)
        mean = None if prediction.mean is None else mean
        return prediction._replace(log_var=log_var, var_0=var_0, mean=mean)

    return shorter


TARGETS = {
    "eps": Target(_eps_of, _eps_to_x0),
    "x0": Target(_x0_of, _x0_to_x0),
    "mu": Target(_mu_of, _mu_to_x0, is_mean=True),
    "v": Target(_v_of, _v_to_x0),
}
