"""CIFAR, IDX and npz: the pixels are the bytes that were written, or an error says why not."""

import gzip
import os
import pathlib
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest

from diffusion.data.prepare import array_formats
from diffusion.data.prepare.sources import open_source
from diffusion.utils.errors import DataError
from tests.conftest import ROOT
from tests.data.prepare.test_sources import noise, refused, write_tar, write_zip

SUBSET = pathlib.Path(
    os.environ.get("DDPM_CIFAR10_SUBSET")
    or ROOT.parent / "shared" / "cifar10_subset" / "cifar-10-binary.tar.gz"
)


CLASSES = [f"class{k}" for k in range(10)]
META = "\n".join(CLASSES) + "\n\n"


def cifar_files(n=3, labels=1):
    """Files of n records of noise; the label of record k is k."""
    names = array_formats.CIFAR10.files if labels == 1 else array_formats.CIFAR100.files
    return {
        f"d/{name}": b"".join(bytes([7, k][-labels:]) + noise(3072, seed + k) for k in range(n))
        for seed, name in zip(range(0, 10**6, n), names, strict=False)
    }


def cifar10(path, files, meta=META):
    order = sorted(files, key=lambda name: name[::-1])  # as published: in no order
    return write_tar(path, {**{k: files[k] for k in order}, "d/batches.meta.txt": meta.encode()},
                     "w:gz")  # fmt: skip


def test_cifar10_equals_its_bytes(tmp_path):
    files = cifar_files()
    source = open_source("cifar10", str(cifar10(tmp_path / "c", files)), accept_incomplete=True)
    assert source.classes == tuple(CLASSES) and source.about.startswith("18 images of CIFAR-10")
    items = list(source.items())
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]
    assert [x.name for x in items] == [f"{name}[{k}]" for name in names for k in range(3)]
    assert [x.label for x in items] == [0, 1, 2] * 6
    assert [x.split for x in items] == ["train"] * 15 + ["test"] * 3
    for item in items:
        name, k = item.name[:-1].split("[")
        record = files[f"d/{name}"][int(k) * 3073 : (int(k) + 1) * 3073]
        assert item.content.shape == (32, 32, 3) and item.content.dtype == np.uint8
        assert item.content.flags.owndata  # and keeps no block of others in memory
        for y, x, c in [(0, 0, 0), (0, 31, 1), (31, 0, 2), (17, 5, 1)]:
            assert item.content[y, x, c] == record[1 + c * 1024 + y * 32 + x]


def test_cifar10_takes_the_first_regular_file_of_a_name(tmp_path):
    content = cifar_files(2)["d/test_batch.bin"]
    files = {"a/test_batch.bin": (tarfile.LNKTYPE,), "b/test_batch.bin": content}
    files |= {"c/test_batch.bin": bytes(3073), "batches.meta.txt": META.encode()}
    path = write_tar(tmp_path / "x", files)
    source = open_source("cifar10", str(path), accept_incomplete=True)
    items = list(source.items())
    assert source.about.startswith("2 images")
    assert [(x.name, x.label) for x in items] == [
        ("test_batch.bin[0]", 0),
        ("test_batch.bin[1]", 1),
    ]


def test_counts_as_published():
    array_formats.check_count("x", 10, 10, False)
    array_formats.check_count("x", 9, 10, True)
    for found, accept_incomplete in [(9, False), (11, False), (11, True)]:
        with pytest.raises(DataError, match=f"x: expected 10 images, found {found}; "):
            array_formats.check_count("x", found, 10, accept_incomplete)


def test_cifar100_is_labelled_finely(tmp_path):
    names = [f"fine{k}" for k in range(100)]
    files = cifar_files(2, labels=2) | {"d/fine_label_names.txt": "\n".join(names).encode()}
    files |= {"d/coarse_label_names.txt": b"coarse"}
    path = write_tar(tmp_path / "cifar-100-binary.tar.gz", files, "w:gz")
    source = open_source("cifar100", str(tmp_path), accept_incomplete=True)  # the folder it is in
    assert source.classes == tuple(names)
    items = list(source.items())
    assert [(x.name, x.label, x.split) for x in items] == [
        ("train.bin[0]", 0, "train"), ("train.bin[1]", 1, "train"),
        ("test.bin[0]", 0, "test"), ("test.bin[1]", 1, "test"),
    ]  # fmt: skip
    pixels = np.frombuffer(files["d/train.bin"], np.uint8).reshape(2, 3074)[1, 2:]
    np.testing.assert_array_equal(items[1].content.ravel(), pixels.reshape(3, 1024).T.ravel())
    found = refused("cifar100", str(path))
    assert "train.bin: expected 50,000 images, found 2; get it whole" in found


def test_cifar_that_is_not_as_published(tmp_path):
    path, files = tmp_path / "c", cifar_files()

    def line(**kwargs):
        return refused("cifar10", str(path), accept_incomplete=True, **kwargs)

    cifar10(path, files)
    found = refused("cifar10", str(path))
    assert "c: data_batch_1.bin: expected 10,000 images, found 3; get it whole, or " in found
    assert found.endswith("take what is there with data.accept_incomplete=True")
    cifar10(path, files | {"d/data_batch_4.bin": files["d/data_batch_4.bin"][:-1]})
    assert "data_batch_4.bin: expected records of 3,073 bytes, found 9,218 bytes" in line()
    cifar10(path, {k: v for k, v in files.items() if "test" not in k and "_3" not in k})
    source = open_source("cifar10", str(path), accept_incomplete=True)
    assert len(list(source.items())) == 12
    cifar10(path, files, meta=META + " " * 2**16)
    assert line().endswith("expected 10 names of classes, found 0 in batches.meta.txt")
    cifar10(path, files, meta="cat\ndog")
    assert line().endswith("expected 10 names of classes, found 2 in batches.meta.txt")
    cifar10(path, {"cifar-10-batches-py/data_batch_1": b"x"})
    assert line().endswith(
        "take the binary version: the one for Python is a pickle, which runs code"
    )
    write_zip(path, files)
    assert line().endswith("expected the binary archive of CIFAR-10, found a zip")
    assert refused("cifar10", str(tmp_path)).endswith("found a folder")
    cifar10(path, {"d/data_batch_2.bin": b"\x0a" + bytes(3072) + b"\x09" + bytes(3072)})
    bad, good = open_source("cifar10", str(path), accept_incomplete=True).items()
    found = "data_batch_2.bin[0]: expected a label of 0 to 9, found 10; it is damaged"
    assert str(bad.content) == found and good.label == 9
    cifar10(path, {"d/test_batch.bin": bytes(10_001 * 3073)})
    assert "test_batch.bin: expected 10,000 images, found 10,001" in line()


def test_cifar_reports_how_far_it_is(tmp_path):
    seen, path = [], cifar10(tmp_path / "c", cifar_files())
    open_source("cifar10", str(path), accept_incomplete=True, report=lambda *x: seen.append(x))
    size = path.stat().st_size
    assert {x[::2] for x in seen} == {("looking through c", size)} and len(seen) == 7
    assert [x[1] for x in seen] == sorted(x[1] for x in seen) and seen[-1][1] == size


@pytest.mark.skipif(not SUBSET.is_file(), reason="needs the archive named by DDPM_CIFAR10_SUBSET")
def test_the_real_cifar10_archive_equals_its_bytes():
    assert "expected 10,000 images, found 1,017" in refused("cifar10", str(SUBSET))
    source = open_source("cifar10", str(SUBSET), accept_incomplete=True)
    assert source.classes == (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    items, n = source.items(), 0
    with tarfile.open(SUBSET) as archive:
        for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
            raw = archive.extractfile(f"cifar-10-batches-bin/{name}").read()
            records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
            images = np.moveaxis(records[:, 1:].reshape(-1, 3, 32, 32), 1, -1)
            for k, (label, image) in enumerate(zip(records[:, 0], images, strict=True)):
                item = next(items)
                assert item.name == f"{name}[{k}]" and item.label == label
                assert item.split == ("test" if "test" in name else "train")
                assert item.content.tobytes() == image.tobytes()
                n += 1
    assert n == 6_102 and next(items, None) is None


def idx_bytes(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist(folder, n_train=4, n_test=2, pack=gzip.compress, ending="-idx{}-ubyte.gz"):
    rng, made = np.random.default_rng(0), {}
    for part, n in (("train", n_train), ("t10k", n_test)):
        image = rng.integers(0, 256, (n, 28, 28), np.uint8)
        label = rng.integers(0, 10, n).astype(np.uint8)
        made[part] = image, label
        for name, x in ((f"images{ending.format(3)}", image), (f"labels{ending.format(1)}", label)):
            (folder / f"{part}-{name}").write_bytes(pack(idx_bytes(x)))
    return made


@pytest.mark.parametrize(
    "pack, ending",
    [(gzip.compress, "-idx{}-ubyte.gz"), (bytes, "-idx{}-ubyte"), (bytes, ".idx{}-ubyte"),
     (bytes, "-idx{}-ubyte.gz")],  # the last: unpacked by the browser
)  # fmt: skip
@pytest.mark.parametrize("name, class_3", [("mnist", "3"), ("fashion_mnist", "Dress")])
def test_mnist_equals_its_bytes(tmp_path, name, class_3, pack, ending):
    made = mnist(tmp_path, pack=pack, ending=ending)
    source = open_source(name, str(tmp_path), accept_incomplete=True)
    assert len(source.classes) == 10 and source.classes[3] == class_3
    items = list(source.items())
    assert [x.split for x in items] == ["train"] * 4 + ["test"] * 2
    assert items[5].name == "t10k-images" + ending.format(3).removesuffix(".gz") + "[1]"
    image, label = (np.concatenate([made["train"][k], made["t10k"][k]]) for k in (0, 1))
    np.testing.assert_array_equal(np.stack([x.content for x in items]), image[..., None])
    assert [x.label for x in items] == label.tolist()


def test_mnist_of_the_published_size(tmp_path, monkeypatch):
    n = {"n_train": 60_000, "n_test": 10_000}
    mnist(tmp_path, **n, pack=bytes)
    assert open_source("mnist", str(tmp_path)).about == "70,000 images of MNIST."


def test_mnist_that_is_not_as_published(tmp_path):
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"

    def line(image=None, label=None):
        mnist(tmp_path, pack=bytes, ending="-idx{}-ubyte")
        if image is not None:
            images.write_bytes(image)
        if label is not None:
            labels.write_bytes(label)
        return refused("mnist", str(tmp_path), accept_incomplete=True)

    assert "found neither" in refused("mnist", str(tmp_path))
    assert "found none of them" in refused("mnist", str(tmp_path), accept_incomplete=True)
    good, n = np.zeros([4, 28, 28], np.uint8), np.zeros(4, np.uint8)
    assert "expected 3,136 bytes after its head, found 3,135" in line(idx_bytes(good)[:-1])
    assert "expected 3,136 bytes after its head, found more" in line(idx_bytes(good) + b"1")
    assert "ubyte: expected 4 labels, found 3" in line(label=idx_bytes(n[:3]))
    for bad in (idx_bytes(n), b"", idx_bytes(np.zeros([4, 28, 27], np.uint8)), b"\0" * 99):
        assert "the head of an IDX file, uint8[n, 28, 28], found b'" in line(bad)
    assert "uint8[n], found" in line(label=idx_bytes(good))
    huge = idx_bytes(good)[:4] + struct.pack(">3I", 2**32 - 1, 28, 28)
    assert "expected 60,000 images, found 4,294,967,295" in line(huge)
    assert "cannot be read: Compressed file ended" in line(gzip.compress(idx_bytes(good))[:-9])
    mnist(tmp_path, pack=bytes, ending="-idx{}-ubyte")
    assert "expected 60,000 images, found 4; get it whole" in refused("mnist", str(tmp_path))
    labels.write_bytes(idx_bytes(np.array([0, 9, 10, 255], np.uint8)))
    items = list(open_source("mnist", str(tmp_path), accept_incomplete=True).items())
    assert [isinstance(x.content, DataError) for x in items[:4]] == [False, False, True, True]
    source = open_source("mnist", str(tmp_path), accept_incomplete=True)
    os.truncate(images, 16 + 2 * 784 + 100)
    with pytest.raises(DataError, match="ubyte: expected 4 records of 784 bytes, found 2"):
        list(source.items())
    labels.unlink()
    alone = refused("mnist", str(tmp_path), accept_incomplete=True)
    assert "train-images-idx3-ubyte alone" in alone


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "images, labels",
    [("arr_0", "arr_1"), ("images", "labels"), ("x", "y"), ("other", None), ("y", None)],
)
@pytest.mark.parametrize("shape", [(7, 3, 2), (7, 3, 2, 1), (7, 3, 2, 3), (7, 3, 2, 4)])
def test_npz_equals_numpy(tmp_path, save, images, labels, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    label = np.array([0, 2, 1, 0, 0, 2, 1], ">i8")[:, None]
    save(tmp_path / "a.npz", **{images: image}, **({labels: label} if labels else {"z": label}))
    source = open_source("npz", str(tmp_path / "a.npz"))
    assert source.classes == (("0", "1", "2") if labels else ())
    assert source.about == "7 images from a.npz."
    items = list(source.items())
    assert [x.name for x in items] == [f"{images}[{k}]" for k in range(7)]
    found = np.stack([x.content for x in items])
    np.testing.assert_array_equal(found, image if image.ndim == 4 else image[..., None])
    assert all(x.content.flags.owndata for x in items)
    assert [x.label for x in items] == (label[:, 0].tolist() if labels else [0] * 7)
    assert {x.split for x in items} == {None}


def test_npz_with_splits(tmp_path):
    x = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2)
    y = np.array([1, 0, 1, 0, 3], np.uint8)
    named = {"x_train": x[:3], "y_train": y[:3], "x_test": x[3:], "y_test": y[3:]}
    np.savez(tmp_path / "a.npz", **named)
    source = open_source("npz", str(tmp_path / "a.npz"))
    assert source.classes == ("0", "1", "2", "3")
    items = list(source.items())
    assert [x.name for x in items] == [
        *(f"x_train[{k}]" for k in range(3)),
        "x_test[0]",
        "x_test[1]",
    ]
    assert [x.split for x in items] == ["train"] * 3 + ["test"] * 2
    assert [x.label for x in items] == y.tolist()
    np.testing.assert_array_equal(np.stack([x.content[..., 0] for x in items]), x)
    np.savez(tmp_path / "b.npz", x_train=x)
    assert [x.split for x in open_source("npz", str(tmp_path / "b.npz")).items()] == ["train"] * 5
    del named["y_test"]
    np.savez(tmp_path / "c.npz", **named)
    found = "expected y_train and y_test, found one of them"
    assert refused("npz", str(tmp_path / "c.npz")).endswith(found)


@pytest.mark.parametrize(
    "named, words",
    [
        ({"x": np.zeros([2, 2, 2])}, "x.npy: expected uint8[n, h, w] or"),
        ({"x": np.zeros([2, 2, 2])}, "found float64[2, 2, 2]"),
        ({"x": np.zeros([2, 3, 8, 8], np.uint8)}, "found uint8[2, 3, 8, 8]"),
        ({"x": np.zeros([0, 3, 8], np.uint8)}, "not empty, found [0, 3, 8]"),
        ({"x": np.asfortranarray(np.zeros([2, 3, 3], np.uint8))}, "in Fortran's order"),
        ({"a": np.zeros([2, 3, 3], np.uint8), "b": np.zeros([2, 3, 3], np.uint8)}, "found a, b"),
        ({"a": np.zeros(3)}, "expected uint8 images under x_train or one of images, x, arr_0"),
        ({"y": np.arange(3)}, "expected 2 labels, integers, found int64[3]"),
        ({"y": np.zeros(2)}, "y.npy: expected 2 labels, integers, found float64[2]"),
        ({"y": np.zeros([2, 10], int)}, "found int64[2, 10]"),
        ({"y": np.array([0, -1])}, "expected labels of 0 to 65,535, found -1 to 0"),
        ({"y": np.array([0, 2**63], np.uint64)}, "found 0 to 9,223,372,036,854,775,808"),
        ({"y": np.array([None, 1])}, "y.npy: holds Python objects, a pickle"),
    ],
)
def test_npz_that_is_refused(tmp_path, named, words):
    images = {"images": np.zeros([2, 2, 2], np.uint8)} if "y" in named else {}
    np.savez(tmp_path / "a.npz", **images, **named)
    text = refused("npz", str(tmp_path / "a.npz"))
    assert text.startswith(f"{tmp_path}/a.npz: ") and words in text, text


def test_npz_is_read_in_parts(tmp_path):
    """16 MiB of rows of 4 KiB: a pass holds a part of them, of a mebibyte."""
    np.savez(tmp_path / "a.npz", np.frombuffer(noise(2**24), np.uint8).reshape(-1, 64, 64))
    tracemalloc.start()
    try:
        source = open_source("npz", str(tmp_path / "a.npz"))
        assert sum(1 for _ in source.items()) == 4096
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
