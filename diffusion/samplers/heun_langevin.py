"""Heun's method on the probability-flow ODE, and Langevin correctors."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion import process
from diffusion.process import Process, beta_between, broadcast_right, gather, q_sample
from diffusion.samplers.ancestral import ancestral, ddim
from diffusion.samplers.base import Sampler, SamplerState, choose, init_state
from diffusion.targets import Predict


def heun(p: Process) -> Sampler:
    """Takes Heun steps in x / alpha over sigma / alpha, where the ODE's slope is eps.

    The last step, to s = 0, is Euler's. Karras et al. 2022 (arXiv:2206.00364), Algorithm 1. Raises
    ValueError if alpha_bar_T = 0, where sigma / alpha is infinite.
    """
    if not p.alpha_bar[-1] > 0:
        raise ValueError("heun: this schedule ends in pure noise, alpha_bar_T = 0; use ddim")
    noise_level = np.sqrt((1 - p.alpha_bar) / p.alpha_bar)

    def step(predict: Predict, keys: Array, state: SamplerState, t: Array, s: Array):
        prediction = predict(state.x, t)
        euler = q_sample(p, prediction.x_0, s, prediction.eps)

        def corrected():
            change = predict(euler, s).eps - prediction.eps
            half_step = 0.5 * (gather(noise_level, s) - gather(noise_level, t))
            weight = jnp.sqrt(gather(p.alpha_bar, s)) * half_step
            return euler + broadcast_right(weight, euler) * change

        return SamplerState(lax.cond(s > 0, corrected, lambda: euler), prediction.x_0)

    return Sampler(init_state, step, evaluations=lambda n: 2 * n - 1)


PREDICTORS = {"ancestral": ancestral, "ddim": ddim}


def predictor_corrector(
    p: Process, predictor: str = "ancestral", corrections: int = 1, snr: float = 0.1
) -> Sampler:
    """Follows each predictor step by Langevin steps at its end, except at s = 0.

        x <- x + d score + sqrt(2 d) z,    d = 2 (1 - beta_s) (snr ||z|| / ||score||)^2

    with score = -eps / sqrt(1 - alpha_bar_s) (Section 3.2), beta_s of the trained chain and norms
    of each image alone. Song et al. 2021 (arXiv:2011.13456), Algorithms 3 and 5.

    Args:
        p: the process.
        predictor: a key of PREDICTORS.
        corrections: the number of Langevin steps after each predictor step.
        snr: the paper's r; the stationary distribution is q(x_s) only as r -> 0.
    """
    inner = choose("predictor", PREDICTORS, predictor)(p)
    if not (isinstance(corrections, int) and corrections >= 1 and snr > 0):
        raise ValueError(
            f"corrections, snr: expected an integer of 1 or more and a number above 0, "
            f"found {corrections} and {snr}"
        )
    one_minus_beta = np.append(1.0, p.alpha_bar[1:] / p.alpha_bar[:-1])

    def norm(x: Array) -> Array:
        return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)

    def step(predict: Predict, keys: Array, state: SamplerState, t: Array, s: Array):
        state = inner.step(predict, keys, state, t, s)

        def correct(x: Array, i: Array) -> tuple[Array, None]:
            # sample_noise folds times 0..T into keys, so i folded in above T gives fresh ones.
            correction_keys = jax.vmap(random.fold_in, (0, None))(keys, p.T + 1 + i)
            z = process.sample_noise(correction_keys, s, x)
            score = -predict(x, s).eps / jnp.sqrt(beta_between(p, 0, s)).astype(x.dtype)
            d = 2 * gather(one_minus_beta, s) * (snr * norm(z) / norm(score)) ** 2
            d = broadcast_right(d, x)
            return x + d * score + jnp.sqrt(2 * d) * z, None

        def corrected():
            return lax.scan(correct, state.x, jnp.arange(corrections))[0]

        return state._replace(x=lax.cond(s > 0, corrected, lambda: state.x))

    return Sampler(inner.init, step, evaluations=lambda n: n + corrections * (n - 1))
