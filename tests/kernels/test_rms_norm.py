"""RMS normalisation: Flax's own, with a bias and an activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import random

from diffusion.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_it_is_that_of_flax(epsilon):
    x, bias = random.normal(random.key(0), (2, 3, 4, 5)), random.normal(random.key(1), (5,))
    scale = random.normal(random.key(2), (5,))
    norm = nn.RMSNorm(epsilon=epsilon)
    with jax.numpy_rank_promotion("allow"):
        expected = nn.swish(norm.apply({"params": {"scale": scale}}, x) + bias)
    found = rms_norm(x, scale, bias, 1, nn.swish, jnp.float32, epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert rms_norm(x, scale, bias, 1, nn.swish, jnp.bfloat16, epsilon).dtype == jnp.bfloat16
