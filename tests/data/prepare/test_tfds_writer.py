"""TFDS reads what was written; a data set is complete or not there, whatever happens."""

import fcntl
import json
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion.data.prepare import tfds_writer
from diffusion.utils.errors import DataError
from tests.conftest import ROOT
from tests.tiny_tfds import png

SHAPE = (4, 5, 3)


def images(n):
    return np.random.default_rng(0).integers(0, 256, (n, *SHAPE), np.uint8)


def write(folder, n=5, classes=("a", "b"), shard_bytes=10**6, name="tiny"):
    """Image i is of class i % 2, and the fourth and every fourth after it is in test."""
    encode = tfds_writer.make_encoder(SHAPE, classes)
    with tfds_writer.create_folder(folder, name) as new:
        writer = tfds_writer.Writer(new, shard_bytes)
        for i, x in enumerate(images(n)):
            writer.write("test" if i % 4 == 3 else "train", encode(png(x), i % 2))
        writer.finish(name, SHAPE, classes, "Tiny.\nOf two lines.")
    return folder / name / "1.0.0"


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def small_files():
    """Files of at most 64 kB: what stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("shard_bytes, shards", [(10**6, 1), (1000, 3), (1, 15)])
def test_tfds_reads_what_was_written(tmp_path, shard_bytes, shards):
    folder = write(tmp_path, 20, shard_bytes=shard_bytes)
    builder = tfds.builder_from_directory(str(folder))
    info = builder.info
    assert (info.name, str(info.version)) == ("tiny", "1.0.0")
    assert info.description == "Tiny.\nOf two lines."
    assert info.features["image"].shape == SHAPE and info.features["image"].np_dtype == np.uint8
    assert info.features["label"].names == ["a", "b"]
    assert {name: split.num_examples for name, split in info.splits.items()} == {
        "train": 15,
        "test": 5,
    }
    assert info.splits["train"].num_shards == shards
    for split, chosen in (("test", 3), ("train", [0, 1, 2])):
        expected = images(20).reshape(5, 4, *SHAPE)[:, chosen].reshape(-1, *SHAPE)
        found = builder.as_data_source(split=split)
        np.testing.assert_array_equal([x["image"] for x in found], expected)
    assert [x["label"] for x in found] == [0, 1, 0] + [0, 1, 0] * 4
    by_name = tfds.data_source(
        "tiny", data_dir=tmp_path, split="test", builder_kwargs={"file_format": "array_record"}
    )
    assert len(by_name) == 5 and "tensorflow" not in sys.modules


def test_names_of_the_files(tmp_path):
    write(tmp_path, 8, shard_bytes=700)
    first, *rest = json.loads((tmp_path / "tiny/1.0.0/dataset_info.json").read_text())["splits"]
    assert names(tmp_path) == [
        "tiny",
        "tiny/1.0.0",
        "tiny/1.0.0/dataset_info.json",
        "tiny/1.0.0/features.json",
        "tiny/1.0.0/label.labels.txt",
        *(f"tiny/1.0.0/tiny-test.array_record-0000{i}-of-00001" for i in range(1)),
        *(f"tiny/1.0.0/tiny-train.array_record-0000{i}-of-00002" for i in range(2)),
    ]
    assert [x["name"] for x in (first, *rest)] == ["train", "test"]
    assert sum(map(int, first["shardLengths"])) == 6


def test_shards_are_filled_up(tmp_path):
    record = bytes(100)
    writer = tfds_writer.Writer(tmp_path, 250)
    for _ in range(5):
        writer.write("train", record)
    writer.write("train", bytes(300))  # larger than a shard: alone in one
    writer.finish("tiny", SHAPE, (), "")
    info = json.loads((tmp_path / "dataset_info.json").read_text())["splits"][0]
    assert info["shardLengths"] == ["2", "2", "1", "1"] and info["numBytes"] == "800"


def test_without_classes_there_are_no_labels(tmp_path):
    features = tfds.builder_from_directory(str(write(tmp_path, classes=()))).info.features
    assert list(features) == ["image"]


def test_a_record_gives_its_image_back_and_is_the_same_everywhere():
    image = png(images(1)[0])
    code = (
        "import sys; from diffusion.data.prepare import tfds_writer; "
        "image = sys.stdin.buffer.read(); "
        "print(tfds_writer.make_encoder((4, 5, 3), ('a',))(image, 0).hex())"
    )
    record = tfds_writer.make_encoder(SHAPE, ("a",))(image, 0)
    assert tfds_writer.image_of(record) == image
    for _ in range(5):  # two orders of two features: by chance alike once in 32 times
        done = subprocess.run(
            [sys.executable, "-c", code], input=image, capture_output=True, cwd=ROOT, check=True
        )
        assert bytes.fromhex(done.stdout.decode()) == record


@pytest.mark.parametrize(
    "classes", [("a", "b", "a"), ("",), (" a",), ("a\nb",), ("a", "b\r"), ("\udcff",)]
)
def test_names_of_classes_that_tfds_would_not_give_back(classes):
    with pytest.raises(DataError, match=r"classes: expected .* found .*; rename it"):
        tfds_writer.check_classes(classes)


def test_names_of_classes_are_kept(tmp_path):
    classes = ("T-shirt/top", "zwei Wörter", "犬", "#'\"")
    tfds_writer.check_classes(classes)
    builder = tfds.builder_from_directory(str(write(tmp_path, classes=classes)))
    assert tuple(builder.info.features["label"].names) == classes


BAD_NAMES = ["Tiny", "a/b", "a-b", "my photos", "é", "", "..", "2d", "a\n", "a" * 201]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_tfds_does_not_know(tmp_path, name):
    with pytest.raises(DataError, match=r"data\.name: expected .*, found ") as error:
        with tfds_writer.create_folder(tmp_path, name):
            raise AssertionError("entered")
    assert not names(tmp_path) and len(str(error.value)) <= 300


def test_the_longest_name_is_one_that_files_can_have(tmp_path):
    name = "a" * tfds_writer.MAX_NAME
    builder = tfds.builder_from_directory(str(write(tmp_path, name=name)))
    assert builder.info.name == name and len(builder.as_data_source(split="train")) == 4


def test_an_error_leaves_nothing(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        tfds_writer.create_folder(tmp_path, "tiny") as new,
    ):
        tfds_writer.Writer(new, 100).write("train", b"x" * 50)
        assert (new / "train-0").exists()
        raise KeyboardInterrupt
    assert not names(tmp_path)


def test_other_versions_are_left_alone(tmp_path):
    write(tmp_path).rename(tmp_path / "tiny" / "0.9.0")
    before = names(tmp_path)
    with pytest.raises(KeyError), tfds_writer.create_folder(tmp_path, "tiny"):
        raise KeyError
    assert names(tmp_path) == before
    write(tmp_path)
    assert [path.name for path in sorted((tmp_path / "tiny").iterdir())] == ["0.9.0", "1.0.0"]


def test_an_existing_set_is_not_touched(tmp_path):
    write(tmp_path)
    before = names(tmp_path)
    with pytest.raises(DataError, match=r"tiny/1.0.0: expected no such .* another data.name"):
        write(tmp_path)
    assert names(tmp_path) == before


def test_a_set_that_came_meanwhile_is_not_touched(tmp_path):
    with pytest.raises(DataError, match="not empty"):
        with tfds_writer.create_folder(tmp_path, "tiny") as new:
            (new / "mine").touch()
            (tmp_path / "tiny" / "1.0.0").mkdir()
            (tmp_path / "tiny" / "1.0.0" / "theirs").touch()
    assert names(tmp_path) == ["tiny", "tiny/1.0.0", "tiny/1.0.0/theirs"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = (
        "import sys, os, signal; from diffusion.data.prepare import tfds_writer\n"
        "with tfds_writer.create_folder(sys.argv[1], 'tiny') as new:\n"
        "    (new / 'dataset_info.json').write_text('{}')\n"
        "    (new / 'train-7').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    new = tmp_path / "tiny" / ".incomplete-1.0.0"
    assert names(new) == ["dataset_info.json", "lock", "train-7"]
    with pytest.raises(tfds.core.DatasetNotFoundError):
        tfds.builder("tiny", data_dir=tmp_path)
    expected = names(write(tmp_path / "elsewhere"))
    assert names(write(tmp_path)) == expected and not new.exists()


def test_two_at_once(tmp_path):
    with tfds_writer.create_folder(tmp_path, "tiny") as new:
        (new / "mine").touch()
        with pytest.raises(DataError, match="another process is making this data set"):
            write(tmp_path)
        assert (new / "mine").exists()
    assert names(tmp_path / "tiny") == ["1.0.0", "1.0.0/mine"]


def test_a_lock_of_a_set_that_is_finished_is_none(tmp_path, monkeypatch):
    """Another process makes and finishes the set between our opening the lock and taking it."""
    flock = fcntl.flock

    def late(lock, how):
        (tmp_path / "tiny" / ".incomplete-1.0.0" / "lock").unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DataError, match="another process is making this data set"):
        write(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, small_files):
    encode = tfds_writer.make_encoder(SHAPE, ())
    with pytest.raises(DataError, match=r"cannot be written: .*File too large") as error:
        with tfds_writer.create_folder(tmp_path, "tiny") as new:
            writer = tfds_writer.Writer(new, 10**9)
            for _ in range(100):
                writer.write("train", encode(bytes(10**3), 0))
            writer.finish("tiny", SHAPE, (), "")
    assert "\n" not in str(error.value) and "make room" in str(error.value)
    assert not names(tmp_path)


def test_a_full_disk_is_noticed_at_the_end_of_a_shard(tmp_path, small_files):
    writer = tfds_writer.Writer(tmp_path, 10**5)
    with pytest.raises(DataError, match="cannot be written"):
        for _ in range(101):
            writer.write("train", bytes(10**3))


def test_a_place_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written: Not a directory; .*data_dir"):
        write(tmp_path / "file")
