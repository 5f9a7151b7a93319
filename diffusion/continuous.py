"""Continuous time: learned noise schedules, and the bound of infinitely many steps.

Kingma et al. 2021, "Variational Diffusion Models" (arXiv:2107.00630). The noise at u in [0, 1] is
given by gamma(u) = log(sigma^2 / alpha^2), which rises from the cleanest z_0 to z_1; as everywhere
alpha^2 = alpha_bar and sigma^2 = 1 - alpha_bar. The image itself, x, is before z_0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion import likelihood, process
from diffusion.likelihood import VLBTerms, meanflat, normal_kl
from diffusion.process import Process, broadcast_right, example_keys, half_log_snr, q_sample
from diffusion.targets import TARGETS, VARIANCES, Predict, Target, Variance

Tree = Any
SCHEDULE_FEATURES = 1024  # of the schedule `network`


class GammaSchedule(NamedTuple):
    """A noise schedule gamma(u), rising in u.

    Attributes:
        init: (key, gamma_min, gamma_max) -> params, with which gamma is about a straight line.
        gamma: (params, u float[...]) -> gamma float[...].
    """

    init: Callable[[Array, float, float], Tree]
    gamma: Callable[[Tree, Array], Array]


def _line(params: Tree, u: Array) -> Array:
    return params["b"].reshape(()) + jnp.abs(params["w"].reshape(())) * u


def _init_line(key: Array, gamma_min: float, gamma_max: float) -> Tree:
    return {"w": jnp.full(1, gamma_max - gamma_min), "b": jnp.full(1, gamma_min)}


def _init_network(key: Array, gamma_min: float, gamma_max: float) -> Tree:
    key_in, key_out = random.split(key)
    small = jax.nn.initializers.normal()
    return {
        "l1": {"kernel": jnp.full((1, 1), gamma_max - gamma_min), "bias": jnp.full(1, gamma_min)},
        "l2": {
            "kernel": small(key_in, (1, SCHEDULE_FEATURES)),
            "bias": jnp.zeros(SCHEDULE_FEATURES),
        },
        "l3": {"kernel": small(key_out, (SCHEDULE_FEATURES, 1))},
    }


def _network(params: Tree, u: Array) -> Array:
    """Adds a monotone network of one hidden layer to a line (Appendix H); not normalised."""
    l1, l2, l3 = (params[name] for name in ("l1", "l2", "l3"))
    u_ = u.reshape(-1, 1)
    hidden = jnp.tanh(0.5 * ((2 * u_ - 1) @ jnp.abs(l2["kernel"]) + l2["bias"][None]))
    line = u_ @ jnp.abs(l1["kernel"]) + l1["bias"][None]
    return (line + hidden @ jnp.abs(l3["kernel"]) / hidden.shape[-1]).reshape(u.shape)


# A schedule that is not learned has no parameters: `linear` keeps the ends of the process.
GAMMAS = {
    "linear": None,
    "learned_line": GammaSchedule(_init_line, _line),
    "learned_network": GammaSchedule(_init_network, _network),
}


def gamma_ends(p: Process) -> tuple[float, float]:
    """Returns gamma at t = 1 and at t = T."""
    gamma = -2 * half_log_snr(p)
    return float(gamma[1]), float(gamma[-1])


def make_gamma_fn(p: Process, name: str) -> Callable[[Tree, Array], Array]:
    """Returns (params, u) -> gamma of a key of GAMMAS."""
    low, high = gamma_ends(p)
    schedule = GAMMAS[name]
    return schedule.gamma if schedule else lambda params, u: low + (high - low) * u


def model_time(p: Process, gamma: Any) -> Any:
    """Returns the network's time input at gamma: linear, from 0 at t = 1 to T - 1 at t = T."""
    low, high = gamma_ends(p)
    return (gamma - low) / (high - low) * (p.T - 1)


def learned_process(p: Process, name: str, params: Tree) -> Process:
    """Returns the chain of p.T steps whose gammas the learned schedule has at 0, ..., 1."""
    u = jnp.linspace(0, 1, p.T)
    gamma = np.asarray(make_gamma_fn(p, name)(params, u), np.float64)
    alpha_bar = np.append(1.0, 1 / (1 + np.exp(gamma)))
    return Process(alpha_bar, np.append(-1.0, model_time(p, gamma)))


def log_p_of_pixels(x: Array, z: Array, gamma_0: Array, values: np.ndarray) -> Array:
    """Returns log p(x | z_0) in nats, elementwise, for z = z_0 / alpha_0 (arXiv's eq. 8).

    p(x | z_0) ~ q(z_0 | x) over the `values` that a pixel can have, float[levels]; no network.
    """
    precision = jnp.exp(-gamma_0)
    candidates = jnp.asarray(values, x.dtype).reshape((1,) * z.ndim + (-1,))
    energies = -0.5 * precision * (z[..., None] - candidates) ** 2
    return -0.5 * precision * (z - x) ** 2 - jax.nn.logsumexp(energies, axis=-1)


class ContinuousTerms(NamedTuple):
    """The parts of one draw of each image's bound, in nats per dimension [b]."""

    decoder: Array
    prior: Array
    diffusion: Array


def continuous_terms(
    gamma: Callable[[Array], Array],
    eps_fn: Callable[[Array, Array], Array],
    x: Array,
    u: Array,
    eps_0: Array,
    eps: Array,
    values: np.ndarray,
    steps: int = 0,
) -> ContinuousTerms:
    """Draws the bound at one time of each image (arXiv's eqs. 11, 13 and 17).

    Args:
      gamma: u -> gamma.
      eps_fn: (z, gamma[b]) -> the predicted noise.
      x: [b, ...], on `values`.
      u: [b] in [0, 1), uniform.
      eps_0: the noise of z_0.
      eps: the noise of z at u.
      values: float[levels], what a pixel can be.
      steps: of a chain in discrete time, whose next time above u is taken; 0: continuous time.
    """
    low, high = gamma(jnp.zeros((), u.dtype)), gamma(jnp.ones((), u.dtype))
    decoder = -meanflat(log_p_of_pixels(x, x + jnp.exp(0.5 * low) * eps_0, low, values))
    if steps:
        u = jnp.ceil(u * steps) / steps
        gamma_u = gamma(u)
        weight = 0.5 * steps * jnp.expm1(gamma_u - gamma(u - 1 / steps))
    else:
        gamma_u, slope = jax.jvp(gamma, (u,), (jnp.ones_like(u),))
        weight = 0.5 * slope
    alpha, sigma = (broadcast_right(jnp.sqrt(jax.nn.sigmoid(g)), x) for g in (-gamma_u, gamma_u))
    error = meanflat((eps - eps_fn(alpha * x + sigma * eps, gamma_u)) ** 2)
    return ContinuousTerms(decoder, prior_nats(x, high), weight * error)


def prior_nats(x: Array, gamma_1: Array) -> Array:
    """Returns KL(q(z_1 | x) || N(0, 1)) in nats per dimension [b]."""
    mean = jnp.sqrt(jax.nn.sigmoid(-gamma_1)) * x
    return meanflat(normal_kl(mean, jax.nn.log_sigmoid(gamma_1), 0.0, 0.0))


def pixel_values(levels: int) -> np.ndarray:
    """Returns the values of x, float64[levels], see data.augment.scale."""
    return np.linspace(-1, 1, levels)


def continuous(
    p: Process, target: Target, variance: Variance, levels: int = 256, schedule: str = "linear"
) -> Callable:
    """Builds the loss that is the bound in continuous time, in bits/dim, of one time of each image.

    Given times t in 1..T stand for u in [(t - 1) / T, t / T).

    Args:
      p: a process with evenly spaced log-SNR, whose t = 1 and t = T are u = 0 and u = 1.
      target: eps.
      variance: fixed_small, of the chain whose limit this is.
      levels: of x_0.
      schedule: a key of GAMMAS; the parameters of a learned one are apply.params["schedule"].

    Raises: ValueError for another process, target, variance or schedule.
    """
    if schedule not in GAMMAS:
        raise ValueError(f"schedule: expected one of {', '.join(GAMMAS)}, found {schedule}")
    if target is not TARGETS["eps"] or variance is not VARIANCES["fixed_small"]:
        raise ValueError("'continuous' trains eps and no variance: use target=eps, fixed_small")
    if p.T < 3 or np.ptp(np.diff(half_log_snr(p)[1:])) > 1e-6:
        raise ValueError("'continuous' needs evenly spaced log-SNR: use process.schedule=logsnr")
    gamma, values = make_gamma_fn(p, schedule), pixel_values(levels)

    def loss(apply: Callable, key: Array, x_0: Array, t: Array | None = None):
        key_u, key_0, key_eps = random.split(key, 3)
        u = random.uniform(key_u, x_0.shape[:1], x_0.dtype)
        u = u if t is None else ((t - 1).astype(u.dtype) + u) / p.T
        eps_0, eps = (random.normal(k, x_0.shape, x_0.dtype) for k in (key_0, key_eps))
        params = apply.params["schedule"] if GAMMAS[schedule] else None
        terms = continuous_terms(
            functools.partial(gamma, params),
            lambda z, g: apply(z, model_time(p, g)),
            *(x_0, u, eps_0, eps, values),
        )
        bits = sum(terms) / np.log(2)
        return bits, {"bpd": bits}

    return loss


def terms_in_discrete_time(
    p: Process, predict: Predict, key: Array, x_0: Array, levels: int = 256
) -> VLBTerms:
    """Returns likelihood.vlb_terms of a model in continuous time on p, whose decoder is its own."""
    terms = likelihood.vlb_terms(p, predict, key, x_0, levels)
    decoder = _decoder_nats(example_keys(key, x_0.shape[0]), x_0, gamma_ends(p)[0], levels)
    return terms._replace(bits=terms.bits.at[:, 0].set(decoder / np.log(2)))


def _decoder_nats(keys: Array, x: Array, gamma_0: float, levels: int) -> Array:
    """Draws -log p(x | z_0) in nats per dimension [b]."""
    low = jnp.asarray(gamma_0, x.dtype)
    z_0 = x + jnp.exp(0.5 * low) * process.sample_noise(keys, jnp.int32(0), x)
    return -meanflat(log_p_of_pixels(x, z_0, low, pixel_values(levels)))


def cells(p: Process, n: int) -> Process:
    """Returns the noise levels in the middle of n equal cells of gamma between t = 1 and t = T."""
    low, high = gamma_ends(p)
    gamma = low + (np.arange(n) + 0.5) / n * (high - low)
    return process.at_levels(p, 1 / (1 + np.exp(gamma)))


def continuous_vlb(
    q: Process,
    predict: Predict,
    key: Array,
    x_0: Array,
    levels: int = 256,
    ends: tuple[float, float] = (0.0, 0.0),
) -> Array:
    """Returns the decoder, diffusion and prior of the bound in continuous time, bits/dim [b, 3].

    It depends on the ends of gamma alone: the diffusion is the integral over gamma of
    E|eps - eps_hat|^2 / 2, here by the midpoint rule, with one draw and evaluation in each cell.

    Args:
      q: `cells` of the model's process.
      predict: the model on q.
      key: one key, or one per example [b].
      x_0: [b, ...], on `levels` levels.
      levels: of x_0.
      ends: `gamma_ends` of the model's process.
    """
    keys = example_keys(key, x_0.shape[0])
    low, high = ends

    def error(_, t):
        t_b = jnp.broadcast_to(t, x_0.shape[:1])
        eps = process.sample_noise(keys, t, x_0)
        return None, meanflat((eps - predict(q_sample(q, x_0, t_b, eps), t_b).eps) ** 2)

    errors = lax.scan(error, None, jnp.arange(1, q.T + 1))[1]
    decoder = _decoder_nats(keys, x_0, low, levels)
    diffusion = 0.5 * (high - low) * errors.mean(0)
    prior = prior_nats(x_0, jnp.asarray(high, x_0.dtype))
    return jnp.stack([decoder, diffusion, prior], axis=1) / np.log(2)
