"""Which of the trained times a sampler visits: T = ts[0] > ts[1] > ... > ts[steps] = 0.

A grid is even in something: in t, in its root, in the logarithm of the signal-to-noise ratio. Its
times are rounded to trained ones, since that is where the network was trained. For noise levels
between them, `process.at_levels` is a chain of its own.
"""

import numpy as np

from diffusion.process import Process, half_log_snr


def _trained(T: int, times: np.ndarray) -> np.ndarray:
    """Real times falling from T to 0, rounded and made distinct: int32.

    Times that round to the same one move up, as little as they can, and down again below T.
    """
    least = np.arange(len(times))  # of the times in rising order, if all are distinct
    rising = np.round(times[::-1]).astype(int)
    rising = least + np.maximum.accumulate(rising - least)
    return np.minimum(rising, T - least[::-1])[::-1].astype(np.int32)


def _check(p: Process, steps: int) -> None:
    if not 1 <= steps <= p.T:
        raise ValueError(f"sampler steps: expected 1 to {p.T} (the trained chain), found {steps}")


def uniform(p: Process, steps: int) -> np.ndarray:
    """Evenly spaced in t (diffusers: trailing).

    Returns int32[steps + 1], as all here. Raises ValueError unless 1 <= steps <= T.
    """
    _check(p, steps)
    return _trained(p.T, np.linspace(p.T, 0, steps + 1))


def quadratic(p: Process, steps: int) -> np.ndarray:
    """Evenly spaced in sqrt(t): denser near the image (DDIM, arXiv 2010.02502, appendix D.2)."""
    _check(p, steps)
    return _trained(p.T, p.T * np.linspace(1, 0, steps + 1) ** 2)


def _even(p: Process, steps: int, of: np.ndarray) -> np.ndarray:
    """Evenly spaced in the rising of[t], t = 1..T, between its ends; the last step is 1 -> 0."""
    _check(p, steps)
    if not np.isfinite(of[0]) or not np.isfinite(of[-1]):
        raise ValueError("sampler grid: this schedule ends in pure noise; use uniform or quadratic")
    times = np.interp(np.linspace(of[-1], of[0], steps), of, np.arange(1, p.T + 1))
    return _trained(p.T, np.append(times, 0.0))


def logsnr(p: Process, steps: int) -> np.ndarray:
    """Evenly spaced in log(alpha / sigma), for DPM-Solver++ and UniPC (arXiv 2211.01095).

    Raises ValueError too for a schedule whose alpha_bar_T is 0.
    """
    return _even(p, steps, -half_log_snr(p)[1:])


def karras(p: Process, steps: int, rho: float = 7.0) -> np.ndarray:
    """Evenly spaced in (sigma / alpha)^(1 / rho): eq. 5 of EDM, arXiv 2206.00364.

    Raises ValueError too for a schedule whose alpha_bar_T is 0.
    """
    return _even(p, steps, np.exp(-half_log_snr(p)[1:] / rho))


def leading(p: Process, steps: int) -> np.ndarray:
    """1, 1 + k, 1 + 2k, ... with k = T // steps: the times of the DDIM code and of diffusers.

    They start below T, where x is not yet pure noise: to repeat published numbers, not for new
    ones, so not in GRIDS.
    """
    _check(p, steps)
    return np.append(1 + p.T // steps * np.arange(steps)[::-1], 0).astype(np.int32)


def explicit(p: Process, ts) -> np.ndarray:
    """A list of times as a grid: distinct ints in 1..T, in any order; 0 is added where it lacks.

    Raises ValueError for others.
    """
    found = np.sort(np.asarray(ts).ravel())
    inside = found.size and np.issubdtype(found.dtype, np.integer)
    inside = inside and 0 <= found[0] and 1 <= found[-1] <= p.T
    if not inside or len(np.unique(found)) != len(found):
        raise ValueError(f"sampler times: expected distinct integers in 1..{p.T}, found {ts}")
    return np.append(found[found > 0][::-1], 0).astype(np.int32)


GRIDS = {"uniform": uniform, "quadratic": quadratic, "logsnr": logsnr, "karras": karras}
