"""Fast solvers of the probability-flow ODE: DPM-Solver++ and UniPC.

With lambda = log(alpha / sigma) and h = lambda_s - lambda_t the exact solution is (Lu et al. 2022,
arXiv:2211.01095, Prop. 4.1)

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^1 h exp(-h (1 - u)) x_0(lambda_t + u h) du.

All solvers here replace x_0(lambda) by a polynomial through some predictions, in Newton's form.
They differ in these nodes and in the weights of the divided differences. A step to s = 0 has
h = inf and returns the predicted x_0.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion.process import Process, broadcast_right, gather, log_snr_step
from diffusion.samplers.base import Sampler, choose
from diffusion.targets import Predict

# Gauss-Legendre quadrature on [0, 1], because the closed forms of the integrals cancel in float32.
_roots, _weights = np.polynomial.legendre.leggauss(20)
ROOTS, WEIGHTS = (1 + _roots) / 2, _weights / 2

# (h [b], r) -> weights [b] of the divided differences x_0[0, 1], x_0[0, 1, 2], ... in a step of
# length h, for nodes at the fractions 0, r_1, r_2, ... of the step.
Rule = Callable[[Array, Sequence[Array]], list[Array]]


def _quadrature(h: Array) -> tuple[Array, Array]:
    """Returns u [1, n] and w [b, n] with sum w f(u) = int_0^1 h exp(-h (1 - u)) u f(u) du."""
    u, h = jnp.asarray(ROOTS, h.dtype)[None], h[:, None]
    return u, h * jnp.exp(-h * (1 - u)) * jnp.asarray(WEIGHTS * ROOTS, h.dtype)[None]


def exact(h: Array, r: Sequence[Array]) -> list[Array]:
    """Integrates u, u (u - r_1), u (u - r_1) (u - r_2), ...: exact for polynomials."""
    (u, w), weights = _quadrature(h), []
    for r_k in r:
        weights.append(w.sum(1))
        w = w * (u - r_k[:, None])
    return weights


def half_expm1(h: Array, r: Sequence[Array]) -> list[Array]:
    """Returns (1 - e^-h) / 2 for two nodes: midpoint of DPM-Solver++, B_2 of UniPC."""
    return [-0.5 * jnp.expm1(-h)]


def released_3m(h: Array, r: Sequence[Array]) -> list[Array]:
    """Counts half of the second divided difference, as the released 3M: its global order is 2."""
    (u, w), (first, second) = _quadrature(h), exact(h, r)
    return [first, second - 0.5 * (w * u).sum(1)]


class Node(NamedTuple):
    """An x_0 [b, ...] predicted at time t int32[b]; t = 0: not predicted yet."""

    x_0: Array
    t: Array


def integrate(
    p: Process, x_t: Array, t, s, nodes: Sequence[Node], order: Array, rules: Sequence[Rule]
) -> Array:
    """Returns x_s [b, ...] from x_t by the polynomial through the first `order` nodes.

    t, s and order are int[b]. The first node is at t, the others in any order. The rules are for
    two nodes, for three, ... Steps of infinite length use one node.
    """
    h = jnp.where(s == t, 0, log_snr_step(p, t, s))
    order = jnp.where(jnp.isfinite(h), order, 1)
    # Unused nodes get distinct finite positions, so that their weight of 0 meets no NaN.
    r = [
        jnp.where(order > k, log_snr_step(p, t, node.t) / h, -float(k))
        for k, node in enumerate(nodes[1:], 1)
    ]
    weights = [jnp.zeros_like(h) for _ in r]
    for n, rule in enumerate(rules, 2):
        for k, weight in enumerate(rule(h, r[: n - 1])):
            weights[k] = jnp.where(order == n, weight, weights[k])
    positions, differences = [jnp.zeros_like(h), *r], [node.x_0 for node in nodes]
    mean = broadcast_right(-jnp.expm1(-h), x_t) * differences[0]
    for k, weight in enumerate(weights, 1):
        differences = [
            (b - a) / broadcast_right(positions[j + k] - positions[j], x_t)
            for j, (a, b) in enumerate(itertools.pairwise(differences))
        ]
        mean = mean + broadcast_right(weight, x_t) * differences[0]
    alpha, sigma = np.sqrt(p.alpha_bar), np.sqrt(1 - p.alpha_bar)
    shrunk = broadcast_right(gather(sigma, s) / gather(sigma, t), x_t) * x_t
    return shrunk + broadcast_right(gather(alpha, s), x_t) * mean


def _times(t: Array, x: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.int32), x.shape[:1])


class MultistepState(NamedTuple):
    """The state of a multistep solver: x_t and the last prediction, made at time t as in Node.

    `older` has the predictions before it, newest first; `start` is the x [b, ...] that the last
    step began with, if there is a corrector.
    """

    x: Array
    x_0: Array
    t: Array
    older: tuple[Node, ...]
    start: Array | None


def _multistep(p: Process, order: int, rules, final_times, corrector=()) -> Sampler:
    """Builds a solver with steps through the newest `order` predictions.

    A corrector (UniC of Zhao et al. 2023, arXiv:2302.04867) repeats the last step with the
    prediction at its end as one more node, which needs no evaluation of its own.
    """
    kept = order - 1 + bool(corrector)

    def init(x_T: Array) -> MultistepState:
        none = Node(jnp.zeros_like(x_T), _times(0, x_T))
        return MultistepState(x_T, *none, (none,) * (kept - 1), x_T if corrector else None)

    def order_of(nodes: Sequence[Node], s: Array) -> Array:
        """Counts the predictions made, up to `order`, and up to k for s <= final_times[k-1]."""
        most = jnp.full_like(s, order)
        for k, time in reversed([*enumerate(final_times, 1)]):
            most = jnp.where(s <= time, min(k, order), most)
        return jnp.minimum(sum((node.t > 0).astype(jnp.int32) for node in nodes), most)

    def step(predict: Predict, keys: Array, state: MultistepState, t: Array, s: Array):
        t, s, x = _times(t, state.x), _times(s, state.x), state.x
        older, new = [Node(state.x_0, state.t), *state.older], Node(predict(x, t).x_0, t)
        if corrector:
            # Before the first step there is nothing to correct, hence a step of length 0.
            start_t = jnp.where(state.t > 0, state.t, t)
            nodes = [older[0], new, *older[1:]]
            x = integrate(p, state.start, start_t, t, nodes, order_of(older, t) + 1, corrector)
        nodes = [new, *older]
        x_s = integrate(p, x, t, s, nodes[:order], order_of(nodes, s), rules)
        return MultistepState(x_s, *new, tuple(nodes[1:kept]), x if corrector else None)

    return Sampler(init, step)


def dpmpp_2m(p: Process, solver: str = "midpoint", final_times: Sequence[int] = ()) -> Sampler:
    """Builds DPM-Solver++ (2M), second order (Lu et al. 2022, arXiv:2211.01095, Alg. 2).

    `solver` is "midpoint", the paper's, or "heun", which integrates exactly. The step to
    final_times[k - 1] has at most order k, which helps with few steps: the last times visited,
    lowest first. The step to 0 always has order 1.
    """
    rule = choose("solver", {"midpoint": half_expm1, "heun": exact}, solver)
    return _multistep(p, 2, [rule], final_times)


def dpmpp_3m(p: Process, solver: str = "released", final_times: Sequence[int] = ()) -> Sampler:
    """Builds DPM-Solver++ (3M): "released" (order 2), as its authors' code, or "exact" (order 3).

    final_times is as in dpmpp_2m; diffusers gives ts[:-3:-1] below 15 steps.
    """
    rule = choose("solver", {"released": released_3m, "exact": exact}, solver)
    return _multistep(p, 3, [half_expm1, rule], final_times)


def unipc(
    p: Process,
    order: int = 2,
    variant: str = "bh2",
    corrector: bool = True,
    final_times: Sequence[int] = (),
) -> Sampler:
    """Builds UniPC of order 1 to 3 with data prediction (Zhao et al. 2023, arXiv:2302.04867).

    `variant` is B(h) of two nodes: "bh1" = h or "bh2" = 1 - e^-h. The corrector raises the order by
    one. final_times is as in dpmpp_2m; diffusers gives ts[:-order:-1].
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, found {order}")
    two = choose("variant", {"bh1": lambda h, r: [0.5 * h], "bh2": half_expm1}, variant)
    rules = [two, exact, exact]
    return _multistep(p, order, rules[: order - 1], final_times, rules[:order] if corrector else ())


class SinglestepState(NamedTuple):
    """The state of a singlestep solver: x_t and the last prediction, made from (start, t).

    t is 0 unless the first half of a step is done.
    """

    x: Array
    x_0: Array
    start: Array
    t: Array


def dpmpp_2s(p: Process) -> Sampler:
    """Builds DPM-Solver++ (2S), second order (Lu et al. 2022, arXiv:2211.01095, Alg. 1).

    A step is a pair of the grid's: the first leads to the middle with order 1, the second from the
    start to the end.
    """

    def init(x_T: Array) -> SinglestepState:
        return SinglestepState(x_T, jnp.zeros_like(x_T), jnp.zeros_like(x_T), _times(0, x_T))

    def step(predict: Predict, keys: Array, state: SinglestepState, t: Array, s: Array):
        t, s = _times(t, state.x), _times(s, state.x)
        new = Node(predict(state.x, t).x_0, t)
        # False as well in pairs that start at pure noise or end at s = 0: two steps of order 1.
        second = jnp.isfinite(log_snr_step(p, state.t, s))
        in_images = broadcast_right(second, state.x) > 0
        first = Node(jnp.where(in_images, state.x_0, new.x_0), jnp.where(second, state.t, t))
        start = jnp.where(in_images, state.start, state.x)
        order = 1 + second.astype(jnp.int32)
        x_s = integrate(p, start, first.t, s, [first, new], order, [half_expm1])
        return SinglestepState(x_s, new.x_0, state.x, jnp.where(state.t > 0, 0, t))

    return Sampler(init, step)
