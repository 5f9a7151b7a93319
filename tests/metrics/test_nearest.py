"""Tests the nearest neighbours of a stream of images against a sort of all distances."""

import numpy as np
import pytest

from diffusion.metrics.nearest import no_neighbours, update_neighbours


def neighbours_of(queries, blocks, k):
    best = no_neighbours(len(queries))
    for block in blocks:
        best = update_neighbours(best, queries, block, k)
    return best


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_neighbours_equal_a_sort_of_all_distances(dtype):
    """For any blocks; equal distances in the order of the images."""
    rng = np.random.default_rng(0)
    levels = 4 if dtype == np.uint8 else 200  # few levels: many ties
    images = rng.integers(0, levels, (101, 2, 3, 1)).astype(dtype)
    queries = np.concatenate([images[[40, 7]], rng.integers(0, levels, (3, 2, 3, 1)).astype(dtype)])
    squared = ((images[None].astype(float) - queries[:, None].astype(float)) ** 2).sum((2, 3, 4))
    expected = np.lexsort([np.broadcast_to(np.arange(101), squared.shape), squared])[:, :6]
    for edges in ([], [50], [1, 2, 99], range(10, 101, 10)):
        best = neighbours_of(queries, np.split(images, edges), 6)
        np.testing.assert_array_equal(best.indices, expected)
        distances = np.take_along_axis(squared, expected, 1)
        np.testing.assert_array_equal(best.squared_distances, distances)
        assert best.n == 101
    assert best.squared_distances[0, 0] == 0
    assert images[best.indices[0, 0]].tolist() == images[40].tolist()


def test_neighbours_are_exact_where_float32_is_not():
    """Squares of large bright images sum to 2e8, where float32 has a spacing of 16."""
    white = np.full((1, 64, 64, 1), 255, np.uint8)
    images = np.repeat(white, 3, 0)
    images[0, 0, 0], images[1, 0, 0] = 253, 254
    best = neighbours_of(white, [images], 3)
    assert best.indices.tolist() == [[2, 1, 0]]
    assert best.squared_distances.tolist() == [[0, 1, 4]]


def test_fewer_images_than_neighbours():
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    assert neighbours_of(images[:1], [images], 8).indices.tolist() == [[0, 1, 2]]


def test_other_shapes_raise():
    images = np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1)
    with pytest.raises(ValueError, match=r"expected images of \[2, 2, 1\] .*, found \[4, 1\]"):
        neighbours_of(images, [images.reshape(3, 4, 1)], 1)
