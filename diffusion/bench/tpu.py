"""--mode=bench --part=tpu: a training step and a sampling step, compiled for absent TPUs.

    pip install "jax[tpu]>=0.10,<0.13"
    JAX_PLATFORMS=cpu python main.py --config=configs/cifar10.py:bfloat16 --mode=bench --part=tpu

The compiler is the real one, so memory, FLOPs, bytes and collectives are the machine's; the speed
is not measured but bounded, by the makers' figures. It takes tens of minutes of a few cores.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.bench import hlo
from diffusion.bench.speed import forward_flops
from diffusion.bench.timing import PEAKS, Measured
from diffusion.runtime.config import validate
from diffusion.samplers import advance
from diffusion.sharding import batch_sharded, replicated
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError, one_line

IMAGES = 50_000  # of the data set on the devices: CIFAR-10's
PAPER = 21.0  # steps/s on a TPU v3-8 (Section 4)


def tpu_part(config: ConfigDict, topology: str = "v5e:2x2") -> Iterator[Measured]:
    """Yields estimates for the named chips. Raises ConfigError without their compiler."""
    exp = experiment.build(config, mesh_of(topology))
    validate(config, exp.mesh.size)
    state, size = experiment.abstract_state(exp), config.train.batch_size
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)

    def array(shape, dtype, sharding=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    images = array((IMAGES, math.prod(exp.image_shape)), jnp.uint8)
    inputs = array((size,), jnp.int32), images, array((IMAGES,), jnp.int32)
    lowered = experiment.make_update(config, exp, True).lower(state, *inputs)
    rate = yield from _bounds(lowered, exp.mesh, f"training step on {topology}")
    needed = 3 * size * forward_flops(exp.net, *exp.image_shape) / exp.mesh.size
    yield Measured("  the same by formula", "GFLOP/chip", [needed / 1e9])
    yield Measured("  steps/s allowed, over the paper's 21 (an estimate)", "", [rate / PAPER])

    sampler, _ = experiment.make_sampler(config, exp)
    predictor = experiment.make_predictor(config, exp)
    n = -(-config.sample.batch_size // exp.mesh.size) * exp.mesh.size

    def sample(params, label, key_data, x_T, ts):
        keys = jax.random.wrap_key_data(key_data)
        return advance(sampler, predictor(params, label), keys, sampler.init(x_T), ts).x

    begun = array((n,), jnp.int32, sharded), array((n, 2), jnp.uint32, sharded)
    begun = (*begun, array((n, *exp.image_shape), jnp.float32, sharded), array((2,), jnp.int32))
    lowered = jax.jit(sample, out_shardings=sharded).lower(state.params, *begun)
    yield from _bounds(lowered, exp.mesh, f"a step of {n} samples on {topology}")


def mesh_of(topology: str) -> Mesh:
    """Returns the chips of a TPU slice, such as v5e:2x2, along the axis `data`.

    Raises ConfigError where their compiler is not installed.
    """
    from jax.experimental import topologies

    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # RuntimeError, ValueError and XLA's own
        message = f"--topology={topology}: expected TPUs such as v5e:2x2, and their compiler "
        message += f'(pip install "jax[tpu]>=0.10,<0.13"), found: {one_line(error, 200)}'
        raise ConfigError(message) from error
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((len(chips),), ("data",), axis_types=axis_types, devices=chips)


def _bounds(lowered: Any, mesh: Mesh, what: str) -> Iterator[Measured]:
    """Compiles; yields what the program needs of a chip; returns the runs per second it allows."""
    logging.info(f"compiling  {what}")
    began = time.perf_counter()
    compiled = lowered.compile()
    yield Measured(f"compiling: {what}", "s", [time.perf_counter() - began])
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    moved = hlo.moved(text)
    yield Measured("  arguments", "GB/chip", [memory.argument_size_in_bytes / 1e9])
    yield Measured("  temporaries", "GB/chip", [memory.temp_size_in_bytes / 1e9])
    for kind, size in hlo.collectives(text).items():
        yield Measured(f"  {kind}", "GB/chip", [size / 1e9])
    yield Measured("  FLOPs, by the compiler", "GFLOP/chip", [cost["flops"] / 1e9])
    yield Measured("  bytes accessed, all memories", "GB/chip", [cost["bytes accessed"] / 1e9])
    yield Measured("  without transfers between memories", "GB/chip", [moved.touched / 1e9])
    yield Measured("  bytes of main memory alone", "GB/chip", [moved.main / 1e9])
    peak = PEAKS[mesh.devices.flat[0].device_kind]
    floors = cost["flops"] / peak.flops, moved.main / peak.bytes
    yield Measured("  no less than, for the arithmetic", "ms", [floors[0] * 1e3])
    yield Measured("  no less than, for main memory", "ms", [floors[1] * 1e3])
    all_bytes = cost["bytes accessed"] / peak.bytes
    yield Measured("  if all bytes accessed were of main memory", "ms", [all_bytes * 1e3])
    yield Measured("  allowed (an estimate)", "/s", [1 / max(floors)])
    return 1 / max(floors)
