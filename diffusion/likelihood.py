"""The variational bound on -log p(x_0), term by term, in bits per dimension (Section 2, eq. 5).

L = L_T + sum_{t>1} L_{t-1} + L_0. Everything is a mean over an image's dimensions divided by ln 2,
so terms of one image add up to its bits per dimension.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.process import (
    Process,
    example_keys,
    noise,
    q_posterior,
    q_sample,
)
from diffusion.targets import Predict, Prediction, posterior_log_var, reverse


def meanflat(x: Array) -> Array:
    """The mean over all axes but the first: [b, ...] -> [b]."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def normal_kl(mean_1: Array, log_var_1: Array, mean_2: Array, log_var_2: Array) -> Array:
    """KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise; the arguments broadcast."""
    log_ratio = log_var_2 - log_var_1
    return 0.5 * (
        -1.0 + log_ratio + jnp.exp(-log_ratio) + (mean_1 - mean_2) ** 2 * jnp.exp(-log_var_2)
    )


def _normal_cdf(x: Array) -> Array:
    """The tanh approximation of the normal CDF that the official code uses, as GELU does."""
    return 0.5 * (1.0 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def decoder_log_likelihood(x_0: Array, mean: Array, log_scale: Array) -> Array:
    """log p(x_0 | x_1) in nats, elementwise: a Gaussian's mass on the pixel's interval (eq. 13).

    x_0: pixel values k/127.5 - 1, k in 0..255; mean and log standard deviation broadcast to it. The
         256 masses sum to
    1: the outer intervals are unbounded. A mass counts as at least 1e-12, as in the official code.
    """
    inverse_scale = jnp.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (x_0 - mean + 1 / 255))
    lower = _normal_cdf(inverse_scale * (x_0 - mean - 1 / 255))
    upper = jnp.where(x_0 > 0.999, 1.0, upper)
    lower = jnp.where(x_0 < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))


def prior_bits(p: Process, x_0: Array) -> Array:
    """L_T = KL(q(x_T | x_0) || N(0, 1)) in bits/dim [b]; sampling starts from this N(0, 1)."""
    a = p.alpha_bar[-1]
    mean = jnp.asarray(np.sqrt(a), x_0.dtype) * x_0
    return meanflat(normal_kl(mean, np.log1p(-a).astype(x_0.dtype), 0.0, 0.0)) / np.log(2)


def term_bits(p: Process, prediction: Prediction, x_0: Array, x_t: Array, t: Array) -> Array:
    """L_{t-1} in bits/dim [b]: the KL of eq. 5 for t > 1, -log p(x_0 | x_1) alone for t = 1.

    prediction: the model's at (x_t, t); x_0, x_t: [b, ...], x_0 on the 256 levels; t: int[b] in
                1..T.
    """
    mean, log_var = reverse(p, prediction, x_t, t - 1, t)
    q_mean, _ = q_posterior(p, x_0, x_t, t - 1, t)
    q_log_var = posterior_log_var(p, t).astype(x_0.dtype)
    q_log_var = q_log_var.reshape(t.shape + (1,) * (x_0.ndim - 1))
    kl = meanflat(normal_kl(q_mean, q_log_var, mean, log_var))
    nll = -meanflat(decoder_log_likelihood(x_0, mean, 0.5 * log_var))
    return jnp.where(t == 1, nll, kl) / np.log(2)


class Terms(NamedTuple):
    """The bound of each image, taken apart.

    bits: [b, T+1] in bits/dim, bits[:, k] = L_k of the paper: the sum is the bound, the running sum
          from the right the rate spent when x_k is known (Section 4.3).
    mse:  [b, T], mse[:, t-1] = squared error of the x_0 predicted from x_t, [-1, 1] scale; RMSE on
          0-255 is 127.5 sqrt(mse).
    """

    bits: Array
    mse: Array


def terms(p: Process, predict: Predict, key: Array, x_0: Array) -> Terms:
    """A Monte Carlo reading of every term: a fresh x_t for each t, T network evaluations.

    key: one key, or one per example [b]; x_0: [b, ...] on the levels k/127.5 - 1. The bound's mean
         over draws is exact.
    Official code: calc_bpd_loop, diffusion_utils_2.py.
    """
    keys = example_keys(key, x_0.shape[0])

    def one(_, t):
        t_b = jnp.broadcast_to(t, x_0.shape[:1])
        x_t = q_sample(p, x_0, t_b, noise(keys, t, x_0))
        prediction = predict(x_t, t_b)
        mse = meanflat((prediction.x_0 - x_0) ** 2)
        return None, (term_bits(p, prediction, x_0, x_t, t_b), mse)

    _, (bits, mse) = lax.scan(one, None, jnp.arange(1, p.T + 1))
    return Terms(jnp.append(bits.T, prior_bits(p, x_0)[:, None], axis=1), mse.T)


class RateDistortion(NamedTuple):
    """Progressive coding of each image (Section 4.3): what it costs to know x_k, and what it shows.

    Both are float64[b, T]; column k - 1 is where x_k is known and x_{k-1} is not.
    rate: bits/dim sent until then, L_k + ... + L_T (Algorithm 3 and 4: L_T for x_T, L_{t-1} for
          x_{t-1}). What is left, L_0 + ... + L_{k-1}, makes the image lossless.
    rmse: distortion, the root of the mean squared error of the x_0 predicted from x_k, on 0-255.
    """

    rate: np.ndarray
    rmse: np.ndarray


def rate_distortion(terms: Terms) -> RateDistortion:
    """Rate and distortion of each image at each step, on the host."""
    bits, mse = (np.asarray(a, np.float64) for a in terms)
    return RateDistortion(np.cumsum(bits[:, :0:-1], axis=1)[:, ::-1], 127.5 * np.sqrt(mse))


class Average(NamedTuple):
    """A mean over images and its standard error, float64 of an image's shape."""

    mean: np.ndarray
    error: np.ndarray


def average(values: Array | np.ndarray) -> Average:
    """Mean and standard error over axis 0 of [n, ...], n independent images, on the host.

    The error is of the mean over all images that there could be, of which these n are a sample.
    Raises ValueError for n < 2, which says nothing of an error.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"average: expected two or more images, found {len(values)}")
    return Average(values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values)))


# Table 4 of the paper, CIFAR-10's test set, T = 1000: (step r, rate, RMSE). After r transmissions,
# x_T the first of them, x_k with k = T - r + 1 is known: in the last row, x_1. (Were it x_0, the
# distortion would be 0. Its rate 1.78 lacks L_0 = 1.97 of the whole 3.75, Section 4.3.)
TABLE_4 = (
    (1000, 1.77581, 0.95136),
    (900, 0.11994, 12.02277),
    (800, 0.05415, 18.47482),
    (700, 0.02866, 24.43656),
    (600, 0.01507, 30.80948),
    (500, 0.00716, 38.03236),
    (400, 0.00282, 46.12765),
    (300, 0.00081, 54.18826),
    (200, 0.00013, 60.97170),
    (100, 0.00000, 67.60125),
)


class Row(NamedTuple):
    """One row of a Table 4: after `step` transmissions, in bits/dim and on 0-255."""

    step: int
    rate: Average
    rmse: Average


def table_4(rate: Average, rmse: Average) -> list[Row]:
    """The paper's Table 4 from one's own averages [T]: after T, 9T/10, ... T/10 transmissions.

    For T = 1000 these are the rows of TABLE_4. Raises ValueError if 10 does not divide T.
    """
    T = len(rate.mean)
    if T % 10:
        raise ValueError(f"table_4: expected a chain of 10 n steps, found {T}")
    # Column k - 1 = T - r.
    return [
        Row(r, *(Average(a.mean[T - r], a.error[T - r]) for a in (rate, rmse)))
        for r in range(T, 0, -T // 10)
    ]
