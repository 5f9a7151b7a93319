"""augment: scaling to the last bit, gathering on the device, and flips of a random half."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from diffusion.data import augment
from diffusion.data.loader import make_batch_indices
from tests.tiny_tfds import distinct_images


@functools.partial(jax.jit, static_argnums=5)
def draw(x, label, index, key, step, flip):
    """(x_0, label) of images as they are; the data set lies in rows."""
    image, label = augment.gather_batch(x.reshape(len(x), -1), label, index, x.shape[1:])
    return augment.augment(image, key, step, flip), label


def test_a_batch_is_a_function_of_seed_and_step_alone():
    x, label = distinct_images(40), np.arange(40, dtype=np.int32)

    def batch(seed, step):
        index = make_batch_indices(40, 8, seed)(step)
        x_0, labels = draw(x, label, index, random.key(seed), jnp.int32(step), True)
        return np.asarray(x_0).tobytes() + np.asarray(labels).tobytes()

    forward = [batch(0, step) for step in range(6)]
    assert [batch(0, step) for step in reversed(range(6))] == forward[::-1]
    assert len(set(forward) | {batch(1, step) for step in range(6)}) == 12


def test_a_batch_is_bit_identical_on_one_and_four_devices():
    x, label = distinct_images(100, c=3), np.arange(100, dtype=np.int32)
    indices, results = make_batch_indices(100, 16, 0), []
    for devices in (1, 4):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        replicated = NamedSharding(mesh, PartitionSpec())
        sharded = NamedSharding(mesh, PartitionSpec("data"))
        compiled = jax.jit(
            lambda x, label, index, step: draw(x, label, index, random.key(0), step, True),
            in_shardings=replicated,
            out_shardings=sharded,
        )
        seen = [compiled(x, label, indices(step), jnp.int32(step)) for step in range(9)]
        assert len(seen[0][0].sharding.device_set) == devices
        assert seen[0][0].dtype == jnp.float32 and seen[0][1].dtype == jnp.int32
        results.append(b"".join(np.asarray(y).tobytes() for batch in seen for y in batch))
    assert results[0] == results[1]


def test_gather_batch_takes_images_and_labels_and_checks_their_shapes():
    x, label = distinct_images(5), np.arange(5, dtype=np.int32) + 100
    rows, shape, index = x.reshape(5, -1), x.shape[1:], jnp.int32([4, 0, 4])
    image, labels = augment.gather_batch(jnp.asarray(rows), jnp.asarray(label), index, shape)
    np.testing.assert_array_equal(image, x[[4, 0, 4]])
    assert labels.tolist() == [104, 100, 104]
    bad = (rows.astype(np.int32), label), (x, label), (rows[:, 1:], label), (rows, label[:4])
    for arrays in bad:
        with pytest.raises(ValueError, match=r"expected images uint8\[n, \d+\] and labels"):
            augment.gather_batch(*arrays, index, shape)


def drawn_and_mirrored(steps=200, batch_size=50, n=60):
    """(index, mirrored) of every image drawn; each must be one of the two, exactly."""
    x, label = distinct_images(n, c=3), np.arange(n, dtype=np.int32)
    indices, index, mirrored = make_batch_indices(n, batch_size, 0), [], []
    for step in range(steps):
        args = indices(step), random.key(0), jnp.int32(step)
        x_0, labels = draw(x, label, *args, True)
        found, original = np.asarray(augment.unscale(x_0)), x[labels]
        same = (found == original).all((1, 2, 3))
        other = (found == original[:, :, ::-1]).all((1, 2, 3))
        assert (same ^ other).all()
        index.append(labels)
        mirrored.append(other)
    return np.concatenate(index), np.concatenate(mirrored)


def test_a_random_half_is_mirrored_whatever_the_image_place_and_visit():
    """Binomial counts of 10,000 flips; every bound has odds of 1e-4 or less under the null."""
    index, mirrored = drawn_and_mirrored()
    assert stats.binomtest(int(mirrored.sum()), len(mirrored)).pvalue > 1e-4
    for groups in (index, np.arange(len(index)) % 50, np.arange(len(index)) // 500):
        table = np.stack([np.bincount(groups, weights=flag) for flag in (mirrored, ~mirrored)])
        assert stats.chi2_contingency(table).pvalue > 1e-4
    # From one visit of an image to its next: as often equal as not.
    by_image = mirrored[np.argsort(index, kind="stable")]
    equal = int((by_image[1:] == by_image[:-1]).sum())
    assert stats.binomtest(equal, len(by_image) - 1).pvalue > 1e-4


def test_without_flips_no_image_is_mirrored():
    x, label = distinct_images(60, c=3), np.arange(60, dtype=np.int32)
    for step in range(3):
        index = make_batch_indices(60, 50, 0)(step)
        x_0, labels = draw(x, label, index, random.key(0), jnp.int32(step), False)
        np.testing.assert_array_equal(augment.unscale(x_0), x[index])
        np.testing.assert_array_equal(labels, index)
        _, labels = draw(x, label, index, random.key(0), jnp.int32(step), True)
        np.testing.assert_array_equal(labels, index)


def test_scale_and_unscale_are_exact_on_all_levels():
    k = np.arange(256, dtype=np.uint8)
    x = np.asarray(jax.jit(augment.scale)(k))
    assert x.dtype == np.float32 and (x[0], x[255]) == (-1, 1)
    # Compilers divide by multiplying with 1 / 127.5: two roundings of numbers up to 2, one up to 1.
    np.testing.assert_allclose(x, k / 127.5 - 1, rtol=0, atol=3e-7)
    np.testing.assert_array_equal(jax.jit(augment.unscale)(x), k)
    # What the official code does instead, and how often it is off.
    x = k.astype(np.float32) / np.float32(127.5) - np.float32(1)
    truncated = ((x + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert np.unique(k - truncated, return_counts=True)[1].tolist() == [193, 63]


@pytest.mark.parametrize("levels", [2, 3, 7, 17, 86, 255])
def test_fewer_levels_are_evenly_spaced(levels):
    """x_0 is on an exact grid, whatever the rounding or truncation of the stored bytes."""
    k = np.arange(levels)
    grid = 2 * k / (levels - 1) - 1
    for to_byte in (np.rint, np.floor) if levels <= 86 else (np.rint,):
        stored = to_byte(k * 255 / (levels - 1)).astype(np.uint8)
        x = np.asarray(jax.jit(augment.scale, static_argnums=1)(stored, levels))
        np.testing.assert_allclose(x, grid, rtol=0, atol=3e-7)  # as above
        assert (x[0], x[-1]) == (-1, 1)
    back = jax.jit(augment.unscale, static_argnums=1)
    near = grid.astype(np.float32) + np.float32(0.49 * 2 / (levels - 1))
    for x in (grid.astype(np.float32), near):
        np.testing.assert_array_equal(back(x, levels), np.rint(k * 255 / (levels - 1)))


def test_unscale_rounds_to_the_nearest_level_and_clips():
    x = jnp.float32([-7.0, -1.001, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.001, jnp.inf])
    assert np.asarray(augment.unscale(x)).tolist() == [0, 0, 0, 1, 255, 255]
    assert augment.unscale(x.astype(jnp.bfloat16)).dtype == jnp.uint8
