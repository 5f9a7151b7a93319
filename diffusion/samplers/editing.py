"""What one can do along the way: the mathematics of the paper's pictures.

A picture is a start and a walk. The start is noise, a noised image, a mixture of two (Section 4.3),
or an x_t that several walks share; the walk goes down the chain, whole or in parts. Inpainting is a
walk of its own that also goes up (RePaint, arXiv 2201.09865). Every image has its own key, so that
it does not depend on the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion.process import (
    Process,
    broadcast_right,
    example_keys,
    log_ratio,
    q_sample,
    sample_noise,
)
from diffusion.samplers import Carry, Sampler, base
from diffusion.targets import Predict

# Numbers that no time t is: `noise` folds t into a key, these make other keys of it.
BRANCH, PARTS = 2**31, 2**30


def advance_between(
    sampler: Sampler, predict: Predict, key: Array, carry: Carry, ts: Array, i: Array, j: Array
) -> Carry:
    """A carry at ts[i] taken to ts[j]; i <= j may be traced: one program for every part of a chain.

    key: one key, or one per example [b]; ts: strictly falling int[n+1]. For i = j nothing happens.
    As `samplers.advance(..., ts[i : j + 1])`, whose compiled program is of one length only.
    """
    keys, ts = example_keys(key, carry.x.shape[0]), jnp.asarray(ts)

    def step(k, carry):
        pair = lax.dynamic_slice_in_dim(ts, k, 2)
        return base.advance(sampler, predict, keys, carry, pair)

    return lax.fori_loop(i, j, step, carry)


def evenly_spaced(steps: int, n: int, first: int = 0) -> np.ndarray:
    """At most n places among first..steps, evenly spread, both ends among them: rising int[<= n].

    Raises ValueError for n < 2.
    """
    if n < 2:
        raise ValueError(f"even: expected 2 places or more, found {n}")
    return np.unique(np.linspace(first, steps, n).round().astype(int))


def nearest_index(ts: np.ndarray, share: float) -> int:
    """Where the chain ts is nearest to share * T; the earlier place of two that are as near."""
    return int(np.abs(ts - share * ts[0]).argmin())


def fork_key(key: Array, number: Array) -> Array:
    """Another key for the same image: walks that share x_t part with it. Branch 0 is the key."""
    other = random.fold_in(key, jnp.uint32(BRANCH) + number.astype(jnp.uint32))
    return random.wrap_key_data(
        jnp.where(number == 0, random.key_data(key), random.key_data(other))
    )


def diffuse(p: Process, key: Array, x_0: Array, t: Array) -> Array:
    """x_t ~ q(x_t | x_0): the image as a latent, found by noise alone. x_0: [b, ...]; t: int[b]."""
    t = jnp.broadcast_to(jnp.asarray(t), x_0.shape[:1])
    return q_sample(p, x_0, t, sample_noise(example_keys(key, x_0.shape[0]), 0, x_0))


def interpolate_latents(p: Process, key: Array, x_0: Array, y_0: Array, t: Array, share: Array) -> Array:
    """(1 - lambda) x_t + lambda y_t, the latents between two images (Section 4.3).

    key: one per pair [b]; the same for all lambda of a pair, so that x_t and y_t stay.
    x_0, y_0: [b, ...]; t: int scalar or [b] in 0..T; share: lambda, [b] in [0, 1].
    The latents are of independent noise, as there: halfway they have less of it than an x_t has.
    """
    keys = example_keys(key, x_0.shape[0])
    x_t = diffuse(p, fork_keys(keys, 1), x_0, t)
    y_t = diffuse(p, fork_keys(keys, 2), y_0, t)
    return broadcast_right(1 - share, x_t) * x_t + broadcast_right(share, y_t) * y_t


def fork_keys(keys: Array, number: int) -> Array:
    """The same branch of each of keys [b]."""
    return jax.vmap(fork_key, (0, None))(keys, jnp.uint32(number))


class ResamplingPath(NamedTuple):
    """The way of an inpainting: step i goes from t[i] down to s[i], then up to u[i] >= s[i].

    int32[n] each. Every step is one evaluation of the network.
    """

    t: np.ndarray
    s: np.ndarray
    u: np.ndarray


def resampling_path(ts: np.ndarray, jump: int = 10, repeats: int = 10) -> ResamplingPath:
    """The chain ts, of which each stretch of `jump` steps is gone through `repeats` times.

    As the schedule of arXiv 2201.09865, Appendix B; jump = 1 is its Algorithm 1, repeats = 1 plain
    replacement. A jump comes where 1, 1 + jump, ... steps are left. The way up is one draw of
    q(x_u | x_s), which is what `jump` small ones amount to. ts: falling int[n+1]. Raises ValueError
    for numbers below 1.
    """
    for name, value in (("jump", jump), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"resampled: expected {name} of 1 or more, found {value}")
    rising, left = np.asarray(ts, np.int32)[::-1], len(ts) - 1
    jumps = dict.fromkeys(range(1, left - jump + 1, jump), repeats - 1)
    path = []
    while left:
        t, s = left, left - 1
        up = jumps.get(s, 0) > 0
        if up:
            jumps[s] -= 1
        left = s + jump * up
        path.append((t, s, left))
    return ResamplingPath(*rising[np.array(path).T])


def inpaint(
    p: Process,
    sampler: Sampler,
    predict: Predict,
    key: Array,
    x: Array,
    x_0: Array,
    known: Array,
    path: ResamplingPath,
    i: Array = 0,
    j: Array | None = None,
) -> Array:
    """Images that agree with x_0 where it is known, by replacement with resampling: steps i..j-1.

    After each step down, what is known is replaced by a draw of q(x_s | x_0); at the end it is x_0
    itself (arXiv 2201.09865, eq. 8). Going up and down again lets the rest agree with it.
    x: [b, ...] at path.t[i], at first standard normal; x_0: [b, ...] in [-1, 1], read where `known`
    (bool, broadcasts to it, True: kept) is true. j: None: to the end. i, j may be traced.
    A step starts anew each time: a sampler of several steps is one of its first order here.
    """
    keys = example_keys(key, x.shape[0])
    t, s, u = map(jnp.asarray, path)

    def draw(k, part):
        """A key for each example, step and use: a time is visited many times."""
        visit = jnp.uint32(PARTS) + jnp.uint32(3) * jnp.uint32(k) + jnp.uint32(part)
        return jax.vmap(random.fold_in, (0, None))(keys, visit)

    def step(k, x):
        carry = sampler.init(x)
        x = base.advance(sampler, predict, draw(k, 0), carry, jnp.stack([t[k], s[k]])).x
        s_b = jnp.broadcast_to(s[k], x.shape[:1])
        x = jnp.where(known, q_sample(p, x_0, s_b, sample_noise(draw(k, 1), 0, x)), x)
        return renoise(p, x, s[k], u[k], sample_noise(draw(k, 2), 0, x))

    return lax.fori_loop(i, len(path.t) if j is None else j, step, x)


def renoise(p: Process, x_s: Array, s: Array, u: Array, eps: Array) -> Array:
    """x_u ~ q(x_u | x_s) for u >= s (eq. 2, over u - s steps at once); x_s itself for u = s."""
    log = log_ratio(p, s, u)
    return broadcast_right(jnp.exp(0.5 * log), x_s) * x_s + broadcast_right(jnp.sqrt(-jnp.expm1(log)), x_s) * eps


def left(h: int, w: int) -> np.ndarray:
    """The left half is drawn anew: bool[h, w], False there."""
    return np.broadcast_to(np.arange(w) >= w // 2, (h, w))


def right(h: int, w: int) -> np.ndarray:
    """The right half is drawn anew."""
    return np.broadcast_to(np.arange(w) < (w + 1) // 2, (h, w))


def centre(h: int, w: int) -> np.ndarray:
    """A box in the middle is drawn anew, half as high and wide as the image."""
    known = np.ones((h, w), bool)
    known[h // 4 : h - h // 4, w // 4 : w - w // 4] = False
    return known


MASKS: dict[str, Callable[[int, int], np.ndarray]] = {
    "left": left,
    "right": right,
    "centre": centre,
}
