"""The forward process q, which turns an image into noise step by step (Section 2).

Time is the paper's: t = 1..T counts noising steps and t = 0 is the image, so alpha_bar[0] = 1.
Tables are float64 on the host: float32 products lose the third digit of 1 - alpha_bar at small t.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random


class Process(NamedTuple):
    """The noise levels of a chain of T steps.

    Attributes:
        alpha_bar: float64[T+1], decreasing from 1 at t = 0.
        model_t: float64[T+1], the network's time input at step t; t - 1 in the trained chain.
    """

    alpha_bar: np.ndarray
    model_t: np.ndarray

    @property
    def T(self) -> int:
        """Returns the number of steps."""
        return len(self.alpha_bar) - 1


def from_betas(betas: np.ndarray) -> Process:
    """Returns the process of eq. 2 with beta_t = betas[t - 1] in (0, 1], float[T]."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas <= 1)):
        raise ValueError(f"betas: expected a vector of numbers in (0, 1], found {betas}")
    return Process(np.append(1.0, np.cumprod(1 - betas)), np.arange(-1.0, len(betas)))


def respace(p: Process, ts: np.ndarray) -> Process:
    """Returns the shorter process whose step i is the i-th smallest of ts, distinct ints in 1..T.

    It has p's marginals q(x_t | x_0) and time inputs at these times.
    """
    ts = np.sort(np.asarray(ts))
    valid = ts.size and np.issubdtype(ts.dtype, np.integer) and 1 <= ts[0] and ts[-1] <= p.T
    if not valid or len(np.unique(ts)) != len(ts):
        raise ValueError(f"ts: expected distinct integers in 1..{p.T}, found {ts}")
    return Process(np.append(1.0, p.alpha_bar[ts]), np.append(-1.0, p.model_t[ts]))


def at_levels(p: Process, alpha_bar: np.ndarray) -> Process:
    """Returns the process of any noise levels, those between p's steps included.

    alpha_bar: float[n], strictly falling in (0, 1), of the steps 1..n. The network's time input is
    interpolated linearly in log(sigma / alpha), and constant beyond p's first and last step.
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    inside = alpha_bar.ndim == 1 and alpha_bar.size and np.all((alpha_bar > 0) & (alpha_bar < 1))
    if not inside or np.any(np.diff(alpha_bar) >= 0):
        raise ValueError(f"alpha_bar: expected falling numbers in (0, 1), found {alpha_bar}")
    q = Process(np.append(1.0, alpha_bar), np.zeros(len(alpha_bar) + 1))
    level, known = -half_log_snr(q)[1:], -half_log_snr(p)[1:]
    return q._replace(model_t=np.append(-1.0, np.interp(level, known, p.model_t[1:])))


def gather(table: np.ndarray, t) -> Array | np.ndarray:
    """Returns table[t]: float64 for a host t, the device's float type for a device or traced t."""
    # Indexing allows for negative t, and is traced for five times as long.
    return jnp.take(jnp.asarray(table), t, 0, mode="clip") if isinstance(t, Array) else table[t]


def broadcast_right(c, x: Array) -> Array:
    """Returns c, a scalar or [b], in the type of x [b, ...] and the shape [b, 1, ..., 1]."""
    c = jnp.asarray(c, x.dtype)
    return c.reshape(c.shape + (1,) * (x.ndim - c.ndim)) if c.ndim else c


def scale_by(table: np.ndarray, t, x: Array) -> Array:
    """Returns table[t] x for x [b, ...] and t a scalar or [b]."""
    return broadcast_right(gather(table, t), x) * x


def _difference(table: np.ndarray, s, t):
    """Returns table[t] - table[s], also where float32 entries would cancel.

    The device gets the table as a sum of two float32 tables, whose differences are added last.
    """
    high = table.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):
        low = np.where(np.isfinite(table), table - high, 0.0)  # inf - inf is not a number
    return (gather(high, t) - gather(high, s)) + (gather(low, t) - gather(low, s))


def log_ratio(p: Process, s, t):
    """Returns log(alpha_bar_t / alpha_bar_s) for 0 <= s <= t <= T, elementwise."""
    with np.errstate(divide="ignore"):  # alpha_bar_T may be 0
        return _difference(np.log(p.alpha_bar), s, t)


def half_log_snr(p: Process) -> np.ndarray:
    """Returns lambda_t = log(alpha_t / sigma_t), float64[T+1], decreasing from inf at t = 0."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(p.alpha_bar) - np.log1p(-p.alpha_bar))


def log_snr_step(p: Process, t, s):
    """Returns lambda_s - lambda_t >= 0 for s <= t, elementwise; inf for s = 0."""
    return _difference(half_log_snr(p), t, s)


def beta_between(p: Process, s, t):
    """Returns 1 - alpha_bar_t / alpha_bar_s, the variance of q(x_t | x_s); beta_t for s = t - 1."""
    xp = jnp if isinstance(s, Array) or isinstance(t, Array) else np
    return -xp.expm1(log_ratio(p, s, t))


class Posterior(NamedTuple):
    """The coefficients of q(x_s | x_t, x_0) = N(weight_0 x_0 + weight_t x_t, variance)."""

    weight_0: Array | np.ndarray
    weight_t: Array | np.ndarray
    variance: Array | np.ndarray


def posterior(p: Process, s, t) -> Posterior:
    """Returns the coefficients of eqs. 6-7, generalised from s = t - 1 to any 0 <= s < t <= T."""
    xp = jnp if isinstance(s, Array) or isinstance(t, Array) else np
    beta, noise_s, noise_t = beta_between(p, s, t), beta_between(p, 0, s), beta_between(p, 0, t)
    return Posterior(
        weight_0=xp.sqrt(gather(p.alpha_bar, s)) * beta / noise_t,
        weight_t=xp.exp(0.5 * log_ratio(p, s, t)) * noise_s / noise_t,
        variance=beta * noise_s / noise_t,
    )


def q_sample(p: Process, x_0: Array, t: Array, eps: Array) -> Array:
    """Returns x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (eq. 4).

    Images are [b, ...], x_0 in [-1, 1] and eps standard normal; t is a scalar or int[b] in 0..T.
    """
    if x_0.shape != eps.shape:
        raise ValueError(f"q_sample: expected eps of x_0's shape {x_0.shape}, found {eps.shape}")
    return scale_by(np.sqrt(p.alpha_bar), t, x_0) + scale_by(np.sqrt(1 - p.alpha_bar), t, eps)


def q_posterior(p: Process, x_0: Array, x_t: Array, s, t) -> tuple[Array, Array]:
    """Returns the mean [b, ...] and variance [b, 1, ..., 1] of q(x_s | x_t, x_0) (eqs. 6-7)."""
    c = posterior(p, s, t)
    mean = broadcast_right(c.weight_0, x_0) * x_0 + broadcast_right(c.weight_t, x_t) * x_t
    return mean, broadcast_right(c.variance, x_0)


def example_keys(key: Array, b: int) -> Array:
    """Returns keys [b] as they are, or one key folded with each example's index.

    Noise then does not depend on the batch or on the number of devices.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = random.wrap_key_data(key)  # a raw key of jax.random.PRNGKey
    if key.ndim == 0:
        return jax.vmap(random.fold_in, (None, 0))(key, jnp.arange(b))
    if key.shape != (b,):
        raise ValueError(f"key: expected one key, or one per example [{b}], found {key.shape}")
    return key


def sample_noise(keys: Array, t: Array, like: Array) -> Array:
    """Draws standard normal noise of the shape of `like` [b, ...], from (keys[i], t) for each i."""
    keys = jax.vmap(random.fold_in, (0, None))(keys, t)
    return jax.vmap(lambda key: random.normal(key, like.shape[1:], like.dtype))(keys)
