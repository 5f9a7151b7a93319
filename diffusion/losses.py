"""Training objectives, `Loss = (apply, key, x_0, t) -> (loss[b], {name: [b]})`.

`apply: (x_t, model_t[b]) -> output` is a network with parameters, labels and dropout bound, in
training a gradients.Network; t is int[b] in 1..T, or None to draw it. Table 2 of the paper
combines `simple` and `vlb` with the targets.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from diffusion.consistency import consistency_loss
from diffusion.continuous import continuous
from diffusion.likelihood import meanflat, prior_bits, vlb_term
from diffusion.process import Process, gather, q_sample
from diffusion.targets import Target, Variance, make_predict

Apply = Callable[[Array, Array], Array]
Loss = Callable[..., tuple[Array, dict[str, Array]]]
TimeWeights = np.ndarray | None


def draw_x_t(
    p: Process, key: Array, x_0: Array, t: Array | None = None
) -> tuple[Array, Array, Array]:
    """Draws t ~ Uniform{1..T} int[b], eps ~ N(0, 1) and x_t (Algorithm 1, lines 3-4).

    A given t is kept.
    """
    key_t, key_eps = random.split(key)
    t = random.randint(key_t, x_0.shape[:1], 1, p.T + 1) if t is None else t
    eps = random.normal(key_eps, x_0.shape, x_0.dtype)
    return t, eps, q_sample(p, x_0, t, eps)


def _weigh(error: Array, weights: TimeWeights, t: Array) -> Array:
    return error if weights is None else error * gather(weights, t).astype(error.dtype)


def simple(p: Process, target: Target, variance: Variance, weights: TimeWeights = None) -> Loss:
    """Builds L_simple (eq. 14): the mean squared error of the output, whatever the target.

    weights: of the error at t = 0..T, as weightings.output_weights has them; None: 1. Raises
    ValueError for a learned variance, which it does not train.
    """
    if variance.outputs != 1:
        raise ValueError("'simple' trains no variance: use a fixed one, or the loss vlb or hybrid")

    def loss(apply: Apply, key: Array, x_0: Array, t: Array | None = None):
        t, eps, x_t = draw_x_t(p, key, x_0, t)
        output = apply(target.scale_input(p, x_t, t), gather(p.model_t, t))
        error = meanflat((output - target.from_x0(p, x_0, eps, x_t, t)) ** 2)
        return _weigh(error, weights, t), {}

    return loss


def vlb(p: Process, target: Target, variance: Variance, levels: int = 256) -> Loss:
    """Builds L (eq. 5): one uniformly drawn term of the bound in bits/dim, x_0 not clipped.

    It is not multiplied by T and lacks L_T (official code); `bpd` estimates L without bias. x_0 is
    on `levels` levels, see data.augment.scale.
    """

    def loss(apply: Apply, key: Array, x_0: Array, t: Array | None = None):
        t, _, x_t = draw_x_t(p, key, x_0, t)
        prediction = make_predict(p, apply, target, variance, clip=False)(x_t, t)
        bits = vlb_term(p, prediction, x_0, x_t, t, levels)
        return bits, {"bpd": p.T * bits + prior_bits(p, x_0)}

    return loss


def hybrid(
    p: Process,
    target: Target,
    variance: Variance,
    levels: int = 256,
    vlb_weight: float = 0.001,
    weights: TimeWeights = None,
) -> Loss:
    """Builds L_simple + vlb_weight L, where L, in bits/dim, trains nothing but the variance.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 16; their code's RESCALED_MSE. Its MSE is a
    vlb_weight of 1 / T. The weights are those of `simple`. Raises ValueError for a fixed variance.
    """
    if variance.outputs != 2:
        raise ValueError("'hybrid' trains a variance: use learned_range or learned, or simple")

    def loss(apply: Apply, key: Array, x_0: Array, t: Array | None = None):
        t, eps, x_t = draw_x_t(p, key, x_0, t)
        output = apply(target.scale_input(p, x_t, t), gather(p.model_t, t))
        mean, extra = jnp.split(output, 2, axis=-1)
        error = meanflat((mean - target.from_x0(p, x_0, eps, x_t, t)) ** 2)
        frozen = jnp.concatenate([lax.stop_gradient(mean), extra], axis=-1)
        predict = make_predict(p, lambda x_t, t: frozen, target, variance, clip=False)
        bits = vlb_term(p, predict(x_t, t), x_0, x_t, t, levels)
        bound = p.T * bits
        return _weigh(error, weights, t) + vlb_weight * bound, {"bpd": bound + prior_bits(p, x_0)}

    return loss


LOSSES = {
    "simple": simple,
    "vlb": vlb,
    "hybrid": hybrid,
    "continuous": continuous,
    "consistency": consistency_loss,
}
