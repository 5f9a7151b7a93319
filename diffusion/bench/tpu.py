"""--mode=bench --part=tpu: the training step and the sampler, compiled for TPUs that are not there.

    pip install "jax[tpu]>=0.10,<0.13"
    JAX_PLATFORMS=cpu python main.py --config=configs/cifar10.py:bfloat16 --mode=bench --part=tpu

The compiler is the real one, so memory, FLOPs, bytes and collectives are those of the machine; the
speed is not measured but bounded, by its makers' figures. It takes tens of minutes of a few cores.
"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.bench import hlo
from diffusion.bench.speed import forward_flops
from diffusion.bench.timing import PEAKS, Measured
from diffusion.modes import _sampling
from diffusion.runtime.config import validate
from diffusion.sharding import batch_sharded, replicated
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError

IMAGES = 50_000  # of the set that lies on the devices: CIFAR-10's
PAPER = 21.0  # steps/s on a TPU v3-8 (Section 4)


def tpu_part(
    config: ConfigDict, x: experiment.Experiment, topology: str = "v5e:2x2"
) -> Iterator[Measured]:
    """Estimates for the named chips. Raises DDPMError where their compiler is not installed."""
    x = x._replace(mesh=mesh_of(topology))
    validate(config, x.mesh.size)
    state = experiment.abstract_state(x)
    whole = replicated(x.mesh)
    pixels = int(np.prod(x.image_shape))
    image = jax.ShapeDtypeStruct((IMAGES, pixels), jnp.uint8, sharding=whole)
    label = jax.ShapeDtypeStruct((IMAGES,), jnp.int32, sharding=whole)
    lowered = experiment.make_update(config, x).lower(state, image, label)
    rate = yield from _bounds(lowered, x.mesh, f"training step on {topology}")
    size = config.train.batch_size
    needed = 3 * size * forward_flops(x.net, *x.image_shape) / x.mesh.size
    yield Measured("  the same by formula", "GFLOP/chip", [needed / 1e9])
    yield Measured("  steps/s allowed, over the paper's 21 (an estimate)", "", [rate / PAPER])

    chain = _sampling.compile_sampler(config, x, config.sample.batch_size)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    seed = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
    indices = jax.ShapeDtypeStruct((chain.size,), jnp.int32, sharding=whole)
    split = batch_sharded(x.mesh)
    begun = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split),
        jax.eval_shape(chain.start, seed, scalar, indices),
    )
    ts = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    lowered = chain.advance.lower(state.params, *begun, ts)
    yield from _bounds(lowered, x.mesh, f"a step of {chain.size} samples on {topology}")


def mesh_of(topology: str) -> Mesh:
    """The chips of a TPU slice by its name, such as v5e:2x2, in one row: the axis `data`."""
    from jax.experimental import topologies

    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # RuntimeError, ValueError and XLA's own
        why = " ".join(str(error).split())[:200]
        message = f"--topology={topology}: expected TPUs such as v5e:2x2, and their compiler "
        message += f'(pip install "jax[tpu]>=0.10,<0.13"), found: {why}'
        raise ConfigError(message) from error
    axis_types = (AxisType.Auto,)
    return jax.make_mesh((len(chips),), ("data",), axis_types=axis_types, devices=chips)


def _bounds(lowered: Any, mesh: Mesh, what: str) -> Iterator[Measured]:
    """Compiles, tells what the program needs of a chip; returns the runs a second it allows."""
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
