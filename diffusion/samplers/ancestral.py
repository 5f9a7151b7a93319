"""ancestral."""

import jax.numpy as jnp
from jax import Array

from diffusion.process import (
    Process,
    beta_between,
    broadcast_right,
    gather,
    posterior,
    q_sample,
    sample_noise,
)
from diffusion.samplers.base import Sampler, SamplerState, initial_state
from diffusion.targets import Predict, Prediction, p_mean_log_variance


def ancestral(p: Process) -> Sampler:
    """Algorithm 2: x_s ~ p_theta(x_s | x_t), without noise in the last step.

    For s = t - 1 it is the paper's step. Longer steps use the generalised posterior
    (process.posterior) and the same choice of variance, which is the respaced chain of Improved
    DDPM (arXiv 2102.09672, Section 4). With targets.analytic it is Analytic-DPM.
    """

    def step(predict: Predict, keys: Array, carry: SamplerState, t: Array, s: Array) -> SamplerState:
        prediction = predict(carry.x, t)
        mean, log_var = p_mean_log_variance(p, prediction, carry.x, s, t)
        z = jnp.where(s > 0, sample_noise(keys, t, carry.x), 0)
        return SamplerState(mean + jnp.exp(0.5 * log_var) * z, prediction.x_0)

    return Sampler(initial_state, step)


def ddim_coefficients(p: Process, t, s, eta: float) -> tuple[Array, Array, Array]:
    """DDIM's q(x_s | x_t, x_0) = N(signal x_0 + direction eps, eta^2 beta~): the three numbers."""
    variance = eta**2 * posterior(p, s, t).variance
    # 1 - alpha_bar_s - variance, without the difference of two numbers near each other.
    left = beta_between(p, 0, s) * (1 - eta**2 * beta_between(p, s, t) / beta_between(p, 0, t))
    return jnp.sqrt(gather(p.alpha_bar, s)), jnp.sqrt(jnp.maximum(left, 0)), variance


def ddim_mean(prediction: Prediction, signal: Array, direction: Array) -> Array:
    x_0, eps = prediction.x_0, prediction.eps
    return broadcast_right(signal, x_0) * x_0 + broadcast_right(direction, eps) * eps


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 (DDIM) to 1 (the posterior's variance), found {eta}")


def ddim(p: Process, eta: float = 0.0) -> Sampler:
    """DDIM, arXiv 2010.02502, eqs. 12 and 16; no noise for eta = 0, nor to s = 0, where beta~ = 0.

    eta = 1 is `ancestral` with the variance fixed_small. The model's variance is not read. Raises
    ValueError unless 0 <= eta <= 1.
    """
    check_eta(eta)

    def step(predict: Predict, keys: Array, carry: SamplerState, t: Array, s: Array) -> SamplerState:
        prediction = predict(carry.x, t)
        if eta == 0:
            return SamplerState(q_sample(p, prediction.x_0, s, prediction.eps), prediction.x_0)
        *weights, variance = ddim_coefficients(p, t, s, eta)
        mean, z = ddim_mean(prediction, *weights), sample_noise(keys, t, carry.x)
        return SamplerState(mean + broadcast_right(jnp.sqrt(variance), z) * z, prediction.x_0)

    return Sampler(initial_state, step)
