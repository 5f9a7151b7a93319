"""From noise to images: ways of walking the reverse process.

Each is made for a process and driven by `sample` (walk.py). Those of this page take one step from
one prediction, or two; the solvers that remember earlier predictions are in solvers.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion.grids import GRIDS, given, uniform
from diffusion.process import (
    Process,
    at,
    expand,
    noise,
    noise_share,
    posterior,
    q_sample,
)
from diffusion.solvers import dpmpp_2m, dpmpp_2s, dpmpp_3m, unipc
from diffusion.targets import Predict, Prediction, implied_var_0, reverse
from diffusion.walk import Carry, Sampler, advance, sample, start, trajectory

# One import for users: the loop and the grids are pages of their own.
__all__ = [
    "GRIDS",
    "PREDICTORS",
    "SAMPLERS",
    "Carry",
    "Sampler",
    "advance",
    "analytic_ddim",
    "ancestral",
    "ddim",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "given",
    "heun",
    "predictor_corrector",
    "sample",
    "trajectory",
    "uniform",
    "unipc",
]


def ancestral(p: Process) -> Sampler:
    """Algorithm 2: x_s ~ p_theta(x_s | x_t), without noise in the last step.

    For s = t - 1 it is the paper's step. Longer steps use the generalised posterior
    (process.posterior) and the same choice of variance, which is the respaced chain of Improved
    DDPM (arXiv 2102.09672, Section 4). With targets.analytic it is Analytic-DPM.
    """

    def step(predict: Predict, keys: Array, carry: Carry, t: Array, s: Array) -> Carry:
        prediction = predict(carry.x, t)
        mean, log_var = reverse(p, prediction, carry.x, s, t)
        z = jnp.where(s > 0, noise(keys, t, carry.x), 0)
        return Carry(mean + jnp.exp(0.5 * log_var) * z, prediction.x_0)

    return Sampler(start, step)


def _family(p: Process, t, s, eta: float) -> tuple[Array, Array, Array]:
    """DDIM's q(x_s | x_t, x_0) = N(signal x_0 + direction eps, eta^2 beta~): the three numbers."""
    variance = eta**2 * posterior(p, s, t).variance
    # 1 - alpha_bar_s - variance, without the difference of two numbers near each other.
    left = noise_share(p, 0, s) * (1 - eta**2 * noise_share(p, s, t) / noise_share(p, 0, t))
    return jnp.sqrt(at(p.alpha_bar, s)), jnp.sqrt(jnp.maximum(left, 0)), variance


def _mean(prediction: Prediction, signal: Array, direction: Array) -> Array:
    x_0, eps = prediction.x_0, prediction.eps
    return expand(signal, x_0) * x_0 + expand(direction, eps) * eps


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 (DDIM) to 1 (the posterior's variance), found {eta}")


def ddim(p: Process, eta: float = 0.0) -> Sampler:
    """DDIM, arXiv 2010.02502, eqs. 12 and 16; no noise for eta = 0, nor to s = 0, where beta~ = 0.

    eta = 1 is `ancestral` with the variance fixed_small. The model's variance is not read. Raises
    ValueError unless 0 <= eta <= 1.
    """
    _check_eta(eta)

    def step(predict: Predict, keys: Array, carry: Carry, t: Array, s: Array) -> Carry:
        prediction = predict(carry.x, t)
        if eta == 0:
            return Carry(q_sample(p, prediction.x_0, s, prediction.eps), prediction.x_0)
        *weights, variance = _family(p, t, s, eta)
        mean, z = _mean(prediction, *weights), noise(keys, t, carry.x)
        return Carry(mean + expand(jnp.sqrt(variance), z) * z, prediction.x_0)

    return Sampler(start, step)


def analytic_ddim(p: Process, eta: float = 0.0) -> Sampler:
    """DDIM with the variance that is best for it: Analytic-DDIM, arXiv 2201.06503, Theorem 1.

    Its mean knows x_0 only as well as the model does, so the variance of x_0 given x_t (targets:
    var_0; measured, with targets.analytic) is added, times the square of x_0's weight in the mean.
    Where x_0 counts as known (fixed_small), it is `ddim`. No noise in the last step. Raises
    ValueError unless 0 <= eta <= 1.
    """
    _check_eta(eta)

    def step(predict: Predict, keys: Array, carry: Carry, t: Array, s: Array) -> Carry:
        prediction = predict(carry.x, t)
        signal, direction, variance = _family(p, t, s, eta)
        mean, var_0 = _mean(prediction, signal, direction), prediction.var_0
        if var_0 is None:
            t_b = jnp.broadcast_to(t, carry.x.shape[:1])
            var_0 = implied_var_0(p, prediction.log_var, t_b)
        # eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t) falls as x_0 rises.
        weight = signal - direction * jnp.sqrt(at(p.alpha_bar, t) / noise_share(p, 0, t))
        variance = expand(variance, carry.x) + expand(weight**2, carry.x) * var_0
        z = jnp.sqrt(variance) * noise(keys, t, carry.x)
        return Carry(mean + jnp.where(s > 0, z, 0), prediction.x_0)

    return Sampler(start, step)


def heun(p: Process) -> Sampler:
    """Heun's second-order steps on the probability-flow ODE (EDM, arXiv 2206.00364, Algorithm 1).

    In the variables x / alpha and sigma / alpha the slope of the ODE is eps. Each step asks the
    network at both ends, t and s; the last, to s = 0, is Euler's. Raises ValueError for a schedule
    whose alpha_bar_T is 0: sigma / alpha is infinite there.
    """
    if not p.alpha_bar[-1] > 0:
        raise ValueError("heun: this schedule ends in pure noise, alpha_bar_T = 0; use ddim")
    level = np.sqrt((1 - p.alpha_bar) / p.alpha_bar)

    def step(predict: Predict, keys: Array, carry: Carry, t: Array, s: Array) -> Carry:
        x_0, eps = predict(carry.x, t)[:2]
        euler = q_sample(p, x_0, s, eps)

        def corrected():
            change = predict(euler, s).eps - eps
            half = 0.5 * jnp.sqrt(at(p.alpha_bar, s)) * (at(level, s) - at(level, t))
            return euler + expand(half, euler) * change

        return Carry(lax.cond(s > 0, corrected, lambda: euler), x_0)

    return Sampler(start, step, evaluations=lambda n: 2 * n - 1)


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

    def step(predict: Predict, keys: Array, carry: Carry, t: Array, s: Array) -> Carry:
        carry = walk.step(predict, keys, carry, t, s)

        def correct(x: Array, i: Array) -> tuple[Array, None]:
            # A key of its own for each correction: those of the times 0..T are taken.
            own = jax.vmap(random.fold_in, (0, None))(keys, p.T + 1 + i)
            z = noise(own, s, x)
            score = -predict(x, s).eps / jnp.sqrt(noise_share(p, 0, s)).astype(x.dtype)
            d = expand(2 * at(shrink, s) * (snr * _norm(z) / _norm(score)) ** 2, x)
            return x + d * score + jnp.sqrt(2 * d) * z, None

        def corrected():
            return lax.scan(correct, carry.x, jnp.arange(corrections))[0]

        return carry._replace(x=lax.cond(s > 0, corrected, lambda: carry.x))

    return Sampler(walk.init, step, evaluations=lambda n: n + corrections * (n - 1))


SAMPLERS = {
    "ancestral": ancestral,
    "ddim": ddim,
    "analytic_ddim": analytic_ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "unipc": unipc,
    "heun": heun,
    "predictor_corrector": predictor_corrector,
}
