"""sharding."""

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def data_mesh() -> Mesh:
    """All devices of all processes in one row: the axis `data`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def local_rows(sharding: NamedSharding, n: int) -> np.ndarray:
    """Which of n rows, cut as `sharding` says, lie on this process's devices: int[r], rising."""
    here = sharding.addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[index] for index in here]))


def make_global_array(rows: np.ndarray, sharding: NamedSharding, shape: tuple[int, ...]) -> Array:
    """A global array of `shape`, of which each process gives the rows that are `rows_here`."""
    here = local_rows(sharding, shape[0])

    def part(index):
        start, stop, _ = index[0].indices(shape[0])
        first = np.searchsorted(here, start)
        return rows[first : first + stop - start]

    return jax.make_array_from_callback(shape, sharding, part)
