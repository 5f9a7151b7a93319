"""Attention against its formula in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.kernels.attention import attention
from tests.kernels.test_winograd import normal


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype, atol", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_attention_is_the_formula(dtype, atol, heads):
    """Each head is the attention of its own neighbouring channels."""
    q, k, v = (jnp.asarray(normal(i, 2, 6, 8), dtype) for i in range(3))
    found = attention(q, k, v, heads)
    assert found.dtype == dtype
    q, k, v = (np.split(np.asarray(a, np.float64), heads, axis=2) for a in (q, k, v))
    weights = np.exp(np.einsum("hbic,hbjc->hbij", q, k) / np.sqrt(8 / heads))
    each = (weights / weights.sum(axis=3, keepdims=True)) @ np.asarray(v)
    expected = np.concatenate(each, axis=2)
    # float32: some roundings of values up to two; bfloat16: weights and result are rounded to 2^-9.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=atol)
