"""batches.py: every image once an epoch, in a random order that follows from (key, step)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from diffusion.data import augment


def images(n, h=3, w=4, c=1):
    """Images no two of which are equal, nor any the mirror of another or of itself."""
    x = np.random.default_rng(0).integers(0, 256, (n, h, w, c), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(n) % 251, np.arange(n) // 251
    x[:, 0, -1, 0] = 251 + np.arange(n) % 5  # no first pixel is as large as this last one
    return x


@functools.partial(jax.jit, static_argnums=(4, 5))
def draw(x, label, key, step, batch_size, flip):
    """Of images as they are; the set lies in rows."""
    index = augment.batch_indices(key, step, batch_size, len(label))
    return augment.gather_batch(x.reshape(len(x), -1), label, index, key, step, flip, x.shape[1:])



walk = jax.jit(augment.walk, static_argnums=3)


def order(key, n):
    keys = random.bits(key, (augment.ROUNDS,), jnp.uint32)
    return np.asarray(
        walk(keys, jnp.arange(n, dtype=jnp.uint32), np.uint32(n), augment.half_bits(n))
    )


def test_shuffled_is_a_bijection_for_every_size_up_to_300():
    """All sizes in one array each, so that there is one thing to compile, not three hundred."""
    for low, high in ((1, 257), (257, 301)):  # half_bits is the same within each
        sizes = np.arange(low, high, dtype=np.uint32)
        assert {augment.half_bits(int(n)) for n in sizes} == {augment.half_bits(low)}
        i = np.minimum(np.arange(high - 1, dtype=np.uint32), sizes[:, None] - 1)  # filled by n - 1
        keys = random.bits(random.key(low), (len(sizes), augment.ROUNDS), jnp.uint32)
        many = jax.jit(jax.vmap(augment.walk, (0, 0, 0, None)), static_argnums=3)
        for n, x in zip(
            sizes, np.asarray(many(keys, i, sizes, augment.half_bits(low))), strict=True
        ):
            np.testing.assert_array_equal(np.sort(x[:n]), np.arange(n))


@pytest.mark.parametrize("n", [1024, 1025, 1797, 50_000])
def test_shuffled_is_a_bijection_for_large_sizes(n):
    np.testing.assert_array_equal(np.sort(order(random.key(n), n)), np.arange(n))


def test_shuffled_works_to_the_largest_size():
    i = np.uint32([0, 1, 2**30, 2**31 - 2])
    x = np.asarray(augment.shuffled(random.key(0), jnp.asarray(i), 2**31 - 1))
    assert x.dtype == np.uint32 and x.max() < 2**31 - 1 and len(set(x)) == 4
    for n in (0, 2**31):
        with pytest.raises(ValueError, match=f"found {n}"):
            augment.shuffled(random.key(0), jnp.asarray(i), n)


@pytest.mark.parametrize("n, batch_size", [(1797, 64), (50, 128), (3, 20), (1, 4)])
def test_the_host_takes_the_same_images(n, batch_size):
    """Without JAX, for what is read from files: over epochs' ends, and at the largest step."""
    x, label, key = images(n), np.arange(n, dtype=np.int32), random.key(5)
    for step in (0, 1, 2, n // batch_size, 2**31 - 1):
        first, last = step * batch_size // n, (step + 1) * batch_size // n
        words = augment.epoch_words(key, first, last)
        assert words.dtype == np.uint32 and words.shape == (last - first + 1, augment.ROUNDS)
        _, drawn = draw(x, label, key, jnp.int32(step), batch_size, False)
        found = augment.indices(words, first, step, batch_size, n)
        np.testing.assert_array_equal(found, drawn)


def p_uniform(counts):
    """Chi-square test: how probable it is that equally likely cells differ as much or more."""
    expected = counts.sum() / counts.size
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1)


def test_all_orders_of_a_small_set_are_equally_likely():
    """20,000 keys over n! <= 120 orders. The seed is fixed: 1e-3 is met by 999 seeds of 1000."""
    keys = random.bits(random.key(0), (20_000, augment.ROUNDS), jnp.uint32)
    many = jax.jit(jax.vmap(augment.walk, (0, None, None, None)), static_argnums=3)
    for n in (2, 3, 4, 5):
        i = np.minimum(np.arange(5, dtype=np.uint32), n - 1)  # one shape: one compilation
        orders = np.asarray(many(keys, i, np.uint32(n), augment.half_bits(n)))[:, :n]
        _, counts = np.unique(orders.astype(int) @ n ** np.arange(n), return_counts=True)
        assert len(counts) == np.prod(np.arange(1, n + 1))
        assert p_uniform(counts) > 1e-3


def test_pairs_of_places_are_equally_likely_in_a_larger_set():
    """What stands at places 0 and 1 of 20: 380 pairs; and at 0 and 19. 1e-3 as above."""
    n = 20
    keys = random.bits(random.key(0), (20_000, augment.ROUNDS), jnp.uint32)
    many = jax.jit(jax.vmap(augment.walk, (0, None, None, None)), static_argnums=3)
    x = np.asarray(many(keys, jnp.uint32([0, 1, n - 1]), np.uint32(n), augment.half_bits(n)))
    for other in (1, 2):
        counts = np.zeros((n, n))
        np.add.at(counts, (x[:, 0], x[:, other]), 1)
        assert not np.diag(counts).any()
        assert p_uniform(counts[~np.eye(n, dtype=bool)]) > 1e-3


def test_an_order_is_unlike_the_identity_its_own_shift_and_the_next_epoch():
    """Correlations of 50,000 independent numbers: standard deviation 1/sqrt(n), 4 of them allowed.

    Of two independent orders one place in n agrees: Poisson of mean 1, over 8 has odds of 1e-6.
    """
    n = 50_000
    a, b = (order(random.fold_in(random.key(0), epoch), n).astype(float) for epoch in (0, 1))
    for x, y in ((a, np.arange(n)), (a[1:], a[:-1]), (a, b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n)
        assert (x == y).sum() <= 8
    steps = np.diff(a) % n  # uniform too if neighbours are independent
    assert p_uniform(np.histogram(steps, 100, (0, n))[0]) > 1e-3




def test_positions_equal_exact_integers_to_the_largest_step():
    rng = np.random.default_rng(0)
    steps = np.uint32([0, 1, 2, 4095, 2**16, 800_000, 2**30, 2**31 - 2, 2**31 - 1])
    for batch_size, n in ((1, 1), (7, 3), (128, 50_000), (5000, 1797), (4095, 2**31 - 1)):
        every = jax.jit(
            lambda s, b=batch_size, n=n: jax.vmap(lambda x: augment.positions(x, b, n))(s)
        )
        for epoch, place, s in zip(*every(steps), steps.tolist(), strict=True):
            at = [s * batch_size + j for j in range(batch_size)]
            np.testing.assert_array_equal(epoch, [k // n % 2**32 for k in at])
            np.testing.assert_array_equal(place, [k % n for k in at])
    # The largest batch there may be, at its ends only.
    batch_size, n = 2**20 - 1, int(rng.integers(2**30, 2**31))
    epoch, place = augment.positions(2**31 - 1, batch_size, n)
    for j in (0, 1, batch_size - 1):
        assert (epoch[j], place[j]) == divmod((2**31 - 1) * batch_size + j, n)
    for bad in ((0, 5), (2**20, 5), (5, 0), (5, 2**31)):
        with pytest.raises(ValueError, match=f"found {bad[0]} and {bad[1]}$"):
            augment.positions(0, *bad)


@pytest.mark.parametrize("n, batch_size", [(50, 7), (10, 32), (1, 3)])
def test_every_image_comes_once_in_every_epoch(n, batch_size):
    """Also where a batch straddles two epochs, or holds several; the labels go with the images."""
    x, label = images(n), np.arange(n, dtype=np.int32) + 100
    steps = -(-4 * n // batch_size)
    seen = [draw(x, label, random.key(1), jnp.int32(s), batch_size, False) for s in range(steps)]
    drawn = np.concatenate([b[1] for b in seen])
    np.testing.assert_array_equal(
        np.concatenate([augment.unscale(b[0]) for b in seen]), x[drawn - 100]
    )
    epochs = drawn[: 4 * n].reshape(4, n)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(label, (4, 1)))
    if n == 50:
        assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batch_is_a_function_of_key_and_step_alone():
    x, label = images(40), np.arange(40, dtype=np.int32)

    def at(seed, step):
        x_0, labels = draw(x, label, random.key(seed), jnp.int32(step), 8, True)
        return np.asarray(x_0).tobytes() + np.asarray(labels).tobytes()

    forward = [at(0, step) for step in range(6)]
    assert [at(0, step) for step in reversed(range(6))] == forward[::-1]
    assert len(set(forward) | {at(1, step) for step in range(6)}) == 12


def test_draw_at_a_late_step_holds_the_images_that_belong_there():
    n, batch_size, step, key = 50, 128, 2**31 - 1, random.key(3)
    label = np.arange(n, dtype=np.int32)
    _, labels = draw(images(n), label, key, jnp.int32(step), batch_size, False)
    key_order, _ = random.split(key)
    at = [divmod(step * batch_size + j, n) for j in range(batch_size)]
    orders = {e: order(random.fold_in(key_order, np.uint32(e % 2**32)), n) for e, _ in at}
    np.testing.assert_array_equal(labels, [orders[e][i] for e, i in at])


def test_draw_is_bit_identical_on_one_and_four_devices():
    x, label = images(100, c=3), np.arange(100, dtype=np.int32)
    results = []
    for devices in (1, 4):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        compiled = jax.jit(
            lambda x, label, step: draw(x, label, random.key(0), step, 16, True),
            in_shardings=whole,
            out_shardings=split,
        )
        seen = [compiled(x, label, jnp.int32(step)) for step in range(9)]
        assert len(seen[0][0].sharding.device_set) == devices
        assert seen[0][0].dtype == jnp.float32 and seen[0][1].dtype == jnp.int32
        results.append(b"".join(np.asarray(y).tobytes() for batch in seen for y in batch))
    assert results[0] == results[1]


def test_taken_checks_the_data_set():
    x, label = images(5), np.arange(5, dtype=np.int32)
    rows, shape = x.reshape(5, -1), x.shape[1:]
    rest = jnp.arange(2), random.key(0), 0, False, shape
    augment.gather_batch(rows, label, *rest)
    bad = (rows.astype(np.int32), label), (x, label), (rows[:, 1:], label), (rows, label[:4])
    for arrays in bad:
        with pytest.raises(ValueError, match=r"expected image uint8\[n, \d+\] and label"):
            augment.gather_batch(*arrays, *rest)




def drawn_and_mirrored(steps=200, batch_size=50, n=60):
    """(index, mirrored) of every image drawn; each must be one of the two, exactly."""
    x, label = images(n, c=3), np.arange(n, dtype=np.int32)
    index, mirrored = [], []
    for step in range(steps):
        x_0, labels = draw(x, label, random.key(0), jnp.int32(step), batch_size, True)
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


def test_no_flip_mirrors_none_and_draws_the_same_images():
    x, label = images(60, c=3), np.arange(60, dtype=np.int32)
    for step in range(3):
        x_0, labels = draw(x, label, random.key(0), jnp.int32(step), 50, False)
        np.testing.assert_array_equal(augment.unscale(x_0), x[labels])
        flipped = draw(x, label, random.key(0), jnp.int32(step), 50, True)
        np.testing.assert_array_equal(labels, flipped[1])


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


def test_unscale_takes_the_nearest_level_and_cuts_at_the_ends():
    x = jnp.float32([-7.0, -1.001, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.001, jnp.inf])
    assert np.asarray(augment.unscale(x)).tolist() == [0, 0, 0, 1, 255, 255]
    assert augment.unscale(x.astype(jnp.bfloat16)).dtype == jnp.uint8
