"""Converts between bytes and x_0, gathers a batch on the device, and flips it at random."""

import math

import jax.numpy as jnp
from jax import Array, random


def scale(image: Array, levels: int = 256) -> Array:
    """Maps uint8[...] to x_0 = 2 k / (levels - 1) - 1, float32[...], of the nearest level k.

    The levels k = 0..levels-1 are evenly spaced over 0..255, so -1 is 0 and 1 is 255.
    """
    k = jnp.rint(image.astype(jnp.float32) * ((levels - 1) / 255))
    return k / ((levels - 1) / 2) - 1


def unscale(x: Array, levels: int = 256) -> Array:
    """Maps float[...] to the nearest level, uint8[...]; values outside [-1, 1] are clipped.

    The official code truncates instead (utils.unnormalize_data and a cast), which puts 63 of the
    256 levels one too low; this is the exact inverse of `scale` for rounded levels.
    """
    k = jnp.clip(jnp.rint((x.astype(jnp.float32) + 1) * ((levels - 1) / 2)), 0, levels - 1)
    return jnp.rint(k * (255 / (levels - 1))).astype(jnp.uint8)


def gather_batch(
    images: Array, labels: Array, index: Array, shape: tuple[int, int, int]
) -> tuple[Array, Array]:
    """Takes a batch out of a data set that lies on the device; called inside a compiled step.

    Args:
      images: uint8[n, h * w * c], an image a row. In four dimensions a TPU would copy all of it
        before it takes a few.
      labels: int32[n].
      index: int32[b] in 0..n-1, from `loader.make_batch_indices`.
      shape: (h, w, c).

    Returns:
      (image uint8[b, h, w, c], label int32[b]).

    Raises:
      ValueError: The arrays have other types or shapes.
    """
    rows = (*labels.shape, math.prod(shape))
    if images.dtype != jnp.uint8 or images.shape != rows or labels.ndim != 1:
        found = f"{images.dtype}{list(images.shape)} and {labels.dtype}{list(labels.shape)}"
        expected = f"images uint8[n, {rows[-1]}] and labels int32[n]"
        raise ValueError(f"expected {expected}, found {found}")
    return images[index].reshape(-1, *shape), labels[index]


def augment(image: Array, key: Array, step: Array, flip: bool, levels: int = 256) -> Array:
    """Turns the images of a step into x_0, float32[b, h, w, c] in [-1, 1].

    Args:
      image: uint8[b, h, w, c].
      key: The key of all flips of a training.
      step: int32[].
      flip: Mirror each image left to right with probability 1/2, drawn anew at every visit (the
        official code's random_flip_left_right).
      levels: Of x_0, see `scale`.
    """
    if flip:
        mirrored = random.bernoulli(random.fold_in(key, step), shape=image.shape[:1])
        image = jnp.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
    return scale(image, levels)
