"""data.py: every image once an epoch, in an order that is random and follows from (key, step)."""

import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from scipy import stats

from diffusion import data

ROOT = pathlib.Path(__file__).parent.parent
TFDS_DIR = os.environ.get("DDPM_TFDS_DIR") or str(ROOT.parent / "shared" / "tfds")
with_cifar10 = pytest.mark.skipif(
    not pathlib.Path(TFDS_DIR, "cifar10").is_dir(),
    reason="needs TFDS's cifar10 in array_record below the folder named by DDPM_TFDS_DIR",
)


def images(n, h=3, w=4, c=1):
    """Images no two of which are equal, nor any the mirror of another or of itself."""
    x = np.random.default_rng(0).integers(0, 256, (n, h, w, c), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(n) % 251, np.arange(n) // 251
    x[:, 0, -1, 0] = 251 + np.arange(n) % 5  # no first pixel is as large as this last one
    return x


draw = jax.jit(data.draw, static_argnums=(4, 5))


# ------------------------------------------------------------------------------------- the shuffle

walk = jax.jit(data.walk, static_argnums=3)


def order(key, n):
    keys = random.bits(key, (data.ROUNDS,), jnp.uint32)
    return np.asarray(walk(keys, jnp.arange(n, dtype=jnp.uint32), np.uint32(n), data.half_bits(n)))


def test_shuffled_is_a_bijection_for_every_size_up_to_300():
    """All sizes in one array each, so that there is one thing to compile, not three hundred."""
    for low, high in ((1, 257), (257, 301)):  # half_bits is the same within each
        sizes = np.arange(low, high, dtype=np.uint32)
        assert {data.half_bits(int(n)) for n in sizes} == {data.half_bits(low)}
        i = np.minimum(np.arange(high - 1, dtype=np.uint32), sizes[:, None] - 1)  # filled by n - 1
        keys = random.bits(random.key(low), (len(sizes), data.ROUNDS), jnp.uint32)
        many = jax.jit(jax.vmap(data.walk, (0, 0, 0, None)), static_argnums=3)
        for n, x in zip(sizes, np.asarray(many(keys, i, sizes, data.half_bits(low))), strict=True):
            np.testing.assert_array_equal(np.sort(x[:n]), np.arange(n))


@pytest.mark.parametrize("n", [1024, 1025, 1797, 50_000])
def test_shuffled_is_a_bijection_for_large_sizes(n):
    np.testing.assert_array_equal(np.sort(order(random.key(n), n)), np.arange(n))


def test_shuffled_works_to_the_largest_size():
    i = np.uint32([0, 1, 2**30, 2**31 - 2])
    x = np.asarray(data.shuffled(random.key(0), jnp.asarray(i), 2**31 - 1))
    assert x.dtype == np.uint32 and x.max() < 2**31 - 1 and len(set(x)) == 4
    for n in (0, 2**31):
        with pytest.raises(ValueError, match=f"found {n}"):
            data.shuffled(random.key(0), jnp.asarray(i), n)


def test_numpy_gives_the_same_order():
    """What reads the images in this order elsewhere, without JAX, can rely on it."""
    n, key = 1797, random.key(5)
    keys = np.asarray(random.bits(key, (data.ROUNDS,), jnp.uint32))
    x = data.feistel(keys, np.arange(n, dtype=np.uint32), data.half_bits(n))
    while (x >= n).any():
        x = np.where(x < n, x, data.feistel(keys, x, data.half_bits(n)))
    np.testing.assert_array_equal(x, data.shuffled(key, jnp.arange(n, dtype=jnp.uint32), n))


def p_uniform(counts):
    """Chi-square test: how probable it is that equally likely cells differ as much or more."""
    expected = counts.sum() / counts.size
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1)


def test_all_orders_of_a_small_set_are_equally_likely():
    """20,000 keys over n! <= 120 orders. The seed is fixed: 1e-3 is met by 999 seeds of 1000."""
    keys = random.bits(random.key(0), (20_000, data.ROUNDS), jnp.uint32)
    many = jax.jit(jax.vmap(data.walk, (0, None, None, None)), static_argnums=3)
    for n in (2, 3, 4, 5):
        i = np.minimum(np.arange(5, dtype=np.uint32), n - 1)  # one shape: one compilation
        orders = np.asarray(many(keys, i, np.uint32(n), data.half_bits(n)))[:, :n]
        _, counts = np.unique(orders.astype(int) @ n ** np.arange(n), return_counts=True)
        assert len(counts) == np.prod(np.arange(1, n + 1))
        assert p_uniform(counts) > 1e-3


def test_pairs_of_places_are_equally_likely_in_a_larger_set():
    """What stands at places 0 and 1 of 20: 380 pairs; and at 0 and 19. 1e-3 as above."""
    n = 20
    keys = random.bits(random.key(0), (20_000, data.ROUNDS), jnp.uint32)
    many = jax.jit(jax.vmap(data.walk, (0, None, None, None)), static_argnums=3)
    x = np.asarray(many(keys, jnp.uint32([0, 1, n - 1]), np.uint32(n), data.half_bits(n)))
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


# ---------------------------------------------------------------------------- which batch is where


def test_positions_equal_exact_integers_to_the_largest_step():
    rng = np.random.default_rng(0)
    steps = np.uint32([0, 1, 2, 4095, 2**16, 800_000, 2**30, 2**31 - 2, 2**31 - 1])
    for batch_size, n in ((1, 1), (7, 3), (128, 50_000), (5000, 1797), (4095, 2**31 - 1)):
        every = jax.jit(lambda s, b=batch_size, n=n: jax.vmap(lambda x: data.positions(x, b, n))(s))
        for epoch, place, s in zip(*every(steps), steps.tolist(), strict=True):
            at = [s * batch_size + j for j in range(batch_size)]
            np.testing.assert_array_equal(epoch, [k // n % 2**32 for k in at])
            np.testing.assert_array_equal(place, [k % n for k in at])
    # The largest batch there may be, at its ends only.
    batch_size, n = 2**20 - 1, int(rng.integers(2**30, 2**31))
    epoch, place = data.positions(2**31 - 1, batch_size, n)
    for j in (0, 1, batch_size - 1):
        assert (epoch[j], place[j]) == divmod((2**31 - 1) * batch_size + j, n)
    for bad in ((0, 5), (2**20, 5), (5, 0), (5, 2**31)):
        with pytest.raises(ValueError, match=f"found {bad[0]} and {bad[1]}$"):
            data.positions(0, *bad)


@pytest.mark.parametrize("n, batch_size", [(50, 7), (10, 32), (1, 3)])
def test_every_image_comes_once_in_every_epoch(n, batch_size):
    """Also where a batch straddles two epochs, or holds several; the labels go with the images."""
    x, label = images(n), np.arange(n, dtype=np.int32) + 100
    steps = -(-4 * n // batch_size)
    batches = [draw(x, label, random.key(1), jnp.int32(s), batch_size, False) for s in range(steps)]
    drawn = np.concatenate([b[1] for b in batches])
    np.testing.assert_array_equal(
        np.concatenate([data.unscale(b[0]) for b in batches]), x[drawn - 100]
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
            lambda x, label, step: data.draw(x, label, random.key(0), step, 16, True),
            in_shardings=whole,
            out_shardings=split,
        )
        batches = [compiled(x, label, jnp.int32(step)) for step in range(9)]
        assert len(batches[0][0].sharding.device_set) == devices
        assert batches[0][0].dtype == jnp.float32 and batches[0][1].dtype == jnp.int32
        results.append(b"".join(np.asarray(y).tobytes() for batch in batches for y in batch))
    assert results[0] == results[1]


def test_draw_checks_the_data_set():
    x, label = images(5), np.arange(5, dtype=np.int32)
    for bad in ((x.astype(np.int32), label), (x[..., 0], label), (x, label[:4])):
        with pytest.raises(ValueError, match=r"expected image uint8\[n, h, w, c\] and label"):
            data.draw(*bad, random.key(0), 0, 2, False)


# --------------------------------------------------------------------------------- flips and scale


def drawn_and_mirrored(steps=200, batch_size=50, n=60):
    """(index, mirrored) of every image drawn; each must be one of the two, exactly."""
    x, label = images(n, c=3), np.arange(n, dtype=np.int32)
    index, mirrored = [], []
    for step in range(steps):
        x_0, labels = draw(x, label, random.key(0), jnp.int32(step), batch_size, True)
        found, original = np.asarray(data.unscale(x_0)), x[labels]
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
        np.testing.assert_array_equal(data.unscale(x_0), x[labels])
        flipped = draw(x, label, random.key(0), jnp.int32(step), 50, True)
        np.testing.assert_array_equal(labels, flipped[1])


def test_scale_and_unscale_are_exact_on_all_levels():
    k = np.arange(256, dtype=np.uint8)
    x = np.asarray(jax.jit(data.scale)(k))
    assert x.dtype == np.float32 and (x[0], x[255]) == (-1, 1)
    # Compilers divide by multiplying with 1 / 127.5: two roundings of numbers up to 2, one up to 1.
    np.testing.assert_allclose(x, k / 127.5 - 1, rtol=0, atol=3e-7)
    np.testing.assert_array_equal(jax.jit(data.unscale)(x), k)
    # What the official code does instead, and how often it is off.
    x = k.astype(np.float32) / np.float32(127.5) - np.float32(1)
    truncated = ((x + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    assert np.unique(k - truncated, return_counts=True)[1].tolist() == [193, 63]


def test_unscale_takes_the_nearest_level_and_cuts_at_the_ends():
    x = jnp.float32([-7.0, -1.001, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 1.001, jnp.inf])
    assert np.asarray(data.unscale(x)).tolist() == [0, 0, 0, 1, 255, 255]
    assert data.unscale(x.astype(jnp.bfloat16)).dtype == jnp.uint8


# ----------------------------------------------------------------------------------------- sources


def test_digits_are_split_without_overlap_and_in_balance():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train.label), len(test.label)) == (1501, 296)
    for x in (train, test):
        assert x.image.dtype == np.uint8 and x.image.shape[1:] == (8, 8, 1)
        assert x.label.dtype == np.int32 and x.num_classes == 10
        assert x.image.min() == 0 and x.image.max() == 255 and len(np.unique(x.image)) == 17
    share = np.bincount(test.label) / np.bincount(np.concatenate([train.label, test.label]))
    assert (abs(share - 1 / 6) < 0.01).all()  # 174 to 183 of a class: rounding down costs 1/174
    from sklearn.datasets import load_digits

    bunch = load_digits()
    both = np.concatenate([train.image, test.image])[..., 0] / 255 * 16

    def rows(x, label):
        return sorted(map(tuple, np.column_stack([np.rint(x.reshape(-1, 64)), label])))

    labels = np.concatenate([train.label, test.label])
    assert rows(both, labels) == rows(bunch.images, bunch.target)  # every image, once


def test_fingerprint_sees_every_change():
    image, label = images(6, 2, 4), np.arange(6, dtype=np.int32)
    first = data.fingerprint(data.Dataset(image, label, 6))
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == data.fingerprint(data.Dataset(image.copy(), label.copy(), 6))
    assert first == data.fingerprint(data.Dataset(image[:, ::-1][:, ::-1], label, 6))
    other = image.copy()
    other[5, 1, 3] ^= 1
    changed = [
        (other, label, 6),
        (image, label[::-1], 6),
        (image, label, 7),
        (image[:5], label[:5], 6),
        (image.reshape(6, 4, 2, 1), label, 6),
        (image, label.astype(np.int64), 6),
    ]
    assert len({first, *(data.fingerprint(data.Dataset(*x)) for x in changed)}) == 7


def test_import_is_light():
    """What only one source needs is not imported by the others."""
    heavy = "sklearn", "tensorflow_datasets", "tensorflow", "PIL"
    code = f"import sys, diffusion.data; print([x for x in {heavy} if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@with_cifar10
def test_tfds_equals_the_records_decoded_one_by_one():
    import tensorflow_datasets
    from tensorflow_datasets.proto import tf_example_pb2

    found = data.load("tfds", "test", name="cifar10", data_dir=TFDS_DIR)
    assert found.image.shape == (10_000, 32, 32, 3) and found.image.dtype == np.uint8
    assert found.label.dtype == np.int32 and found.num_classes == 10
    np.testing.assert_array_equal(np.bincount(found.label), [1000] * 10)
    folder = next(pathlib.Path(TFDS_DIR, "cifar10").glob("*/dataset_info.json")).parent
    builder = tensorflow_datasets.builder_from_directory(str(folder))
    raw = builder.as_data_source(
        split="test", deserialize_method=tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
    )
    for i in (0, 1, 255, 256, 5000, 9999):  # 256: where another thread's part begins
        feature = tf_example_pb2.Example.FromString(raw[i]).features.feature
        with Image.open(io.BytesIO(feature["image"].bytes_list.value[0])) as image:
            np.testing.assert_array_equal(found.image[i], np.asarray(image))
        assert found.label[i] == feature["label"].int64_list.value[0]
    assert "tensorflow" not in sys.modules


# ------------------------------------------------------------------------------ sources: own sets


@pytest.fixture
def store(tmp_path):
    """store(name, pictures, shape, ...) prepares such a data set with TFDS; returns its folder.

    pictures: arrays uint8[h, w, c], or bytes that are to pass for an encoded picture.
    """
    import tensorflow_datasets

    def png(x):
        file = io.BytesIO()
        Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x).save(file, "png")
        return file.getvalue()

    def store(name, pictures, shape, version="1.0.0", classes=7):
        kinds = {"image": tensorflow_datasets.features.Image(shape=shape)}
        if classes:
            kinds["label"] = tensorflow_datasets.features.ClassLabel(num_classes=classes)

        class Builder(tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tensorflow_datasets.core.Version(version)
            pkg_dir_path = tmp_path

            def _info(self):
                features = tensorflow_datasets.features.FeaturesDict(kinds)
                return self.dataset_info_from_configs(features=features)

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i, x in enumerate(pictures):
                    encoded = x if isinstance(x, bytes) else png(x)
                    label = {"label": i % classes} if classes else {}
                    yield i, {"image": io.BytesIO(encoded)} | label

        Builder.name = name
        Builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return tmp_path / name / version

    return store


def load(folder, name="some", split="train"):
    return data.load("tfds", split, name=name, data_dir=str(folder))


def refused(*args, **kwargs):
    """The one line that loading ends in."""
    with pytest.raises(data.DataError) as error:
        data.load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tfds_grey_and_colour_with_and_without_classes(store, tmp_path):
    """More pictures than one thread takes, in an order that only TFDS knows: compared as sets."""
    grey = images(600)
    store("some", list(grey), (3, 4, 1))
    found = load(tmp_path)
    assert found.image.shape == (600, 3, 4, 1) and found.num_classes == 7
    index = {x.tobytes(): i for i, x in enumerate(grey)}
    order = [index.pop(x.tobytes()) for x in found.image]
    assert not index
    np.testing.assert_array_equal(found.label, np.array(order) % 7)
    colour = images(3, c=3)
    store("other", list(colour), (None, None, 3), classes=0)  # one size, though nothing says so
    found = load(tmp_path, "other")
    assert found.num_classes == 0 and found.label.tolist() == [0, 0, 0]
    assert {x.tobytes() for x in found.image} == {x.tobytes() for x in colour}


def test_tfds_takes_the_newest_version(store, tmp_path):
    for i, version in enumerate(("2.0.0", "10.0.0", "9.1.0")):
        store("some", list(images(i + 1)), (3, 4, 1), version)
    assert len(load(tmp_path).image) == 2


def test_unknown_names_end_in_the_nearest(store, tmp_path):
    assert refused("digit", "train") == "source: 'digit' is not known; nearest: digits"
    assert refused("xyz", "train") == "source: 'xyz' is not known; there are: digits, tfds"
    said = refused("digits", "train", nmae="x")
    assert said == "nmae: not a key of source 'digits'; nearest: name"
    assert refused("digits", "tset") == "split: digits has no split 'tset'; nearest: test"
    store("some", list(images(2)), (3, 4, 1))
    store("other", list(images(2)), (3, 4, 1))
    here = {"data_dir": str(tmp_path)}
    said = refused("tfds", "test", name="some", **here)
    assert said == "split: some has no split 'test'; there are: train"
    said = refused("tfds", "train", name="somme", **here)
    assert said == f"name: no data set 'somme' in {tmp_path}; nearest: some; prepare it with TFDS"
    assert "there are: other, some" in refused("tfds", "train", name="cifar10", **here)


def test_no_place_no_folder_and_an_empty_one(tmp_path):
    said = refused("tfds", "train", name="cifar10", data_dir="")
    assert said == "data_dir: expected the folder that holds 'cifar10', found none; give one"
    gone = str(tmp_path / "gone")
    said = refused("tfds", "train", name="cifar10", data_dir=gone)
    assert said == f"data_dir: expected a folder, found no {gone!r}; check the path"
    said = refused("tfds", "train", name="cifar10", data_dir=str(tmp_path))
    assert "no data set 'cifar10' in" in said and "it holds no TFDS data set" in said


def test_too_large_is_refused_before_anything_is_read(store, tmp_path, monkeypatch):
    store("some", list(images(5)), (3, 4, 1))
    monkeypatch.setattr(data, "MAX_BYTES", 60)
    assert len(load(tmp_path).image) == 5
    monkeypatch.setattr(data, "MAX_BYTES", 59)
    monkeypatch.setattr(data, "_decoded", None)  # to be called by nobody
    said = refused("tfds", "train", name="some", data_dir=str(tmp_path))
    assert ": expected at most 5.49e-08 GiB of pixels, found 5.59e-08 GiB (5x3x4x1); use" in said


def test_pictures_of_mixed_sizes_and_kinds_are_named(store, tmp_path):
    here = {"name": "some", "data_dir": str(tmp_path)}
    for odd, found in ((images(1, 5, 4, 3)[0], "5x4 RGB"), (images(1, 3, 4, 1)[0], "3x4 L")):
        folder = store("some", [*images(4, c=3), odd], (None, None, 3))
        said = refused("tfds", "train", **here)
        assert f"{folder}: train image " in said
        if f"found {found}" in said:
            assert f"expected 3x4 RGB like the first, found {found}; mend it" in said
        else:  # in TFDS's order it came first, and the others are odd
            assert f"expected {found} like the first, found 3x4 RGB; mend it" in said
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_damaged_picture_is_named(store, tmp_path):
    folder = store("some", [*images(2), b"no picture"], (3, 4, 1))
    said = refused("tfds", "train", name="some", data_dir=str(tmp_path))
    assert said.startswith(f"{folder}: train image ") and "cannot identify image file" in said


def edited(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))


DAMAGES = {
    "layout": (
        lambda x: edited(x, "dataset_info.json", "array_record", "tfrecord"),
        ": expected the layout array_record, found tfrecord; prepare it again with",
    ),
    "no image": (
        lambda x: edited(
            x, "features.json", '"image": {\n                "image"', '"a": {"image"'
        ),
        ": expected a feature `image` that is an image, found a, label",
    ),
    "four channels": (
        lambda x: edited(x, "features.json", '"1"\n', '"4"\n'),
        ": expected uint8 images of 1 or 3 channels, found uint8 and 4",
    ),
    "description": (
        lambda x: (x / "dataset_info.json").write_text("{"),
        ": not readable as a TFDS data set: ",
    ),
    "records cut": (
        lambda x: os.truncate(next(x.glob("*array_record-0*")), 100),
        ": train cannot be read: ",
    ),
    "records gone": (
        lambda x: next(x.glob("*array_record-0*")).unlink(),
        ": train cannot be read: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_data_set_that_does_not_fit_is_refused(store, tmp_path, damage):
    folder = store("some", list(images(5)), (3, 4, 1))
    inflict, what = DAMAGES[damage]
    inflict(folder)
    said = refused("tfds", "train", name="some", data_dir=str(tmp_path))
    assert said.startswith(f"{folder}{what}")
