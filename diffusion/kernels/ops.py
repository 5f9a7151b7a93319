"""Normalisation, convolution and attention, arranged for the machines: where the time goes.

Each is the plain formula to within the rounding that its test states. Where the kind of device
decides how something is computed, it decides in this file and nowhere else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from diffusion.kernels import winograd

EPSILON = 1e-6  # of the normalisation, officially
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def group_norm(
    x: Array, scale: Array, bias: Array, groups: int, after: Callable[[Array], Array], dtype: Any
) -> Array:
    """after(GroupNorm(x)), [b, h, w, c] -> same in `dtype`; after: of one number, such as swish.

    scale, bias: float32[c]. Everything inside is float32.
    Source: official `normalize` (`tf.contrib.layers.group_norm` and its default epsilon).
    """
    return _forward(x, scale, bias, groups, after, dtype)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm_in_training(
    x: Array, scale: Array, bias: Array, groups: int, after: Callable[[Array], Array], dtype: Any
) -> Array:
    """`group_norm` with a way back that keeps x and two numbers a channel; no forward mode."""
    return _forward(x, scale, bias, groups, after, dtype)[0]


def _forward(x, scale, bias, groups, after, dtype):
    """(what `group_norm` gives, what the way back needs)."""
    statistics = _statistics(x, groups)
    y = _normalised(*_read_again(x), *statistics, scale, bias, after)
    return y.astype(dtype), (x, *statistics, scale, bias)


def _backward_of_norm(groups, after, dtype, saved, g):
    """By x, scale and bias, in two passes over x and g, of which nothing is written between."""
    x, mean, deviation, scale, bias = saved

    def of_pixels(x, g):
        normal = (x.astype(jnp.float32) - mean[:, None, None]) * deviation[:, None, None]
        _, pull = jax.vjp(after, normal * scale[None, None, None] + bias[None, None, None])
        return normal, pull(g.astype(jnp.float32))[0]

    normal, by_bias = of_pixels(x, g)
    by_bias, by_scale = by_bias.sum(axis=(1, 2)), (by_bias * normal).sum(axis=(1, 2))
    x, g, by_bias, by_scale = _read_again(x, g, by_bias, by_scale)
    normal, by_normal = of_pixels(x, g)
    pixels = x.shape[1] * x.shape[2]
    first = _of_group(by_bias * scale[None], groups) / pixels
    second = _of_group(by_scale * scale[None], groups) / pixels
    by_normal = by_normal * scale[None, None, None] - first[:, None, None]
    by_x = (by_normal - normal * second[:, None, None]) * deviation[:, None, None]
    return by_x.astype(x.dtype), by_scale.sum(axis=0), by_bias.sum(axis=0)


group_norm_in_training.defvjp(_forward, _backward_of_norm)


def _read_again(*arrays):
    """The same arrays, of which no later pass shares what an earlier one computed.

    XLA would keep float32 copies of them for that: twice the bytes of bfloat16. A processor reads
    faster than it computes: there they are shared.
    """
    return lax.platform_dependent(
        *arrays, cpu=lambda *a: a, default=lambda *a: lax.optimization_barrier(a)
    )


def _statistics(x, groups):
    """(mean, 1 / standard deviation) of each channel's group, float32[b, c], in one pass over x.

    The moments are taken around the middle pixel: E[x²] - E[x]² would lose digits where the mean is
    large. The derivative knows nothing of that pixel.
    """
    shift = lax.stop_gradient(x[:, x.shape[1] // 2, x.shape[2] // 2]).astype(jnp.float32)
    d = x.astype(jnp.float32) - shift[:, None, None]
    first, second = d.mean(axis=(1, 2)), jnp.square(d).mean(axis=(1, 2))
    means = shift + first
    mean = _of_group(means, groups)
    variance = _of_group(second - jnp.square(first) + jnp.square(means - mean), groups)
    return mean, lax.rsqrt(jnp.maximum(variance, 0) + EPSILON)


def _of_group(channels, groups):
    """[b, c] -> the mean of each channel's group, [b, c]."""
    b, c = channels.shape
    grouped = channels.reshape(b, groups, c // groups)
    return jnp.broadcast_to(grouped.mean(axis=2, keepdims=True), grouped.shape).reshape(b, c)


def _normalised(x, mean, deviation, scale, bias, after):
    x = x.astype(jnp.float32) - mean[:, None, None]
    return after(x * (deviation * scale[None])[:, None, None] + bias[None, None, None])


# Height * width * channels in * channels out, from which on Winograd's way is the faster one:
LARGE, LARGE_IN_TRAINING = 2**21, 2**22
MOST = 2**20  # numbers of an image, beyond which its tiles leave the cache: XLA's is faster again
FEWEST = 4  # tiles of F4 along a side: fewer pixels do not pay for the larger kernels


def convolve(x: Array, kernel: Array, strides: Any, padding: Any, **options) -> Array:
    """`lax.conv_general_dilated` for nn.Conv; on a CPU a large 3x3 one takes Winograd's F2.

    x [b, h, w, c], kernel [kh, kw, c, o] -> [b, h', w', o]. Where the images are cut over devices,
    `jax.sharding.use_abstract_mesh` around the call says so; else a CPU would gather them first.
    """
    if _is_large(LARGE, x, kernel, strides, padding):
        return _convolve_3x3(_devices(x), winograd.F2, x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def convolve_in_training(x: Array, kernel: Array, strides: Any, padding: Any, **options) -> Array:
    """`convolve` with Winograd's way back too, and F4 on large images; no forward mode.

    F4 rounds ten to twenty times as coarsely as F2: far finer than the noise of a batch's gradient,
    but not for what is measured.
    """
    if _is_large(LARGE_IN_TRAINING, x, kernel, strides, padding):
        return _convolve_3x3_in_training(_devices(x), _fastest(x), x, kernel)
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _is_large(least, x, kernel, strides, padding):
    """And 3x3, of float32, for more than a picture's channels and sides that the tiles cover."""
    plain = kernel.shape[:2] == (3, 3) and set(strides) == {1} and padding == "SAME"
    even = x.shape[1] % 2 == x.shape[2] % 2 == 0 and x.dtype == kernel.dtype == jnp.float32
    *_, c, o = kernel.shape
    return plain and even and min(c, o) >= 32 and x.shape[1] * x.shape[2] * c * o >= least


def _in_cache(x):
    return math.prod(x.shape[1:]) <= MOST


def _fastest(x):
    sides = x.shape[1:3]
    pays = all(side % winograd.F4.m == 0 and side >= FEWEST * winograd.F4.m for side in sides)
    return winograd.F4 if pays else winograd.F2


def _devices(x):
    """Those that the images are cut over, an abstract mesh, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or x.shape[0] % mesh.size else mesh


def _convolve_3x3(mesh, f, x, kernel):
    fast = functools.partial(winograd.convolve, f=f) if _in_cache(x) else _of_xla
    return _chosen(mesh, fast, _of_xla, (True, False, True), x, kernel)


def _backward_of_convolution(mesh, f, saved, g):
    x, kernel = saved

    def by_x_of_xla(g, kernel):
        return jax.linear_transpose(lambda x: _of_xla(x, kernel), x)(g)[0]

    def by_kernel(x, g):
        found = winograd.by_kernel(x, g, f)
        return lax.psum(found, mesh.axis_names) if mesh else found

    def by_kernel_of_xla(x, g):
        return jax.linear_transpose(lambda kernel: _of_xla(x, kernel), kernel)(g)[0]

    fast = functools.partial(winograd.by_x, f=f) if _in_cache(g) else by_x_of_xla
    by_x = _chosen(mesh, fast, by_x_of_xla, (True, False, True), g, kernel)
    return by_x, _chosen(mesh, by_kernel, by_kernel_of_xla, (True, True, False), x, g)


def _chosen(mesh, fast, of_xla, cut, *arrays):
    """fast(*arrays) on a CPU, on each device for its images; of_xla(*arrays) elsewhere.

    cut: of each array, and last of the result, whether it is of images, cut over the devices.
    """
    if mesh:
        *given, out = (PartitionSpec(mesh.axis_names if c else None) for c in cut)
        fast = jax.shard_map(fast, mesh=mesh, in_specs=tuple(given), out_specs=out)
    return lax.platform_dependent(*arrays, cpu=fast, default=of_xla)


def _of_xla(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


_convolve_3x3_in_training = jax.custom_vjp(_convolve_3x3, nondiff_argnums=(0, 1))
_convolve_3x3_in_training.defvjp(
    lambda *args: (_convolve_3x3(*args), args[2:]), _backward_of_convolution
)


def attention(q: Array, k: Array, v: Array) -> Array:
    """softmax(q kᵀ / sqrt(c)) v with one head: [b, n, c] each -> [b, n, c].

    Logits and softmax are float32. By cuDNN's flash attention where that applies.
    """
    if _flash(q.dtype, q.shape[-1]):
        heads = (a[:, :, None] for a in (q, k, v))
        with jax.numpy_dtype_promotion("standard"):  # which JAX's own function counts on
            return jax.nn.dot_product_attention(*heads, implementation="cudnn")[:, :, 0]
    # Not JAX's own: a processor turns its axis of heads around, a tenth of a small network's time.
    logits = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bnm,bmc->bnc", weights.astype(v.dtype), v)


def _flash(dtype, c) -> bool:
    """On an Ampere GPU or a later one, in bfloat16, with heads that cuDNN has kernels for."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16 or c % 8:
        return False
    capability = float(jax.devices()[0].compute_capability)
    return capability >= 8 and c <= (256 if capability >= 9 else 128)
