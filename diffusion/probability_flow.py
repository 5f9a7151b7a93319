"""The likelihood by the probability-flow ODE, a third reading beside the bounds.

Song et al. 2021, arXiv 2011.13456, Section 4.3 and appendix D.2. Noise is added in continuous time
t in [0, T]; one ODE has the same marginals and takes an image to x_T and back without noise, so it
gives images a density, by the change of variables along the way.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from jax.tree_util import Partial
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline, PchipInterpolator

from diffusion.likelihood import meanflat
from diffusion.process import Process, broadcast_right, example_keys, gather

EpsFn = Callable[[Array, Array], Array]  # (x_t [b, ...], t float[b]) -> eps [b, ...], t real


def log_alpha_bar_spline(p: Process) -> np.ndarray:
    """log alpha_bar between the steps: float64[4, T], column i the cubic in t - i on [i, i + 1].

    A cubic spline through every step, t = 0 included, whose second derivative is continuous. Where
    it would not fall everywhere (betas with a sharp bend, very few steps), scipy's monotone cubics,
    whose first derivative is; they cost the solver more steps. beta(t) of the continuous process is
    minus the derivative. At the steps the marginals are the discrete chain's, so the network is
    asked what it was trained on. Highest power first, as scipy has it.
    Raises ValueError if alpha_bar reaches 0 (no finite logarithm: the schedule jsd).
    """
    if not p.alpha_bar[-1] > 0:
        raise ValueError(
            "log_alpha_bar: expected alpha_bar_T > 0; this schedule ends in pure noise"
        )
    t, log = np.arange(p.T + 1), np.log(p.alpha_bar)
    spline = CubicSpline(t, log)
    turns = spline.derivative().roots(extrapolate=False)
    return (PchipInterpolator(t, log) if turns.size else spline).c


def evaluate_spline(cubics: np.ndarray, t):
    """(value, derivative) at real t in [0, T]: float64 for a host t, else the device's floats."""
    xp = jnp if isinstance(t, Array) else np
    i = xp.clip(xp.floor(t), 0, cubics.shape[1] - 1).astype(int)
    u = t - i.astype(xp.asarray(t).dtype)
    a, b, c, d = (gather(row, i).astype(u.dtype) for row in cubics)
    return ((a * u + b) * u + c) * u + d, (3 * a * u + 2 * b) * u + c


# eps from what the network gives, with alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar). The
# target mu is not here: it means a step of the trained chain, and between the times there is none.
TO_EPS = {
    "eps": lambda output, x, alpha, sigma: output,
    "x0": lambda output, x, alpha, sigma: (x - alpha * output) / sigma,
    "v": lambda output, x, alpha, sigma: sigma * x + alpha * output,
}


def eps_fn(p: Process, apply: Callable[[Array, Array], Array], target: str) -> EpsFn:
    """A network `(x_t, model_t[b]) -> output` as eps of real t; nothing is clipped.

    target: a key of TO_EPS. A second half of the channels, a learned log-variance, is dropped.
    model_t is t - 1, as the official code counts. Raises KeyError.
    """
    to_eps, cubics = TO_EPS[target], log_alpha_bar_spline(p)

    def eps(x: Array, t: Array) -> Array:
        log_a, _ = evaluate_spline(cubics, t)
        alpha, sigma = (broadcast_right(c, x) for c in (jnp.exp(0.5 * log_a), jnp.sqrt(-jnp.expm1(log_a))))
        return to_eps(apply(x, t - 1)[..., : x.shape[-1]], x, alpha, sigma)

    return eps


class Divergence(NamedTuple):
    """A way to the mean of the diagonal of a Jacobian, that is its trace per dimension.

    draw:  (key, x) -> probes like x, one draw for a whole solution: the integrand must not jump.
    value: (f, x, probes) -> (f(x) [b, ...], mean diagonal of df/dx [b]).
    """

    draw: Callable[[Array, Array], Array]
    value: Callable[[Callable[[Array], Array], Array, Array], tuple[Array, Array]]


def _per_example(sampler: Callable) -> Callable[[Array, Array], Array]:
    def draw(key: Array, x: Array) -> Array:
        keys = example_keys(key, x.shape[0])
        return jax.vmap(lambda k: sampler(k, x.shape[1:], x.dtype))(keys)

    return draw


def hutchinson(f: Callable[[Array], Array], x: Array, probes: Array) -> tuple[Array, Array]:
    """v^T J v, whose mean over v with E[v v^T] = I is the trace: one product with the Jacobian."""
    value, tangent = jax.jvp(f, (x,), (probes,))
    return value, meanflat(probes * tangent)


def exact(f: Callable[[Array], Array], x: Array, probes: Array) -> tuple[Array, Array]:
    """The trace itself by as many products as an image has dimensions, for small images."""
    del probes
    d = x[0].size

    def diagonal(i):
        unit = jnp.zeros(d, x.dtype).at[i].set(1).reshape(x.shape[1:])
        unit = jnp.broadcast_to(unit, x.shape)  # images do not see each other
        return meanflat(unit * jax.jvp(f, (x,), (unit,))[1])

    return f(x), lax.map(diagonal, jnp.arange(d)).sum(0)


# Probes of signs have the least variance of all (Hutchinson 1990); for a diagonal Jacobian, none.
DIVERGENCES = {
    "rademacher": Divergence(_per_example(random.rademacher), hutchinson),
    "gaussian": Divergence(_per_example(random.normal), hutchinson),
    "exact": Divergence(lambda key, x: jnp.zeros_like(x), exact),
}


@functools.partial(jax.jit, static_argnums=0)
def _field(value: Callable, eps: Partial, x: Array, t: Array, probes: Array):
    """eps and its mean diagonal at one t for the whole batch; parameters in `eps` are arguments."""
    t = jnp.broadcast_to(t, x.shape[:1])
    return value(lambda x: eps(x, t), x, probes)


class Density(NamedTuple):
    """log_p: float64[b], log p(x) in nats per dimension; x_T: [b, ...]; evaluations: of the field.

    A field with a probe costs the network and one product with its Jacobian.
    """

    log_p: np.ndarray
    x_T: np.ndarray
    evaluations: int


def log_density(
    p: Process,
    eps: EpsFn,
    divergence: Divergence,
    key: Array,
    x: Array,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = 1.0,
) -> Density:
    """log p_{t_min}(x) of the ODE's model: N(0, I) at T, carried down to t_min.

    With beta(t) = -d log alpha_bar / dt and the score -eps / sigma, sigma^2 = 1 - alpha_bar, the
    ODE (eq. 13) is dx/dt = -beta/2 (x - eps(x, t) / sigma), and (eq. 39)

        log p(x) = log N(x_T; 0, I) + int_{t_min}^T div(dx/dt) dt.

    The divergence of x is its number of dimensions; only that of eps is estimated.
    x:   float[b, ...]. eps: a function, or jax.tree_util.Partial(function, params): parameters in a
         Partial are arguments of the compiled field, others are constants in it, which is slow for
         large networks. Keep one function for all batches: another one is compiled again.
    rtol, atol: of scipy's RK45 (Dormand-Prince), which solves the batch as one system: the root
         mean square of error / (atol + rtol |y|) over every pixel and log-density of all images is
         kept below 1 in each step. So a hard image among b easy ones may err sqrt(b) times as
         much, and a result depends on its batch, within the tolerance. Over a whole solution 1e-5
         comes to about 1e-4 nats per dimension; a float32 network carries nothing below 1e-6.
    t_min: the network is trained at t = 1, ..., T; below 1 it extrapolates. Song et al. stop at
           1e-5 T.
    Raises RuntimeError if the solver gives up, ValueError for a t_min outside of (0, T).
    """
    if not 0 < t_min < p.T:
        raise ValueError(f"t_min: expected a time between 0 and {p.T}, found {t_min}")
    cubics, probes = log_alpha_bar_spline(p), divergence.draw(key, x)
    eps = eps if isinstance(eps, Partial) else Partial(eps)
    b, n = x.shape[0], x.size

    def slope(t, y):
        log_a, derivative = evaluate_spline(cubics, np.float64(t))
        x_t = jnp.asarray(y[:n].reshape(x.shape), x.dtype)
        noise, diagonal = _field(divergence.value, eps, x_t, jnp.asarray(t, x.dtype), probes)
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


def dequantise(key: Array, x_0: Array) -> Array:
    """Uniform in the level's own interval, of width 1/127.5, around k/127.5 - 1; [b, ...]."""
    keys = example_keys(key, x_0.shape[0])
    u = jax.vmap(lambda k: random.uniform(k, x_0.shape[1:], x_0.dtype, -0.5, 0.5))(keys)
    return x_0 + u / 127.5


class BitsPerDim(NamedTuple):
    """bits: float64[b], bits/dim of each image; evaluations: of the field, the batch as one."""

    bits_per_dim: np.ndarray
    evaluations: int


def bits_per_dim(
    p: Process,
    eps: EpsFn,
    divergence: Divergence,
    key: Array,
    x_0: Array,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    t_min: float = 1.0,
) -> BitsPerDim:
    """Bits per dimension of images on the 256 levels, with uniform dequantisation.

    A level k is the interval around k/127.5 - 1, of volume 127.5^-d for an image. What the model
    gives it is P = int p(x) dx = 127.5^-d E_u[p(x_0 + u)], so by Jensen's inequality

        -log2 P <= E_u[-log2 p(x_0 + u)] + d log2 127.5,

    and per dimension -log_p / ln 2 + log2 127.5 at one u is an unbiased reading of a bound on the
    code length of the model that draws x_{t_min} by the ODE and rounds it, up to the solver's
    tolerance. That holds for any t_min; it is not the model of the discrete bound, whose last step
    is the decoder's.
    key: one key, or one per example [b]; x_0: [b, ...]. The rest as in log_density.
    """
    keys = jax.vmap(random.split)(example_keys(key, x_0.shape[0]))
    x = dequantise(keys[:, 0], x_0)
    out = log_density(p, eps, divergence, keys[:, 1], x, rtol, atol, t_min)
    return BitsPerDim(-out.log_p / np.log(2) + np.log2(127.5), out.evaluations)
