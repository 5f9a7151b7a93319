"""--mode=bench --part=tpu: a training step and a sampling step, compiled for absent TPUs.

    pip install "jax[tpu]>=0.10,<0.13"
    JAX_PLATFORMS=cpu python main.py --config=configs/cifar10.py:bfloat16 --mode=bench --part=tpu

The compiler is the real one, so memory, FLOPs, bytes and collectives are the machine's; the speed
is not measured but bounded, by the makers' figures. It takes about ten minutes on two cores.
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
from diffusion.bench.speed import forward_flops, jit_chain, round_up
from diffusion.bench.timing import PEAKS, Measured
from diffusion.runtime.validation import validate
from diffusion.sharding import batch_sharded, replicated
from diffusion.train_step import training_keys
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError, one_line

NUM_IMAGES = 50_000  # of the data set, on the devices if it fits: CIFAR-10's
PAPER_RATE = 21.0  # steps/s on a TPU v3-8 (Section 4)


def tpu_part(config: ConfigDict, topology: str = "v5e:2x2") -> Iterator[Measured]:
    """Yields estimates for the named chips. Raises ConfigError without their compiler."""
    exp = experiment.build(config, tpu_mesh(topology))
    validate(config, exp.mesh.size)
    training, sampling = lower_steps(config, exp)
    rate = yield from _bounds(training, exp.mesh, f"training step on {topology}")
    forward = forward_flops(exp.net, *exp.image_shape)
    needed = 3 * config.train.batch_size * forward / exp.mesh.size
    yield Measured("  the same by formula", "GFLOP/chip", [needed / 1e9])
    yield Measured("  steps/s allowed, over the paper's 21 (an estimate)", "", [rate / PAPER_RATE])
    n = round_up(config.sample.batch_size, exp)
    yield from _bounds(sampling, exp.mesh, f"a step of {n} samples on {topology}")


def lower_steps(config: ConfigDict, exp: experiment.Experiment) -> tuple[Any, Any]:
    """Lowers a training step and a sampling step for the devices of exp.mesh."""
    everywhere, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)

    def array(shape, dtype, sharding=everywhere):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    state, n = exp.abstract_state, round_up(config.sample.batch_size, exp)
    size, pixels = config.train.batch_size, math.prod(exp.image_shape)
    if resident := NUM_IMAGES * pixels <= config.data.on_device_gib * 2**30:
        images = array((NUM_IMAGES, pixels), jnp.uint8)
        batch, dataset = array((size,), jnp.int32), (images, array((NUM_IMAGES,), jnp.int32))
    else:  # a larger set is streamed
        images = array((size, *exp.image_shape), jnp.uint8, sharded)
        batch, dataset = (images, array((size,), jnp.int32, sharded)), ()
    fixed = jax.tree.map(lambda key: array((), key.dtype), training_keys(config.seed)), dataset
    training = experiment.make_update(config, exp, resident).lower(state, batch, fixed)
    label, x_T = array((n,), jnp.int32, sharded), array((n, *exp.image_shape), jnp.float32, sharded)
    keys, ts = array((n,), jax.random.key(0).dtype, sharded), array((2,), jnp.int32)
    return training, jit_chain(config, exp).lower(state.ema, label, keys, x_T, ts)


def tpu_mesh(topology: str) -> Mesh:
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
    touched, main = hlo.moved_bytes(text)
    peak, accessed = PEAKS[mesh.devices.flat[0].device_kind], cost["bytes accessed"]
    arithmetic, traffic = cost["flops"] / peak.flops, main / peak.bytes
    rate = 1 / max(arithmetic, traffic)
    for what, value, unit in (
        ("arguments", memory.argument_size_in_bytes / 1e9, "GB/chip"),
        ("temporaries", memory.temp_size_in_bytes / 1e9, "GB/chip"),
        *((kind, size / 1e9, "GB/chip") for kind, size in hlo.collectives(text).items()),
        ("FLOPs, by the compiler", cost["flops"] / 1e9, "GFLOP/chip"),
        ("bytes accessed, all memories", accessed / 1e9, "GB/chip"),
        ("without transfers between memories", touched / 1e9, "GB/chip"),
        ("bytes of main memory alone", main / 1e9, "GB/chip"),
        ("no less than, for the arithmetic", arithmetic * 1e3, "ms"),
        ("no less than, for main memory", traffic * 1e3, "ms"),
        ("if all bytes accessed were of main memory", accessed / peak.bytes * 1e3, "ms"),
        ("allowed (an estimate)", rate, "/s"),
    ):
        yield Measured(f"  {what}", unit, [value])
    return rate
