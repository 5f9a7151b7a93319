"""Records: a data set of images in TFDS's array_record layout, written without TensorFlow.

    folder/NAME/VERSION/dataset_info.json, features.json, label.labels.txt
                        NAME-SPLIT.array_record-00000-of-00002, ...

A record is a serialised tf.train.Example. The folder gets its name when it is whole and on the
disk; until then it is .incomplete-VERSION beside it, under a lock that ends with its process.
"""

import collections
import contextlib
import fcntl
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

NAME = r"[a-z][a-z0-9_]*", "a-z, 0-9 and _, a letter first"
# A record for itself, for reading in any order; its image is compressed already.
OPTIONS = "group_size:1,uncompressed"
VERSION = r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}", "three numbers, such as 1.0.0"


class RecordsError(Exception):
    """One line: what was expected, what was found, what to do."""


def encoder(shape: tuple[int, int, int], classes: Sequence[str]) -> Callable[[bytes, int], bytes]:
    """(the file of an image, its label) -> a record; the same in every process.

    shape: (h, w, c) of the images. classes: names by label; without any, labels are left out.
    """
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = _features(shape, classes)
    serializer = ExampleSerializer(features.get_serialized_info())

    def encode(image: bytes, label: int) -> bytes:
        values = {"image": image, "label": label} if classes else {"image": image}
        example = serializer.get_tf_example(features.encode_example(values))
        # Left to itself, protobuf puts the features into another order in every process.
        return example.SerializeToString(deterministic=True)

    return encode


def image_of(record: bytes) -> bytes:
    """The file of the image in a record."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(record).features
    return features.feature["image"].bytes_list.value[0]


def check_classes(classes: Sequence[str]) -> None:
    """Raises RecordsError for names that TFDS, which keeps them one a line, would not give back."""
    twice = [name for name, count in collections.Counter(classes).items() if count > 1]
    bad = [name for name in classes if not name or name != name.strip() or not name.isprintable()]
    if twice or bad:
        wanted = "different, printable names without spaces around them"
        raise RecordsError(f"classes: expected {wanted}, found {[*twice, *bad][0]!r}; rename it")


class Writer:
    """Writes the splits of one data set into a folder, in files of up to shard_bytes of records.

    Of the files that are being written, array_record keeps some 150 bytes a record in memory.
    """

    def __init__(self, folder: pathlib.Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self._open, self._room, self._lengths, self._bytes = {}, {}, {}, collections.Counter()

    def write(self, split: str, record: bytes) -> None:
        """Raises RecordsError, though a full disk is noticed at the end of a file only."""
        from array_record.python.array_record_module import ArrayRecordWriter

        lengths = self._lengths.setdefault(split, [])
        with _writing(self.folder):
            if not lengths or len(record) > self._room[split]:
                self._close(split)
                # How many files there will be, which TFDS has in their names, is not known yet.
                path = self.folder / f"{split}-{len(lengths)}"
                self._open[split] = ArrayRecordWriter(str(path), OPTIONS)
                self._room[split] = self.shard_bytes
                lengths.append(0)
            self._open[split].write(record)
        self._room[split] -= len(record)
        self._bytes[split] += len(record)
        lengths[-1] += 1

    def _close(self, split: str) -> None:
        if split in self._open:
            self._open.pop(split).close()

    def finish(
        self, name: str, version: str, shape: tuple, classes: Sequence[str], about: str
    ) -> None:
        """Gives the files their names, and adds what TFDS needs to read them. Once, at the end."""
        import tensorflow_datasets as tfds

        template = tfds.core.ShardedFileTemplate(
            data_dir=self.folder, dataset_name=name, filetype_suffix="array_record"
        )
        with _writing(self.folder):
            infos = []
            for split, lengths in sorted(self._lengths.items(), reverse=True):  # train first
                self._close(split)
                names = template.replace(split=split)
                for i in range(len(lengths)):
                    path = names.sharded_filepath(shard_index=i, num_shards=len(lengths))
                    os.rename(self.folder / f"{split}-{i}", path)
                info = tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=lengths,
                    num_bytes=self._bytes[split],
                    filename_template=names,
                )
                infos.append(info)
            tfds.folder_dataset.write_metadata(
                data_dir=self.folder,
                features=_features(shape, classes),
                split_infos=infos,
                version=version,
                filename_template=template,
                check_data=False,  # the check takes TensorFlow
                description=about,
            )


def _features(shape: tuple[int, int, int], classes: Sequence[str]) -> Any:
    from tensorflow_datasets import features

    kinds = {"image": features.Image(shape=shape)}
    if classes:
        kinds["label"] = features.ClassLabel(names=classes)
    return features.FeaturesDict(kinds)


@contextlib.contextmanager
def whole(folder: str | os.PathLike, name: str, version: str) -> Iterator[pathlib.Path]:
    """A new folder that becomes folder/name/version when it is complete.

    An error leaves nothing of it; what a killed process left is removed by the next that comes.
    Raises RecordsError for other names, if the set exists, if another process is making it, and
    if it cannot be written.
    """
    for key, value, (form, words) in (("name", name, NAME), ("version", version, VERSION)):
        if not re.fullmatch(form, value):
            raise RecordsError(f"{key}: expected {words}, found {value!r}")
    final = pathlib.Path(folder).expanduser() / name / version
    new = final.with_name(f".incomplete-{version}")  # beside it: on the same file system
    if os.path.lexists(final):
        advice = "give another name, or delete it to make it anew"
        raise RecordsError(f"{final}: expected no such data set yet, found one; {advice}")
    with _writing(new):
        new.mkdir(parents=True, exist_ok=True)
        lock = open(new / "lock", "a")
    with lock:
        _take(lock, new)
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


def _take(lock: Any, new: pathlib.Path) -> None:
    """Locks it, for as long as this process lives. Raises RecordsError if another one has it."""
    with _writing(new):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name)):
                return
        except (BlockingIOError, FileNotFoundError):
            pass  # it is held; or it was, and has gone together with what it was for
    advice = "wait for it, or give another name"
    raise RecordsError(f"{new}: another process is making this data set; {advice}")


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
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        what, advice = " ".join(text.split())[:200], "make room, or choose another folder"
        raise RecordsError(f"{folder}: cannot be written: {what}; {advice}") from error
