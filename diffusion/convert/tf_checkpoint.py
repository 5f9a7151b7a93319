"""TensorFlow checkpoints (V2, "tensor bundle"), read without TensorFlow; every checksum is checked.

    PREFIX.index                 a sorted table: name -> where its array lies, its type and shape
    PREFIX.data-00000-of-00001   the arrays, one after the other; there may be several such files

The table is LevelDB's: blocks of keys that each share a beginning with the one before, an index
block that points to them, a footer that points to the index. Its values are protocol buffers.
Sources: leveldb, doc/table_format.md; TensorFlow, core/protobuf/tensor_bundle.proto and
core/util/tensor_bundle/tensor_bundle.cc.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from diffusion.convert.crc32c import crc32c, extend, masked
from diffusion.convert.validation import covered, finite
from diffusion.utils.errors import IntegrityError

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes: two handles, padding to 40, the magic number
MOST_INDEX = 2**26  # bytes; that of a network of 450 arrays has 2^15
# A name that shares its beginning with the one before costs the file next to nothing, but memory.
MOST_NAME, MOST_NAMES = 2**12, 2**16  # bytes of one, how many
CHUNK = 2**24  # bytes of an array that are read and checked at a time
DTYPES = {  # TensorFlow's DataType -> NumPy's
    **{1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?"},
    **{17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8"},
}


class Entry(NamedTuple):
    """Where an array lies. kind: TensorFlow's DataType; crc: masked; slices: of a cut variable."""

    kind: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    slices: int


class Bundle(NamedTuple):
    """What the index tells: how many files of arrays there are, and every array by name."""

    prefix: pathlib.Path
    shards: int
    entries: dict[str, Entry]


def prefix_of(path: pathlib.Path) -> pathlib.Path | None:
    """The checkpoint that is meant by PREFIX, PREFIX.index, a folder or its file `checkpoint`.

    Of a folder it is the one that its file `checkpoint` names, or else the only one there. None if
    there is no such checkpoint.
    """
    path = path.parent if path.name == "checkpoint" and path.is_file() else path
    if path.is_dir():
        there = [p.with_suffix("") for p in path.glob("*.index")]
        named = path / _latest(path / "checkpoint")
        return named if named in there else there[0] if len(there) == 1 else None
    path = path.with_suffix("") if path.suffix == ".index" else path
    return path if path.name and path.with_name(f"{path.name}.index").is_file() else None


def open_bundle(prefix: pathlib.Path) -> Bundle:
    """Reads the index. Raises WeightsError if it is damaged or is none."""
    path = prefix.with_name(f"{prefix.name}.index")
    try:
        if (size := path.stat().st_size) > MOST_INDEX:
            raise IntegrityError(f"{path}: expected at most {MOST_INDEX:,} bytes, found {size:,}")
        table = dict(itertools.islice(_table(path.read_bytes()), MOST_NAMES + 1))
        if len(table) > MOST_NAMES:
            raise IntegrityError(f"it has more than {MOST_NAMES:,} names")
        header = _message(table.pop(b"", b""))
        shards, big = _number(header, 1), _number(header, 2)
        if not 1 <= shards <= 10**5 or big:
            raise IntegrityError("it is no bundle of files of little-endian numbers")
        # A key that begins with 0 belongs to a slice of a partitioned variable.
        named = {key: value for key, value in table.items() if not key.startswith(b"\0")}
        entries = {key.decode(): _entry(value) for key, value in named.items()}
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from error
    except (IntegrityError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path}: not the index of a TensorFlow checkpoint: {error}") from error
    return Bundle(prefix, shards, entries)


def read(
    bundle: Bundle, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, np.ndarray]:
    """{name: array} of the arrays whose names are wanted; no others are read.

    Raises WeightsError for files that are damaged, cut, or not there, and for wanted arrays that
    hold NaN, are cut into slices, or are of a type that NumPy has not, such as strings.
    """
    arrays = {}
    for name, entry in filter(lambda item: wanted(item[0]), bundle.entries.items()):
        if not 0 <= entry.shard < bundle.shards:
            raise IntegrityError(f"{name} lies in file {entry.shard}, there are {bundle.shards}")
        shard = f"{bundle.prefix.name}.data-{entry.shard:05}-of-{bundle.shards:05}"
        path = bundle.prefix.with_name(shard)
        try:
            arrays[name] = finite(name, _array(name, entry, path))
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from error
    return arrays


def _array(name: str, entry: Entry, path: pathlib.Path) -> np.ndarray:
    if entry.slices:
        raise IntegrityError(f"{name} is a partitioned variable, cut into slices: these are not read")
    if entry.kind not in DTYPES:
        raise IntegrityError(f"{name}: expected numbers, found TensorFlow's type {entry.kind}")
    dtype, have = np.dtype(DTYPES[entry.kind]), path.stat().st_size
    if entry.offset + entry.size > have:
        end = entry.offset + entry.size
        raise IntegrityError(f"{name}: {path} should go on to byte {end:,}, it has {have:,}")
    covered(name, entry.shape, have // dtype.itemsize)
    array = np.empty(entry.shape, dtype)
    if array.nbytes != entry.size:
        shape = list(entry.shape)
        raise IntegrityError(f"{name}: {shape} takes {array.nbytes:,} bytes, not {entry.size:,}")
    content, crc = array.reshape(-1).view(np.uint8), 0
    with open(path, "rb") as file:
        file.seek(entry.offset)
        for start in range(0, entry.size, CHUNK):
            part = content[start : start + CHUNK]
            if file.readinto(part) != part.size:
                raise IntegrityError(f"{name}: {path} ends within it")
            crc = extend(crc, part)
    if masked(crc) != entry.crc:
        raise IntegrityError(f"{name}: {path} is damaged there: its checksum is not the index's")
    return array


def _latest(path: pathlib.Path) -> str:
    """The prefix that a file `checkpoint` names, without its folder: it may have been moved."""
    try:
        found = re.search(r'^model_checkpoint_path: "(.+)"$', path.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return ""
    return pathlib.PurePosixPath(found[1]).name if found else ""




def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a LevelDB table."""
    footer = data[-FOOTER:]
    if len(footer) < FOOTER or int.from_bytes(footer[40:], "little") != MAGIC:
        raise IntegrityError("it does not end as one")
    _, _, start, size, _ = _varints(footer[:40], 4)
    last = None
    for _, handle in _block(data, start, size):
        for key, value in _block(data, *_varints(handle, 2)[:2]):
            if last is not None and key <= last:
                raise IntegrityError("its names are not in order")
            last = key
            yield key, value


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields what a block holds; behind it are a byte, 0 for "not compressed", and its checksum."""
    end = start + size
    if end + 5 > len(data) - FOOTER or size < 4:
        raise IntegrityError("a block reaches beyond its end")
    if masked(crc32c(data[start : end + 1])) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise IntegrityError(f"it is damaged in bytes {start} to {end}: the checksum differs")
    if data[end]:
        raise IntegrityError("its blocks are compressed, which TensorFlow's are not")
    restarts = int.from_bytes(data[end - 4 : end], "little")  # for searching; they are passed over
    block, at, key = data[start : max(start, end - 4 - 4 * restarts)], 0, b""
    while at < len(block):
        shared, own, length, used = _varints(block[at : at + 30], 3)
        at += used
        if shared > len(key) or at + own + length > len(block) or shared + own > MOST_NAME:
            raise IntegrityError("a name or value reaches beyond its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _varints(data: bytes, count: int) -> list[int]:
    """That many numbers of 7 bits a byte, the low ones first, and how many bytes they took."""
    numbers, number, shift = [], 0, 0
    for used, byte in enumerate(data, 1):
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(number)
            number, shift = 0, 0
        elif shift >= 70:
            break
        if len(numbers) == count:
            return [*numbers, used]
    raise IntegrityError("a number in it has no end")




def _message(data: bytes) -> dict[int, list[Any]]:
    """{number of the field: its values} of a protocol buffer: ints, or bytes of what is nested."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, used = _varints(data[at : at + 10], 1)
        at += used
        wire, size = tag & 7, {1: 8, 5: 4}.get(tag & 7, 0)
        if wire == 0 or wire == 2:
            value, used = _varints(data[at : at + 10], 1)
            at, size = at + used, value if wire == 2 else 0
        elif not size:
            raise IntegrityError(f"a message in it has a field of kind {wire}")
        if at + size > len(data):
            raise IntegrityError("a message in it is cut")
        content = data[at : at + size]
        if wire != 0:
            value = content if wire == 2 else int.from_bytes(content, "little")
        fields.setdefault(tag >> 3, []).append(value)
        at += size
    return fields


def _number(fields: dict[int, list[Any]], field: int) -> int:
    """The last value of a field, 0 if it is not there."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise IntegrityError(f"a message in it has no number in field {field}")
    return value


def _nested(fields: dict[int, list[Any]], field: int) -> list[dict[int, list[Any]]]:
    values = fields.get(field, [])
    if not all(isinstance(value, bytes) for value in values):
        raise IntegrityError(f"a message in it has no message in field {field}")
    return [_message(value) for value in values]


def _entry(data: bytes) -> Entry:
    """The fields of BundleEntryProto, in its order."""
    fields = _message(data)
    shape = [_number(axis, 1) for s in _nested(fields, 2) for axis in _nested(s, 2)]
    kind, shard, offset, size, crc = (_number(fields, i) for i in (1, 3, 4, 5, 6))
    return Entry(kind, tuple(shape), shard, offset, size, crc, len(fields.get(7, [])))
