"""Normalisation, convolution and attention, arranged for the machines: where the time goes.

Each is the plain formula to within the rounding that its test states. Where the kind of device
decides how something is computed, it decides in this file and nowhere else.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

EPSILON = 1e-6  # of the normalisation, officially
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@functools.partial(
    jax.checkpoint,
    static_argnums=(3, 4, 5),
    policy=jax.checkpoint_policies.save_only_these_names("statistics"),
)
def group_norm(
    x: Array, scale: Array, bias: Array, groups: int, after: Callable[[Array], Array], dtype: Any
) -> Array:
    """after(GroupNorm(x)), [b, h, w, c] -> same in `dtype`; after: of one number, such as swish.

    scale, bias: float32[c]. Everything inside is float32. The way back keeps x and two numbers a
    channel and computes the rest again: cheaper everywhere than to write and read it.
    The image is read once for both moments. They are taken around its middle pixel: E[x²] - E[x]²
    would lose digits where the mean is large. The derivative knows nothing of that pixel.
    Source: official `normalize` (`tf.contrib.layers.group_norm` and its default epsilon).
    """
    b, height, width, c = x.shape
    x = x.astype(jnp.float32)

    def of_group(channels):
        grouped = channels.reshape(b, groups, c // groups)
        mean = grouped.mean(axis=2, keepdims=True)
        return jnp.broadcast_to(mean, grouped.shape).reshape(b, c)

    shift = lax.stop_gradient(x[:, height // 2, width // 2])
    d = x - shift[:, None, None]
    first, second = d.mean(axis=(1, 2)), jnp.square(d).mean(axis=(1, 2))
    means = shift + first
    mean = of_group(means)
    variance = of_group(second - jnp.square(first) + jnp.square(means - mean))
    mean, deviation = checkpoint_name(
        (mean, lax.rsqrt(jnp.maximum(variance, 0) + EPSILON)), "statistics"
    )
    x = (x - mean[:, None, None]) * (deviation * scale[None])[:, None, None]
    return after(x + bias[None, None, None]).astype(dtype)


def convolve(x: Array, kernel: Array, strides: Any, padding: Any, **options) -> Array:
    """`lax.conv_general_dilated`, for nn.Conv in training: XLA's except where that is slow.

    No forward-mode derivative where it is not XLA's.
    """
    height, width, c = x.shape[1:]
    large = height * width >= 32 * 32 and c * kernel.shape[-1] >= 128 * 128
    if large and kernel.shape[:2] == (3, 3) and set(strides) == {1} and padding == "SAME":
        return _convolve_3x3(x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _of_xla(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def _backward(saved, g):
    x, kernel = saved
    (by_x,) = jax.linear_transpose(lambda x: _of_xla(x, kernel), x)(g)
    return by_x, lax.platform_dependent(x, g, cpu=by_kernel_in_products, default=by_kernel_of_xla)


_convolve_3x3 = jax.custom_vjp(_of_xla)
_convolve_3x3.defvjp(lambda x, kernel: (_of_xla(x, kernel), (x, kernel)), _backward)


def by_kernel_of_xla(x: Array, g: Array) -> Array:
    """The gradient by the kernel of a 3x3 'SAME' convolution of x, g being that by its output.

    x [b, h, w, c], g [b, h, w, o] -> [3, 3, c, o].
    """
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], g.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _of_xla(x, kernel), kernel)(g)[0]


def by_kernel_in_products(x: Array, g: Array) -> Array:
    """The same as nine matrix products, one for each place in the kernel.

    On a CPU, for images of 32x32 and more with 128 channels and more, in half to a third of the
    time of XLA's; smaller ones are faster with XLA's (docs/performance.md).
    """
    _, height, width, c = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows = g.reshape(-1, g.shape[-1])
    places = [
        jnp.einsum(
            "nc,no->co",
            x[:, i : i + height, j : j + width].reshape(-1, c),
            rows,
            preferred_element_type=jnp.float32,
        )
        for i in range(3)
        for j in range(3)
    ]
    return jnp.stack(places).reshape(3, 3, c, -1).astype(x.dtype)


def attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ / sqrt(c)) v with one head: [b, n, c] each -> [b, n, c].

    Logits and softmax are float32. By cuDNN's flash attention where that applies.
    """
    heads = (a[:, :, None] for a in (q, k, v))
    kind = "cudnn" if _flash(q.dtype, q.shape[-1]) else "xla"
    with jax.numpy_dtype_promotion("standard"):  # which JAX's own function counts on
        return jax.nn.dot_product_attention(*heads, implementation=kind)[:, :, 0]


def _flash(dtype, c) -> bool:
    """On an Ampere GPU or a later one, in bfloat16, with heads that cuDNN has kernels for."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16 or c % 8:
        return False
    capability = float(jax.devices()[0].compute_capability)
    return capability >= 8 and c <= (256 if capability >= 9 else 128)
