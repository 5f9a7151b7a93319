"""The DINOv2 networks ViT-B/14 and ViT-L/14 (Oquab et al. 2023, arXiv:2304.07193).

    prepare_images ── patches of 14x14 ── + positions ── blocks ── norm ── class token

The class token of ViT-L/14 is what FD-DINOv2 compares (Stein et al. 2023, arXiv:2306.04675); its
program dgm-eval sets the resize and the positions used here. All is float32 with exact products on
every device, because reduced precision changes distances.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array, lax

RESIZED = 224  # every image is resized to it
PATCH_SIZE = 14
GRID_SIDE = 37  # patches on a side of the images of 518x518 that the positions were learned for
# Added to the number of patches where the original code computes the scale between two grids, so
# that rounding never loses one; it moves the points that learned positions are read at.
POSITION_OFFSET = 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1
MATMUL_PRECISION = lax.Precision.HIGHEST  # GPUs round factors to 10 bits otherwise, TPUs to 7
NORM_EPSILON = 1e-6  # of the layer norms
COEFFICIENT_BITS = 22  # of Pillow's filters for 8-bit images


class Size(NamedTuple):
    """The dimensions of a network; the features are as many as `width`."""

    width: int
    layers: int
    heads: int


DINOV2_SIZES = {"dinov2_b14": Size(768, 12, 12), "dinov2_l14": Size(1024, 24, 16)}


def kind_of(params: Any) -> str:
    """Returns the key of DINOV2_SIZES of parameters as `convert.from_dinov2` returns them."""
    width = np.shape(params["cls_token"])[-1]
    return next(kind for kind, size in DINOV2_SIZES.items() if size.width == width)


def prepare_images(images: Array) -> Array:
    """Resizes uint8[b, h, w, 3] to float32[b, 224, 224, 3], normalised as ImageNet's pixels are.

    The resize is Pillow's bicubic one of 8-bit images, bit for bit: antialiased, in integers, and
    rounded to 8 bits after the columns and after the rows; from version 13 on, Pillow begins with
    the rows of images that are much too high. Sides are stretched; grey images [b, h, w, 1] are
    repeated. Raises ValueError for other shapes and types.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        found = f"{images.dtype}{list(images.shape)}"
        raise ValueError(f"images: expected uint8[b, h, w, 3] or [b, h, w, 1], found {found}")
    x = _resize(_resize(jnp.asarray(images, jnp.int32), axis=2), axis=1)
    x = jnp.broadcast_to(x.astype(jnp.float32) / 255, (*x.shape[:3], 3))
    mean, std = (np.asarray(each, np.float32)[None, None, None] for each in (MEAN, STD))
    return (x - mean) / std


def _resize(x: Array, axis: int) -> Array:
    size, shape = x.shape[axis], [1] * 4
    shape[axis] = RESIZED
    first, taps = resize_taps(size, RESIZED)
    total = jnp.int32(2 ** (COEFFICIENT_BITS - 1))  # one half, to round to nearest
    for k, tap in enumerate(taps.T):
        pixel = jnp.take(x, np.minimum(first + k, size - 1), axis)
        total = total + pixel * tap.reshape(shape)
    return jnp.clip(total >> COEFFICIENT_BITS, 0, 255)


def resize_taps(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first pixel int32[out] and the weights int32[out, k] of Pillow's bicubic resize.

    The weights are of 22 bits, and 0 beyond the last pixel. Source: Pillow's Resample.c, whose
    cubic has a = -1/2 and is as wide as `size / out` where that is more than 1.
    """
    scale = size / out
    width = max(scale, 1.0)
    centre = (np.arange(out) + 0.5) * scale
    first = np.maximum((centre - 2 * width + 0.5).astype(int), 0)
    end = np.minimum((centre + 2 * width + 0.5).astype(int), size)
    pixel = first[:, None] + np.arange((end - first).max())
    weights = cubic((pixel - centre[:, None] + 0.5) / width, -0.5) * (pixel < end[:, None])
    weights *= 2**COEFFICIENT_BITS / weights.sum(1, keepdims=True)
    return first.astype(np.int32), np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Returns the cubic convolution kernel of Keys 1981, 0 from |x| = 2 on."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def position_weights(patches: int, offset: float) -> np.ndarray:
    """Returns float32[patches, 37] that read the learned positions for a side of so many patches.

    PyTorch's bicubic interpolation: a = -3/4, not antialiased, the border repeated; patch i is read
    at (i + 1/2) 37 / (patches + offset) - 1/2. transformers has the offset 0.
    """
    point = (np.arange(patches) + 0.5) * GRID_SIDE / (patches + offset) - 0.5
    low, weights = np.floor(point).astype(int), np.zeros((patches, GRID_SIDE))
    for k in range(-1, 3):
        at = np.clip(low + k, 0, GRID_SIDE - 1)
        np.add.at(weights, (np.arange(patches), at), cubic(point - low - k, -0.75))
    return weights.astype(np.float32)


class TransformerBlock(nn.Module):
    """Self-attention and a perceptron, each after a layer norm, scaled and added to its input."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        """Maps [b, n, c] to ([b, n, c], None), as `nn.scan` wants it."""
        b, n, c = x.shape

        def scale(name, y):
            return y * self.param(name, nn.initializers.ones, (c,))[None, None]

        y = dense(norm(x, "norm1"), "qkv", 3 * c).reshape(b, n, 3, self.heads, -1)
        q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        logits = jnp.einsum("bnhc,bmhc->bhnm", q, k, precision=MATMUL_PRECISION)
        weights = jax.nn.softmax(logits / np.float32(np.sqrt(q.shape[-1])), axis=-1)
        y = jnp.einsum("bhnm,bmhc->bnhc", weights, v, precision=MATMUL_PRECISION)
        x = x + scale("scale1", dense(y.reshape(b, n, c), "proj", c))
        y = nn.gelu(dense(norm(x, "norm2"), "fc1", 4 * c), approximate=False)
        return x + scale("scale2", dense(y, "fc2", c)), None


def dense(x: Array, name: str, features: int) -> Array:
    """Returns x kernel + bias, a layer of the module that calls it."""
    return nn.Dense(features, precision=MATMUL_PRECISION, name=name)(x)


def norm(x: Array, name: str) -> Array:
    """Returns a layer norm of the last axis, a layer of the module that calls it."""
    return nn.LayerNorm(NORM_EPSILON, use_fast_variance=False, name=name)(x)


class DinoV2(nn.Module):
    """Returns features by `DinoV2(*DINOV2_SIZES[kind]).apply({"params": params}, x)`."""

    width: int
    layers: int
    heads: int
    position_offset: float = POSITION_OFFSET

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the normed class token float32[b, width] of x, float32[b, h, w, 3].

        What exceeds a multiple of 14 pixels is cut off. Raises ValueError for other shapes.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < PATCH_SIZE:
            expected = "float[b, h, w, 3] of `prepare_images`, of 14x14 or more"
            raise ValueError(f"x: expected {expected}, found {x.dtype}{list(x.shape)}")
        window = (PATCH_SIZE, PATCH_SIZE)
        patches = nn.Conv(
            self.width, window, window, padding="VALID", precision=MATMUL_PRECISION, name="patch"
        )(x)
        b, h, w, c = patches.shape
        normal = nn.initializers.normal(0.02)
        cls_token = self.param("cls_token", normal, (c,))
        learned = self.param("position", normal, (1 + GRID_SIDE * GRID_SIDE, c))
        grid = learned[1:].reshape(GRID_SIDE, GRID_SIDE, c)
        if (h, w) != (GRID_SIDE, GRID_SIDE):  # of 518x518 nothing is interpolated
            rows, columns = (position_weights(n, self.position_offset) for n in (h, w))
            grid = jnp.einsum("ip,jq,pqc->ijc", rows, columns, grid, precision=MATMUL_PRECISION)
        tokens = (patches + grid[None]).reshape(b, h * w, c)
        first = jnp.broadcast_to((cls_token + learned[0])[None, None], (b, 1, c))
        # Blocks have their weights stacked, so that they are compiled once.
        stack = nn.scan(
            TransformerBlock, {"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = stack(self.heads, name="blocks")(jnp.concatenate([first, tokens], axis=1), None)
        return norm(x[:, 0], "norm")
