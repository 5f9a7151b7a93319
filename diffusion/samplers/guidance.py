"""guidance."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion.process import broadcast_right


def dynamic_threshold(ratio: float = 0.995, maximum: float = np.inf) -> Callable[[Array], Array]:
    """Dynamic thresholding of x_0, in place of clipping (Imagen, arXiv 2205.11487, Section 2.3).

    Each image is clipped to [-c, c] and divided by c, the quantile `ratio` of its |x_0|, but at
    least 1 and at most `maximum`. For strong guidance, whose x_0 clipping saturates. Raises
    ValueError.
    """
    if not (0 < ratio <= 1 <= maximum):
        found = f"{ratio} and {maximum}"
        raise ValueError(f"threshold: expected 0 < ratio <= 1 <= maximum, found {found}")

    def limit(x_0: Array) -> Array:
        c = jnp.quantile(jnp.abs(x_0).reshape(len(x_0), -1), ratio, axis=1)
        c = broadcast_right(jnp.clip(c, 1, maximum), x_0)
        return jnp.clip(x_0, -c, c) / c

    return limit


def classifier_free_guidance(
    apply: Callable[[Array, Array, Array], Array], label: Array, null: int, w: float | Array
) -> Callable[[Array, Array], Array]:
    """Classifier-free guidance as a network `(x_t, model_t[b]) -> output`.

    Eq. 6 of arXiv 2207.12598,

        (1 + w) output(x_t, label) - w output(x_t, null)

    of what is predicted, before x_0 is clipped; for any target, as each is linear in eps at one
    x_t. A second half of the channels, a learned variance, is the labelled one's.
    apply: (x_t [2b, ...], model_t[2b], label[2b]) -> output: both are one evaluation, pairs side by
           side, so that a batch cut over devices stays where it is.
    label: int[b]. null: the label that means none; for unet.UNet its num_classes. w: a number or
    [b]; 0 is no guidance, -1 no label. Others count from 1: their scale is 1 + w.
    """

    def both(x_t: Array, model_t: Array) -> Array:
        labels = jnp.stack([label, jnp.full_like(label, null)], 1).reshape(-1)
        output = apply(jnp.repeat(x_t, 2, 0), jnp.repeat(model_t, 2, 0), labels)
        output = output.reshape(len(x_t), 2, *output.shape[1:])
        labelled, free = output[:, 0], output[:, 1]
        of, rest = jnp.split(labelled, [x_t.shape[-1]], axis=-1)
        of = of + broadcast_right(w, of) * (of - free[..., : x_t.shape[-1]])
        return jnp.concatenate([of, rest], -1)

    return both
