"""heun_langevin."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion.process import Process, beta_between, broadcast_right, gather, q_sample, sample_noise
from diffusion.samplers.ancestral import ancestral, ddim
from diffusion.samplers.base import Sampler, SamplerState, initial_state
from diffusion.targets import Predict


def heun(p: Process) -> Sampler:
    """Heun's second-order steps on the probability-flow ODE (EDM, arXiv 2206.00364, Algorithm 1).

    In the variables x / alpha and sigma / alpha the slope of the ODE is eps. Each step asks the
    network at both ends, t and s; the last, to s = 0, is Euler's. Raises ValueError for a schedule
    whose alpha_bar_T is 0: sigma / alpha is infinite there.
    """
    if not p.alpha_bar[-1] > 0:
        raise ValueError("heun: this schedule ends in pure noise, alpha_bar_T = 0; use ddim")
    level = np.sqrt((1 - p.alpha_bar) / p.alpha_bar)

    def step(predict: Predict, keys: Array, carry: SamplerState, t: Array, s: Array) -> SamplerState:
        x_0, eps = predict(carry.x, t)[:2]
        euler = q_sample(p, x_0, s, eps)

        def corrected():
            change = predict(euler, s).eps - eps
            half = 0.5 * jnp.sqrt(gather(p.alpha_bar, s)) * (gather(level, s) - gather(level, t))
            return euler + broadcast_right(half, euler) * change

        return SamplerState(lax.cond(s > 0, corrected, lambda: euler), x_0)

    return Sampler(initial_state, step, evaluations=lambda n: 2 * n - 1)


def _norm(x: Array) -> Array:
    return jnp.linalg.norm(x.reshape(len(x), -1), axis=1)


PREDICTORS = {"ancestral": ancestral, "ddim": ddim}


def predictor_corrector(
    p: Process, predictor: str = "ancestral", corrections: int = 1, snr: float = 0.1
) -> Sampler:
    """A step of a predictor, then Langevin steps at its end (arXiv 2011.13456, Algorithms 3 and 5).

        x <- x + d score + sqrt(2 d) z,    d = 2 (1 - beta_s) (snr ||z|| / ||score||)^2

    with the score -eps / sqrt(1 - alpha_bar_s): the link of Section 3.2 to score matching. Norms
    are those of each image alone. No correction at s = 0, where there is no noise.
    predictor: a key of PREDICTORS. corrections: Langevin steps after each. snr: r of the paper;
    the stationary law is the marginal's for snr -> 0 only. Raises ValueError.
    """
    if predictor not in PREDICTORS:
        known = ", ".join(PREDICTORS)
        raise ValueError(f"predictor: expected one of {known}, found {predictor}")
    if not (isinstance(corrections, int) and corrections >= 1 and snr > 0):
        raise ValueError(
            f"corrections, snr: expected an integer of 1 or more and a number above 0, "
            f"found {corrections} and {snr}"
        )
    walk = PREDICTORS[predictor](p)
    # beta_s is that of the trained step, however long the steps that are taken.
    shrink = np.append(1.0, p.alpha_bar[1:] / p.alpha_bar[:-1])

    def step(predict: Predict, keys: Array, carry: SamplerState, t: Array, s: Array) -> SamplerState:
        carry = walk.step(predict, keys, carry, t, s)

        def correct(x: Array, i: Array) -> tuple[Array, None]:
            # A key of its own for each correction: those of the times 0..T are taken.
            own = jax.vmap(random.fold_in, (0, None))(keys, p.T + 1 + i)
            z = sample_noise(own, s, x)
            score = -predict(x, s).eps / jnp.sqrt(beta_between(p, 0, s)).astype(x.dtype)
            d = broadcast_right(2 * gather(shrink, s) * (snr * _norm(z) / _norm(score)) ** 2, x)
            return x + d * score + jnp.sqrt(2 * d) * z, None

        def corrected():
            return lax.scan(correct, carry.x, jnp.arange(corrections))[0]

        return carry._replace(x=lax.cond(s > 0, corrected, lambda: carry.x))

    return Sampler(walk.init, step, evaluations=lambda n: n + corrections * (n - 1))
