"""Reads PyTorch's files of weights without running what they contain.

Such a file is a pickle that describes tensors, and the bytes of their storages: members of a zip
since PyTorch 1.6, one after the other before. Unpickling may call whatever the pickle names, so
here it is the standard library's unpickler without most of its instructions, and the few names that
state dicts need stand for functions of this module. Nothing is imported.

Sources: PyTorch, torch/serialization.py and torch/_utils.py.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from diffusion.convert.validation import check_finite, check_shape, integrity_errors
from diffusion.utils.errors import one_line

ZIP = b"PK\x03\x04"
# A file of the older layout begins with a pickle of this number: 0x80, the protocol, and then
# the instruction for an integer (0x8a) of ten bytes.
MAGIC = 0x1950A86A20F9469CFC6C
LEGACY = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
MAX_PICKLE_BYTES = 2**20  # a state dict takes about 150 bytes per tensor
MAX_NUMBER = 2**48  # of elements, offsets and strides
BFLOAT16 = "bfloat16"  # NumPy has none: its two bytes are the upper half of a float32's
STORAGES = {
    **{"DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2"},
    **{"LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1"},
    **{"ByteStorage": "u1", "BoolStorage": "?", "BFloat16Storage": BFLOAT16},
}


class Storage(NamedTuple):
    """A one-dimensional buffer of numbers, by the key under which the file holds it."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * (2 if self.dtype == BFLOAT16 else np.dtype(self.dtype).itemsize)


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


Load = Callable[[Storage], np.ndarray]


def is_pytorch(start: bytes) -> bool:
    """Returns whether a file with these first bytes claims to be PyTorch's."""
    return start.startswith(ZIP) or start[2:].startswith(LEGACY)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns {name: array} of a file that holds a dict of tensors, such as a `state_dict`.

    Strides are honoured, bfloat16 becomes float32. Arrays are read-only views: those that share a
    storage in the file share it here, so that memory is bounded by the file's size.
    Raises IntegrityError for files that are damaged, hold NaN, or contain anything else.
    """
    with integrity_errors(path), open(path, "rb") as file:
        is_zip = file.read(len(ZIP)) == ZIP
        file.seek(0)
        tensors, load = _open_zip(file) if is_zip else _open_legacy(file)
        arrays, storages = {}, {}
        for name, tensor in tensors.items():
            storage = tensor.storage
            check_shape(name, tensor.shape, storage.count)
            if storage.key not in storages:
                storages[storage.key] = storage, check_finite(name, load(storage))
            if storages[storage.key][0] != storage:
                raise ValueError(f"{name}: its storage {storage.key} is described in two ways")
            arrays[name] = _view(name, tensor, storages[storage.key][1])
        return arrays


def _view(name: str, tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """Returns the tensor as a view of its storage. Raises ValueError if it reaches beyond it."""
    _, offset, shape, strides = tensor
    if len(strides) != len(shape):
        raise ValueError(f"{name}: expected strides of {shape}, found {strides}")
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError(f"{name} reaches beyond its storage of {storage.size} elements")
    strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)


def _decode(data: bytes, storage: Storage, order: str) -> np.ndarray:
    """Returns the numbers of a storage in this machine's byte order; order: '<' or '>'."""
    if len(data) != storage.nbytes:
        expected = f"expected {storage.nbytes} bytes, found {len(data)}"
        raise ValueError(f"storage {storage.key}: {expected}")
    if storage.dtype == BFLOAT16:
        return (np.frombuffer(data, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
    array = np.frombuffer(data, f"{order}{storage.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _open_zip(file: BinaryIO) -> tuple[dict[str, Tensor], Load]:
    """Opens a zip with NAME/data.pkl, and the storage of key K in NAME/data/K, not compressed."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"not a complete zip: {error}") from error
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("its zip holds two members of one name")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise ValueError("expected a file of PyTorch, found a zip without its data.pkl")
    root = pickles[0].removesuffix("data.pkl")

    def read_member(name: str, most: int) -> bytes:
        if name not in names:
            raise ValueError(f"{name} is not in the zip")
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
            raise ValueError(f"{name}: expected at most {most} bytes, not compressed")
        try:
            return archive.read(info)  # checks its CRC
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"{name} is damaged: {error}") from error

    order = read_member(f"{root}byteorder", 16) if f"{root}byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise ValueError(f"expected a byte order of little or big, found {order!r}")

    def load(storage: Storage) -> np.ndarray:
        data = read_member(f"{root}data/{storage.key}", storage.nbytes)
        return _decode(data, storage, "<" if order == b"little" else ">")

    pickled = io.BytesIO(read_member(f"{root}data.pkl", MAX_PICKLE_BYTES))
    return _check_tensors(_unpickle(pickled)), load


def _open_legacy(file: BinaryIO) -> tuple[dict[str, Tensor], Load]:
    """Opens five pickles (magic number, version, system, object, keys), then storages.

    Each storage is its count and its bytes, little-endian unless the system says otherwise; the
    count always is.
    """
    head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    magic, version, system, found, keys = (_unpickle(head) for _ in range(5))
    if magic != MAGIC or version != 1001 or type(system) is not _Dict or type(keys) is not list:
        raise ValueError("expected PyTorch's layout of before 1.6, found another")
    order = "<" if system.get("little_endian", True) else ">"
    tensors = _check_tensors(found)
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    offsets, offset, size = {}, head.tell(), file.seek(0, os.SEEK_END)
    for key in keys:
        if type(key) is not str or key not in storages:
            raise ValueError("it holds a storage that no tensor names")
        offsets[key] = offset
        offset += 8 + storages[key].nbytes
        if offset > size:
            raise ValueError(f"it ends after {size:,} bytes, within its storage {key}")

    def load(storage: Storage) -> np.ndarray:
        if storage.key not in offsets:
            raise ValueError(f"its storage {storage.key} is missing")
        file.seek(offsets[storage.key])
        if (count := int.from_bytes(file.read(8), "little")) != storage.count:
            expected = f"expected {storage.count} elements, found {count}"
            raise ValueError(f"storage {storage.key}: {expected}; the file is damaged")
        return _decode(file.read(storage.nbytes), storage, order)

    return tensors, load


def _check_tensors(found: Any) -> dict[str, Tensor]:
    if type(found) is not _Dict:
        raise ValueError(f"expected a dict of tensors, found a {type(found).__name__}")
    for name, value in found.items():
        if type(name) is not str or type(value) is not Tensor:
            raise ValueError(f"expected only tensors by name, found none at {one_line(name, 100)}")
    return found


class _Dict(dict):
    """Stands for dict and OrderedDict; refuses keys whose hash might take forever."""

    def __init__(self, pairs: Any = ()):
        super().__init__()
        for key, value in pairs:
            self[key] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):
            raise TypeError(f"expected names as the keys of a dict, found a {type(key).__name__}")
        super().__setitem__(key, value)


def _make_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    numbers = [offset, *shape, *strides]
    if type(storage) is not Storage or not all(
        type(n) is int and 0 <= n < MAX_NUMBER for n in numbers
    ):
        raise ValueError("it describes a tensor without storage, shape or strides")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _make_storage(kind: Any, dtype: Any, key: Any, device: Any, count: Any, view: Any) -> Storage:
    """Checks a persistent id; dtype: what `find_class` gives for a torch.*Storage."""
    known = kind == "storage" and dtype in STORAGES.values()
    if not known or type(key) is not str or view is not None:
        raise ValueError("it describes a storage in an unknown way")
    if type(count) is not int or not 0 <= count < MAX_NUMBER:
        raise ValueError(f"its storage {key} claims an impossible number of elements")
    return Storage(key, dtype, count)


GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _make_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _make_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *rest: tensor,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}
# Left out: whatever makes an object of a class or a set, looks up an extension or allocates ahead.
INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID", "REDUCE", "BUILD"),
)


class _Unpickler(pickle._Unpickler):
    """The unpickler in Python: that in C allocates what the index of a memo entry claims."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise ValueError(f"it asks for {module}.{name}, which no weights need")
        return GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        return _make_storage(*pid, *[None] * (6 - len(pid)))

    def load_empty_dict(self) -> None:
        self.append(_Dict())

    def load_build(self) -> None:
        self.stack.pop()  # attributes, such as a state dict's _metadata

    def load_unknown(self) -> None:
        raise ValueError("it holds an instruction that no weights need")

    dispatch = dict.fromkeys(range(256), load_unknown) | {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS)
    }
    dispatch |= {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build}


def _unpickle(file: BinaryIO) -> Any:
    """Reads the pickle at the file's position, and leaves the position behind it."""
    try:
        return _Unpickler(file).load()
    except Exception as error:  # nonsense raises anything
        raise ValueError(f"its pickle is damaged: {one_line(error, 200)}") from error
