"""Writes a data set in TFDS's array_record layout, without TensorFlow.

    folder/NAME/1.0.0/dataset_info.json, features.json, label.labels.txt
                      NAME-SPLIT.array_record-00000-of-00002, ...

A record is a serialised tf.train.Example. Until the folder is complete and on the disk, it is named
.incomplete-1.0.0, under a lock that ends with its process.
"""

import collections
import contextlib
import fcntl
import functools
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from etils import epath

from diffusion.data import mismatch
from diffusion.utils import io
from diffusion.utils.errors import DataError, error_text

VERSION = "1.0.0"
MAX_NAME = 200  # characters: the names of files are 35 longer, and end at 255
# One record a group, to read them in any order; images are compressed already.
ARRAY_RECORD_OPTIONS = "group_size:1,uncompressed"


@functools.lru_cache(maxsize=1)
def make_encoder(
    shape: tuple[int, int, int], classes: tuple[str, ...]
) -> Callable[[bytes, int], bytes]:
    """Returns a function from (the file of an image, its label) to a record.

    shape is the images' (h, w, c); without classes, labels are left out.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features(shape, classes)
    serializer = ExampleSerializer(features.get_serialized_info())

    def encode(image: bytes, label: int) -> bytes:
        values = {"image": image, "label": label} if classes else {"image": image}
        example = serializer.get_tf_example(features.encode_example(values))
        return example.SerializeToString(deterministic=True)  # else every process has its own order

    return encode


def image_of(record: bytes) -> bytes:
    """Returns the file of the image in a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(record).features
    return features.feature["image"].bytes_list.value[0]


def check_classes(classes: Sequence[str]) -> None:
    """Raises DataError for names that TFDS, which keeps them one a line, would not give back."""
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    bad = [name for name in classes if not name or name != name.strip() or not name.isprintable()]
    if twice or bad:
        expected = "different, printable names without spaces around them"
        raise mismatch("classes", expected, repr([*twice, *bad][0]), "rename it")


class Writer:
    """Writes the splits of one data set into a folder, in files of up to shard_bytes of records."""

    def __init__(self, folder: pathlib.Path, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._open, self._room, self._lengths, self._bytes = {}, {}, {}, collections.Counter()

    def write(self, split: str, record: bytes) -> None:
        """Appends a record. A full disk raises DataError, but not before the end of a file."""
        from array_record.python.array_record_module import ArrayRecordWriter

        lengths = self._lengths.setdefault(split, [])
        with _writing(self._folder):
            if not lengths or len(record) > self._room[split]:
                self._close(split)
                # TFDS has the number of files in their names, which is not known yet.
                path = self._folder / f"{split}-{len(lengths)}"
                self._open[split] = ArrayRecordWriter(str(path), ARRAY_RECORD_OPTIONS)
                self._room[split] = self._shard_bytes
                lengths.append(0)
            self._open[split].write(record)
        self._room[split] -= len(record)
        self._bytes[split] += len(record)
        lengths[-1] += 1

    def _close(self, split: str) -> None:
        if split in self._open:
            self._open.pop(split).close()

    def finish(self, name: str, shape: tuple, classes: Sequence[str], about: str) -> None:
        """Gives the files their names, and adds what TFDS needs to read them; called once."""
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            data_dir=self._folder, dataset_name=name, filetype_suffix="array_record"
        )
        with _writing(self._folder):
            infos = []
            for split, lengths in sorted(self._lengths.items(), reverse=True):  # train first
                self._close(split)
                names = template.replace(split=split)
                for i in range(len(lengths)):
                    path = names.sharded_filepath(shard_index=i, num_shards=len(lengths))
                    os.rename(self._folder / f"{split}-{i}", path)
                info = tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=self._bytes[split],
                    filename_template=names,
                )
                infos.append(info)
            tfds.folder_dataset.write_metadata(
                data_dir=self._folder,
                features=_features(shape, classes),
                split_infos=infos,
                version=VERSION,
                filename_template=template,
                check_data=False,  # the check takes TensorFlow
                description=about,
            )


def _features(shape: tuple[int, int, int], classes: Sequence[str]) -> Any:
    from tensorflow_datasets import features

    label = {"label": features.ClassLabel(names=classes)} if classes else {}
    return features.FeaturesDict({"image": features.Image(shape=shape), **label})


def new_set_path(folder: str | os.PathLike, name: str, may_exist: bool = False) -> epath.Path:
    """Returns folder/name/VERSION.

    Raises DataError if TFDS does not allow the name, or the data set exists and must not.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or len(name) > MAX_NAME:
        expected = f"a-z, 0-9 and _, a letter first, at most {MAX_NAME} characters"
        found = repr(name) if len(name) <= MAX_NAME else f"{len(name):,} characters"
        raise mismatch("data.name", expected, found)
    path = io.to_path(folder) / name / VERSION
    # In a store it is there once its last file is.
    last = path / "dataset_info.json" if io.is_object_store(path) else path
    if (last.exists() or os.path.islink(path)) and not may_exist:
        advice = "give another data.name, or delete it to make it anew"
        raise mismatch(path, "no such data set yet", "one", advice)
    return path


@contextlib.contextmanager
def create_folder(folder: str | os.PathLike, name: str) -> Iterator[pathlib.Path]:
    """Gives a new folder that becomes folder/name/VERSION when the block ends without an error.

    For an object store it is a local one, whose files are copied there at the end. An error leaves
    nothing of it; what a killed process left is removed by the next one. Raises DataError as
    `new_set_path`, and if another process is making it or it cannot be written.
    """
    final = new_set_path(folder, name)
    if io.is_object_store(final):
        with _writing(final):  # better an error now than after an hour
            io.try_writing(final)
        local = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-"))
        try:
            yield local
        except BaseException:
            shutil.rmtree(local, ignore_errors=True)
            raise
        try:
            io.upload_folder(local, final, last="dataset_info.json")
        except OSError as error:
            what = f"cannot be written: {error_text(error)}; the data set is in {local}"
            raise DataError(f"{final}: {what}: copy its files there") from error
        shutil.rmtree(local, ignore_errors=True)
        return
    final = pathlib.Path(final)
    new = final.with_name(f".incomplete-{VERSION}")  # beside it: on the same file system
    with _writing(new):
        new.mkdir(parents=True, exist_ok=True)
        lock = open(new / "lock", "ab")
    with lock:
        _acquire_lock(lock, new)
        try:
            with _writing(new):
                for path in new.iterdir():
                    if path.name != "lock":
                        path.unlink()
            yield new
            with _writing(new):
                os.unlink(lock.name)
                for path in (*new.iterdir(), new):  # a name must not outlast what it names
                    _sync(path)
                os.rename(new, final)  # refused if it came meanwhile
                _sync(final.parent)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            with contextlib.suppress(OSError):  # there are other versions
                final.parent.rmdir()
            raise


def _acquire_lock(lock: BinaryIO, new: pathlib.Path) -> None:
    """Locks the file until this process ends. Raises DataError if another one has it."""
    with _writing(new), contextlib.suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):  # not finished meanwhile
            return
    advice = "wait for it, or give another data.name"
    raise DataError(f"{new}: another process is making this data set; {advice}")


def _sync(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: array_record's
        advice = "make room, or choose another data.data_dir"
        raise DataError(f"{folder}: cannot be written: {error_text(error)}; {advice}") from error
