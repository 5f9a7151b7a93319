"""Training objectives: `Loss = (apply, key, x_0) -> (loss[b], {name: [b]})`.

Per example out; train.py reduces once. `apply: (x_t, model_t[b]) -> output` is the network with
parameters, labels and dropout already bound. Each builder takes (p, target, variance) and its own
settings. Table 2 of the paper is made of these two and the targets.
"""

from collections.abc import Callable

from jax import Array, random

from diffusion.likelihood import meanflat, prior_bits, vlb_term
from diffusion.process import Process, gather, q_sample
from diffusion.targets import Target, Variance, make_predict

Apply = Callable[[Array, Array], Array]
Loss = Callable[[Apply, Array, Array], tuple[Array, dict[str, Array]]]


def draw_x_t(p: Process, key: Array, x_0: Array) -> tuple[Array, Array, Array]:
    """t ~ Uniform{1..T} int[b], eps ~ N(0, 1) and x_t (eq. 4): lines 3-4 of Algorithm 1."""
    key_t, key_eps = random.split(key)
    t = random.randint(key_t, x_0.shape[:1], 1, p.T + 1)
    eps = random.normal(key_eps, x_0.shape, x_0.dtype)
    return t, eps, q_sample(p, x_0, t, eps)


def simple(p: Process, target: Target, variance: Variance) -> Loss:
    """L_simple (eq. 14): the unweighted squared error of the prediction, whatever is predicted.

    It says nothing of the variance, so a learned one is refused with ValueError, as in the official
    code.
    """
    if variance.outputs != 1:
        raise ValueError("loss 'simple' trains no variance: use a fixed one, or the loss 'vlb'")

    def loss(apply: Apply, key: Array, x_0: Array):
        t, eps, x_t = draw_x_t(p, key, x_0)
        output = apply(x_t, gather(p.model_t, t))
        return meanflat((output - target.of(p, x_0, eps, x_t, t)) ** 2), {}

    return loss


def vlb(p: Process, target: Target, variance: Variance) -> Loss:
    """L (eq. 5): a uniformly drawn term of the true bound, in bits/dim, x_0 unclipped.

    As in the official code (training_losses, 'kl') the term is not multiplied by T and the constant
    L_T is left out; the metric `bpd` is the unbiased estimate of the whole bound.
    """

    def loss(apply: Apply, key: Array, x_0: Array):
        t, _, x_t = draw_x_t(p, key, x_0)
        prediction = make_predict(p, apply, target, variance, clip=False)(x_t, t)
        bits = vlb_term(p, prediction, x_0, x_t, t)
        return bits, {"bpd": p.T * bits + prior_bits(p, x_0)}

    return loss


LOSSES = {"simple": simple, "vlb": vlb}
