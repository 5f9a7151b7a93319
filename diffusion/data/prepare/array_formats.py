"""Images that are published as bare pixels: CIFAR's binary files, MNIST's IDX, NumPy's npz.

All are rows of bytes behind a header. The header is checked against the length of what follows
when a source is opened; then the rows are read as they are asked for, from within the archive, a
mebibyte at a time. Pickled versions exist of all three, and are not read: a pickle runs code.
"""

import contextlib
import io
import itertools
import math
import pathlib
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from diffusion.data.prepare import archives
from diffusion.data.prepare.archives import (
    CHUNK,
    MAX_FILE_BYTES,
    Item,
    Report,
    Source,
    SourceError,
    reading,
)

MAX_CLASSES = 2**16


def check_count(what: str, found: int, expected: int, accept_incomplete: bool) -> None:
    """Raises SourceError for more images than were published, or fewer where those do not do."""
    if found > expected:
        raise SourceError(f"{what}: expected {expected:,} images, found {found:,}; is it another?")
    if found < expected and not accept_incomplete:
        advice = "get it whole, or take what is there with data.accept_incomplete=True"
        raise SourceError(f"{what}: expected {expected:,} images, found {found:,}; {advice}")


def _rows(file: BinaryIO, width: int, n: int, what: str) -> Iterator[np.ndarray]:
    """n rows of a file, uint8[width] each. Raises SourceError if it ends before."""
    for block in _blocks(file, width, n, what):
        yield from block


def _blocks(file: BinaryIO, width: int, n: int, what: str) -> Iterator[np.ndarray]:
    """The same, uint8[k, width] at a time."""
    most, done = max(1, CHUNK // width), 0
    while done < n:
        data = file.read(min(most, n - done) * width)
        if not data or len(data) % width:
            found = f"{done + len(data) // width:,}"
            raise SourceError(f"{what}: expected {n:,} records of {width:,} bytes, found {found}")
        block = np.frombuffer(data, np.uint8).reshape(-1, width)
        done += len(block)
        yield block


def _item(name: str, image: np.ndarray, label: int, classes: tuple, split: str) -> Item:
    if label < len(classes):
        return Item(name, image, label, split)
    found = f"expected a label of 0 to {len(classes) - 1}, found {label}"
    return Item(name, SourceError(f"{name}: {found}; it is damaged"), 0, split)




class Cifar(NamedTuple):
    """What is in an archive. labels: bytes of them before the pixels; the last is the label."""

    title: str
    names: str  # the file of the classes' names
    n_classes: int
    labels: int
    files: dict[str, tuple[int, str]]  # images, split


CIFAR10 = Cifar(
    *("CIFAR-10", "batches.meta.txt", 10, 1),
    files={f"data_batch_{k}.bin": (10_000, "train") for k in range(1, 6)}
    | {"test_batch.bin": (10_000, "test")},
)
CIFAR100 = Cifar(
    *("CIFAR-100", "fine_label_names.txt", 100, 2),
    files={"train.bin": (50_000, "train"), "test.bin": (10_000, "test")},
)
SIZE = 32 * 32 * 3


def cifar(form: Cifar, path: pathlib.Path, accept_incomplete: bool, report: Report) -> Source:
    """The binary version (www.cs.toronto.edu/~kriz/cifar.html): a tar of files of records, each of
    labels and then 32 x 32 bytes of red, of green, of blue. Nothing is unpacked.
    """
    if (found := archives.kind(path, f"the binary archive of {form.title}")) != "tar":
        raise SourceError(f"{path}: expected the binary archive of {form.title}, found a {found}")
    sizes, classes, width = {}, (), form.labels + SIZE
    for member in archives.tar_members(path, report):
        name = _file_name(member)
        if name in form.files:
            sizes.setdefault(name, member.size)
        elif name == form.names and member.size < 2**16:
            text = archives.content(member)
            words = text.decode(errors="replace").split() if isinstance(text, bytes) else ()
            classes = tuple(map(archives.shown, words))
    if not sizes:
        advice = "take the binary version: the one for Python is a pickle, which runs code"
        raise SourceError(f"{path}: expected {', '.join(form.files)}, found none; {advice}")
    for name, (n, _) in form.files.items():
        found, rest = divmod(sizes.get(name, 0), width)
        if rest:
            advice = f"which is {found:,} and {rest:,} bytes; get it anew"
            wanted = f"expected records of {width:,} bytes, found {sizes[name]:,} bytes"
            raise SourceError(f"{path}: {name}: {wanted}, {advice}")
        check_count(f"{path}: {name}", found, n, accept_incomplete)
    if len(classes) != form.n_classes:
        found = f"found {len(classes)} in {form.names}"
        raise SourceError(f"{path}: expected {form.n_classes} names of classes, {found}")

    def items():
        for name, (_, split) in form.files.items():
            with contextlib.closing(archives.tar_members(path)) as members:
                for k, row in enumerate(_records(members, name, width)):
                    image = row[form.labels :].reshape(3, 32, 32).transpose(1, 2, 0).copy()
                    label = int(row[form.labels - 1])
                    yield _item(f"{name}[{k}]", image, label, classes, split)

    n = sum(sizes.values()) // width
    return Source(items, classes, f"{n:,} images of {form.title}, from {path.name}.", n)


def _records(members: Iterator[archives.Member], name: str, width: int) -> Iterator[np.ndarray]:
    """Those of one file: a walk through the archive, for each, so that none must be kept."""
    for member in members:
        if _file_name(member) == name:
            yield from _rows(member.open(), width, member.size // width, name)
            return


def _file_name(member: archives.Member) -> str:
    return "" if member.trouble else member.name.rpartition("/")[2]




def idx(
    title: str,
    classes: tuple[str, ...],
    path: pathlib.Path,
    accept_incomplete: bool,
    report: Report,
) -> Source:
    """A folder of MNIST's four files, gzipped or not (yann.lecun.com/exdb/mnist: the format).

    Two zero bytes, 8 for uint8, the number of dimensions; these, big-endian; the bytes.
    """
    parts = []  # file of images, file of labels, how many, split
    for part, n, split in (("train", 60_000, "train"), ("t10k", 10_000, "test")):
        images, labels = _idx_file(path, f"{part}-images"), _idx_file(path, f"{part}-labels")
        if images and labels:
            found, other = _idx_size(images, (28, 28), n), _idx_size(labels, (), n)
            check_count(str(images), found, n, accept_incomplete)
            if other != found:
                raise SourceError(f"{labels}: expected {found:,} labels, found {other:,}")
            parts.append((images, labels, found, split))
        elif images or labels or not accept_incomplete:
            wanted = f"{part}-images-idx3-ubyte and {part}-labels-idx1-ubyte, or both .gz"
            found = (images or labels).name + " alone" if images or labels else "neither"
            raise SourceError(f"{path}: expected a folder of {wanted}, found {found}")
    if not parts:
        raise SourceError(f"{path}: expected a folder of the files of {title}, found none of them")

    def items():
        for images, labels, n, split in parts:
            with reading(images), archives.unzipped(images) as a, archives.unzipped(labels) as b:
                a.read(16), b.read(8)
                name = images.name.removesuffix(".gz")
                rows = _rows(a, 28 * 28, n, name), _rows(b, 1, n, labels.name)
                for k, (image, label) in enumerate(zip(*rows, strict=True)):
                    image = image.reshape(28, 28, 1).copy()
                    yield _item(f"{name}[{k}]", image, int(label[0]), classes, split)

    n = sum(x[2] for x in parts)
    return Source(items, classes, f"{n:,} images of {title}.", n)


def _idx_file(path: pathlib.Path, start: str) -> pathlib.Path | None:
    ends = "3" if start.endswith("images") else "1"
    names = (f"{start}{dot}idx{ends}-ubyte{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((path / name for name in names if (path / name).is_file()), None)


def _idx_size(file: pathlib.Path, shape: tuple[int, ...], most: int) -> int:
    """How many arrays of this shape there are, once the header and the length agree on it."""
    start = 4 * (2 + len(shape))
    with reading(file), archives.unzipped(file) as stream:
        head = stream.read(start)
        dims = struct.unpack(f">{start // 4}I", head) if len(head) == start else (0,)
        if dims[0] != 0x801 + len(shape) or dims[2:] != shape:
            wanted = f"the head of an IDX file, uint8{['n', *shape]}".replace("'", "")
            raise SourceError(f"{file}: expected {wanted}, found {head!r}")
        length = min(dims[1], most + 1) * math.prod(shape)
        found = 0
        while found <= length and (data := stream.read(CHUNK)):
            found += len(data)
    if found != length and dims[1] <= most:
        what = "more" if found > length else f"{found:,}"
        raise SourceError(f"{file}: expected {length:,} bytes after its head, found {what}")
    return dims[1]




class Array(NamedTuple):
    """An array in an npz. file: as zipfile knows it. start: where in it the values begin."""

    file: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


IMAGES = ("images", "x", "arr_0")
LABELS = ("labels", "y", "arr_1")


def npz(path: pathlib.Path) -> Source:
    """(how many, the source): uint8[n, h, w] or [n, h, w, 1 to 4] and perhaps labels, by name.

    x_train and x_test, with y_train and y_test; or images, x, arr_0 or the only array that can be
    images, with labels, y or arr_1. Labels: integers from 0 of any type, [n] or [n, 1].
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        files = {x.filename.removesuffix(".npy"): x for x in archive.infolist()}
        parts = []
        for key, label_key, split in _parts(archive, files):
            images = _image_array(archive, files[key])
            labels = label_key and _label_array(archive, files[label_key], images.shape[0])
            parts.append((key, images, labels, split))
        labelled = [labels for _, _, labels, _ in parts if labels]
        if labelled and len(labelled) < len(parts):
            raise SourceError(f"{path}: expected y_train and y_test, found one of them")
        n_classes = 1 + max((_largest(archive, labels) for labels in labelled), default=-1)

    def items():
        with reading(path), zipfile.ZipFile(path) as archive:
            for key, images, labels, split in parts:
                shape = (*images.shape[1:], 1)[:3]
                rows = _values(archive, images)
                numbers = _values(archive, labels) if labels else itertools.repeat(None)
                for k, (row, number) in enumerate(zip(rows, numbers, strict=False)):
                    label = int(number.view(labels.dtype)[0]) if labels else 0
                    yield Item(
                        f"{archives.shown(key)}[{k}]", row.reshape(shape).copy(), label, split
                    )

    n = sum(images.shape[0] for _, images, _, _ in parts)
    classes = tuple(map(str, range(n_classes)))
    return Source(items, classes, f"{n:,} images from {path.name}.", n)


def _parts(archive: zipfile.ZipFile, files: dict) -> list[tuple[str, str | None, str | None]]:
    """Which arrays are images, which their labels, and of which split."""
    both = (("x_train", "y_train", "train"), ("x_test", "y_test", "test"))
    if parts := [(x, y if y in files else None, split) for x, y, split in both if x in files]:
        return parts
    key = next((key for key in IMAGES if key in files), None)
    if key is None:
        fit = []
        for name, file in files.items():
            with contextlib.suppress(Exception):  # whatever it is, it is not images
                _image_array(archive, file)
                fit.append(name)
        if len(fit) != 1:
            wanted = f"expected uint8 images under x_train or one of {', '.join(IMAGES)}"
            raise SourceError(f"{archive.filename}: {wanted}, found {archives.some(list(files))}")
        key = fit[0]
    return [(key, next((x for x in LABELS if x in files and x != key), None), None)]


def _array(archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> Array:
    """What its header says, if that is true, and nothing that numpy would unpickle."""
    if trouble := archives.zip_trouble(file.filename, file):
        raise _wrong(archive, file, trouble)
    with archive.open(file) as stream:
        head = io.BytesIO(stream.read(2**16))  # numpy reads as long a header as one claims to be
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    shape, fortran, dtype = read[npy.read_magic(head)](head)
    if dtype.hasobject:
        raise _wrong(archive, file, "holds Python objects, a pickle; none is ever read")
    if (fortran and len(shape) > 1) or not shape or min(shape) < 1:
        found = f"found {list(shape)}" + ", in Fortran's order" * fortran
        raise _wrong(archive, file, f"expected an array in C's order, not empty, {found}")
    claimed, there = math.prod(shape) * dtype.itemsize, file.file_size - head.tell()
    if claimed != there:
        raise _wrong(archive, file, f"expected {claimed:,} bytes of values, found {there:,}")
    return Array(file, shape, dtype, head.tell())


def _image_array(archive: zipfile.ZipFile, file: zipfile.ZipInfo) -> Array:
    array = _array(archive, file)
    fits = len(array.shape) == 3 or (len(array.shape) == 4 and array.shape[3] <= 4)
    if array.dtype != np.uint8 or not fits or _width(array) > MAX_FILE_BYTES:
        found = f"found {array.dtype}{list(array.shape)}"
        raise _wrong(archive, file, f"expected uint8[n, h, w] or [n, h, w, 1 to 4], {found}")
    return array


def _label_array(archive: zipfile.ZipFile, file: zipfile.ZipInfo, n: int) -> Array:
    array = _array(archive, file)
    if array.dtype.kind not in "iu" or array.shape not in ((n,), (n, 1)):
        found = f"found {array.dtype}{list(array.shape)}"
        raise _wrong(archive, file, f"expected {n:,} labels, integers, {found}")
    return array


def _largest(archive: zipfile.ZipFile, labels: Array) -> int:
    """The largest label, once they are known to be labels."""
    blocks = (block.view(labels.dtype) for block in _value_blocks(archive, labels))
    ends = [(int(block.min()), int(block.max())) for block in blocks]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    if low < 0 or high >= MAX_CLASSES:
        found = f"found {low:,} to {high:,}"
        raise _wrong(archive, labels.file, f"expected labels of 0 to {MAX_CLASSES - 1:,}, {found}")
    return high


def _values(archive: zipfile.ZipFile, array: Array) -> Iterator[np.ndarray]:
    """Its rows, the bytes of each."""
    for block in _value_blocks(archive, array):
        yield from block


def _value_blocks(archive: zipfile.ZipFile, array: Array) -> Iterator[np.ndarray]:
    with archive.open(array.file) as stream:
        stream.read(array.start)
        name = f"{archive.filename}: {array.file.filename}"
        yield from _blocks(stream, _width(array), array.shape[0], name)


def _width(array: Array) -> int:
    """Bytes of a row."""
    return math.prod(array.shape[1:]) * array.dtype.itemsize


def _wrong(archive: zipfile.ZipFile, file: zipfile.ZipInfo, what: str) -> SourceError:
    return SourceError(f"{archive.filename}: {file.filename}: {what}")
