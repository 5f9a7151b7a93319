"""Fast solvers of the probability-flow ODE: DPM-Solver++ and UniPC.

In lambda = log(alpha / sigma) the ODE has an exact linear part, and what is left is an integral of
the predicted x_0 (DPM-Solver++, arXiv 2211.01095, Proposition 4.1):

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^1 h exp(-h (1 - u)) x_0(lambda_t + u h) du

with h = lambda_s - lambda_t. Every solver here puts a polynomial through some predictions in place
of x_0(lambda), in Newton's form; they differ in the points it goes through and in how exactly they
weigh it. The last step, to s = 0, has h = inf: it gives the predicted x_0 itself.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion.process import Process, broadcast_right, gather, log_snr_step
from diffusion.samplers.base import Sampler
from diffusion.targets import Predict

# Gauss-Legendre on [0, 1], exact to float64 for the longest steps: closed forms of the integrals
# subtract neighbours and lose, in float32, all digits of a short step's third one.
_roots, _weights = np.polynomial.legendre.leggauss(20)
ROOTS, WEIGHTS = (1 + _roots) / 2, _weights / 2


def _integral(h: Array, k: int) -> Array:
    """M_k = int_0^1 h exp(-h (1 - u)) u^k du [b], k >= 1: the weight of the k-th power; h: [b]."""
    u, w = jnp.asarray(ROOTS, h.dtype), jnp.asarray(WEIGHTS * ROOTS**k, h.dtype)
    h = h[:, None]
    return (h * jnp.exp(-h * (1 - u)[None]) * w[None]).sum(1)


# The weights of Newton's differences x_0[0, 1], x_0[0, 1, 2], ... in a step of length h: a function
# of h [b] and of where the points 1, 2, ... are, r_k [b], as fractions of the step.
Weights = Callable[[Array, Sequence[Array]], list[Array]]


def exact(h: Array, r: Sequence[Array]) -> list[Array]:
    """The integrals of u, u (u - r_1), u (u - r_1) (u - r_2), ...: exact for polynomials."""
    moments = [_integral(h, k) for k in range(1, len(r) + 1)]
    weights, powers = [], [jnp.ones_like(h)]  # coefficients of u, u^2, ...
    for r_k in r:
        weights.append(sum(c * m for c, m in zip(powers, moments, strict=False)))
        raised, lowered = [jnp.zeros_like(h), *powers], [-r_k * c for c in powers]
        powers = [a + b for a, b in zip(raised, [*lowered, jnp.zeros_like(h)], strict=True)]
    return weights


def half_expm1(h: Array, r: Sequence[Array]) -> list[Array]:
    """(1 - e^-h) / 2 for two points: midpoint of DPM-Solver++, B_2 of UniPC."""
    return [-0.5 * jnp.expm1(-h)]


def half_step(h: Array, r: Sequence[Array]) -> list[Array]:
    """h / 2 for two points: B_1 of UniPC."""
    return [0.5 * h]


def released_3m(h: Array, r: Sequence[Array]) -> list[Array]:
    """Three points as in the released DPM-Solver++ 3M, whose curvature counts half.

    Its D_2 is the second divided difference, where Taylor's polynomial has twice that. So the
    error of a step is of third order, and that of a chain of second: measured in the tests.
    """
    first, second = exact(h, r)
    return [first, second - 0.5 * _integral(h, 2)]


class Point(NamedTuple):
    """A prediction of x_0 [b, ...], made at time t int32[b]; 0: none was made yet."""

    x_0: Array
    t: Array


def integrate(
    p: Process, x_t: Array, t, s, points: Sequence[Point], order: Array, rules: Sequence[Weights]
) -> Array:
    """x_s [b, ...] from x_t, with the first `order` of the points; t, s: int[b].

    points: the first was made at t, the others before or, where they are known, after. order:
            int[b], 1 to len(points). rules: the weights for two points, for three, ...
    """
    h = jnp.where(s == t, 0, log_snr_step(p, t, s))
    # An endless step, to the image or from pure noise, is taken with the first point alone.
    order = jnp.where(jnp.isfinite(h), order, 1)
    # Points that are not used stand somewhere harmless, with weight 0.
    r = [
        jnp.where(order > k, log_snr_step(p, t, point.t) / h, -float(k))
        for k, point in enumerate(points[1:], 1)
    ]
    weights = [jnp.zeros_like(h) for _ in r]
    for n, rule in enumerate(rules, 2):
        for k, weight in enumerate(rule(h, r[: n - 1])):
            weights[k] = jnp.where(order == n, weight, weights[k])
    nodes, differences = [jnp.zeros_like(h), *r], [point.x_0 for point in points]
    mean = broadcast_right(-jnp.expm1(-h), x_t) * differences[0]
    for k, weight in enumerate(weights, 1):
        differences = [
            (b - a) / broadcast_right(nodes[j + k] - nodes[j], x_t)
            for j, (a, b) in enumerate(itertools.pairwise(differences))
        ]
        mean = mean + broadcast_right(weight, x_t) * differences[0]
    alpha, sigma = np.sqrt(p.alpha_bar), np.sqrt(1 - p.alpha_bar)
    shrunk = broadcast_right(gather(sigma, s) / gather(sigma, t), x_t) * x_t
    return shrunk + broadcast_right(gather(alpha, s), x_t) * mean


def _times(t: Array, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.int32), x.shape[:1])


def _most(order: int, s: Array, last: Sequence[int]) -> Array:
    """The highest order of a step to s: k to last[k - 1] or below, else `order`; int[b]."""
    most = jnp.full_like(s, order)
    for k, time in reversed([*enumerate(last, 1)]):
        most = jnp.where(s <= time, min(k, order), most)
    return most


class History(NamedTuple):
    """What a multi-step solver carries.

    x:      [b, ...] x_t.
    x_0:    [b, ...] the last prediction, made at time t int32[b]; 0: none was made yet.
    older:  those before, the newest first.
    start:  [b, ...] the x that the last step began at, where a corrector needs it, or None.
    """

    x: Array
    x_0: Array
    t: Array
    older: tuple[Point, ...]
    start: Array | None


def _multistep(
    p: Process,
    order: int,
    rules: Sequence[Weights],
    last: Sequence[int],
    corrector: Sequence[Weights] = (),
) -> Sampler:
    """Steps of `order` through the newest predictions; one more point each corrects the last x_t.

    The corrector (UniC, arXiv 2302.04867) needs no evaluation of its own: what is
    predicted at x_t is first used to take the step before once more.
    """
    kept = order - 1 + bool(corrector)

    def init(x_T: Array) -> History:
        none = Point(jnp.zeros_like(x_T), _times(0, x_T))
        return History(x_T, *none, (none,) * (kept - 1), x_T if corrector else None)

    def order_of(points: Sequence[Point], s: Array) -> Array:
        made = sum((point.t > 0).astype(jnp.int32) for point in points)
        return jnp.minimum(made, _most(order, s, last))

    def step(predict: Predict, keys: Array, carry: History, t: Array, s: Array) -> History:
        t, s = _times(t, carry.x), _times(s, carry.x)
        points, x = [Point(carry.x_0, carry.t), *carry.older], carry.x
        now = Point(predict(x, t).x_0, t)
        if corrector:
            # Before the first step there is nothing to correct: a step of no length, from t to t.
            before = jnp.where(carry.t > 0, carry.t, t)
            again = [points[0], now, *points[1:]]
            x = integrate(p, carry.start, before, t, again, order_of(points, t) + 1, corrector)
        points = [now, *points]
        x_s = integrate(p, x, t, s, points[:order], order_of(points, s), rules)
        return History(x_s, *now, tuple(points[1:kept]), x if corrector else None)

    return Sampler(init, step)


def _choose(what: str, choices: dict, name: str):
    if name not in choices:
        raise ValueError(f"{what}: expected one of {', '.join(map(str, choices))}, found {name}")
    return choices[name]


def dpmpp_2m(p: Process, solver: str = "midpoint", last: Sequence[int] = ()) -> Sampler:
    """DPM-Solver++ (2M): second order from the last two predictions (arXiv 2211.01095, Alg. 2).

    solver: "midpoint" as in the paper, or "heun", which weighs the straight line exactly.
    last: the last times that are visited, lowest first; the step to last[k - 1] is of order k at
          most, which helps with few steps. The step to 0 is of order 1 always. Raises ValueError.
    """
    rule = _choose("solver", {"midpoint": half_expm1, "heun": exact}, solver)
    return _multistep(p, 2, [rule], last)


def dpmpp_3m(p: Process, solver: str = "released", last: Sequence[int] = ()) -> Sampler:
    """DPM-Solver++ (3M): from the last three predictions; the code of arXiv 2211.01095 has it.

    solver: "released" as there and in diffusers, whose order is 2 (see released_3m) with about
            a third of 2M's error; "exact" weighs the parabola exactly, and its order is 3.
    last: as in dpmpp_2m; diffusers gives ts[:-3:-1] below fifteen steps. Raises ValueError.
    """
    rule = _choose("solver", {"released": released_3m, "exact": exact}, solver)
    return _multistep(p, 3, [half_expm1, rule], last)


def unipc(
    p: Process,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    last: Sequence[int] = (),
) -> Sampler:
    """UniPC-p, arXiv 2302.04867, with data prediction: of order p, with the corrector p + 1.

    order: 1 to 3. variant: B(h) of rules with two points, "bh1" = h, "bh2" = 1 - e^-h. last: as in
    dpmpp_2m; diffusers gives ts[:-order:-1]. Raises ValueError.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, found {order}")
    two = _choose("variant", {"bh1": half_step, "bh2": half_expm1}, variant)
    rules = [two, exact, exact]
    return _multistep(p, order, rules[: order - 1], last, rules[:order] if corrector else ())


class Pair(NamedTuple):
    """What a single-step solver carries: between the two halves of a step also where it began.

    x, x_0: [b, ...] as everywhere; start: [b, ...] the x that x_0 was predicted from, at time t
    int32[b] if a step is half done, else t = 0.
    """

    x: Array
    x_0: Array
    start: Array
    t: Array


def dpmpp_2s(p: Process) -> Sampler:
    """DPM-Solver++ (2S): second order from both predictions of a step (arXiv 2211.01095, Alg. 1).

    Its steps are pairs of the grid's: the first of a pair, of order 1, leads to the middle, the
    second goes all the way from where the pair began. The step to 0 is of order 1.
    """

    def init(x_T: Array) -> Pair:
        return Pair(x_T, jnp.zeros_like(x_T), jnp.zeros_like(x_T), _times(0, x_T))

    def step(predict: Predict, keys: Array, carry: Pair, t: Array, s: Array) -> Pair:
        t, s = _times(t, carry.x), _times(s, carry.x)
        now = Point(predict(carry.x, t).x_0, t)
        # A pair of no finite length (none begun, pure noise, s = 0) is two steps of their own.
        whole = jnp.isfinite(log_snr_step(p, carry.t, s))
        in_images = broadcast_right(whole, carry.x) > 0
        first = Point(jnp.where(in_images, carry.x_0, now.x_0), jnp.where(whole, carry.t, t))
        start = jnp.where(in_images, carry.start, carry.x)
        order = 1 + whole.astype(jnp.int32)
        x_s = integrate(p, start, first.t, s, [first, now], order, [half_expm1])
        return Pair(x_s, now.x_0, carry.x, jnp.where(carry.t > 0, 0, t))

    return Sampler(init, step)
