"""Placement of arrays on the devices of all processes: batches sharded, all else replicated."""

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """Returns a mesh of all devices of all processes along one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that holds a copy of the array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(sharding: NamedSharding, n: int) -> np.ndarray:
    """Returns which of n rows under `sharding` lie on this process's devices, int[r], ascending."""
    indices = sharding.addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[index] for index in indices]))


def make_global_array(rows: np.ndarray, sharding: NamedSharding, shape: tuple[int, ...]) -> Array:
    """Returns the global array of `shape`, of which each process gives its `local_rows`.

    A replicated array has all its rows in every process.
    """
    return jax.make_array_from_process_local_data(sharding, rows, shape)
