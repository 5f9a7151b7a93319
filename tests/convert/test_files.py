"""Files of weights: those of other programs, and what is damaged, lying or hostile."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
from tensorboard.compat.proto import graph_pb2, node_def_pb2, tensor_pb2, types_pb2

from diffusion.convert import files, inception_names, safetensors_file, torch_file
from diffusion.convert.files import WeightsError
from diffusion.data.prepare.download import Remote
from tests.conftest import GOLDEN

# Origin: torch.save of torch 2.13.0. zip, zip4 (pickle protocol 4), legacy, legacy3 (protocol 3):
# one state dict with a convolution, a batch norm, tensors of all types, views of one storage and a
# parameter, `value.*` being its tensors by Tensor.numpy(). nan, list, nested, module: other files.
TRUTH = dict(np.load(GOLDEN / "pytorch.npz"))
LAYOUTS = ("zip", "zip4", "legacy", "legacy3")
VALUES = {key.removeprefix("value."): a for key, a in TRUTH.items() if key.startswith("value.")}


def saved(name):
    return TRUTH[name].tobytes()


def refused(path, *words):
    """One line that names the file and what is wrong with it."""
    with pytest.raises(WeightsError) as caught:
        files.read(path)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(f"{path}: ") and len(text) < 600
    for word in words:
        assert word in text, text
    return text




@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorch_s_files(tmp_path, layout):
    path = tmp_path / "x.pth"
    path.write_bytes(saved(layout))
    arrays = files.read(path)
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
        ("nested", ["expected only tensors by name, found state_dict: a dict"]),
        ("module", ["asks for torch.nn.modules.container.Sequential"]),
    ],
)
def test_files_of_other_things(tmp_path, name, words):
    path = tmp_path / "x.pth"
    path.write_bytes(saved(name))
    refused(path, *words)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_a_file(tmp_path, layout):
    path, data = tmp_path / "x.pth", saved(layout)
    for n in range(0, len(data), 37):
        path.write_bytes(data[:n])
        refused(path)


def test_damaged_files_are_refused_or_read(tmp_path):
    """A flipped bit is refused, or in the old layout, which has no checksums, changes a number."""
    path, rng, read = tmp_path / "x.pth", np.random.default_rng(0), 0
    for layout in ("zip", "legacy"):
        for _ in range(150):
            data = bytearray(saved(layout))
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            try:
                arrays = files.read(path)
            except WeightsError as error:
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
    np.testing.assert_array_equal(files.read(path)["x"], NUMBERS)
    count = (3).to_bytes(8, "little")
    path.write_bytes(legacy(found, ["0"], count + data, {"little_endian": order == "little"}))
    np.testing.assert_array_equal(files.read(path)["x"], NUMBERS)


@pytest.mark.parametrize(
    "lie, words",
    [
        ({"shape": (4,)}, "x claims the shape [4]"),
        ({"shape": (2**60,)}, "x claims the shape"),
        ({"shape": (0, 2**40), "strides": (1, 1)}, "x claims the shape"),
        ({"shape": (2**40,), "strides": (0,)}, "x claims the shape"),
        ({"shape": (2**40,), "count": 2**40}, "expected 4398046511104 bytes, found 12"),
        ({"shape": (2,), "strides": (3,)}, "x reaches beyond its storage"),
        ({"shape": (2,), "offset": 2}, "x reaches beyond its storage"),
        ({"shape": (2,), "offset": -1}, "describes a tensor"),
        ({"shape": (-1,)}, "describes a tensor"),
        ({"strides": (-1,)}, "describes a tensor"),
        ({"strides": (1, 1)}, "are none of [3]"),
        ({"shape": ("3",)}, "describes a tensor"),
        ({"shape": 3}, "description is damaged"),
        ({"count": 2}, "x claims the shape [3]"),
        ({"count": 4}, "expected 16 bytes, found 12"),
        ({"count": -3}, "claims -3 elements"),
        ({"count": 2**100}, "more than 80 bits"),
        ({"kind": "DoubleStorage"}, "expected 24 bytes, found 12"),
        ({"kind": "ComplexFloatStorage"}, "asks for torch.ComplexFloatStorage"),
        ({"key": "1"}, "archive/data/1 is not in the zip"),
        ({"key": "../../data.pkl"}, "is not in the zip"),
        ({"key": 0}, "describes a storage"),
    ],
)
def test_lies_about_tensors(tmp_path, lie, words):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped({"x": tensor(**lie)}, {"data/0": BYTES}))
    refused(path, words)


def test_names_are_shown_in_one_line_of_bounded_length(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped({"a\nb\x1b[31mc" + "d" * 10**6: 3}, {}))
    with pytest.raises(WeightsError, match=r"found a b \[31mcddd") as error:
        files.read(path)
    assert len(str(error.value)) < 1200


@pytest.mark.parametrize(
    "keys, data, words",
    [
        (["0"], (4).to_bytes(8, "little") + BYTES, "expected 3 elements, found 4"),
        (["0"], (3).to_bytes(8, "little") + BYTES[:-1], "within its storage 0"),
        (["0", "1"], bytes(100), "holds a storage that no tensor names"),
        ([], b"", "its storage 0 is not there"),
        ("0", b"", "expected PyTorch's layout of before 1.6"),
    ],
)
def test_lies_of_the_old_layout(tmp_path, keys, data, words):
    path = tmp_path / "x.pth"
    path.write_bytes(legacy({"x": tensor()}, keys, data))
    refused(path, words)


@pytest.mark.parametrize(
    "description, words",
    [
        (b"cos\nsystem\n(X\x04\x00\x00\x00echotR", "asks for os.system"),
        (b"cbuiltins\neval\n(X\x01\x00\x00\x001tR", "asks for builtins.eval"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "asks for os.system"),
        (b"(X\x04\x00\x00\x00echoios\nsystem\n", "instruction INST"),
        (b"(cos\nsystem\nX\x04\x00\x00\x00echoo", "asks for os.system"),
        (b"ctorch\nload\n)\x81", "asks for torch.load"),
        (b"ccollections\nOrderedDict\n)\x81", "instruction NEWOBJ"),
        (b"Pkey\n", "instruction PERSID"),
        (b"\x82\x01", "instruction EXT1"),
        (b"ctorch\nFloatStorage\n)R", "description is damaged"),
        (b"ctorch._utils\n_rebuild_parameter\n)R", "description is damaged"),
        (b"]}b", "sets items of a list"),
        (b"}]a", "appends to a dict"),
        (b"})Ns", "by keys that are no names"),
        (b"h\x07", "description is damaged"),
        (b"t", "description is damaged"),
        (b"NN", "description is damaged"),
        (b"0" * 5, "instruction POP"),
    ],
)
@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_programs_are_not_run(tmp_path, description, words, layout):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(description, {}) if layout == "zip" else legacy(description, [], b""))
    refused(path, words)


def test_descriptions_that_would_grow_without_end(tmp_path):
    """Tuples of tuples, each twice in the next, would be 2^64 items if anybody followed them."""
    path = tmp_path / "x.pth"
    doubled = b")" + b"q\x00h\x00\x86" * 64  # remember it as 0; fetch 0; both as a tuple
    path.write_bytes(zipped(b"}" + doubled + b"Ns", {}))
    refused(path, "by keys that are no names")
    path.write_bytes(zipped(b"}X\x01\x00\x00\x00a" + doubled + b"s", {}))
    refused(path, "found a: a tuple")


def test_zips_that_are_something_else(tmp_path):
    path, data = tmp_path / "x.pth", {"data/0": BYTES}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(path, "without its data.pkl")
    path.write_bytes(zipped({"x": tensor()}, data, compression=zipfile.ZIP_DEFLATED))
    refused(path, "not compressed")
    twice = io.BytesIO(zipped({"x": tensor()}, data))
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", BYTES)
    path.write_bytes(twice.getvalue())
    refused(path, "two members of one name")
    path.write_bytes(zipped({"x": tensor()}, data | {"byteorder": "middle"}))
    refused(path, "byte order")
    path.write_bytes(zipped({"x": tensor(), "y": tensor(kind="IntStorage")}, data))
    refused(path, "its storage 0 is described in two ways")




def constant(name, array, packed=True):
    dtype = {"f": types_pb2.DT_FLOAT, "i": types_pb2.DT_INT32}[array.dtype.kind]
    message = tensor_pb2.TensorProto(dtype=dtype)
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    if packed:
        message.tensor_content = array.tobytes()
    else:
        getattr(message, "float_val" if dtype == types_pb2.DT_FLOAT else "int_val").extend(
            array.flat
        )
    node = node_def_pb2.NodeDef(name=name, op="Const")
    node.attr["value"].tensor.CopyFrom(message)
    return node


# Pairs of the conversion that torch-fidelity's weights were made with (its
# utils/util_convert_inception_weights.py): of every kind of block, and of all that is irregular.
PUBLISHED = {
    "conv": "Conv2d_1a_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
    "mixed/conv": "Mixed_5b.branch1x1",
    "mixed/tower/conv_1": "Mixed_5b.branch5x5_2",
    "mixed_1/tower_1/conv_2": "Mixed_5c.branch3x3dbl_3",
    "mixed_2/tower_2/conv": "Mixed_5d.branch_pool",
    "mixed_3/conv": "Mixed_6a.branch3x3",
    "mixed_3/tower/conv": "Mixed_6a.branch3x3dbl_1",
    "mixed_4/tower/conv_2": "Mixed_6b.branch7x7_3",
    "mixed_5/tower_1/conv_4": "Mixed_6c.branch7x7dbl_5",
    "mixed_6/conv": "Mixed_6d.branch1x1",
    "mixed_7/tower_2/conv": "Mixed_6e.branch_pool",
    "mixed_8/tower/conv": "Mixed_7a.branch3x3_1",
    "mixed_8/tower_1/conv_3": "Mixed_7a.branch7x7x3_4",
    "mixed_9/tower/conv": "Mixed_7b.branch3x3_1",
    "mixed_9/tower/mixed/conv": "Mixed_7b.branch3x3_2a",
    "mixed_9/tower/mixed/conv_1": "Mixed_7b.branch3x3_2b",
    "mixed_10/tower_1/conv_1": "Mixed_7c.branch3x3dbl_2",
    "mixed_10/tower_1/mixed/conv": "Mixed_7c.branch3x3dbl_3a",
    "mixed_10/tower_1/mixed/conv_1": "Mixed_7c.branch3x3dbl_3b",
    "mixed_10/tower_2/conv": "Mixed_7c.branch_pool",
}


def test_a_frozen_graph(tmp_path):
    """The real graph's names and layouts, small arrays."""
    rng, graph, expected = np.random.RandomState(0), graph_pb2.GraphDef(), {}
    for scope, name in PUBLISHED.items():
        kernel = rng.randn(1, 3, 4, 5).astype(np.float32)
        graph.node.append(constant(f"{scope}/conv2d_params", kernel))
        expected[f"{name}.conv.weight"] = kernel.transpose(3, 2, 0, 1)
        norm = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        for theirs, word in norm.items():
            expected[f"{name}.bn.{word}"] = rng.randn(5).astype(np.float32)
            graph.node.append(
                constant(f"{scope}/batchnorm/{theirs}", expected[f"{name}.bn.{word}"])
            )
    weights, biases = rng.randn(6, 7).astype(np.float32), rng.randn(7).astype(np.float32)
    graph.node.append(constant("softmax/weights", weights))
    graph.node.append(constant("softmax/biases", biases, packed=False))
    expected |= {"fc.weight": weights.T, "fc.bias": biases}
    graph.node.append(constant("ResizeBilinear/size", np.array([299, 299], np.int32)))
    graph.node.append(node_def_pb2.NodeDef(name="conv", op="Relu"))
    path = tmp_path / "classify_image_graph_def.pb"
    path.write_bytes(graph.SerializeToString())
    arrays = files.inception(str(path))
    scales = {name for name in arrays if name.endswith("bn.weight")}
    assert arrays.keys() - scales == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    for name in scales:  # those are all there: the real graph may leave them out
        np.testing.assert_array_equal(arrays[name], np.ones(inception_names.SHAPES[name]))
    graph.node.append(constant("conv/batchnorm/gamma", np.full(32, 2, np.float32)))
    path.write_bytes(graph.SerializeToString())
    assert files.inception(str(path))["Conv2d_1a_3x3.bn.weight"].sum() == 64


def test_the_table_names_the_network_of_pytorch():
    """Origin: the state dict of torch-fidelity 0.4.0."""
    truth = np.load(GOLDEN / "inception.npz")
    shapes = map(tuple, json.loads(str(truth["shapes_json"])))
    assert inception_names.SHAPES == dict(zip(map(str, truth["names"]), shapes, strict=True))
    assert len({layer.scope for layer in inception_names.CONVOLUTIONS.values()}) == 94


def test_a_constant_s_last_value_stands_for_the_rest(tmp_path):
    node = constant("x", np.array([1, 2], np.float32), packed=False)
    node.attr["value"].tensor.tensor_shape.dim[0].size = 4
    path = tmp_path / "x.pb"
    path.write_bytes(graph_pb2.GraphDef(node=[node]).SerializeToString())
    np.testing.assert_array_equal(files.read(path)["x"], [1, 2, 2, 2])


def test_graphs_that_are_refused(tmp_path):
    path = tmp_path / "x.pb"

    def write(*nodes):
        path.write_bytes(graph_pb2.GraphDef(node=nodes).SerializeToString())

    good = constant("x", NUMBERS)
    write(good, good)
    refused(path, "x is there twice")
    write(constant("x", np.array([1, np.inf], np.float32)))
    refused(path, "x holds inf at [1]")
    write(node_def_pb2.NodeDef(name="x", op="Relu"))
    refused(path, "found one without constants")
    bad = constant("x", NUMBERS)
    lies = {(4,): "expected 4 values for [4], found 3", (-1,): "a shape that is none"}
    lies |= {(2**40,): "claims the shape", (0, 2**40): "claims the shape"}
    for sizes, words in lies.items():
        del bad.attr["value"].tensor.tensor_shape.dim[:]
        for size in sizes:
            bad.attr["value"].tensor.tensor_shape.dim.add(size=size)
        write(bad)
        refused(path, words)
    write(good)
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    refused(path, "expected a TensorFlow graph, found another or a part of one")




def test_safetensors_there_and_back(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {name: array for name, array in VALUES.items() if name != "bfloat16"}
    safetensors_file.write(path, arrays, {"format": "pt"})
    back = files.read(path)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_safetensors_file_is_the_old_one_or_the_new(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors_file.write(path, {"x": NUMBERS})

    def cut_off(*paths):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors_file.os, "replace", cut_off)
    with pytest.raises(OSError, match="no space left"):
        safetensors_file.write(path, {"x": -NUMBERS})
    assert files.read(path)["x"].tolist() == NUMBERS.tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def header(text, data=BYTES, length=None):
    text = text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


X = '{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}'


@pytest.mark.parametrize(
    "content, words",
    [
        (header(X[:-1] + ", " + X[1:]), "x is there twice"),
        (header(X, np.array([1, np.nan, 2], "<f4").tobytes()), "x holds nan at [1]"),
        (header(X.replace("[3]", "[4]")), "x claims the shape [4]"),
        (header(X.replace("[3]", "[0, 1099511627776]"), b""), "x claims the shape"),
        (header(X.replace("[3]", "[-3]")), "a shape that is none"),
        (header(X.replace("[3]", "3")), "a shape that is none"),
        (header(X.replace("F32", "BF16")), "expected a type of F64, F32"),
        (header(X.replace("F32", "F8_E4M3")), "found F8_E4M3"),
        (header(X.replace("12", "16")), "not a whole safetensors file"),
        (header(X, BYTES[:-1]), "x claims the shape"),
        (header(X, BYTES + b"?"), "not a whole safetensors file"),
        (header(X, length=2**40), "its header claims 1,099,511,627,776 bytes"),
        (header(X, length=3), "its header cannot be read"),
        (header("{" + '"x": [' * 9000), "its header cannot be read"),
        (header('{"x": 3}'), "says of x what is no array"),
    ],
)
def test_safetensors_that_are_refused(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, words)


def test_damaged_safetensors_are_refused_or_read(tmp_path):
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    safetensors_file.write(path, {"x": NUMBERS, "y": np.arange(4)})
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        try:
            assert sum(array.nbytes for array in files.read(path).values()) <= len(whole)
        except WeightsError as error:
            assert "\n" not in str(error)




def test_files_of_no_known_kind(tmp_path):
    refused(tmp_path, "expected a file, found a folder")
    refused(tmp_path / "none", "expected a file, found nothing")
    path = tmp_path / "x"
    for content in (b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(20)):
        path.write_bytes(content)
        refused(path, "expected a file of safetensors, of PyTorch or a frozen TensorFlow graph")




def test_the_published_file():
    """Its name carries the first digits of its digest, as torch.hub wants it."""
    assert files.INCEPTION.file == files.INCEPTION.url.rsplit("/", 1)[1]
    assert re.search(r"-([0-9a-f]{8})\.pth$", files.INCEPTION.file)[1] == files.INCEPTION.sha256[:8]
    assert len(files.INCEPTION.sha256) == 64


def test_inception_is_downloaded_once(tmp_path, monkeypatch, serve):  # noqa: F811
    remote, asked = serve(saved("zip"))
    monkeypatch.setattr(files, "INCEPTION", remote)
    for _ in range(2):
        assert files.inception(cache=str(tmp_path / "cache")).keys() == VALUES.keys()
    assert asked == [None]


def test_inception_that_cannot_be_had(tmp_path, monkeypatch, serve):  # noqa: F811
    def failed(remote, *words, **arguments):
        monkeypatch.setattr(files, "INCEPTION", remote)
        with pytest.raises(WeightsError) as caught:
            files.inception(**arguments)
        text = str(caught.value)
        assert "\n" not in text and remote.url in text
        for word in (*words, "eval.inception=FILE", "fd_random and fd_pixels need no weights"):
            assert word in text, text

    cache = str(tmp_path / "cache")
    failed(Remote("x.pth", "http://127.0.0.1:1/x.pth", 9, "0" * 64), "refused", cache=cache)
    failed(serve(saved("zip"), sha256="0" * 64)[0], "expected SHA-256 000", cache=cache)
    failed(serve(saved("zip"), code=404)[0], "404", f"put it at {cache}", cache=cache)
    failed(files.INCEPTION, "are not here")


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(saved("zip"))
    with pytest.raises(
        WeightsError, match=r"begins with 6726825d, found .*; it is damaged"
    ) as error:
        files.inception(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    other = path.rename(tmp_path / "own.pth")
    assert files.inception(str(other)).keys() == VALUES.keys()
