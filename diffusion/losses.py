"""Training objectives, `Loss = (apply, key, x_0) -> (loss[b], {name: [b]})`.

`apply: (x_t, model_t[b]) -> output` is the network with parameters, labels and dropout bound.
Table 2 of the paper combines the two losses with the targets.
"""

from collections.abc import Callable

from jax import Array, random

from diffusion.likelihood import meanflat, prior_bits, vlb_term
from diffusion.process import Process, gather, q_sample
from diffusion.targets import Target, Variance, make_predict

Apply = Callable[[Array, Array], Array]
Loss = Callable[[Apply, Array, Array], tuple[Array, dict[str, Array]]]


def draw_x_t(p: Process, key: Array, x_0: Array) -> tuple[Array, Array, Array]:
    """Draws t ~ Uniform{1..T} int[b], eps ~ N(0, 1) and x_t (Algorithm 1, lines 3-4)."""
    key_t, key_eps = random.split(key)
    t = random.randint(key_t, x_0.shape[:1], 1, p.T + 1)
    eps = random.normal(key_eps, x_0.shape, x_0.dtype)
    return t, eps, q_sample(p, x_0, t, eps)


def simple(p: Process, target: Target, variance: Variance) -> Loss:
    """Builds L_simple (eq. 14): the mean squared error of the output, whatever the target.

    Raises ValueError for a learned variance, which it does not train.
    """
    if variance.outputs != 1:
        raise ValueError("loss 'simple' trains no variance: use a fixed one, or the loss 'vlb'")

    def loss(apply: Apply, key: Array, x_0: Array):
        t, eps, x_t = draw_x_t(p, key, x_0)
        output = apply(x_t, gather(p.model_t, t))
        return meanflat((output - target.from_x0(p, x_0, eps, x_t, t)) ** 2), {}

    return loss


def vlb(p: Process, target: Target, variance: Variance, levels: int = 256) -> Loss:
    """Builds L (eq. 5): one uniformly drawn term of the bound in bits/dim, x_0 not clipped.

    It is not multiplied by T and lacks L_T (official code); `bpd` estimates L without bias. x_0 is
    on `levels` levels, see data.augment.scale.
    """

    def loss(apply: Apply, key: Array, x_0: Array):
        t, _, x_t = draw_x_t(p, key, x_0)
        prediction = make_predict(p, apply, target, variance, clip=False)(x_t, t)
        bits = vlb_term(p, prediction, x_0, x_t, t, levels)
        return bits, {"bpd": p.T * bits + prior_bits(p, x_0)}

    return loss


LOSSES = {"simple": simple, "vlb": vlb}
