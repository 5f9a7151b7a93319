"""Reads TensorFlow checkpoints (V2, "tensor bundle") without TensorFlow; checks every checksum.

    PREFIX.index                 a sorted table: name -> where its array lies, its type and shape
    PREFIX.data-00000-of-00001   the arrays, one after the other; there may be several such files

The table is LevelDB's: blocks of keys that each share a prefix with the key before, an index block
that points to them, a footer that points to the index. Its values are protocol buffers.
Sources: leveldb, doc/table_format.md and util/crc32c.h; TensorFlow,
core/protobuf/tensor_bundle.proto and core/util/tensor_bundle/tensor_bundle.cc.
"""

import collections
import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from google.protobuf import empty_pb2
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet
from tensorboard.compat.proto import tensor_shape_pb2

from diffusion.convert.validation import check_finite, check_shape, integrity_errors

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48  # two handles, padding to 40, the magic number
MAX_INDEX_BYTES = 2**26  # that of a network of 450 arrays has 2^15
# A name that shares its prefix with the one before takes little of the file, but memory.
MAX_NAME_BYTES, MAX_NAMES = 2**12, 2**16
DTYPES = {  # TensorFlow's DataType -> NumPy's
    **{1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?"},
    **{17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8"},
}


class IndexEntry(NamedTuple):
    """Where an array lies; dtype: TensorFlow's DataType; crc: masked."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    is_partitioned: bool


class Bundle(NamedTuple):
    """The index of a checkpoint; shards: the number of data files."""

    prefix: pathlib.Path
    shards: int
    entries: dict[str, IndexEntry]


def find_prefix(path: pathlib.Path) -> pathlib.Path | None:
    """Returns the checkpoint meant by PREFIX, PREFIX.index, a folder or its file `checkpoint`.

    In a folder it is the one that its file `checkpoint` names, or else the only one. None if there
    is no such checkpoint.
    """
    path = path.parent if path.name == "checkpoint" and path.is_file() else path
    if path.is_dir():
        found = [p.with_suffix("") for p in path.glob("*.index")]
        named = path / _latest(path / "checkpoint")
        return named if named in found else found[0] if len(found) == 1 else None
    path = path.with_suffix("") if path.suffix == ".index" else path
    return path if path.name and path.with_name(f"{path.name}.index").is_file() else None


def open_bundle(prefix: pathlib.Path) -> Bundle:
    """Reads the index. Raises IntegrityError if it is damaged."""
    path = prefix.with_name(f"{prefix.name}.index")
    with integrity_errors(path):
        if (size := path.stat().st_size) > MAX_INDEX_BYTES:
            raise ValueError(f"expected at most {MAX_INDEX_BYTES:,} bytes, found {size:,}")
        try:
            table = dict(itertools.islice(_read_table(path.read_bytes()), MAX_NAMES + 1))
            if len(table) > MAX_NAMES:
                raise ValueError(f"it has more than {MAX_NAMES:,} names")
            shards = _parse_header(table.pop(b"", b""))
            # A key that begins with 0 belongs to a slice of a partitioned variable.
            named = {key: value for key, value in table.items() if not key.startswith(b"\0")}
            entries = {key.decode(): _parse_entry(named[key]) for key in named}
        except (ValueError, DecodeError) as error:
            raise ValueError(f"not the index of a TensorFlow checkpoint: {error}") from error
    return Bundle(prefix, shards, entries)


def read(bundle: Bundle, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns {name: array} of the named arrays; no others are read.

    Raises IntegrityError for files that are damaged or missing, and for named arrays that hold
    NaN, overlap, are partitioned, or are of a type that NumPy lacks, such as strings.
    """
    arrays, done = {}, collections.Counter()
    for name in names:
        entry = bundle.entries[name]
        shard = f"{bundle.prefix.name}.data-{entry.shard:05}-of-{bundle.shards:05}"
        path = bundle.prefix.with_name(shard)
        with integrity_errors(path):
            arrays[name] = check_finite(name, _read_array(name, entry, path))
            done[path] += entry.size
            if done[path] > path.stat().st_size:
                raise ValueError(f"{name}: its arrays overlap: they take more than the file has")
    return arrays


def _read_array(name: str, entry: IndexEntry, path: pathlib.Path) -> np.ndarray:
    if entry.is_partitioned:
        raise ValueError(f"{name} is a partitioned variable: these are not read")
    if entry.dtype not in DTYPES:
        raise ValueError(f"{name}: expected numbers, found TensorFlow's type {entry.dtype}")
    dtype, available = np.dtype(DTYPES[entry.dtype]), path.stat().st_size
    if entry.offset + entry.size > available:
        where = f"{entry.size:,} bytes at {entry.offset:,}"
        raise ValueError(f"{name}: expected {where}, the file has {available:,}")
    check_shape(name, entry.shape, available // dtype.itemsize)
    if (nbytes := math.prod(entry.shape) * dtype.itemsize) != entry.size:
        raise ValueError(f"{name}: {entry.shape} takes {nbytes:,} bytes, not {entry.size:,}")
    with path.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(entry.size)
    if _masked_crc(content) != entry.crc:
        raise ValueError(f"{name} is damaged: its checksum is not the index's")
    return np.frombuffer(content, dtype).reshape(entry.shape)


def _masked_crc(data: bytes) -> int:
    """Returns CRC-32C as TensorFlow stores it: rotated and offset, for data that holds CRCs."""
    import google_crc32c  # needed by TensorFlow's files alone

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def _latest(path: pathlib.Path) -> str:
    """Returns the prefix that a file `checkpoint` names, without its folder: it may have moved."""
    try:
        found = re.search(r'^model_checkpoint_path: "(.+)"$', path.read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return ""
    return pathlib.PurePosixPath(found[1]).name if found else ""


def _read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a LevelDB table."""
    footer = data[-FOOTER_BYTES:]
    if len(footer) < FOOTER_BYTES or int.from_bytes(footer[40:], "little") != MAGIC:
        raise ValueError("its footer is another")
    _, _, start, size, _ = _read_varints(footer[:40], 4)
    last = None
    for _, handle in _read_block(data, start, size):
        for key, value in _read_block(data, *_read_varints(handle, 2)[:2]):
            if last is not None and key <= last:
                raise ValueError("its names are not in order")
            last = key
            yield key, value


def _read_block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block; 0 for "not compressed" and a checksum follow it."""
    end = start + size
    if end + 5 > len(data) - FOOTER_BYTES or size < 4:
        raise ValueError("a block reaches beyond its end")
    if _masked_crc(data[start : end + 1]) != int.from_bytes(data[end + 1 : end + 5], "little"):
        raise ValueError(f"it is damaged in bytes {start} to {end}: the checksum differs")
    if data[end]:
        raise ValueError("its blocks are compressed, which TensorFlow's are not")
    restarts = int.from_bytes(data[end - 4 : end], "little")  # for binary search: skipped
    block, at, key = data[start : max(start, end - 4 - 4 * restarts)], 0, b""
    while at < len(block):
        shared, own, length, used = _read_varints(block[at : at + 30], 3)
        at += used
        if shared > len(key) or at + own + length > len(block) or shared + own > MAX_NAME_BYTES:
            raise ValueError("a name or value reaches beyond its block")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + length]
        at += own + length


def _read_varints(data: bytes, count: int) -> list[int]:
    """Returns `count` integers of 7 bits a byte, low bits first, and the number of bytes read."""
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
    raise ValueError("an integer in it has no end")


def _parse_fields(data: bytes) -> dict[int, int | bytes]:
    """Returns {number of a field: its last value} of a protocol buffer."""
    message = empty_pb2.Empty.FromString(data)
    return {field.field_number: field.data for field in UnknownFieldSet(message)}


def _parse_header(data: bytes) -> int:
    """Returns the number of data files in a BundleHeaderProto."""
    fields = _parse_fields(data)
    shards, big_endian = fields.get(1, 0), fields.get(2, 0)
    if type(shards) is not int or not 1 <= shards <= 10**5 or big_endian:
        raise ValueError("expected data files of little-endian numbers, found none")
    return shards


def _parse_entry(data: bytes) -> IndexEntry:
    """Parses a BundleEntryProto."""
    fields = _parse_fields(data)
    numbers, shape = [fields.get(i, 0) for i in (1, 3, 4, 5, 6)], fields.get(2, b"")
    if not all(type(n) is int for n in numbers) or type(shape) is not bytes:
        raise ValueError("an entry has a field of another type")
    dims = tensor_shape_pb2.TensorShapeProto.FromString(shape).dim
    dtype, *rest = numbers
    return IndexEntry(dtype, tuple(axis.size for axis in dims), *rest, is_partitioned=7 in fields)
