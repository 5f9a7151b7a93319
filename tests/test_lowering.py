"""Training step and sampler are lowered for TPUs and GPUs, on a machine that has neither."""

import jax
import numpy as np
import pytest

from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.train_step import training_keys
from tests.test_configs import config_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step_and_sampler_lower_for_tpu_and_cuda(dtype):
    """On a machine that has neither; the shapes of the paper's CIFAR-10 experiment.

    Of its network in bfloat16; in float32 of a narrower one, which CPUs compute by Winograd too.
    """
    config = config_of("cifar10", "conditional")
    config.model.dtype = dtype
    if dtype == "float32":
        config.model.update(ch=64, ch_mult=(1,), num_res_blocks=1)
    exp = experiment.build(config)
    state = exp.abstract_state
    images = jax.ShapeDtypeStruct((50_000, 32 * 32 * 3), np.uint8)
    labels = jax.ShapeDtypeStruct((50_000,), np.int32)
    index = jax.ShapeDtypeStruct((128,), np.int32)
    platforms = ["tpu", "cuda"]
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its counter with floats
        step = jax.export.export(experiment.make_update(config, exp, True), platforms=platforms)
        keys = jax.eval_shape(lambda: training_keys(0))
        exported = step(state, index, (keys, (images, labels)))
    assert exported.platforms == tuple(platforms)
    sampler = _sampling.compile_sampler(config, exp, 64)
    seed, indices = jax.ShapeDtypeStruct((), np.uint32), jax.ShapeDtypeStruct((64,), np.int32)
    label = jax.ShapeDtypeStruct((), np.int32)
    keys, labels, carry = jax.eval_shape(sampler.start, seed, label, indices)
    for program, arguments in [
        (sampler.start, (seed, label, indices)),
        (sampler.advance, (state.params, keys, labels, carry, label, label)),
        (sampler.finish, (carry.x,)),
    ]:
        assert jax.export.export(program, platforms=platforms)(*arguments).nr_devices == 4
