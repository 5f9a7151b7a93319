"""data.py: sources, and the ways of reading them, which all give the same images."""

import io
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax import random
from PIL import Image

from diffusion import data
from diffusion.data import augment, loader
from diffusion.utils.errors import DataError
from tests.data.test_augment import images

ROOT = pathlib.Path(__file__).parent.parent
TFDS_DIR = os.environ.get("DDPM_TFDS_DIR") or str(ROOT.parent / "shared" / "tfds")
with_cifar10 = pytest.mark.skipif(
    not pathlib.Path(TFDS_DIR, "cifar10").is_dir(),
    reason="needs TFDS's cifar10 in array_record below the folder named by DDPM_TFDS_DIR",
)




def test_digits_are_split_without_overlap_and_in_balance():
    train, test = (loader.load_dataset(data.open_dataset("digits", split)) for split in ("train", "test"))
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
    first = data.dataset_digest(data.ArrayDataset(image, label, 6))
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == data.dataset_digest(data.ArrayDataset(image.copy(), label.copy(), 6))
    assert first == data.dataset_digest(data.ArrayDataset(image[:, ::-1][:, ::-1], label, 6))
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
    assert len({first, *(data.dataset_digest(data.ArrayDataset(*x)) for x in changed)}) == 7


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

    found = loader.load_dataset(data.open_dataset("tfds", "test", name="cifar10", data_dir=TFDS_DIR))
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
    return loader.load_dataset(data.open_dataset("tfds", split, name=name, data_dir=str(folder)))


def refused(*args, **kwargs):
    """The one line that loading ends in."""
    with pytest.raises(DataError) as error:
        loader.load_dataset(data.open_dataset(*args, **kwargs))
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
    assert (
        said
        == f"name: no data set 'somme' in {tmp_path}; nearest: some; prepare it with --mode=prepare"
    )
    assert "there are: other, some" in refused("tfds", "train", name="cifar10", **here)


def test_no_place_no_folder_and_an_empty_one(tmp_path):
    said = refused("tfds", "train", name="cifar10", data_dir="")
    assert said == "data_dir: expected the folder that holds 'cifar10', found none; give one"
    gone = str(tmp_path / "gone")
    said = refused("tfds", "train", name="cifar10", data_dir=gone)
    advice = "make the data set with --mode=prepare, or name another folder"
    assert said == f"data_dir: expected a folder, found no {gone!r}; {advice}"
    said = refused("tfds", "train", name="cifar10", data_dir=str(tmp_path))
    assert "no data set 'cifar10' in" in said and "it holds no TFDS data set" in said


def test_too_large_is_refused_before_anything_is_read(store, tmp_path, monkeypatch):
    store("some", list(images(5)), (3, 4, 1))
    monkeypatch.setattr(data, "MAX_BYTES", 60)
    assert len(load(tmp_path).image) == 5
    monkeypatch.setattr(data, "MAX_BYTES", 59)
    monkeypatch.setattr(data, "_decoded", None)  # to be called by nobody
    said = refused("tfds", "train", name="some", data_dir=str(tmp_path))
    assert said == (
        "expected at most 5.49e-08 GiB of pixels, found 5.59e-08 GiB (5x3x4x1); "
        "stream it by data.on_device_gib=0"
    )


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




@pytest.fixture
def stored(store, tmp_path):
    store("some", list(images(60, c=3)), (3, 4, 3))
    return data.open_dataset("tfds", "train", name="some", data_dir=str(tmp_path))


@pytest.mark.parametrize("batch_size", [16, 100])
def test_streaming_gives_the_images_of_the_device_s_batches(stored, batch_size):
    """Also from the middle on, as a resumed run does, and in rows, as several processes do."""
    whole, key, steps = loader.load_dataset(stored), random.key(3), 9
    rows, shape = jnp.asarray(whole.image.reshape(len(whole.label), -1)), whole.image.shape[1:]
    labels = jnp.asarray(whole.label)

    @jax.jit
    def draw(step):
        index = augment.batch_indices(key, step, batch_size, len(labels))
        return augment.gather_batch(rows, labels, index, key, step, False, shape)

    drawn = [draw(np.int32(step)) for step in range(steps)]
    for first, rows in ((0, slice(None)), (5, slice(None)), (0, np.arange(3, batch_size, 4))):
        streamed = list(loader.iterate_shuffled(stored, key, range(first, steps), batch_size, rows))
        assert len(streamed) == steps - first
        for (x_0, label), (image, other) in zip(drawn[first:], streamed, strict=True):
            assert image.dtype == np.uint8 and other.dtype == np.int32
            np.testing.assert_array_equal(augment.unscale(x_0)[rows], image)
            np.testing.assert_array_equal(label[rows], other)


def test_worker_processes_change_nothing(stored):
    """Of an array_record set, opened anew in each worker."""
    flags.FLAGS.mark_as_parsed()  # grain's workers ask; under main.py they are
    alone, two = (list(loader.iterate_shuffled(stored, random.key(0), range(6), 8, workers=w)) for w in (0, 2))
    jax.tree.map(np.testing.assert_array_equal, alone, two)


def test_in_order_gives_every_image_once_and_masks_the_rest(stored):
    whole = loader.load_dataset(stored)
    for batch_size in (7, 60, 64):
        parts = list(loader.iterate_split(stored, batch_size))
        assert {len(image) for image, _, _ in parts} == {batch_size}
        image, label, mask = (np.concatenate(x) for x in zip(*parts, strict=True))
        np.testing.assert_array_equal(mask, np.arange(len(mask)) < 60)
        np.testing.assert_array_equal(image[mask], whole.image)
        np.testing.assert_array_equal(label[mask], whole.label)
        jax.tree.map(
            np.testing.assert_array_equal,
            list(loader.iterate_split(stored, batch_size, first=1)),
            parts[1:],
        )
        halves = [loader.iterate_split(stored, batch_size, rows) for rows in (slice(0, 3), slice(3, None))]
        together = [
            [np.concatenate(x) for x in zip(*p, strict=True)] for p in zip(*halves, strict=True)
        ]
        jax.tree.map(np.testing.assert_array_equal, [tuple(x) for x in together], parts)


def test_a_damaged_picture_ends_the_stream_with_its_name(store, tmp_path):
    folder = store("some", [*images(20), b"no picture"], (3, 4, 1))
    found = data.open_dataset("tfds", "train", name="some", data_dir=str(tmp_path))
    for workers in (0, 1):
        with pytest.raises(DataError, match=f"{folder}: train image .*cannot identify"):
            list(loader.iterate_shuffled(found, random.key(0), range(9), 8, workers=workers))


def test_nothing_to_stream_and_too_many_epochs(stored):
    assert list(loader.iterate_shuffled(stored, random.key(0), range(5, 5), 8)) == []
    with pytest.raises(DataError, match="expected at most 1,048,576 epochs"):
        next(loader.iterate_shuffled(stored, random.key(0), range(0, 2**31 - 1), 60))




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
