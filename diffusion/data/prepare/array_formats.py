"""Reads images that are published as bare pixels: CIFAR's binary files, MNIST's IDX, NumPy's npz.

All are rows of bytes behind a header, which is checked against the length of what follows when a
source is opened; the rows are read on demand from within the archive. Pickled versions exist of all
three and are never read, as a pickle runs code.
"""

import contextlib
import io
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from diffusion.data import escape, mismatch
from diffusion.data.prepare import archives
from diffusion.data.prepare.archives import CHUNK, Item, Report, Source, reading
from diffusion.utils.errors import DataError

MAX_CLASSES = 2**16


def check_count(what: str, found: int, expected: int, accept_incomplete: bool) -> None:
    """Raises DataError for more images than were published, or for fewer unless accepted."""
    if found > expected or (found < expected and not accept_incomplete):
        advice = "get it whole, or take what is there with data.accept_incomplete=True"
        advice = "is it another?" if found > expected else advice
        raise mismatch(what, f"{expected:,} images", f"{found:,}", advice)


def _read_rows(file: BinaryIO, width: int, n: int, where: str) -> Iterator[np.ndarray]:
    """Yields n rows of a file, uint8[width] each, read up to CHUNK bytes at a time."""
    limit, done = max(1, CHUNK // width), 0
    while done < n:
        data = file.read(min(limit, n - done) * width)
        if not data or len(data) % width:
            expected = f"{n:,} records of {width:,} bytes"
            raise mismatch(where, expected, f"{done + len(data) // width:,}")
        rows = np.frombuffer(data, np.uint8).reshape(-1, width)
        done += len(rows)
        yield from rows


def _labelled(name: str, image: np.ndarray, label: int, classes: tuple, split: str) -> Item:
    if label < len(classes):
        return Item(name, image, label, split)
    error = mismatch(name, f"a label of 0 to {len(classes) - 1}", label, "it is damaged")
    return Item(name, error, 0, split)


class Cifar(NamedTuple):
    """The contents of a binary archive."""

    title: str
    class_file: str  # holds the names of the classes
    num_classes: int
    label_bytes: int  # before the pixels; the last is the label
    files: dict[str, tuple[int, str]]  # name -> (images, split)


CIFAR10 = Cifar(
    *("CIFAR-10", "batches.meta.txt", 10, 1),
    files={f"data_batch_{k}.bin": (10_000, "train") for k in range(1, 6)}
    | {"test_batch.bin": (10_000, "test")},
)
CIFAR100 = Cifar(
    *("CIFAR-100", "fine_label_names.txt", 100, 2),
    files={"train.bin": (50_000, "train"), "test.bin": (10_000, "test")},
)


def cifar(form: Cifar, path: pathlib.Path, accept_incomplete: bool, report: Report) -> Source:
    """Opens the binary version (www.cs.toronto.edu/~kriz/cifar.html): a tar of files of records.

    A record is one or two labels and then 32x32 bytes each of red, green and blue.
    """
    if (kind := archives.archive_kind(path, f"the binary archive of {form.title}")) != "tar":
        raise mismatch(path, f"the binary archive of {form.title}", f"a {kind}")
    sizes, classes, width = {}, (), form.label_bytes + 32 * 32 * 3
    for member in archives.tar_members(path, report):
        name = _base_name(member)
        if name in form.files:
            sizes.setdefault(name, member.size)
        elif name == form.class_file and member.size < 2**16:
            text = archives.read_member(member)
            words = text.decode(errors="replace").split() if isinstance(text, bytes) else ()
            classes = tuple(map(escape, words))
    if not sizes:
        advice = "take the binary version: the one for Python is a pickle, which runs code"
        raise mismatch(path, ", ".join(form.files), "none", advice)
    for name, (n, _) in form.files.items():
        found, rest = divmod(sizes.get(name, 0), width)
        if rest:
            expected, found = f"records of {width:,} bytes", f"{sizes[name]:,} bytes"
            raise mismatch(f"{path}: {name}", expected, found, "get it anew")
        check_count(f"{path}: {name}", found, n, accept_incomplete)
    if len(classes) != form.num_classes:
        found = f"{len(classes)} in {form.class_file}"
        raise mismatch(path, f"{form.num_classes} names of classes", found)

    def items() -> Iterator[Item]:
        for name, (_, split) in form.files.items():  # a walk for each file keeps none in memory
            with contextlib.closing(archives.tar_members(path)) as members:
                if (member := next((m for m in members if _base_name(m) == name), None)) is None:
                    continue
                rows = _read_rows(member.open(), width, member.size // width, name)
                for k, row in enumerate(rows):
                    image = row[form.label_bytes :].reshape(3, 32, 32).transpose(1, 2, 0).copy()
                    label = int(row[form.label_bytes - 1])
                    yield _labelled(f"{name}[{k}]", image, label, classes, split)

    n = sum(sizes.values()) // width
    return Source(items, classes, f"{n:,} images of {form.title}, from {path.name}.", n)


def _base_name(member: archives.Member) -> str:
    return "" if member.problem else member.name.rpartition("/")[2]


def idx(
    title: str,
    classes: tuple[str, ...],
    path: pathlib.Path,
    accept_incomplete: bool,
    report: Report,
) -> Source:
    """Opens a folder of MNIST's four files, gzipped or not (format: yann.lecun.com/exdb/mnist)."""
    files = []  # (file of images, labels, split)
    for part, n, split in (("train", 60_000, "train"), ("t10k", 10_000, "test")):
        images, labels = _idx_file(path, f"{part}-images"), _idx_file(path, f"{part}-labels")
        if images and labels:
            found, other = _idx_count(images, (28, 28), n), _idx_count(labels, (), n)
            check_count(str(images), found, n, accept_incomplete)
            if other != found:
                raise mismatch(labels, f"{found:,} labels", f"{other:,}")
            with archives.open_unzipped(labels) as stream:
                files.append((images, stream.read()[8:], split))
        elif images or labels or not accept_incomplete:
            expected = f"{part}-images-idx3-ubyte and {part}-labels-idx1-ubyte, or both .gz"
            found = (images or labels).name + " alone" if images or labels else "neither"
            raise mismatch(path, f"a folder of {expected}", found)
    if not files:
        raise mismatch(path, f"a folder of the files of {title}", "none of them")

    def items() -> Iterator[Item]:
        for images, labels, split in files:
            name = images.name.removesuffix(".gz")
            with reading(images), archives.open_unzipped(images) as stream:
                stream.read(16)
                for k, row in enumerate(_read_rows(stream, 28 * 28, len(labels), name)):
                    image = row.reshape(28, 28, 1).copy()
                    yield _labelled(f"{name}[{k}]", image, labels[k], classes, split)

    count = sum(len(labels) for _, labels, _ in files)
    return Source(items, classes, f"{count:,} images of {title}.", count)


def _idx_file(path: pathlib.Path, start: str) -> pathlib.Path | None:
    rank = "3" if start.endswith("images") else "1"
    names = (f"{start}{dot}idx{rank}-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((path / name for name in names if (path / name).is_file()), None)


def _idx_count(file: pathlib.Path, shape: tuple[int, ...], limit: int) -> int:
    """Returns the number of arrays of this shape, once header and length agree on it.

    The header is two zero bytes, 8 for uint8, the rank, and the dimensions as big-endian uint32.
    """
    start = 4 * (2 + len(shape))
    with reading(file), archives.open_unzipped(file) as stream:
        head = stream.read(start)
        dims = struct.unpack(f">{start // 4}I", head) if len(head) == start else (0,)
        if dims[0] != 0x801 + len(shape) or dims[2:] != shape:
            expected = f"the head of an IDX file, uint8{['n', *shape]}".replace("'", "")
            raise mismatch(file, expected, repr(head))
        length, found = min(dims[1], limit + 1) * math.prod(shape), 0
        while found <= length and (data := stream.read(CHUNK)):
            found += len(data)
    if found != length and dims[1] <= limit:
        what = "more" if found > length else f"{found:,}"
        raise mismatch(file, f"{length:,} bytes after its head", what)
    return dims[1]


NPZ_SPLITS = (("x_train", "y_train", "train"), ("x_test", "y_test", "test"))
NPZ_IMAGES = ("images", "x", "arr_0")
NPZ_LABELS = ("labels", "y", "arr_1")


class _ArrayHeader(NamedTuple):
    """The header of an array in an npz, which agrees with the size of its file."""

    where: str  # for errors
    file: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # of the values in the file


def npz(path: pathlib.Path) -> Source:
    """Opens uint8[n, h, w] or [n, h, w, 1 to 4] and perhaps labels, by the names of the arrays.

    These are x_train and x_test, with y_train and y_test; or images, x, arr_0 or the only array
    that can be images, with labels, y or arr_1. Labels are integers from 0, [n] or [n, 1].
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        members = {x.filename.removesuffix(".npy"): x for x in archive.infolist()}
        parts = []  # (name of the images, their header, their labels, split)
        for key, label_key, split in _npz_parts(archive, members):
            images, labels = _image_header(archive, members[key]), None
            if label_key:
                labels = _read_labels(archive, members[label_key], images.shape[0])
            parts.append((key, images, labels, split))
    largest = [int(labels.max()) for _, _, labels, _ in parts if labels is not None]
    if len(largest) not in (0, len(parts)):
        raise mismatch(path, "y_train and y_test", "one of them")

    def items() -> Iterator[Item]:
        with reading(path), zipfile.ZipFile(path) as archive:
            for key, images, labels, split in parts:
                shape, name = (*images.shape[1:], 1)[:3], escape(key)
                with archive.open(images.file) as file:
                    file.read(images.start)
                    rows = _read_rows(file, math.prod(shape), images.shape[0], images.where)
                    for k, row in enumerate(rows):
                        label = 0 if labels is None else int(labels[k])
                        yield Item(f"{name}[{k}]", row.reshape(shape).copy(), label, split)

    n = sum(images.shape[0] for _, images, _, _ in parts)
    classes = tuple(map(str, range(1 + max(largest, default=-1))))
    return Source(items, classes, f"{n:,} images from {path.name}.", n)


def _npz_parts(archive: zipfile.ZipFile, files: dict) -> list[tuple[str, str | None, str | None]]:
    """Returns (name of images, name of their labels, split)."""
    if parts := [(x, y if y in files else None, s) for x, y, s in NPZ_SPLITS if x in files]:
        return parts
    names = [name for name in NPZ_IMAGES if name in files]
    if not names:
        for name, file in files.items():
            with contextlib.suppress(Exception):  # whatever it is, it is not images
                _image_header(archive, file)
                names.append(name)
        if len(names) != 1:
            expected = f"uint8 images under x_train or one of {', '.join(NPZ_IMAGES)}"
            raise mismatch(archive.filename, expected, ", ".join(list(files)[:3]))
    labels = (name for name in NPZ_LABELS if name in files and name != names[0])
    return [(names[0], next(labels, None), None)]


def _read_header(archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> _ArrayHeader:
    where = f"{archive.filename}: {file.filename}"
    if problem := archives.zip_problem(file.filename, file):
        raise DataError(escape(f"{where}: {problem}"))
    with archive.open(file) as stream:
        head = io.BytesIO(stream.read(2**16))  # numpy reads as long a header as one claims to be
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, fortran, dtype = read[npy.read_magic(head)](head)
    if dtype.hasobject:
        raise DataError(escape(f"{where}: holds Python objects, a pickle; none is ever read"))
    if (fortran and len(shape) > 1) or not shape or min(shape) < 1:
        found = f"{list(shape)}" + ", in Fortran's order" * fortran
        raise mismatch(where, "an array in C's order, not empty", found)
    claimed, there = math.prod(shape) * dtype.itemsize, file.file_size - head.tell()
    if claimed != there:
        raise mismatch(where, f"{claimed:,} bytes of values", f"{there:,}")
    return _ArrayHeader(where, file, shape, dtype, head.tell())


def _image_header(archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> _ArrayHeader:
    x = _read_header(archive, file)
    fits = len(x.shape) == 3 or (len(x.shape) == 4 and x.shape[3] <= 4)
    if x.dtype != np.uint8 or not fits or math.prod(x.shape[1:]) > archives.MAX_FILE_BYTES:
        raise mismatch(x.where, "uint8[n, h, w] or [n, h, w, 1 to 4]", f"{x.dtype}{list(x.shape)}")
    return x


def _read_labels(archive: zipfile.ZipFile, file: zipfile.ZipInfo, n: int) -> np.ndarray:
    x = _read_header(archive, file)
    if x.dtype.kind not in "iu" or x.shape not in ((n,), (n, 1)):
        raise mismatch(x.where, f"{n:,} labels, integers", f"{x.dtype}{list(x.shape)}")
    labels = np.frombuffer(archive.read(file), x.dtype, offset=x.start)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise mismatch(x.where, f"labels of 0 to {MAX_CLASSES - 1:,}", f"{low:,} to {high:,}")
    return labels
