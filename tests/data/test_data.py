"""Sources of images: what they give is what was stored, or one line says what is wrong."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.data.loader import load_dataset
from diffusion.utils.errors import DataError
from tests.conftest import ROOT
from tests.tiny_tfds import distinct_images, write_images

TFDS_DIR = os.environ.get("DDPM_TFDS_DIR") or str(ROOT.parent / "shared" / "tfds")
with_cifar10 = pytest.mark.skipif(
    not pathlib.Path(TFDS_DIR, "cifar10").is_dir(),
    reason="needs TFDS's cifar10 in array_record below the folder named by DDPM_TFDS_DIR",
)


def test_digits_are_split_without_overlap_and_in_balance():
    (train, train_label), (test, test_label) = (
        load_dataset(data.open_dataset("digits", split)) for split in ("train", "test")
    )
    assert (len(train_label), len(test_label)) == (1501, 296)
    assert data.open_dataset("digits", "test").num_classes == 10
    for x, label in ((train, train_label), (test, test_label)):
        assert x.dtype == np.uint8 and x.shape[1:] == (8, 8, 1) and label.dtype == np.int32
        assert x.min() == 0 and x.max() == 255 and len(np.unique(x)) == 17
    labels = np.concatenate([train_label, test_label])
    share = np.bincount(test_label) / np.bincount(labels)
    assert (abs(share - 1 / 6) < 0.01).all()  # 174 to 183 of a class: rounding down costs 1/174
    from sklearn.datasets import load_digits

    bunch = load_digits()
    both = np.concatenate([train, test])[..., 0] / 255 * 16

    def rows(x, label):
        return sorted(map(tuple, np.column_stack([np.rint(x.reshape(-1, 64)), label])))

    assert rows(both, labels) == rows(bunch.images, bunch.target)  # every image, once


def test_fingerprint_sees_every_change_of_a_small_set():
    def fingerprint(image, label, num_classes):
        read = lambda i: (image[i], label[i])  # noqa: E731
        return data.fingerprint(data.ImageDataset(len(image), image.shape[1:], num_classes, read))

    image, label = distinct_images(6, 2, 4), np.arange(6, dtype=np.int32)
    first = fingerprint(image, label, 6)
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == fingerprint(image.copy(), label.copy(), 6)
    other = image.copy()
    other[5, 1, 3] ^= 1
    changed = [
        (other, label, 6),
        (image, label[::-1], 6),
        (image, label, 7),
        (image[:5], label[:5], 6),
        (image.reshape(6, 4, 2, 1), label, 6),
    ]
    assert len({first, *(fingerprint(*x) for x in changed)}) == 6


def test_fingerprint_of_a_large_set_reads_an_even_part():
    seen = []

    def read(index):
        seen.extend(index)
        return np.zeros((len(index), 128, 128, 1), np.uint8), np.zeros(len(index), np.int32)

    data.fingerprint(data.ImageDataset(10**6, (128, 128, 1), 0, read))
    gaps = np.diff(seen)
    assert len(seen) == 1024 and (seen[0], seen[-1]) == (0, 10**6 - 1)
    assert gaps.max() - gaps.min() <= 1


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

    images = data.open_dataset("tfds", "test", name="cifar10", data_dir=TFDS_DIR)
    found, label = load_dataset(images)
    assert found.shape == (10_000, 32, 32, 3) and found.dtype == np.uint8
    assert label.dtype == np.int32 and images.num_classes == 10
    np.testing.assert_array_equal(np.bincount(label), [1000] * 10)
    folder = next(pathlib.Path(TFDS_DIR, "cifar10").glob("*/dataset_info.json")).parent
    builder = tensorflow_datasets.builder_from_directory(str(folder))
    raw = builder.as_data_source(
        split="test", deserialize_method=tensorflow_datasets.decode.DeserializeMethod.RAW_BYTES
    )
    for i in (0, 1, 255, 256, 5000, 9999):  # 256: where another thread's part begins
        feature = tf_example_pb2.Example.FromString(raw[i]).features.feature
        with Image.open(io.BytesIO(feature["image"].bytes_list.value[0])) as image:
            np.testing.assert_array_equal(found[i], np.asarray(image))
        assert label[i] == feature["label"].int64_list.value[0]
    assert "tensorflow" not in sys.modules


@pytest.fixture
def store(tmp_path):
    """store(name, images, shape, ...) writes such a data set; returns its folder."""
    return lambda *args, **kwargs: write_images(tmp_path, *args, **kwargs)


def load(folder, name="some", split="train"):
    return load_dataset(data.open_dataset("tfds", split, name=name, data_dir=str(folder)))


def refused(*args, **kwargs):
    """The one line that loading ends in."""
    with pytest.raises(DataError) as error:
        load_dataset(data.open_dataset(*args, **kwargs))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tfds_grey_and_colour_with_and_without_classes(store, tmp_path):
    """More images than one thread takes, in an order that only TFDS knows: compared as sets."""
    grey = distinct_images(600)
    store("some", list(grey), (3, 4, 1))
    assert data.open_dataset("tfds", "train", "some", str(tmp_path)).num_classes == 7
    image, label = load(tmp_path)
    assert image.shape == (600, 3, 4, 1)
    index = {x.tobytes(): i for i, x in enumerate(grey)}
    order = [index.pop(x.tobytes()) for x in image]
    assert not index
    np.testing.assert_array_equal(label, np.array(order) % 7)
    colour = distinct_images(3, c=3)
    store("other", list(colour), (None, None, 3), classes=0)  # one size, though nothing says so
    assert data.open_dataset("tfds", "train", "other", str(tmp_path)).num_classes == 0
    image, label = load(tmp_path, "other")
    assert label.tolist() == [0, 0, 0]
    assert {x.tobytes() for x in image} == {x.tobytes() for x in colour}


def test_tfds_takes_the_newest_version(store, tmp_path):
    for i, version in enumerate(("2.0.0", "10.0.0", "9.1.0")):
        store("some", list(distinct_images(i + 1)), (3, 4, 1), version)
    assert len(load(tmp_path)[0]) == 2


def test_unknown_names_end_in_the_nearest(store, tmp_path):
    assert refused("digit", "train") == "data.source: 'digit' is not known; nearest: digits"
    assert refused("xyz", "train") == "data.source: 'xyz' is not known; there are: digits, tfds"
    assert refused("digits", "tset") == (
        "digits: expected a split 'tset' (bpd.split, eval.references, figures.split), found none; "
        "nearest: test"
    )
    store("some", list(distinct_images(2)), (3, 4, 1))
    store("other", list(distinct_images(2)), (3, 4, 1))
    here = {"data_dir": str(tmp_path)}
    said = refused("tfds", "test", name="some", **here)
    assert said.startswith("some: expected a split 'test' (bpd.split, ")
    assert said.endswith("), found none; there are: train")
    said = refused("tfds", "train", name="somme", **here)
    advice = "nearest: some; prepare it with --mode=prepare"
    assert said == f"data.name: no data set 'somme' in {tmp_path}; {advice}"
    assert "there are: other, some" in refused("tfds", "train", name="cifar10", **here)


def test_no_place_no_folder_and_an_empty_one(tmp_path):
    said = refused("tfds", "train", name="cifar10", data_dir="")
    assert said == "data.data_dir: expected the folder that holds 'cifar10', found none; give one"
    gone = str(tmp_path / "gone")
    said = refused("tfds", "train", name="cifar10", data_dir=gone)
    advice = "make the data set with --mode=prepare, or name another folder"
    assert said == f"data.data_dir: expected a folder, found no {gone!r}; {advice}"
    said = refused("tfds", "train", name="cifar10", data_dir=str(tmp_path))
    assert "no data set 'cifar10' in" in said and "it holds no TFDS data set" in said


def test_images_of_mixed_sizes_and_kinds_are_named(store, tmp_path):
    here = {"name": "some", "data_dir": str(tmp_path)}
    for shape, found in (((5, 4, 3), "5x4 RGB"), ((3, 4, 1), "3x4 L")):
        odd = distinct_images(1, *shape)[0]
        folder = store("some", [*distinct_images(4, c=3), odd], (None, None, 3))
        said = refused("tfds", "train", **here)
        assert f"{folder}: train image " in said
        if f"found {found}" in said:
            assert f"expected 3x4 RGB like the first, found {found}; mend it" in said
        else:  # in TFDS's order it came first, and the others are odd
            assert f"expected {found} like the first, found 3x4 RGB; mend it" in said
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_damaged_image_is_named(store, tmp_path):
    folder = store("some", [*distinct_images(2), b"no image"], (3, 4, 1))
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
    folder = store("some", list(distinct_images(5)), (3, 4, 1))
    inflict, what = DAMAGES[damage]
    inflict(folder)
    said = refused("tfds", "train", name="some", data_dir=str(tmp_path))
    assert said.startswith(f"{folder}{what}")
