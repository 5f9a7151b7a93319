"""Ancestral sampling (Algorithm 2) and DDIM."""

import jax.numpy as jnp
from jax import Array

from diffusion import process
from diffusion.process import Process, beta_between, broadcast_right, gather, posterior, q_sample
from diffusion.samplers.base import Sampler, SamplerState, init_state
from diffusion.targets import Predict, Prediction, p_mean_log_variance


def ancestral(p: Process) -> Sampler:
    """Draws x_s ~ p_theta(x_s | x_t), without noise in the last step (Algorithm 2).

    Steps longer than one use the generalised posterior, as the respaced chains of Nichol and
    Dhariwal 2021 (arXiv:2102.09672), Section 4.
    """

    def step(predict: Predict, keys: Array, state: SamplerState, t: Array, s: Array):
        prediction = predict(state.x, t)
        mean, log_var = p_mean_log_variance(p, prediction, state.x, s, t)
        z = jnp.where(s > 0, process.sample_noise(keys, t, state.x), 0)
        return SamplerState(mean + jnp.exp(0.5 * log_var) * z, prediction.x_0)

    return Sampler(init_state, step)


def check_eta(eta: float) -> None:
    """Raises ValueError unless 0 <= eta <= 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 (DDIM) to 1 (the posterior's variance), found {eta}")


def ddim_coefficients(p: Process, t: Array, s: Array, eta: float) -> tuple[Array, Array, Array]:
    """Returns (a, b, v) of DDIM's q(x_s | x_t, x_0) = N(a x_0 + b eps, v), v = eta^2 beta~."""
    variance = eta**2 * posterior(p, s, t).variance
    # 1 - alpha_bar_s - variance, as a product that does not cancel.
    rest = beta_between(p, 0, s) * (1 - eta**2 * beta_between(p, s, t) / beta_between(p, 0, t))
    return jnp.sqrt(gather(p.alpha_bar, s)), jnp.sqrt(jnp.maximum(rest, 0)), variance


def ddim_mean(prediction: Prediction, a: Array, b: Array) -> Array:
    """Returns a x_0 + b eps."""
    x_0, eps = prediction.x_0, prediction.eps
    return broadcast_right(a, x_0) * x_0 + broadcast_right(b, eps) * eps


def ddim(p: Process, eta: float = 0.0) -> Sampler:
    """Takes DDIM's steps, deterministic for eta = 0 and `ancestral` with fixed_small for eta = 1.

    The model's variance is not used. Song et al. 2021 (arXiv:2010.02502), eqs. 12 and 16.
    """
    check_eta(eta)

    def step(predict: Predict, keys: Array, state: SamplerState, t: Array, s: Array):
        prediction = predict(state.x, t)
        if eta == 0:
            return SamplerState(q_sample(p, prediction.x_0, s, prediction.eps), prediction.x_0)
        a, b, variance = ddim_coefficients(p, t, s, eta)
        z = process.sample_noise(keys, t, state.x)
        x_s = ddim_mean(prediction, a, b) + broadcast_right(jnp.sqrt(variance), z) * z
        return SamplerState(x_s, prediction.x_0)

    return Sampler(init_state, step)
