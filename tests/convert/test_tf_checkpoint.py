"""TensorFlow's checkpoints: one of its own, ones written here by hand, and damaged ones."""

import struct

import numpy as np
import pytest

from diffusion.convert import tf_checkpoint
from diffusion.utils.errors import IntegrityError
from tests.conftest import GOLDEN

KINDS = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 10, "float16": 19}


def checksum(data):
    """CRC-32C bit by bit, as RFC 3720 has it, and masked as in LevelDB."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)


def varint(n):
    return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])


def field(number, value):
    """An int as a varint, bytes with their length: what protocol buffers are made of."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(items, restart=16):
    """Keys share their beginning with the one before, save every 16th."""
    content, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % restart == 0:
            restarts.append(len(content))
        else:
            pairs = zip(key, last, strict=False)
            shared = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(key), len(last)))
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content, last = content + key[shared:] + value, key
    restarts = restarts or [0]
    return content + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(items, per_block=5, compressed=0):
    """items: {key: value} in bytes -> a LevelDB table."""
    data, index = b"", []

    def add(content):
        nonlocal data
        handle = varint(len(data)) + varint(len(content))
        tail = content + bytes([compressed])
        data += tail + checksum(tail)
        return handle

    items = sorted(items.items())
    for i in range(0, len(items), per_block):
        part = items[i : i + per_block]
        index.append((part[-1][0] + b"\x00", add(block(part))))
    handles = add(block([])) + add(block(index, restart=1))
    return data + handles.ljust(40, b"\x00") + struct.pack("<Q", 0xDB4775248B80FB57)


def entry(array, shard=0, offset=0, crc=None, **fields):
    """BundleEntryProto; fields: kind, shape, size, slices, if they are to be others."""
    content = array.tobytes()
    shape = b"".join(field(2, field(1, n)) for n in fields.get("shape", array.shape))
    message = field(1, fields.get("kind", KINDS.get(array.dtype.name, 1))) + field(2, shape)
    message += field(3, shard) if shard else b""
    message += field(4, offset) if offset else b""
    message += field(5, fields.get("size", len(content)))
    message += varint(6 << 3 | 5) + (crc or checksum(content))
    return message + b"".join(field(7, b"") for _ in range(fields.get("slices", 0)))


def header(shards=1, big=0):
    return field(1, shards) + (field(2, big) if big else b"") + field(3, field(1, 1))


def write(prefix, arrays, shards=1, checksum=checksum, **table_options):
    """Writes PREFIX.index and its data files. Returns the index's items, to be spoiled."""
    data, items = [b""] * shards, {b"": header(shards)}
    for i, (name, array) in enumerate(sorted(arrays.items())):
        shard = i % shards
        items[name.encode()] = entry(array, shard, len(data[shard]), checksum(array.tobytes()))
        data[shard] += array.tobytes()
    for i, content in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}").write_bytes(content)
    rewrite(prefix, items, **table_options)
    return items


def rewrite(prefix, items, **table_options):
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(items, **table_options))


def some_arrays():
    random = np.random.RandomState(0)
    arrays = {f"model/down_{i}/conv/W": random.randn(2, i + 1, 3).astype("f4") for i in range(9)}
    arrays["model/down_1/conv/b/ExponentialMovingAverage"] = random.randn(7)
    arrays["global_step"] = np.asarray(790_000)
    arrays["flags"] = np.array([[True, False]])
    arrays["half"], arrays["bytes"] = np.float16([0.5]), np.arange(256, dtype=np.uint8)
    return arrays | {"none": np.zeros((0, 4), np.int32)}


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "model.ckpt-790000"


def read_all(prefix):
    bundle = tf_checkpoint.open_bundle(prefix)
    return tf_checkpoint.read(bundle, bundle.entries)


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name, strict=True)


# Origin: TensorFlow 2.21.0, tf.compat.v1.train.Saver, of a graph with variables of all these kinds,
# with Adam and an ExponentialMovingAverage, one of strings, one cut by a partitioner; three steps
# made. index, data: the bytes of the two files; values/NAME: what TensorFlow's own reader gives.
TENSORFLOW = np.load(GOLDEN / "tensorflow.npz")


def test_what_tensorflow_wrote_is_read(prefix):
    for key, name in {"index": "index", "data": "data-00000-of-00001"}.items():
        prefix.with_name(f"{prefix.name}.{name}").write_bytes(TENSORFLOW[key].tobytes())
    opened = tf_checkpoint.open_bundle(prefix)
    values = {n.removeprefix("values/"): TENSORFLOW[n] for n in TENSORFLOW if "values/" in n}
    assert opened.entries.keys() == values.keys() | {"cut", "kinds/words"}
    equal(tf_checkpoint.read(opened, values), values)
    for name, why in {"cut": "partitioned variable", "kinds/words": "type 7"}.items():
        with pytest.raises(IntegrityError, match=f"{name}.*{why}"):
            tf_checkpoint.read(opened, [name])


@pytest.mark.parametrize("shards, per_block", [(1, 5), (3, 1), (2, 100)])
def test_what_was_written_by_hand_is_read(prefix, shards, per_block):
    write(prefix, some_arrays(), shards, per_block=per_block)
    equal(read_all(prefix), some_arrays())


def test_only_what_is_wanted_is_read(prefix):
    items = write(prefix, some_arrays())
    items[b"words"] = entry(np.zeros(2, np.float32), kind=7)  # strings
    items[b"parts"] = entry(np.zeros(2, np.float32), slices=2)
    rewrite(prefix, items)
    opened = tf_checkpoint.open_bundle(prefix)
    found = tf_checkpoint.read(opened, [n for n in opened.entries if n.startswith("model/")])
    equal(found, {k: v for k, v in some_arrays().items() if k.startswith("model/")})


def test_a_checkpoint_is_found_by_any_of_its_names(prefix):
    assert (
        tf_checkpoint.find_prefix(prefix) is None
        and tf_checkpoint.find_prefix(prefix.parent) is None
    )
    write(prefix, some_arrays())
    folder = prefix.parent
    index = folder / "model.ckpt-790000.index"
    assert [tf_checkpoint.find_prefix(path) for path in (prefix, index, folder)] == [prefix] * 3
    other = folder / "model.ckpt-788000"
    write(other, some_arrays())
    assert tf_checkpoint.find_prefix(folder) is None  # which of the two?
    state = folder / "checkpoint"
    state.write_text(
        'model_checkpoint_path: "/elsewhere/model.ckpt-788000"\n'
        'all_model_checkpoint_paths: "/elsewhere/model.ckpt-790000"\n'
    )
    assert tf_checkpoint.find_prefix(folder) == tf_checkpoint.find_prefix(state) == other


A = np.arange(4, dtype=np.float32)


def refused(prefix, match):
    with pytest.raises(IntegrityError, match=match) as error:
        read_all(prefix)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def unread(index):
    """The bytes of an index that say nothing: an empty block, the handle of it, and padding."""
    end, start, size = len(index), *index[-48:-46]  # in a small file each is one byte
    used = len(index[-48:-8].rstrip(b"\x00"))
    return {*range(start, start + size + 5), end - 48, end - 47, *range(end - 48 + used, end - 8)}


def test_every_flipped_bit_is_noticed(prefix):
    write(prefix, {"a": A[:2], "b": A.astype(np.float64)})
    for kind in ("index", "data-00000-of-00001"):
        path = prefix.with_name(f"{prefix.name}.{kind}")
        whole = path.read_bytes()
        for i in set(range(len(whole))) - (unread(whole) if kind == "index" else set()):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :])
            refused(prefix, ".")
        path.write_bytes(whole)
    read_all(prefix)


def test_cut_files_are_noticed(prefix):
    write(prefix, {"a": A})
    for kind in ("index", "data-00000-of-00001"):
        path = prefix.with_name(f"{prefix.name}.{kind}")
        whole = path.read_bytes()
        for n in range(len(whole)):
            path.write_bytes(whole[:n])
            refused(prefix, "not the index of a TensorFlow checkpoint|expected 16 bytes at 0")
        path.unlink()
        refused(prefix, "cannot be read: No such file")
        path.write_bytes(whole)


@pytest.mark.parametrize(
    "bad, match",
    [
        (entry(A, size=8), r"a: \(4,\) takes 16 bytes, not 8"),
        (entry(A, shape=(5,)), r"a claims the shape \[5\], the file holds 4"),
        (entry(A, shape=(2**40, 0), size=0), "a claims the shape"),
        (entry(A, shape=(2**62,), size=2**64 - 8), "bytes at 0, the file has 16"),
        (entry(A, offset=2**63), "the file has 16"),
        (entry(A, shard=3), "data-00003-of-00001: cannot be read: No such file"),
        (entry(A, crc=b"1234"), "a is damaged: its checksum"),
        (entry(A, kind=7), "a: expected numbers, found TensorFlow's type 7"),
        (entry(A, slices=2), "a is a partitioned variable"),
        (b"\x0a", "not the index"),  # a length, and nothing of that length
        (b"\x0b", "not the index"),
        (b"\x80" * 12, "not the index"),
        (field(1, b"float"), "a field of another type"),
        (field(2, 5), "a field of another type"),
    ],
)
def test_false_entries_are_refused(prefix, bad, match):
    items = write(prefix, {"a": A})
    rewrite(prefix, items | {b"a": bad})
    refused(prefix, match)


@pytest.mark.parametrize(
    "items, options, match",
    [
        ({b"": header(shards=0)}, {}, "expected data files"),
        ({b"": header(shards=10**6)}, {}, "expected data files"),
        ({b"": header(big=1)}, {}, "little-endian"),
        ({b"a": entry(A)}, {}, "expected data files"),  # no header
        ({b"": header(), b"\xff": entry(A)}, {}, "not the index"),
        ({b"": header(), b"a" * 5000: entry(A)}, {}, "reaches beyond"),
        ({b"": header()}, {"compressed": 1}, "compressed"),
    ],
)
def test_false_indexes_are_refused(prefix, items, options, match):
    rewrite(prefix, items, **options)
    refused(prefix, match)


def test_names_out_of_order_or_without_end_are_refused(prefix, monkeypatch):
    path = prefix.with_name(f"{prefix.name}.index")

    def one_block(content):
        tail = content + b"\x00"
        index = block([(b"z", varint(0) + varint(len(content)))]) + b"\x00"
        start = len(tail) + 4
        data = tail + checksum(tail) + index + checksum(index)
        handles = varint(0) + varint(0) + varint(start) + varint(len(index) - 1)
        path.write_bytes(data + handles.ljust(40, b"\x00") + struct.pack("<Q", tf_checkpoint.MAGIC))

    one_block(block([(b"b", b""), (b"a", b"")]))
    refused(prefix, "not in order")
    # A few bytes each, a kilobyte once they are put together.
    monkeypatch.setattr(tf_checkpoint, "MAX_NAMES", 100)
    first = varint(0) + varint(1000) + varint(0) + b"a" * 1000
    more = (varint(1000) + varint(1) + varint(0) + bytes([i]) for i in range(100))
    one_block(first + b"".join(more) + struct.pack("<2I", 0, 1))
    refused(prefix, "more than 100 names")


def test_arrays_that_overlap_are_refused(prefix):
    """Entries of a few bytes that all point to one array would take its size in memory each."""
    items = write(prefix, {"a": A})
    rewrite(prefix, items | {b"b": items[b"a"]})
    refused(prefix, "b: its arrays overlap")


def test_nan_is_refused(prefix):
    write(prefix, {"a": np.float32([1, np.nan])})
    refused(prefix, r"a holds nan at \[1\]")
