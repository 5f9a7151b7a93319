"""The variational bound on -log p(x_0), term by term (eq. 5): L = L_T + sum_{t>1} L_{t-1} + L_0.

Terms are in bits/dim: the mean over an image's dimensions, divided by ln 2.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion import process
from diffusion.process import Process, broadcast_right, example_keys, q_posterior, q_sample
from diffusion.targets import Predict, Prediction, p_mean_log_variance, posterior_log_var


def meanflat(x: Array) -> Array:
    """Averages over all axes but the first: [b, ...] -> [b]."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def normal_kl(mean_1: Array, log_var_1: Array, mean_2: Array, log_var_2: Array) -> Array:
    """Returns KL(N(mean_1, var_1) || N(mean_2, var_2)) in nats, elementwise with broadcasting."""
    log_ratio = log_var_2 - log_var_1
    return 0.5 * (
        -1.0 + log_ratio + jnp.exp(-log_ratio) + (mean_1 - mean_2) ** 2 * jnp.exp(-log_var_2)
    )


def _normal_cdf(x: Array) -> Array:
    """Approximates the standard normal CDF by a tanh, as the official code and GELU do."""
    return 0.5 * (1.0 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def decoder_log_likelihood(x_0: Array, mean: Array, log_scale: Array, levels: int = 256) -> Array:
    """Returns log p(x_0 | x_1) in nats, elementwise (eq. 13), at least log 1e-12.

    It is the mass of N(mean, exp(log_scale)^2) within 1 / (levels - 1) of x_0, half the distance of
    two levels (see data.augment.scale), where the intervals of -1 and 1 are unbounded.
    """
    half = 1 / (levels - 1)
    inverse_scale = jnp.exp(-log_scale)
    upper = _normal_cdf(inverse_scale * (x_0 - mean + half))
    lower = _normal_cdf(inverse_scale * (x_0 - mean - half))
    upper = jnp.where(x_0 > 0.999, 1.0, upper)
    lower = jnp.where(x_0 < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(upper - lower, 1e-12))


def prior_bits(p: Process, x_0: Array) -> Array:
    """Returns L_T = KL(q(x_T | x_0) || N(0, 1)) in bits/dim [b]."""
    a = p.alpha_bar[-1]
    mean = jnp.asarray(np.sqrt(a), x_0.dtype) * x_0
    return meanflat(normal_kl(mean, np.log1p(-a).astype(x_0.dtype), 0.0, 0.0)) / np.log(2)


def vlb_term(
    p: Process, prediction: Prediction, x_0: Array, x_t: Array, t: Array, levels: int = 256
) -> Array:
    """Returns L_{t-1} in bits/dim [b]: the KL of eq. 5 for t > 1, -log p(x_0 | x_1) for t = 1.

    The prediction is the model's at (x_t, t), x_0 on `levels` levels, and t is int[b] in 1..T.
    """
    mean, log_var = p_mean_log_variance(p, prediction, x_t, t - 1, t)
    q_mean, _ = q_posterior(p, x_0, x_t, t - 1, t)
    q_log_var = broadcast_right(posterior_log_var(p, t), x_0)
    kl = meanflat(normal_kl(q_mean, q_log_var, mean, log_var))
    nll = -meanflat(decoder_log_likelihood(x_0, mean, 0.5 * log_var, levels))
    return jnp.where(t == 1, nll, kl) / np.log(2)


class VLBTerms(NamedTuple):
    """The terms of each image's bound, and the mean squared errors of the predicted x_0."""

    bits: Array  # [b, T+1], bits[:, k] = L_k in bits/dim
    mse: Array  # [b, T], mse[:, t-1] is that of the x_0 predicted from x_t, on [-1, 1]


def vlb_terms(p: Process, predict: Predict, key: Array, x_0: Array, levels: int = 256) -> VLBTerms:
    """Estimates every term by one draw of x_t for each t, without bias: T network evaluations.

    The key is one key or one per example [b], and x_0 is on `levels` levels (official:
    calc_bpd_loop).
    """
    keys = example_keys(key, x_0.shape[0])

    def term(_, t):
        t_b = jnp.broadcast_to(t, x_0.shape[:1])
        x_t = q_sample(p, x_0, t_b, process.sample_noise(keys, t, x_0))
        prediction = predict(x_t, t_b)
        mse = meanflat((prediction.x_0 - x_0) ** 2)
        return None, (vlb_term(p, prediction, x_0, x_t, t_b, levels), mse)

    _, (bits, mse) = lax.scan(term, None, jnp.arange(1, p.T + 1))
    return VLBTerms(jnp.append(bits.T, prior_bits(p, x_0)[:, None], axis=1), mse.T)


class RateDistortion(NamedTuple):
    """Progressive coding of each image (Section 4.3), with column k-1 where x_k is known."""

    rate: np.ndarray  # float64[b, T], the bits/dim sent so far, L_k + ... + L_T
    rmse: np.ndarray  # float64[b, T], of the x_0 predicted from x_k, on 0..255


def rate_distortion(terms: VLBTerms) -> RateDistortion:
    """Computes rate and distortion on the host."""
    bits, mse = (np.asarray(a, np.float64) for a in terms)
    return RateDistortion(np.cumsum(bits[:, :0:-1], axis=1)[:, ::-1], 127.5 * np.sqrt(mse))
