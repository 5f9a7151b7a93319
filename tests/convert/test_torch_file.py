"""PyTorch's files of weights: those of torch.save, and damaged, false and hostile ones."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from diffusion.convert import torch_file
from diffusion.utils.errors import IntegrityError
from tests.conftest import GOLDEN

# one state dict with a convolution, a batch norm, tensors of all types, views of one storage and a
# parameter, `value.*` being its tensors by Tensor.numpy(). nan, list, nested, module: other files.
TRUTH = dict(np.load(GOLDEN / "pytorch.npz"))
LAYOUTS = ("zip", "zip4", "legacy", "legacy3")
VALUES = {key.removeprefix("value."): a for key, a in TRUTH.items() if key.startswith("value.")}


def saved(name):
    return TRUTH[name].tobytes()


def refused(read, path, *words):
    """Asserts that reading ends in one line that names the file and what is wrong with it."""
    with pytest.raises(IntegrityError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ") and len(text) < 300 + len(str(path))
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_equal_those_of_torch_save(tmp_path, layout):
    path = tmp_path / "x.pth"
    path.write_bytes(saved(layout))
    arrays = torch_file.read(path)
    assert arrays.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert arrays[name].dtype == value.dtype and arrays[name].shape == value.shape, name
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)
        assert not arrays[name].size or not arrays[name].flags.writeable


@pytest.mark.parametrize(
    "name, words",
    [
        ("nan", ["bad holds nan at [1]"]),
        ("list", ["expected a dict of tensors, found a list"]),
        ("nested", ["expected only tensors by name, found none at state_dict"]),
        ("module", ["asks for torch.nn.modules.container.Sequential"]),
    ],
)
def test_other_objects_are_refused(tmp_path, name, words):
    path = tmp_path / "x.pth"
    path.write_bytes(saved(name))
    refused(torch_file.read, path, *words)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_files_are_refused(tmp_path, layout):
    path, data = tmp_path / "x.pth", saved(layout)
    for n in range(0, len(data), 37):
        path.write_bytes(data[:n])
        refused(torch_file.read, path)


def test_damaged_files_are_refused_or_read(tmp_path):
    """A flipped bit is refused, or in the old layout, which has no checksums, changes a number."""
    path, rng, read = tmp_path / "x.pth", np.random.default_rng(0), 0
    for layout in ("zip", "legacy"):
        for _ in range(150):
            data = bytearray(saved(layout))
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            try:
                arrays = torch_file.read(path)
            except IntegrityError as error:
                assert "\n" not in str(error)
                continue
            read += 1
            for name, value in VALUES.items() if layout == "zip" else ():
                if name in arrays:
                    np.testing.assert_array_equal(arrays[name], value, err_msg=name)
    assert 0 < read < 300


class Name(str):
    """A global, "module attribute"."""


class Call(tuple):
    """(Name, *arguments)"""


class Persistent(tuple):
    """A persistent id."""


def pickled(value):
    """The instructions of a pickle, of protocol 2, for the few types that files of tensors need."""
    match value:
        case None:
            return b"N"
        case Name():
            return b"c%b\n" % value.replace(" ", "\n").encode()
        case Call():
            return pickled(value[0]) + pickled(tuple(value[1:])) + b"R"
        case Persistent():
            return pickled(tuple(value)) + b"Q"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            data = value.to_bytes(20, "little", signed=True)
            return b"\x8a" + bytes([len(data)]) + data
        case str():
            return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
        case tuple():
            return b"(" + b"".join(map(pickled, value)) + b"t"
        case list():
            return b"](" + b"".join(map(pickled, value)) + b"e"
        case dict():
            pairs = (pickled(key) + pickled(item) for key, item in value.items())
            return b"}(" + b"".join(pairs) + b"u"
        case bytes():
            return value


def tensor(shape=(3,), strides=(1,), offset=0, count=3, kind="FloatStorage", key="0"):
    storage = Persistent(("storage", Name(f"torch {kind}"), key, "cpu", count))
    return Call(
        (Name("torch._utils _rebuild_tensor_v2"), storage, offset, shape, strides, False, {})
    )


def zipped(description, members, root="archive", **settings):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **settings) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + pickled(description) + b".")
        for name, data in members.items():
            archive.writestr(f"{root}/{name}", data)
    return content.getvalue()


def legacy(description, keys, data, system=None):
    parts = 1001, system or {"little_endian": True}, description, keys
    return (
        b"\x80\x02"
        + torch_file.LEGACY
        + b"".join(b"\x80\x02%b." % pickled(part) for part in parts)
        + data
    )


NUMBERS = np.array([1.5, -2, 3e5], "<f4")
BYTES = NUMBERS.tobytes()


@pytest.mark.parametrize("order", ["little", "big"])
def test_byte_orders(tmp_path, order):
    data = NUMBERS.astype("<f4" if order == "little" else ">f4").tobytes()
    path, found = tmp_path / "x.pth", {"x": tensor()}
    path.write_bytes(zipped(found, {"data/0": data, "byteorder": order}))
    np.testing.assert_array_equal(torch_file.read(path)["x"], NUMBERS)
    count = (3).to_bytes(8, "little")
    path.write_bytes(legacy(found, ["0"], count + data, {"little_endian": order == "little"}))
    np.testing.assert_array_equal(torch_file.read(path)["x"], NUMBERS)


@pytest.mark.parametrize(
    "lie, words",
    [
        ({"shape": (4,)}, "x claims the shape [4]"),
        ({"shape": (2**60,)}, "describes a tensor"),
        ({"shape": (2**47,)}, "x claims the shape"),
        ({"shape": (1,), "strides": (2**100,)}, "describes a tensor"),
        ({"shape": (0, 2**40), "strides": (1, 1)}, "x claims the shape"),
        ({"shape": (2**40,), "strides": (0,)}, "x claims the shape"),
        ({"shape": (2**40,), "count": 2**40}, "expected 4398046511104 bytes, found 12"),
        ({"shape": (2,), "strides": (3,)}, "x reaches beyond its storage"),
        ({"shape": (2,), "offset": 2}, "x reaches beyond its storage"),
        ({"shape": (2,), "offset": -1}, "describes a tensor"),
        ({"shape": (-1,)}, "describes a tensor"),
        ({"strides": (-1,)}, "describes a tensor"),
        ({"strides": (1, 1)}, "expected strides of (3,)"),
        ({"shape": ("3",)}, "describes a tensor"),
        ({"shape": 3}, "pickle is damaged"),
        ({"count": 2}, "x claims the shape [3]"),
        ({"count": 4}, "expected 16 bytes, found 12"),
        ({"count": -3}, "impossible number of elements"),
        ({"count": 2**100}, "impossible number of elements"),
        ({"kind": "DoubleStorage"}, "expected 24 bytes, found 12"),
        ({"kind": "ComplexFloatStorage"}, "asks for torch.ComplexFloatStorage"),
        ({"key": "1"}, "archive/data/1 is not in the zip"),
        ({"key": "../../data.pkl"}, "is not in the zip"),
        ({"key": 0}, "describes a storage"),
    ],
)
def test_false_tensors_are_refused(tmp_path, lie, words):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped({"x": tensor(**lie)}, {"data/0": BYTES}))
    refused(torch_file.read, path, words)


def test_names_are_shown_in_one_line_of_bounded_length(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped({"a\nb\x1b[31mc" + "d" * 10**6: 3}, {}))
    with pytest.raises(IntegrityError, match=r"found none at a b \[31mcddd") as error:
        torch_file.read(path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "keys, data, words",
    [
        (["0"], (4).to_bytes(8, "little") + BYTES, "expected 3 elements, found 4"),
        (["0"], (3).to_bytes(8, "little") + BYTES[:-1], "within its storage 0"),
        (["0", "1"], bytes(100), "holds a storage that no tensor names"),
        ([], b"", "its storage 0 is missing"),
        ("0", b"", "expected PyTorch's layout of before 1.6"),
    ],
)
def test_false_legacy_storages_are_refused(tmp_path, keys, data, words):
    path = tmp_path / "x.pth"
    path.write_bytes(legacy({"x": tensor()}, keys, data))
    refused(torch_file.read, path, words)


@pytest.mark.parametrize(
    "description, words",
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00echotR", "asks for os.system"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "asks for builtins.eval"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "asks for os.system"),
        (b"(X\x04\x00\x00\x00echoios\nsystem\n", "an instruction that no weights need"),
        (b"(cos\nsystem\nX\x04\x00\x00\x00echoo", "asks for os.system"),
        (b"ctorch\nload\n)\x81", "asks for torch.load"),
        (b"ccollections\nOrderedDict\n)\x81", "an instruction that no weights need"),
        (b"Pkey\n", "an instruction that no weights need"),
        (b"\x82\x01", "an instruction that no weights need"),
        (b"ctorch\nFloatStorage\n)R", "pickle is damaged"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "pickle is damaged"),
        (b"]}b", "expected a dict of tensors, found a list"),
        (b"}]a", "pickle is damaged"),
        (b"})Ns", "names as the keys of a dict"),
        (b"h\x07", "pickle is damaged"),
        (b"t", "pickle is damaged"),
        (b"NN", "expected a dict of tensors, found a NoneType"),
        (b"0" * 5, "an instruction that no weights need"),
    ],
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_pickles_run_nothing(tmp_path, description, words, layout):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(description, {}) if layout == "zip" else legacy(description, [], b""))
    refused(torch_file.read, path, words)


def test_nested_tuples_are_not_followed(tmp_path):
    """Tuples of tuples, each twice in the next, would be 2^64 items if anybody followed them."""
    path = tmp_path / "x.pth"
    doubled = b")" + b"q\x00h\x00\x86" * 64  # remember it as 0; fetch 0; both as a tuple
    path.write_bytes(zipped(b"}" + doubled + b"Ns", {}))
    refused(torch_file.read, path, "names as the keys of a dict")
    path.write_bytes(zipped(b"}X\x01\x00\x00\x00a" + doubled + b"s", {}))
    refused(torch_file.read, path, "found none at a")


@pytest.mark.parametrize(
    "description",
    [
        b"Nr\xff\xff\xff\xff0",  # a memo entry of index 2^32 - 1
        b"\x96" + (2**62).to_bytes(8, "little"),  # an array of 2^62 bytes
        b"\x8b\xff\xff\xff\x7f",  # an integer of 2^31 bytes
        b"X\xff\xff\xff\xff",  # a text of 2^32 bytes
        b"]" * 2**21,  # more instructions than any state dict takes
        b"})" + b"\x85" * 100_000 + b"Ns",  # a key whose hash would recurse 100,000 times
        b"\x8f(" + b")" + b"\x85" * 100_000 + b"\x90",  # the same in a set
    ],
    ids=["memo", "bytearray", "int", "text", "instructions", "nested key", "nested set"],
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_memory_stays_bounded(tmp_path, description, layout):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(description, {}) if layout == "zip" else legacy(description, [], b""))
    tracemalloc.start()
    try:
        refused(torch_file.read, path)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


def test_functions_stay_as_they_are(tmp_path):
    """The instruction BUILD could set the attributes of an object, and so a function's defaults."""
    path, make = tmp_path / "x.pth", torch_file.GLOBALS["torch._utils", "_rebuild_tensor"]
    state = b"N}X\x0c\x00\x00\x00__defaults__)s\x86"
    path.write_bytes(zipped(b"ctorch._utils\n_rebuild_tensor\n" + state + b"b", {}))
    refused(torch_file.read, path, "expected a dict of tensors")
    assert make.__defaults__ is None and "__defaults__" not in vars(make)


def test_false_zips_are_refused(tmp_path):
    path, data = tmp_path / "x.pth", {"data/0": BYTES}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(torch_file.read, path, "without its data.pkl")
    path.write_bytes(zipped({"x": tensor()}, data, compression=zipfile.ZIP_DEFLATED))
    refused(torch_file.read, path, "not compressed")
    twice = io.BytesIO(zipped({"x": tensor()}, data))
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", BYTES)
    path.write_bytes(twice.getvalue())
    refused(torch_file.read, path, "two members of one name")
    path.write_bytes(zipped({"x": tensor()}, data | {"byteorder": "middle"}))
    refused(torch_file.read, path, "byte order")
    path.write_bytes(zipped({"x": tensor(), "y": tensor(kind="IntStorage")}, data))
    refused(torch_file.read, path, "its storage 0 is described in two ways")
