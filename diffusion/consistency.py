"""Easy consistency tuning: a trained denoiser becomes a map from any x_t to the end of its ODE.

A consistency function has f(x_t, t) = x_0 for all x_t of one trajectory of the probability-flow
ODE, so that one evaluation draws a sample (Song et al. 2023, arXiv:2303.01469). It is tuned by
making f agree at two neighbouring noise levels sigma > r, sigma = sqrt(1 - alpha_bar) /
sqrt(alpha_bar), of one image and noise: Geng et al. 2024 (arXiv:2406.14548).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from scipy import special

from diffusion.process import Process, at_levels, gather, half_log_snr, q_sample
from diffusion.targets import Target, Variance, make_predict

LEVELS = 2**14  # noise levels that times are drawn from: 0.1% apart for a range of 1e6


def lower_level(
    sigma: np.ndarray,
    stage: int | np.ndarray,
    q: float = 2.0,
    k: float = 8.0,
    b: float = 1.0,
    adjust: str = "sigmoid",
) -> np.ndarray:
    """Returns the noise level r < sigma that a noise level is compared with.

        r = max(0, sigma (1 - q^-(stage + 1) n)),    n = 1 + k / (1 + exp(b sigma)), or 1

    Args:
        sigma: the noise level, above 0.
        stage: an int of 0 or more; the larger, the nearer is r to sigma.
        q, k, b: the paper's; q > 1.
        adjust: n: `sigmoid` for the first, `const` for 1.
    """
    if adjust not in ("sigmoid", "const"):
        raise ValueError(f"adjust: expected sigmoid or const, found {adjust}")
    n = 1 + k * special.expit(-b * sigma) if adjust == "sigmoid" else 1
    return np.maximum(sigma * (1 - n / q ** (stage + 1.0)), 0)


def distance(denoised: Array, wanted: Array, sigma: Array, r: Array, c: float = 0.0) -> Array:
    """Returns (sqrt(|denoised - wanted|^2 + c^2) - c) / (sigma - r), [b], of images [b, ...].

    The gradient is finite where both are equal, also for c = 0.
    """
    squares = ((denoised - wanted) ** 2).sum(axis=tuple(range(1, denoised.ndim))) + c**2
    positive = squares > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    return (root - c) / (sigma - r)


def consistency_loss(
    p: Process,
    target: Target,
    variance: Variance,
    stage: int = 7,
    stage_steps: int = 0,
    c: float = 0.0,
    log_mean: float = -1.1,
    log_std: float = 2.0,
) -> Callable:
    """Builds the loss of easy consistency tuning, for weights that were trained as a denoiser.

    Both evaluations have the same noise and, as `apply` binds its key, the same dropout; the one at
    r has no gradient, and is the image itself where r is below the chain's first level. Noise
    levels are LEVELS of p's range, evenly spaced in their logarithm.

    Args:
        p, target, variance: of the training that the weights are from.
        stage, stage_steps: of `lower_level`, from the beginning; or, with stage_steps, the last of
            the stages 0, 1, ..., of so many updates each.
        c: of `distance`.
        log_mean, log_std: ln sigma is drawn from this normal law, within p's range.

    Raises ValueError for a learned variance, which it does not train, a mu-network, whose output is
    defined at p's own steps only, and a schedule that ends in pure noise.
    """
    if variance.outputs != 1:
        raise ValueError("'consistency' trains no variance: use a fixed one")
    if target.is_mean:
        raise ValueError(
            "'consistency' works between steps, where mu is not defined: use eps, x0 or v"
        )
    if not p.alpha_bar[-1] > 0:
        raise ValueError("'consistency' needs a noise level at T, but alpha_bar_T = 0")
    if not (stage >= 0 and stage_steps >= 0 and c >= 0 and log_std > 0):
        wanted, found = "expected 0 or more, the last above 0", (stage, stage_steps, c, log_std)
        raise ValueError(f"stage, stage_steps, c, log_std: {wanted}, found {found}")
    log_sigma = np.linspace(*-half_log_snr(p)[[1, -1]], LEVELS)
    fine = at_levels(p, special.expit(-2 * log_sigma))
    sigma = np.append(0.0, np.exp(log_sigma))
    share = np.cumsum(np.exp(-0.5 * ((log_sigma - log_mean) / log_std) ** 2))
    stages = np.arange(stage + 1) if stage_steps else np.array([stage])
    lower = np.stack([nearest_lower(sigma, lower_level(sigma[1:], s)) for s in stages])

    def loss(apply: Callable, key: Array, x_0: Array, times: Array | None = None):
        if times is not None:
            raise ValueError("loss 'consistency' draws its own noise levels, not the chain's times")
        key_t, key_eps = random.split(key)
        u = random.uniform(key_t, x_0.shape[:1], x_0.dtype)
        t = 1 + jnp.searchsorted(jnp.asarray(share[:-1] / share[-1], x_0.dtype), u, side="right")
        eps = random.normal(key_eps, x_0.shape, x_0.dtype)
        now = jnp.minimum(apply.step // stage_steps, stage) if stage_steps else 0
        r = jnp.asarray(lower)[now, t]
        predict = make_predict(fine, apply, target, variance, clip=False)

        def denoise(t):
            return predict(q_sample(fine, x_0, t, eps), t).x_0

        # At level 0 the network is evaluated at level 1 instead, and not used.
        at_r = jax.lax.stop_gradient(denoise(jnp.maximum(r, 1)))
        wanted = jnp.where((r > 0).reshape(-1, *(1,) * (x_0.ndim - 1)), at_r, x_0)
        levels = (gather(sigma, i).astype(x_0.dtype) for i in (t, r))
        return distance(denoise(t), wanted, *levels, c), {}

    return loss


def nearest_lower(sigma: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the index of the level nearest to each wanted one, int[n+1], below its own.

    sigma: float[n+1], rising from 0; wanted: float[n], below sigma[1:]. The index is 0 for what is
    below sigma[1].
    """
    at = np.interp(np.log(np.maximum(wanted, 1e-300)), np.log(sigma[1:]), np.arange(1, len(sigma)))
    index = np.minimum(np.round(at).astype(int), np.arange(len(wanted)))
    return np.append(0, np.where(wanted < sigma[1], 0, index))
