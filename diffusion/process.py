"""The forward process q: how an image becomes noise, step by step (Section 2 of the paper).

Time is the paper's: t = 1..T counts steps of noise and t = 0 is the image itself, so alpha_bar[0] =
1 and "the step before" needs no special case. Tables are float64 on the host; a float32 cumulative
product would be wrong in the third digit of 1 - alpha_bar at small t. They are cast where they meet
the images.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random


class Process(NamedTuple):
    """A chain of T noising steps. A value: no state, no randomness.

    alpha_bar: float64[T+1], the share of variance that is still image, 1 at t = 0 and falling.
    model_t:   float64[T+1], the time the network is told at step t; the official code counts from
               0.
    """

    alpha_bar: np.ndarray
    model_t: np.ndarray

    @property
    def T(self) -> int:
        """The number of steps."""
        return len(self.alpha_bar) - 1


def from_betas(betas: np.ndarray) -> Process:
    """The process of eq. 2, with alpha_bar_t = prod_{s<=t} (1 - beta_s) of eq. 4.

    betas: float[T], each in (0, 1], beta_t = betas[t - 1]. Raises ValueError for anything else.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas <= 1)):
        raise ValueError(f"betas: expected a vector of numbers in (0, 1], found {betas}")
    alpha_bar = np.append(1.0, np.cumprod(1 - betas))
    return Process(alpha_bar, np.arange(-1.0, len(betas)))


def respace(p: Process, ts: np.ndarray) -> Process:
    """The chain that visits only the times `ts` of p: a shorter chain is just another process.

    ts: distinct ints in 1..T, in any order. Step i of the result stands at the i-th smallest, with
    the same marginal q(x_t | x_0), and the network is told the time that it was trained with.
    Raises ValueError for other times.
    """
    ts = np.sort(np.asarray(ts))
    inside = ts.size and np.issubdtype(ts.dtype, np.integer) and 1 <= ts[0] and ts[-1] <= p.T
    if not inside or len(np.unique(ts)) != len(ts):
        raise ValueError(f"ts: expected distinct integers in 1..{p.T}, found {ts}")
    return Process(np.append(1.0, p.alpha_bar[ts]), np.append(-1.0, p.model_t[ts]))


def at_levels(p: Process, alpha_bar: np.ndarray) -> Process:
    """The chain that visits any noise levels, those between the trained times included.

    alpha_bar: float[n], strictly falling in (0, 1), of the steps 1..n. What the network is told
               lies between two trained times as log(sigma / alpha) does; beyond the first or last
               of them it is that one.
    A network of real times only; one of eps, x0 or v, as mu means a trained step. Raises ValueError
    for other levels.
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    inside = alpha_bar.ndim == 1 and alpha_bar.size and np.all((alpha_bar > 0) & (alpha_bar < 1))
    if not inside or np.any(np.diff(alpha_bar) >= 0):
        raise ValueError(f"alpha_bar: expected falling numbers in (0, 1), found {alpha_bar}")
    q = Process(np.append(1.0, alpha_bar), np.zeros(len(alpha_bar) + 1))
    noise_level, trained = -half_log_snr(q)[1:], -half_log_snr(p)[1:]
    return q._replace(model_t=np.append(-1.0, np.interp(noise_level, trained, p.model_t[1:])))


def gather(table: np.ndarray, t) -> Array | np.ndarray:
    """table[t]: float64 for a host t, the device's float type for a device or traced t."""
    return jnp.asarray(table)[t] if isinstance(t, Array) else table[t]


def broadcast_right(c, x: Array) -> Array:
    """Numbers c, scalar or [b], with the shape [b, 1, ..., 1] and type that multiply x [b, ...]."""
    c = jnp.asarray(c, x.dtype)
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) if c.ndim else c


def _difference(table: np.ndarray, s, t):
    """table[t] - table[s], elementwise, of a table whose neighbours agree in most of their digits.

    One float32 table would lose half the digits. So it goes to the device in two parts whose
    differences are exact enough, and both are added after.
    """
    high = table.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        low = np.where(np.isfinite(table), table - high, 0.0)  # an infinity has no lower part
    return (gather(high, t) - gather(high, s)) + (gather(low, t) - gather(low, s))


def log_ratio(p: Process, s, t):
    """log(alpha_bar_t / alpha_bar_s) for 0 <= s <= t <= T, elementwise."""
    with np.errstate(divide="ignore"):  # alpha_bar_T = 0
        return _difference(np.log(p.alpha_bar), s, t)


def half_log_snr(p: Process) -> np.ndarray:
    """lambda_t = log(alpha_t / sigma_t) = log(alpha_bar / (1 - alpha_bar)) / 2, falling from inf.

    float64[T+1]. Solvers measure their steps in it (DPM-Solver, arXiv 2206.00927).
    """
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(p.alpha_bar) - np.log1p(-p.alpha_bar))


def log_snr_step(p: Process, t, s):
    """lambda_s - lambda_t, elementwise: the length h >= 0 of a step t -> s, inf to s = 0."""
    return _difference(half_log_snr(p), t, s)


def beta_between(p: Process, s, t):
    """1 - alpha_bar_t / alpha_bar_s, the variance of q(x_t | x_s); for s = t - 1 it is beta_t."""
    xp = jnp if isinstance(t, Array) or isinstance(s, Array) else np
    return -xp.expm1(log_ratio(p, s, t))


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(weight_0 x_0 + weight_t x_t, variance): numbers per (s, t)."""

    weight_0: Array | np.ndarray
    weight_t: Array | np.ndarray
    variance: Array | np.ndarray


def posterior(p: Process, s, t) -> Posterior:
    """The coefficients of eqs. 6-7, for s = t - 1 and for any other 0 <= s < t <= T.

    Host integers give float64, device integers float32.
    """
    xp = jnp if isinstance(t, Array) or isinstance(s, Array) else np
    beta, noise_s, noise_t = beta_between(p, s, t), beta_between(p, 0, s), beta_between(p, 0, t)
    return Posterior(
        weight_0=xp.sqrt(gather(p.alpha_bar, s)) * beta / noise_t,
        weight_t=xp.exp(0.5 * log_ratio(p, s, t)) * noise_s / noise_t,
        variance=beta * noise_s / noise_t,
    )


def q_sample(p: Process, x_0: Array, t: Array, eps: Array) -> Array:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (eq. 4).

    x_0: [b, ...] in [-1, 1]; t: int[b] or a scalar in 0..T; eps: standard normal, x_0's shape.
         Returns x_0's shape.
    """
    if x_0.shape != eps.shape:
        raise ValueError(f"q_sample: expected eps of x_0's shape {x_0.shape}, found {eps.shape}")
    signal, noise = np.sqrt(p.alpha_bar), np.sqrt(1 - p.alpha_bar)
    return broadcast_right(gather(signal, t), x_0) * x_0 + broadcast_right(gather(noise, t), x_0) * eps


def q_posterior(p: Process, x_0: Array, x_t: Array, s, t) -> tuple[Array, Array]:
    """Mean [b, ...] and variance [b, 1, ...] of q(x_s | x_t, x_0): eqs. 6-7, and any s < t."""
    c = posterior(p, s, t)
    mean = broadcast_right(c.weight_0, x_0) * x_0 + broadcast_right(c.weight_t, x_t) * x_t
    return mean, broadcast_right(c.variance, x_0)


def example_keys(key: Array, b: int) -> Array:
    """One key per example [b]: a single key is folded with each index, an array [b] stays as it is.

    Drawing per example makes an example's noise independent of the batch and of the devices it
    shares.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = random.wrap_key_data(key)  # the old style of keys, jax.random.PRNGKey
    if key.ndim == 0:
        return jax.vmap(random.fold_in, (None, 0))(key, jnp.arange(b))
    if key.shape != (b,):
        raise ValueError(f"key: expected one key, or one per example [{b}], found {key.shape}")
    return key


def sample_noise(keys: Array, t: Array, like: Array) -> Array:
    """Standard normal noise like `like` [b, ...], a function of (keys[i], t) for each example i."""

    def draw(key):
        return random.normal(random.fold_in(key, t), like.shape[1:], like.dtype)

    return jax.vmap(draw)(keys)
