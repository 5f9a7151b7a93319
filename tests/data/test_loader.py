"""The order of the data, and the ways of reading it, which all give the same images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from scipy import stats

from diffusion import data
from diffusion.data import augment, loader
from diffusion.data.loader import iterate_shuffled, iterate_split, load_dataset, make_batch_indices
from diffusion.utils.errors import DataError
from tests.tiny_tfds import distinct_images, write_images


def orders(n, epochs, seed=0):
    """int[epochs, n]: the first epochs of an order, read in batches of an epoch."""
    indices = make_batch_indices(n, n, seed)
    return np.stack([indices(epoch) for epoch in range(epochs)])


def p_uniform(counts):
    """Chi-square test: how probable it is that equally likely cells differ as much or more."""
    expected = counts.sum() / counts.size
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1)


@pytest.mark.parametrize("n", [*range(1, 301), 1024, 1025, 1797, 50_000])
def test_an_epoch_is_a_permutation(n):
    for order in orders(n, 3, seed=n):
        assert order.dtype == np.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_all_orders_of_a_small_set_are_equally_likely():
    """20,000 epochs over n! <= 120 orders. The seed is fixed: 1e-3 is met by 999 seeds of 1000."""
    for n in (2, 3, 4, 5):
        _, counts = np.unique(orders(n, 20_000) @ n ** np.arange(n), return_counts=True)
        assert len(counts) == np.prod(np.arange(1, n + 1))
        assert p_uniform(counts) > 1e-3


def test_consecutive_epochs_and_seeds_are_independent():
    """One of six orders after another; and epoch 1 of seed k is not epoch 0 of seed k + 1."""
    code = orders(3, 6000) @ [9, 3, 1]
    _, code = np.unique(code, return_inverse=True)
    table = np.zeros((6, 6))
    np.add.at(table, (code[:-1], code[1:]), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-3
    by_seed = np.stack([orders(100, 4, seed) for seed in range(4)])
    assert len({order.tobytes() for order in by_seed.reshape(16, 100)}) == 16


def test_pairs_of_places_are_equally_likely_in_a_larger_set():
    """What stands at places 0 and 1 of 20: 380 pairs; and at 0 and 19. 1e-3 as above."""
    n = 20
    x = orders(n, 20_000)
    for other in (1, n - 1):
        counts = np.zeros((n, n))
        np.add.at(counts, (x[:, 0], x[:, other]), 1)
        assert not np.diag(counts).any()
        assert p_uniform(counts[~np.eye(n, dtype=bool)]) > 1e-3


def test_an_order_is_unlike_the_identity_its_own_shift_and_the_next_epoch():
    """Correlations of 50,000 independent numbers: standard deviation 1/sqrt(n), 4 of them allowed.

    Of two independent orders one place in n agrees: Poisson of mean 1, over 8 has odds of 1e-6.
    """
    n = 50_000
    a, b = orders(n, 2).astype(float)
    for x, y in ((a, np.arange(n)), (a[1:], a[:-1]), (a, b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 4 / np.sqrt(n)
        assert (x == y).sum() <= 8
    steps = np.diff(a) % n  # uniform too if neighbours are independent
    assert p_uniform(np.histogram(steps, 100, (0, n))[0]) > 1e-3


@pytest.mark.parametrize("n, batch_size", [(50, 7), (10, 32), (1, 3), (1797, 64)])
def test_batches_follow_each_other_without_a_gap(n, batch_size):
    """Also where a batch straddles two epochs or holds several; in any order of the steps."""
    indices = make_batch_indices(n, batch_size, seed=5)
    steps = range(-(-4 * n // batch_size))
    batches = [indices(step) for step in steps]
    assert all(len(batch) == batch_size for batch in batches)
    found = np.concatenate(batches)[: 4 * n].reshape(4, n)
    np.testing.assert_array_equal(found, orders(n, 4, seed=5))
    resumed = make_batch_indices(n, batch_size, seed=5)
    for step in reversed(steps):
        np.testing.assert_array_equal(resumed(step), batches[step])


@pytest.mark.parametrize("n, batch_size", [(1, 1), (3, 7), (50, 128), (1797, 5000), (50_000, 128)])
def test_the_largest_step_is_exact(n, batch_size):
    """Against Python's integers, where the product does not fit in 32 bits."""
    step, seed = 2**31 - 1, 2**32 - 1
    places = [divmod(step * batch_size + j, n) for j in range(batch_size)]
    order = {epoch: make_batch_indices(n, n, seed)(epoch) for epoch in {e for e, _ in places}}
    expected = [order[epoch][place] for epoch, place in places]
    np.testing.assert_array_equal(make_batch_indices(n, batch_size, seed)(step), expected)


def test_orders_differ_between_epochs_and_seeds():
    x = np.concatenate([orders(40, 3, seed) for seed in (0, 1, 2**32 - 1)])
    assert len({order.tobytes() for order in x}) == 9


def test_an_order_stays_the_same_in_every_release():
    """A resumed training relies on it. PCG64 of SeedSequence([7, e]): sorted keys."""
    for epoch, order in enumerate(orders(100, 2, seed=7)):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, epoch])))
        keys = generator.integers(0, 2**64, 100, np.uint64)
        np.testing.assert_array_equal(order, np.argsort(keys))


def test_sizes_that_are_none():
    for n, batch_size in ((0, 5), (2**31, 5), (5, 0)):
        with pytest.raises(ValueError, match=f"found {n} and {batch_size}$"):
            make_batch_indices(n, batch_size, 0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """60 images in array_record."""
    folder = tmp_path_factory.mktemp("stored")
    write_images(folder, "some", list(distinct_images(60, c=3)), (3, 4, 3))
    return data.open_dataset("tfds", "train", name="some", data_dir=str(folder))


@pytest.mark.parametrize("batch_size", [16, 100])
def test_streamed_batches_are_those_gathered_on_the_device(stored, batch_size):
    """Also from the middle on, as a resumed run does, and in rows, as several processes do."""
    image, label = load_dataset(stored)
    indices, steps = make_batch_indices(60, batch_size, seed=3), 9
    pixels, labels, shape = jnp.asarray(image.reshape(60, -1)), jnp.asarray(label), image.shape[1:]
    gather = jax.jit(lambda index: augment.gather_batch(pixels, labels, index, shape))
    gathered = [gather(indices(step)) for step in range(steps)]
    for first, rows in ((0, slice(None)), (5, slice(None)), (0, np.arange(3, batch_size, 4))):
        streamed = list(iterate_shuffled(stored, 3, range(first, steps), batch_size, rows))
        assert len(streamed) == steps - first
        for (x, y), (image, label) in zip(gathered[first:], streamed, strict=True):
            assert image.dtype == np.uint8 and label.dtype == np.int32
            np.testing.assert_array_equal(x[rows], image)
            np.testing.assert_array_equal(y[rows], label)


def test_worker_processes_change_nothing(stored):
    """Of an array_record set, opened anew in each worker."""
    flags.FLAGS.mark_as_parsed()  # grain's workers ask; under main.py they are
    alone, two = (list(iterate_shuffled(stored, 0, range(6), 8, workers=w)) for w in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, alone, two)


def test_iterate_split_gives_every_image_once_and_masks_the_rest(stored):
    all_images, all_labels = load_dataset(stored)
    for batch_size in (7, 60, 64):
        parts = list(iterate_split(stored, batch_size))
        assert {len(image) for image, _, _ in parts} == {batch_size}
        image, label, mask = (np.concatenate(x) for x in zip(*parts, strict=True))
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < 60)
        np.testing.assert_array_equal(image[mask], all_images)
        np.testing.assert_array_equal(label[mask], all_labels)
        rest = list(iterate_split(stored, batch_size, first=1))
        jax.tree.map(np.testing.assert_array_equal, rest, parts[1:])
        halves = [iterate_split(stored, batch_size, r) for r in (slice(0, 3), slice(3, None))]
        together = [
            tuple(np.concatenate(x) for x in zip(*pair, strict=True))
            for pair in zip(*halves, strict=True)
        ]
        jax.tree.map(np.testing.assert_array_equal, together, parts)


def test_a_damaged_image_ends_the_stream_with_its_name(tmp_path):
    flags.FLAGS.mark_as_parsed()
    images = [*distinct_images(20), b"no image"]
    folder = write_images(tmp_path, "some", images, (3, 4, 1))
    found = data.open_dataset("tfds", "train", name="some", data_dir=str(tmp_path))
    for workers in (0, 1):
        with pytest.raises(DataError, match=f"{folder}: train image .*cannot identify"):
            list(iterate_shuffled(found, 0, range(9), 8, workers=workers))


def test_nothing_to_stream(stored):
    assert list(iterate_shuffled(stored, 0, range(5, 5), 8)) == []


def test_too_many_bytes_are_refused_before_anything_is_read(monkeypatch):
    images = data.ImageDataset(5, (3, 4, 1), 0, lambda i: (np.zeros((len(i), 3, 4, 1)), 0 * i[0]))
    monkeypatch.setattr(loader, "MAX_BYTES", 60)
    assert len(load_dataset(images)[0]) == 5
    monkeypatch.setattr(loader, "MAX_BYTES", 59)
    with pytest.raises(DataError) as error:
        load_dataset(images._replace(read=None))
    assert str(error.value) == (
        "data.on_device_gib: expected at most 5.49e-08 GiB of pixels, "
        "found 5.59e-08 GiB (5x3x4x1); stream them with 0"
    )
