"""Placement of rows on four devices."""

import jax
import numpy as np
import pytest

from diffusion.sharding import (
    batch_sharded,
    data_mesh,
    local_rows,
    make_global_array,
    replicated,
)


@pytest.mark.parametrize("shape", [(8,), (4, 3, 2)])
def test_global_arrays_have_their_rows_in_order(shape):
    """Each device holds its part of the batch, or all of a replicated array."""
    mesh, rows = data_mesh(), np.arange(np.prod(shape)).reshape(shape)
    for sharding, parts in ((batch_sharded(mesh), 4), (replicated(mesh), 1)):
        array = make_global_array(rows, sharding, shape)
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, rows)
        for shard in array.addressable_shards:
            assert len(shard.data) == shape[0] // parts
            np.testing.assert_array_equal(shard.data, rows[shard.index])
    assert mesh.devices.size == jax.device_count() == 4


def test_a_single_process_has_all_rows():
    mesh = data_mesh()
    for sharding in (batch_sharded(mesh), replicated(mesh)):
        np.testing.assert_array_equal(local_rows(sharding, 8), np.arange(8))


class InterleavedSharding:
    """A sharding as one of two processes sees it, whose devices alternate with the other's."""

    def addressable_devices_indices_map(self, shape):
        rows = shape[0] // 4
        return {device: (slice(device * rows, (device + 1) * rows),) for device in (1, 3)}


def test_local_rows_may_have_gaps():
    np.testing.assert_array_equal(local_rows(InterleavedSharding(), 8), [2, 3, 6, 7])
