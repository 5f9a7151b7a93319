"""The timesteps that a sampler visits: T = ts[0] > ts[1] > ... > ts[steps] = 0.

A grid maps (p, steps) to such times, int32[steps + 1], evenly spaced in some function of t and
rounded to the times of training. It raises ValueError unless 1 <= steps <= T.
"""

import numpy as np
from jax import Array
from jax import numpy as jnp

from diffusion.process import Process, broadcast_right, gather, half_log_snr, respace
from diffusion.targets import Predict, Variance, p_mean_log_variance, posterior_log_var
from diffusion.utils.errors import one_line


def _check(T: int, steps: int) -> None:
    if not 1 <= steps <= T:
        raise ValueError(f"sampler steps: expected 1 to {T} (the trained chain), found {steps}")


def _round(T: int, times: np.ndarray) -> np.ndarray:
    """Rounds times falling from T to 0 and makes them distinct by moving as few as possible."""
    lowest = np.arange(len(times))
    rising = np.round(times[::-1]).astype(int)
    rising = lowest + np.maximum.accumulate(rising - lowest)
    return np.minimum(rising, T - lowest[::-1])[::-1].astype(np.int32)


def uniform(p: Process, steps: int) -> np.ndarray:
    """Spaces the times evenly in t (diffusers: trailing)."""
    _check(p.T, steps)
    return _round(p.T, np.linspace(p.T, 0, steps + 1))


def quadratic(p: Process, steps: int) -> np.ndarray:
    """Spaces the times evenly in sqrt(t): Song et al. 2021 (arXiv:2010.02502), appendix D.2."""
    _check(p.T, steps)
    return _round(p.T, p.T * np.linspace(1, 0, steps + 1) ** 2)


def _evenly_in(p: Process, steps: int, values: np.ndarray) -> np.ndarray:
    """Spaces the times 1..T evenly in the rising values[t - 1]; the last step is 1 -> 0."""
    _check(p.T, steps)
    if not np.isfinite(values[0]) or not np.isfinite(values[-1]):
        raise ValueError("sampler grid: this schedule ends in pure noise; use uniform or quadratic")
    times = np.interp(np.linspace(values[-1], values[0], steps), values, np.arange(1, p.T + 1))
    return _round(p.T, np.append(times, 0.0))


def logsnr(p: Process, steps: int) -> np.ndarray:
    """Spaces the times evenly in log(alpha / sigma): Lu et al. 2022 (arXiv:2211.01095)."""
    return _evenly_in(p, steps, -half_log_snr(p)[1:])


def karras(p: Process, steps: int, rho: float = 7.0) -> np.ndarray:
    """Spaces the times evenly in (sigma / alpha)^(1 / rho), as Karras et al. (arXiv:2206.00364)."""
    return _evenly_in(p, steps, np.exp(-half_log_snr(p)[1:] / rho))


def angle(p: Process, steps: int) -> np.ndarray:
    """Spaces the times evenly in arctan(sigma / alpha), the angle of the target v.

    It has few times near 0 and T: the middle of two steps is where image and noise are equal.
    """
    _check(p.T, steps)
    values = np.arccos(np.sqrt(p.alpha_bar))
    angles = np.linspace(values[-1], 0, steps + 1)
    return _round(p.T, np.interp(angles, values, np.arange(p.T + 1)))


def explicit(p: Process, ts) -> np.ndarray:
    """Makes a grid of distinct ints in 1..T that fall, or rise; appends 0 where it is missing."""
    found = np.asarray(ts).ravel()
    found = found[::-1] if found.size and found[0] < found[-1] else found
    valid = found.size and np.issubdtype(found.dtype, np.integer)
    if not valid or not 1 <= found[0] <= p.T or found[-1] < 0 or np.any(np.diff(found) >= 0):
        wanted = f"expected distinct integers in 1..{p.T}, falling from first to last"
        raise ValueError(f"sampler times: {wanted}, found {one_line(ts, 100)}")
    return np.append(found[found > 0], 0).astype(np.int32)


def least_cost(costs: np.ndarray, steps: int) -> np.ndarray:
    """Finds the grid of least total cost, where costs[s, t] is the cost of a step t -> s.

    With analytic.step_costs it has the best bound: Watson et al. 2021 (arXiv:2106.03802). Takes
    O(steps T^2). More steps may cost more, if the network errs or the decoder does better.
    """
    T = len(costs) - 1
    _check(T, steps)
    # least[t] is the least cost from t to 0 in k steps, whose first one leads to next_times[k][t].
    least, next_times = costs[0], [np.zeros(T + 1, np.int32)]
    for _ in range(steps - 1):
        through = least[:, None] + costs
        next_times.append(through.argmin(0).astype(np.int32))
        least = through.min(0)
    ts = [T]
    for table in reversed(next_times):
        ts.append(table[ts[-1]])
    return np.array(ts, np.int32)


def respace_predict(p: Process, predict: Predict, variance: Variance, ts: np.ndarray) -> Predict:
    """Turns the `predict` of p into that of process.respace(p, ts), for every target.

    A fixed variance and a learned range become those of the shorter chain's own tables. A learned
    variance and the mean of a mu-network are kept where a step of the shorter chain is one of p,
    and otherwise follow from x0_variance and x_0; the variance of the first step is clipped as in
    `posterior_log_var`.
    """
    q = respace(p, ts)
    times = np.append(0, np.sort(np.asarray(ts)))

    def respaced(x_t: Array, i: Array):
        i = jnp.broadcast_to(jnp.asarray(i), x_t.shape[:1])
        s, t = gather(times, i - 1), gather(times, i)
        prediction = predict(x_t, t)
        mean, log_var = p_mean_log_variance(p, prediction, x_t, s, t)
        x0_variance = prediction.x0_variance
        if variance.outputs == 1 or variance.is_range:
            log_var = broadcast_right(variance.log_var(q, prediction.position, i), x_t)
            x0_variance = variance.x0_variance(q, log_var, i)
        else:
            floor = jnp.maximum(log_var, broadcast_right(posterior_log_var(q, i), x_t))
            log_var = jnp.where(broadcast_right(s == t - 1, x_t) > 0, log_var, floor)
        mean = None if prediction.mean is None else mean
        return prediction._replace(log_var=log_var, x0_variance=x0_variance, mean=mean)

    return respaced
