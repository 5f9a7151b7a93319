"""PyTorch's files of weights, read without running what they carry.

Such a file is a pickle that describes tensors, and the bytes of their storages: in a zip since 1.6,
one after the other before. A pickle is a program. Here its instructions are listed by the standard
library, which runs none of them, and followed by a machine that knows dicts, lists, tuples, strings
and whole numbers, and of functions only the ones that rebuild a tensor, by name. Nothing is ever
imported or called; any other name or instruction ends the reading.

Formats: PyTorch's torch/serialization.py and torch/_utils.py.
"""

import functools
import io
import math
import os
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from diffusion.convert.validation import covered, finite
from diffusion.utils.errors import IntegrityError

# How files of the layout before 1.6 begin: a pickle of this number, and nothing else. Before it
# stand two bytes, 0x80 and the protocol; 0x8a and 10 mean a number of ten bytes.
MAGIC = 0x1950A86A20F9469CFC6C
LEGACY = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
ZIP = b"PK\x03\x04"
MOST_INSTRUCTIONS = 2**21  # a state dict takes about 40 per tensor
MOST_DESCRIPTION = 2**26  # bytes of a zip's data.pkl; those of large networks take 2^18


class Global(NamedTuple):
    """A name that the pickle mentions: one of KNOWN."""

    name: str


class Storage(NamedTuple):
    """Numbers in a row, by the key under which the file holds them."""

    key: str
    dtype: str
    count: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


BFLOAT16 = "bfloat16"  # NumPy has none: its two bytes are the upper half of a float32's
STORAGES = {
    **{"DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2"},
    **{"LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1"},
    **{"ByteStorage": "u1", "BoolStorage": "?", "BFloat16Storage": BFLOAT16},
}
START = 2 + len(LEGACY)  # bytes that tell


def is_pytorch(start: bytes) -> bool:
    """Does a file that begins so claim to be PyTorch's?"""
    return start.startswith(ZIP) or start[2:] == LEGACY


def read(file: BinaryIO) -> dict[str, np.ndarray]:
    """{name: array} of a file that holds a dict of tensors, such as a `state_dict`.

    Strides are honoured, bfloat16 becomes float32. Arrays are read-only views: what shares a
    storage there, shares it here, so that memory is at most the file's size and one storage more.
    Raises WeightsError for files that are damaged, hold NaN, or describe anything else.
    """
    start = file.read(START)
    file.seek(0)
    if not is_pytorch(start):
        raise IntegrityError("expected a file of PyTorch, found another")
    found, load = _zip(file) if start.startswith(ZIP) else _legacy(file)
    if type(found) is not dict:
        raise IntegrityError(f"expected a dict of tensors, found {_named(found)}")
    for name, value in found.items():
        if type(name) is not str or type(value) is not Tensor:
            raise IntegrityError(f"expected only tensors by name, found {name}: {_named(value)}")
    storages = {}  # each is read once, however many tensors look into it
    for name, tensor in found.items():
        _check(name, tensor)
        key = tensor.storage.key
        if key not in storages:
            storages[key] = tensor.storage, finite(name, load(tensor.storage))
        if storages[key][0] != tensor.storage:
            raise IntegrityError(f"{name}: its storage {key} is described in two ways")
    return {name: _view(tensor, storages[tensor.storage.key][1]) for name, tensor in found.items()}


def _check(name: str, tensor: Tensor) -> None:
    """Raises WeightsError unless the tensor lies within its storage."""
    covered(name, tensor.shape, tensor.storage.count)
    if len(tensor.strides) != len(tensor.shape):
        raise IntegrityError(f"{name}: strides {tensor.strides} are none of {list(tensor.shape)}")
    steps = ((n - 1) * by for n, by in zip(tensor.shape, tensor.strides, strict=True))
    if math.prod(tensor.shape) and tensor.offset + sum(steps) >= tensor.storage.count:
        raise IntegrityError(f"{name} reaches beyond its storage of {tensor.storage.count} elements")


def _view(tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    if not math.prod(tensor.shape):
        return np.zeros(tensor.shape, storage.dtype)
    strides = [by * storage.itemsize for by in tensor.strides]
    start = storage[tensor.offset :]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, strides, writeable=False)


def _decoded(data: bytes, dtype: str, order: str) -> np.ndarray:
    """The numbers of a storage, in this machine's byte order. order: '<' or '>'."""
    if dtype == BFLOAT16:
        return (np.frombuffer(data, f"{order}u2").astype(np.uint32) << 16).view(np.float32)
    array = np.frombuffer(data, f"{order}{dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _bytes(storage: Storage) -> int:
    return storage.count * (2 if storage.dtype == BFLOAT16 else np.dtype(storage.dtype).itemsize)



Load = Callable[[Storage], np.ndarray]


def _zip(file: BinaryIO) -> tuple[Any, Load]:
    """A zip with NAME/data.pkl, and the storage of key K in NAME/data/K, not compressed."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise IntegrityError(f"it is not a whole zip: {error}") from error
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise IntegrityError("its zip holds two members of one name")
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise IntegrityError("expected a file of PyTorch, found a zip without its data.pkl")
    root = pickles[0].removesuffix("data.pkl")

    def member(name: str, most: int) -> bytes:
        info = archive.NameToInfo.get(name)
        if info is None:
            raise IntegrityError(f"{name} is not in the zip")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > most:
            raise IntegrityError(f"{name}: expected {most} bytes at most, not compressed")
        try:
            return archive.read(info)  # checks its CRC
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, RuntimeError) as error:
            raise IntegrityError(f"{name} is damaged: {error}") from error

    order = member(f"{root}byteorder", 16) if f"{root}byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise IntegrityError(f"expected a byte order of little or big, found {order!r}")

    def load(storage: Storage) -> np.ndarray:
        data = member(f"{root}data/{storage.key}", _bytes(storage))
        if len(data) != _bytes(storage):
            expected = f"expected {_bytes(storage)} bytes, found {len(data)}"
            raise IntegrityError(f"storage {storage.key}: {expected}")
        return _decoded(data, storage.dtype, "<" if order == b"little" else ">")

    return _unpickled(io.BytesIO(member(f"{root}data.pkl", MOST_DESCRIPTION))), load


def _legacy(file: BinaryIO) -> tuple[Any, Load]:
    """Five pickles (magic number, version, system, object, keys), then per key a count and bytes.

    The bytes are little-endian unless the system says otherwise; the count always is.
    """
    _, version, system, found, keys = (_unpickled(file) for _ in range(5))
    if version != 1001 or not isinstance(system, dict) or not isinstance(keys, list):
        raise IntegrityError("expected PyTorch's layout of before 1.6, found another")
    order = "<" if system.get("little_endian", True) else ">"
    start = file.tell()
    size = file.seek(0, os.SEEK_END)

    @functools.cache
    def places() -> dict[str, int]:
        storages, at, places = {t.storage.key: t.storage for t in found.values()}, start, {}
        for key in keys:
            if type(key) is not str or key not in storages:
                raise IntegrityError("it holds a storage that no tensor names")
            places[key] = at
            at += 8 + _bytes(storages[key])
            if at > size:
                raise IntegrityError(f"it ends after {size:,} bytes, within its storage {key}")
        return places

    def load(storage: Storage) -> np.ndarray:
        if storage.key not in places():
            raise IntegrityError(f"its storage {storage.key} is not there")
        file.seek(places()[storage.key])
        if (count := int.from_bytes(file.read(8), "little")) != storage.count:
            said = f"storage {storage.key}: expected {storage.count} elements, found {count}"
            raise IntegrityError(f"{said}; the file is damaged")
        return _decoded(file.read(_bytes(storage)), storage.dtype, order)

    return found, load




def _tensor(storage, offset, shape, strides, *rest) -> Tensor:
    numbers = [offset, *shape, *strides]
    if type(storage) is not Storage or not all(type(n) is int and n >= 0 for n in numbers):
        raise IntegrityError("it describes a tensor without storage, shape or strides")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor, *rest) -> Tensor:
    return tensor


def _ordered(items=()) -> dict:
    ordered = {}
    _update(ordered, [word for pair in items for word in pair])
    return ordered


# The functions that a pickle may name, and what stands for them here.
REBUILD = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
KNOWN = REBUILD.keys() | {f"torch {name}" for name in STORAGES}

# Instructions that put their own argument on the stack, and those that put something empty.
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
}
CONSTANTS = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple},
}
MOST_NUMBER = 2**80  # of a whole number: the magic one is the largest


def _unpickled(file: BinaryIO) -> Any:
    """What the pickle at the file's position describes; the position is then behind it.

    Raises WeightsError for an instruction or a name that is not known here, and for nonsense.
    """
    try:
        return _followed(file)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise IntegrityError(f"its description is damaged: {error}") from error


def _followed(file: BinaryIO) -> Any:
    stack, marks, memo = [], [], {}

    def pop(n: int) -> list:
        items = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return items

    def pop_to_mark() -> list:
        return pop(len(stack) - marks.pop())

    for i, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if i == MOST_INSTRUCTIONS:
            raise IntegrityError(f"its description takes more than {MOST_INSTRUCTIONS} instructions")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(_literal(argument))
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack.append(tuple(pop(int(name[-1]))))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND":
                _extend(stack[-2], pop(1))
            case "APPENDS":
                items = pop_to_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                _update(stack[-3], pop(2))
            case "SETITEMS":
                items = pop_to_mark()
                _update(stack[-1], items)
            case "GLOBAL":
                stack.append(_global(argument))
            case "STACK_GLOBAL":
                stack.append(_global(" ".join(pop(2))))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE":
                function, arguments = pop(2)
                stack.append(REBUILD[function.name](*arguments))
            case "BUILD":  # a state dict's _metadata, the versions of its modules
                _update(stack[-2], [])
                stack.pop()
            case "STOP":
                (found,) = stack
                return found
            case name:
                raise IntegrityError(f"it holds the instruction {name}, which no weights need")
    raise IntegrityError("its description has no end")


def _literal(argument: int | str) -> int | str:
    if isinstance(argument, int) and abs(argument) > MOST_NUMBER:
        raise IntegrityError("its description holds a number of more than 80 bits")
    return argument


def _global(name: str) -> Global:
    if name not in KNOWN:
        raise IntegrityError(f"it asks for {name.replace(' ', '.')}, which no weights need")
    return Global(name)


def _storage(kind, of, key, location, count, view=None) -> Storage:
    known = isinstance(of, Global) and STORAGES.get(of.name.removeprefix("torch "))
    if kind != "storage" or not known or type(key) is not str or view is not None:
        raise IntegrityError("it describes a storage in a way that is not known")
    if type(count) is not int or not 0 <= count < 2**48:
        raise IntegrityError(f"its storage {key} claims {count} elements")
    return Storage(key, known, count)


def _extend(to: Any, items: list) -> None:
    if type(to) is not list:
        raise IntegrityError(f"it appends to {_named(to)}")
    to.extend(items)


def _update(to: Any, items: list) -> None:
    """items: key, value, key, value, ..."""
    if type(to) is not dict or not all(type(key) in (str, int) for key in items[::2]):
        raise IntegrityError(f"it sets items of {_named(to)}, or by keys that are no names")
    to.update(zip(items[::2], items[1::2], strict=True))


def _named(value: Any) -> str:
    return value.name if isinstance(value, Global) else f"a {type(value).__name__}"
