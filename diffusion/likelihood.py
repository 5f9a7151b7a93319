"""The variational bound on -log p(x_0), term by term, in bits per dimension (Section 2, eq. 5).

L = L_T + sum_{t>1} L_{t-1} + L_0. Everything is a mean over an image's dimensions divided by ln 2,
so terms of one image add up to its bits per dimension.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.process import Process, example_keys, q_posterior, q_sample, sample_noise
from diffusion.targets import Predict, Prediction, p_mean_log_variance, posterior_log_var


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


def vlb_term(p: Process, prediction: Prediction, x_0: Array, x_t: Array, t: Array) -> Array:
    """L_{t-1} in bits/dim [b]: the KL of eq. 5 for t > 1, -log p(x_0 | x_1) alone for t = 1.

    prediction: the model's at (x_t, t); x_0, x_t: [b, ...], x_0 on the 256 levels; t: int[b] in
                1..T.
    """
    mean, log_var = p_mean_log_variance(p, prediction, x_t, t - 1, t)
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


def vlb_terms(p: Process, predict: Predict, key: Array, x_0: Array) -> Terms:
    """A Monte Carlo reading of every term: a fresh x_t for each t, T network evaluations.

    key: one key, or one per example [b]; x_0: [b, ...] on the levels k/127.5 - 1. The bound's mean
         over draws is exact.
    Official code: calc_bpd_loop, diffusion_utils_2.py.
    """
    keys = example_keys(key, x_0.shape[0])

    def one(_, t):
        t_b = jnp.broadcast_to(t, x_0.shape[:1])
        x_t = q_sample(p, x_0, t_b, sample_noise(keys, t, x_0))
        prediction = predict(x_t, t_b)
        mse = meanflat((prediction.x_0 - x_0) ** 2)
        return None, (vlb_term(p, prediction, x_0, x_t, t_b), mse)

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
