"""Likelihood by the probability-flow ODE, an alternative to the variational bound.

Song et al. 2021 (arXiv:2011.13456), Section 4.3 and appendix D.2. In continuous time t in [0, T] an
ODE with the marginals of the forward process maps an image to x_T deterministically, so the density
of the image follows from a change of variables.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.tree_util import Partial
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline, PchipInterpolator

from diffusion.edm import DATA_STD
from diffusion.likelihood import meanflat
from diffusion.process import Process, broadcast_right, example_keys, gather

EpsFn = Callable[[Array, Array], Array]  # (x_t [b, ...], real t [b]) -> eps [b, ...]


def log_alpha_bar_spline(p: Process) -> np.ndarray:
    """Interpolates log alpha_bar by cubics in t - i on [i, i + 1]: float64[4, T], as scipy's `c`.

    A C2 spline where that decreases everywhere, else a monotone C1 spline, which needs more solver
    steps. It is exact at the trained times. Raises ValueError if alpha_bar_T = 0.
    """
    if not p.alpha_bar[-1] > 0:
        found = "a schedule that ends in pure noise; use the variational bound"
        raise ValueError(f"expected alpha_bar_T > 0, found {found}")
    t, log = np.arange(p.T + 1), np.log(p.alpha_bar)
    spline = CubicSpline(t, log)
    turns = spline.derivative().roots(extrapolate=False)
    return (PchipInterpolator(t, log) if turns.size else spline).c


def evaluate_spline(cubics: np.ndarray, t):
    """Returns value and derivative at real t, in float64 for a host t."""
    xp = jnp if isinstance(t, Array) else np
    i = xp.clip(xp.floor(t), 0, cubics.shape[1] - 1).astype(int)
    u = t - i.astype(xp.asarray(t).dtype)
    a, b, c, d = (gather(row, i).astype(u.dtype) for row in cubics)
    return ((a * u + b) * u + c) * u + d, (3 * a * u + 2 * b) * u + c


def _edm_to_eps(network, x, alpha, sigma):
    scale = jax.lax.rsqrt(sigma**2 + (DATA_STD * alpha) ** 2)
    return sigma * scale**2 * x - alpha * DATA_STD * scale * network(scale * x)


# eps from the network x -> output, with alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar).
# The target mu is missing, because between the trained times there is no x_{t-1}.
TO_EPS = {
    "eps": lambda network, x, alpha, sigma: network(x),
    "x0": lambda network, x, alpha, sigma: (x - alpha * network(x)) / sigma,
    "v": lambda network, x, alpha, sigma: sigma * x + alpha * network(x),
    "edm": _edm_to_eps,
}


def eps_fn(p: Process, apply: Callable[[Array, Array], Array], target: str) -> EpsFn:
    """Turns a network (x_t, model_t[b]) -> output into eps at real t, without clipping.

    target is a key of TO_EPS. A learned variance is dropped.
    """
    to_eps, cubics = TO_EPS[target], log_alpha_bar_spline(p)

    def eps(x: Array, t: Array) -> Array:
        log_a, _ = evaluate_spline(cubics, t)
        alpha = broadcast_right(jnp.exp(0.5 * log_a), x)
        sigma = broadcast_right(jnp.sqrt(-jnp.expm1(log_a)), x)
        return to_eps(lambda x: apply(x, t - 1)[..., : x.shape[-1]], x, alpha, sigma)

    return eps


def hutchinson(f: Callable[[Array], Array], x: Array, probes: Array) -> tuple[Array, Array]:
    """Returns f(x) and v^T J v / d [b], an unbiased estimate of tr J / d if E[v v^T] = I."""
    value, tangent = jax.jvp(f, (x,), (probes,))
    return value, meanflat(probes * tangent)


def rademacher(key: Array, x: Array) -> Array:
    """Draws signs of x's shape, the probes of least variance."""
    keys = example_keys(key, x.shape[0])
    return jax.vmap(lambda key: random.rademacher(key, x.shape[1:], x.dtype))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _eps_and_divergence(divergence: Callable, eps: Partial, x: Array, t: Array, probes: Array):
    t = jnp.broadcast_to(t, x.shape[:1])
    return divergence(lambda x: eps(x, t), x, probes)


class Density(NamedTuple):
    """Densities of a batch, and the cost of computing them."""

    log_p: np.ndarray  # float64[b], log p(x) in nats per dimension
    x_T: np.ndarray  # [b, ...], the latents
    evaluations: int  # of the network with one product with its Jacobian


def log_density(
    p: Process,
    eps: EpsFn,
    key: Array,
    x: Array,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = 1.0,
    divergence: Callable = hutchinson,
) -> Density:
    """Computes log p_{t_min}(x) for p_T = N(0, I) carried down to t_min by the ODE.

    With beta(t) = -d log alpha_bar / dt and sigma^2 = 1 - alpha_bar the ODE (eq. 13) is
    dx/dt = -beta/2 (x - eps(x, t) / sigma), and (eq. 39)

        log p(x) = log N(x_T; 0, I) + int_{t_min}^T div(dx/dt) dt.

    Args:
        p: the process.
        eps: the model. With a jax.tree_util.Partial(function, params) the parameters are arguments
            of the compiled program, otherwise constants in it; reuse the function between batches.
        key: one key, or one per example [b].
        x: [b, ...].
        rtol, atol: tolerances of scipy's RK45, which solves the batch as one system: it bounds the
            root mean square of error / (atol + rtol |y|) over all pixels and log-densities.
        t_min: in (0, T). The network is trained at t >= 1; Song et al. use 1e-5 T.
        divergence: as hutchinson. The probes are the same during a solution.

    Raises:
        RuntimeError: if the solver fails.
    """
    if not 0 < t_min < p.T:
        raise ValueError(f"t_min: expected a time between 0 and {p.T}, found {t_min}")
    cubics, probes = log_alpha_bar_spline(p), rademacher(key, x)
    eps = eps if isinstance(eps, Partial) else Partial(eps)
    b, n = x.shape[0], x.size

    def slope(t, y):
        log_a, derivative = evaluate_spline(cubics, np.float64(t))
        x_t = jnp.asarray(y[:n].reshape(x.shape), x.dtype)
        t = jnp.asarray(t, x.dtype)
        noise, diagonal = _eps_and_divergence(divergence, eps, x_t, t, probes)
        sigma = np.sqrt(-np.expm1(log_a))
        noise = np.asarray(noise, np.float64).ravel() / sigma
        diagonal = np.asarray(diagonal, np.float64) / sigma
        return 0.5 * derivative * np.append(y[:n] - noise, 1 - diagonal)

    start = np.append(np.asarray(x, np.float64).ravel(), np.zeros(b))
    solution = solve_ivp(slope, (t_min, p.T), start, t_eval=[p.T], rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"log_density: {solution.message}")
    x_T, change = solution.y[:n, -1].reshape(x.shape), solution.y[n:, -1]
    prior = -0.5 * (x_T**2 + np.log(2 * np.pi)).reshape(b, -1).mean(1)
    return Density(prior + change, x_T, solution.nfev)


def dequantise(key: Array, x_0: Array, levels: int = 256) -> Array:
    """Adds uniform noise of one level's width, 2 / (levels - 1), to x_0."""
    keys = example_keys(key, x_0.shape[0])
    u = jax.vmap(lambda key: random.uniform(key, x_0.shape[1:], x_0.dtype, -0.5, 0.5))(keys)
    return x_0 + u * (2 / (levels - 1))


class BitsPerDim(NamedTuple):
    """The code lengths of a batch, and the cost of computing them."""

    bits: np.ndarray  # float64[b], in bits/dim
    evaluations: int  # as in Density


def bits_per_dim(
    p: Process, eps: EpsFn, key: Array, x_0: Array, levels: int = 256, **options
) -> BitsPerDim:
    """Estimates a bound on the code length of images x_0 on `levels` levels, without bias.

    With w = 2 / (levels - 1) between levels, the model gives a level the mass of its interval,
    P = int p(x) dx = w^d E_u[p(x_0 + u)], so by Jensen's inequality -log2 P <=
    E_u[-log2 p(x_0 + u)] - d log2 w, estimated at one u. This model, which rounds x_{t_min}, is not
    that of the variational bound, whose last step is the decoder's. The options are rtol, atol and
    t_min of log_density.
    """
    keys = jax.vmap(random.split)(example_keys(key, x_0.shape[0]))
    x = dequantise(keys[:, 0], x_0, levels)
    out = log_density(p, eps, keys[:, 1], x, **options)
    return BitsPerDim(-out.log_p / np.log(2) + np.log2((levels - 1) / 2), out.evaluations)
