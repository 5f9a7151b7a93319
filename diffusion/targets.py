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
    at,
    expand,
    noise_share,
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
    return expand(at(table, t), x) * x


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
    return (output - expand(c.weight_t, x_t) * x_t) / expand(c.weight_0, x_t)


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
    table[:2] = posterior(p, 1, 2).variance if p.T > 1 else variance[1] or noise_share(p, 0, 1)
    return np.log(table)


def posterior_log_var(p: Process, t: Array) -> Array:
    """log beta~_t of eq. 7, at t = 1 that of t = 2 (posterior_log_variance_clipped)."""
    steps = np.arange(1, p.T + 1)
    return at(_log_table(p, np.append(0, posterior(p, steps - 1, steps).variance)), t)


def beta_log_var(p: Process, t: Array) -> Array:
    """log beta_t, with t = 1 as in `posterior_log_var`."""
    steps = np.arange(1, p.T + 1)
    return at(_log_table(p, np.append(0, noise_share(p, steps - 1, steps))), t)


def implied_var_0(p: Process, log_var: Array, t: Array) -> Array:
    """The variance of x_0 given x_t that makes `log_var` the optimal one for t -> t-1, at least 0.

    sigma^2 = beta~ + weight_0^2 Var[x_0 | x_t] (Bao et al. 2022, arXiv 2201.06503, Theorem 1),
    solved for Var.
    """
    c = posterior(p, t - 1, t)
    excess = jnp.exp(log_var) - expand(c.variance, log_var)
    return jnp.maximum(excess, 0) / expand(c.weight_0, log_var) ** 2


VARIANCES = {
    "fixed_small": Variance(
        1,
        lambda p, extra, t: posterior_log_var(p, t),
        lambda p, log_var, t: jnp.zeros_like(log_var),
    ),
    "fixed_large": Variance(
        1,
        lambda p, extra, t: beta_log_var(p, t),
        lambda p, log_var, t: expand(noise_share(p, 0, t), log_var),
    ),
    "learned": Variance(2, lambda p, extra, t: extra, implied_var_0),
}


def analytic(var_0: np.ndarray, decoder: np.ndarray | None = None) -> Variance:
    """The isotropic variance that makes the bound least: beta~ + weight_0^2 var_0[t].

    Bao et al. 2022, arXiv 2201.06503, Theorem 1, with a measured Var[x_0 | x_t] (bounds.optimum).

    var_0:   float64[T+1], one for each t of the trained chain; entry 0 is not read.
    decoder: float64[T+1], the variance of p(x_0 | x_t) for a chain whose first step is t -> 0;
             entry 0 is not read. None: that of the fixed variances.
    Entries are found by what the network is told, t - 1, so they hold for every respaced chain.
    Raises ValueError for tables of other shapes or with negative entries.
    """
    var_0 = np.asarray(var_0, np.float64)
    decoder = None if decoder is None else np.asarray(decoder, np.float64)
    for table in (var_0, var_0 if decoder is None else decoder):
        if table.ndim != 1 or table.shape != var_0.shape or not np.all(table[1:] >= 0):
            raise ValueError(f"analytic: expected T + 1 numbers, none below 0; found {table}")

    def trained(p: Process) -> np.ndarray:
        times = np.round(p.model_t).astype(int) + 1
        if times[-1] >= len(var_0):
            raise ValueError(f"analytic: the table ends at t = {len(var_0) - 1} < {times[-1]}")
        return times

    def log_var(p: Process, extra: Array | None, t: Array) -> Array:
        steps, times = np.arange(1, p.T + 1), trained(p)
        c = posterior(p, steps - 1, steps)
        table = np.append(0, c.variance + c.weight_0**2 * var_0[times[1:]])
        if decoder is None:
            return at(_log_table(p, table), t)
        table[:2] = decoder[times[1]]
        return at(np.log(table), t)

    def of_x_0(p: Process, log_var: Array, t: Array) -> Array:
        return expand(at(var_0[trained(p)], t), log_var)

    return Variance(1, log_var, of_x_0)


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


def threshold(ratio: float = 0.995, maximum: float = np.inf) -> Callable[[Array], Array]:
    """Dynamic thresholding of x_0, in place of clipping (Imagen, arXiv 2205.11487, Section 2.3).

    Each image is clipped to [-c, c] and divided by c, the quantile `ratio` of its |x_0|, but at
    least 1 and at most `maximum`. For strong guidance, whose x_0 clipping saturates. Raises
    ValueError.
    """
    if not (0 < ratio <= 1 <= maximum):
        found = f"{ratio} and {maximum}"
        raise ValueError(f"threshold: expected 0 < ratio <= 1 <= maximum, found {found}")

    def limit(x_0: Array) -> Array:
        c = jnp.quantile(jnp.abs(x_0).reshape(len(x_0), -1), ratio, axis=1)
        c = expand(jnp.clip(c, 1, maximum), x_0)
        return jnp.clip(x_0, -c, c) / c

    return limit


def guided(
    apply: Callable[[Array, Array, Array], Array], label: Array, null: int, w: float | Array
) -> Callable[[Array, Array], Array]:
    """Classifier-free guidance as a network `(x_t, model_t[b]) -> output`.

    Eq. 6 of arXiv 2207.12598,

        (1 + w) output(x_t, label) - w output(x_t, null)

    of what is predicted, before x_0 is clipped; for any target, as each is linear in eps at one
    x_t. A second half of the channels, a learned variance, is the labelled one's.
    apply: (x_t [2b, ...], model_t[2b], label[2b]) -> output: both are one evaluation, pairs side by
           side, so that a batch cut over devices stays where it is.
    label: int[b]. null: the label that means none; for unet.UNet its num_classes. w: a number or
    [b]; 0 is no guidance, -1 no label. Others count from 1: their scale is 1 + w.
    """

    def both(x_t: Array, model_t: Array) -> Array:
        labels = jnp.stack([label, jnp.full_like(label, null)], 1).reshape(-1)
        output = apply(jnp.repeat(x_t, 2, 0), jnp.repeat(model_t, 2, 0), labels)
        output = output.reshape(len(x_t), 2, *output.shape[1:])
        labelled, free = output[:, 0], output[:, 1]
        of, rest = jnp.split(labelled, [x_t.shape[-1]], axis=-1)
        of = of + expand(w, of) * (of - free[..., : x_t.shape[-1]])
        return jnp.concatenate([of, rest], -1)

    return both


CLIPS = {True: lambda x_0: jnp.clip(x_0, -1, 1), False: lambda x_0: x_0}


def predictor(
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
        output = apply(x_t, at(p.model_t, t))
        expected = (*x_t.shape[:-1], x_t.shape[-1] * variance.outputs)
        if output.shape != expected:
            raise ValueError(f"network output: expected {expected}, found {output.shape}")
        output, extra = jnp.split(output, 2, axis=-1) if variance.outputs == 2 else (output, None)
        x_0 = limit(target.to_x0(p, output, x_t, t))
        log_var = variance.log_var(p, extra, t)
        log_var = expand(log_var, x_t) if extra is None else log_var
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


def reverse(p: Process, prediction: Prediction, x_t: Array, s, t) -> tuple[Array, Array]:
    """Mean and log-variance of p_theta(x_s | x_t): eq. 1 for s = t - 1, and any 0 <= s < t <= T.

    s, t: ints, scalar or [b]. Returns the mean [b, ...] and the log-variance, which broadcasts to
    it; -inf where the step is certain.
    """
    s, t = (jnp.broadcast_to(jnp.asarray(u), x_t.shape[:1]) for u in (s, t))
    one_step = expand(s == t - 1, x_t) > 0
    mean, variance = q_posterior(p, prediction.x_0, x_t, s, t)
    if prediction.mean is not None:
        mean = jnp.where(one_step, prediction.mean, mean)
    var_0 = prediction.var_0
    if var_0 is None:
        var_0 = implied_var_0(p, prediction.log_var, t)
    weight_0 = expand(posterior(p, s, t).weight_0, x_t)
    long_step = jnp.log(variance + weight_0**2 * var_0)
    return mean, jnp.where(one_step, prediction.log_var, long_step)


def respaced(p: Process, predict: Predict, variance: Variance, ts: np.ndarray) -> Predict:
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
        s, t = at(times, i - 1), at(times, i)
        prediction = predict(x_t, t)
        mean, log_var = reverse(p, prediction, x_t, s, t)
        var_0 = prediction.var_0
        if variance.outputs == 1:
            log_var = expand(variance.log_var(q, None, i), x_t)
            var_0 = variance.var_0(q, log_var, i)
        else:
            floor = jnp.maximum(log_var, expand(posterior_log_var(q, i), x_t))
            log_var = jnp.where(expand(s == t - 1, x_t) > 0, log_var, floor)
        mean = None if prediction.mean is None else mean
        return prediction._replace(log_var=log_var, var_0=var_0, mean=mean)

    return shorter


TARGETS = {
    "eps": Target(_eps_of, _eps_to_x0),
    "x0": Target(_x0_of, _x0_to_x0),
    "mu": Target(_mu_of, _mu_to_x0, is_mean=True),
    "v": Target(_v_of, _v_to_x0),
}
