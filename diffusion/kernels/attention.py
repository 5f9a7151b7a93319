"""Self-attention, by cuDNN's flash attention where it applies."""

import math

import jax
import jax.numpy as jnp
from jax import Array


def attention(q: Array, k: Array, v: Array, heads: int = 1) -> Array:
    """Returns softmax(q kᵀ / sqrt(c)) v, [b, n, c], for q, k, v [b, n, c].

    Logits and softmax are float32. heads: divides c; each has c / heads neighbouring channels.
    """
    if heads > 1:
        b, n, c = q.shape

        def split(a):
            return a.reshape(b, n, heads, -1).swapaxes(1, 2).reshape(b * heads, n, -1)

        out = attention(*map(split, (q, k, v)))
        return out.reshape(b, heads, n, -1).swapaxes(1, 2).reshape(b, n, c)
    if _has_flash_kernel(q.dtype, q.shape[-1]):
        heads = (a[:, :, None] for a in (q, k, v))
        with jax.numpy_dtype_promotion("standard"):  # assumed by JAX's own function
            return jax.nn.dot_product_attention(*heads, implementation="cudnn")[:, :, 0]
    # Not jax.nn's: on a CPU it transposes the axis of heads, a tenth of a small network's time.
    logits = jnp.einsum("bnc,bmc->bnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("bnm,bmc->bnc", weights.astype(v.dtype), v)


def _has_flash_kernel(dtype, c) -> bool:
    """Returns whether this is an Ampere GPU or later, and cuDNN has a kernel for dtype and c."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16 or c % 8:
        return False
    capability = float(jax.devices()[0].compute_capability)
    return capability >= 8 and c <= (256 if capability >= 9 else 128)
