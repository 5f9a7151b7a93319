"""Classifier-free guidance, and dynamic thresholding of the predicted x_0."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion.process import broadcast_right


def classifier_free_guidance(
    apply: Callable[[Array, Array, Array], Array], label: Array, null: int, w: float | Array
) -> Callable[[Array, Array], Array]:
    """Returns the guided network (1 + w) output(x_t, label) - w output(x_t, null).

    Ho and Salimans 2022 (arXiv:2207.12598), eq. 6, for any target, as each is linear in eps at a
    given x_t. A learned variance is that of the label.

    Args:
        apply: (x_t [2b, ...], model_t[2b], label[2b]) -> output. Both outputs of an image are
            neighbours in one batch, so that a sharded batch is not moved between devices.
        label: int[b].
        null: the label of no class; the null_label of unet.UNet.
        w: the guidance weight, a number or [b]; other codes call 1 + w the scale.
    """

    def guided(x_t: Array, model_t: Array) -> Array:
        labels = jnp.stack([label, jnp.full_like(label, null)], 1).reshape(-1)
        output = apply(jnp.repeat(x_t, 2, 0), jnp.repeat(model_t, 2, 0), labels)
        output = output.reshape(len(x_t), 2, *output.shape[1:])
        conditional, unconditional = output[:, 0], output[:, 1, ..., : x_t.shape[-1]]
        output, log_var = jnp.split(conditional, [x_t.shape[-1]], axis=-1)
        output = output + broadcast_right(w, output) * (output - unconditional)
        return jnp.concatenate([output, log_var], -1)

    return guided


def dynamic_threshold(ratio: float = 0.995, maximum: float = np.inf) -> Callable[[Array], Array]:
    """Returns a function that clips each image to [-c, c] and divides it by c.

    c is the quantile `ratio` of the image's |x_0|, but at least 1 and at most `maximum`. Saharia et
    al. 2022 (arXiv:2205.11487), Section 2.3.
    """
    if not (0 < ratio <= 1 <= maximum):
        found = f"{ratio} and {maximum}"
        raise ValueError(f"threshold: expected 0 < ratio <= 1 <= maximum, found {found}")

    def threshold(x_0: Array) -> Array:
        c = jnp.quantile(jnp.abs(x_0).reshape(len(x_0), -1), ratio, axis=1)
        c = broadcast_right(jnp.clip(c, 1, maximum), x_0)
        return jnp.clip(x_0, -c, c) / c

    return threshold
