"""However images are packed, the same images come out, in an order that stays."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from diffusion.data.prepare import archives, sources
from diffusion.data.prepare.archives import Item
from diffusion.data.prepare.sources import Selection, open_source
from diffusion.utils.errors import DataError
from tests.conftest import ROOT


def refused(*args, **kwargs):
    """The one line that a source ends in: when it is opened, or while its items come."""
    with pytest.raises(DataError) as caught:
        list(open_source(*args, **kwargs).items())
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def described(source):
    """[(name, bytes or the error's words, name of the class, split)]"""
    items = []
    for name, content, label, split in source.items():
        if isinstance(content, DataError):
            content = str(content)
            assert name in content and "\n" not in content
        items.append((name, content, source.classes[label] if source.classes else None, split))
    return items


def write_zip(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w"):
    """files: {name: bytes, or (a TarInfo's type,)}"""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if not isinstance(content, bytes):
                (info.type,), info.linkname, content = content, "/etc/passwd", b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


PACKED = {
    "folder": write_folder,
    "zip": write_zip,
    "tar": write_tar,
    "tar.gz": lambda path, files: write_tar(path, files, "w:gz"),
    "tar.bz2": lambda path, files: write_tar(path, files, "w:bz2"),
    "tar.xz": lambda path, files: write_tar(path, files, "w:xz"),
}


def noise(n, seed=0):
    return np.random.default_rng(seed).bytes(n)


def listing(folder):
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


FILES = {
    "b/2.PNG": b"two",
    "b/10.jpeg": b"ten",
    "a/x.webp": b"x",
    "a/deep/y.tif": b"y",
    "é/z.ppm": b"z",
    "a/notes.txt": b"no image",
    "a/.hidden.png": b"hidden",
    ".git/c.png": b"hidden",
    "__MACOSX/a/x.webp": b"left by a system",
    "b/Thumbs.db": b"left by a system",
}
ITEMS = [
    ("a/deep/y.tif", b"y", "a", None),
    ("a/x.webp", b"x", "a", None),
    ("b/10.jpeg", b"ten", "b", None),
    ("b/2.PNG", b"two", "b", None),
    ("é/z.ppm", b"z", "é", None),
]


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["folder", "zip", "tar", "npz", "lsun"])  # whatever is there
def test_files_are_the_same_however_they_are_packed(tmp_path, kind, name):
    path = PACKED[kind](tmp_path / f"set.{kind}", FILES)
    source = open_source(name, str(path))
    assert source.classes == ("a", "b", "é")
    assert source.about == f"5 images from set.{kind}; files passed over: 1."
    items = described(source)
    if kind.startswith("tar"):  # in its own order, which is that of FILES
        assert [x[0] for x in items] == list(FILES)[:5]
    else:
        assert items == ITEMS
    assert sorted(items) == ITEMS == sorted(described(source))  # a second pass is the same
    assert all(isinstance(x, Item) for x in source.items())


LAYOUTS = {
    "flat": (["1.png", "2.png"], (), [(0, None)] * 2),
    "one folder": (["a/1.png", "a/2.png"], (), [(0, None)] * 2),
    "an image beside the folders": (["1.png", "a/2.png", "b/3.png"], (), [(0, None)] * 3),
    "classes": (["b/1.png", "a/c/2.png"], ("a", "b"), [(1, None), (0, None)]),
    "classes below one folder": (
        ["t/u/b/1.png", "t/u/a/2.png"],
        ("a", "b"),
        [(1, None), (0, None)],
    ),
    "splits": (["train/1.png", "test/2.png"], (), [(0, "train"), (0, "test")]),
    "val is a test": (["train/1.png", "val/2.png"], (), [(0, "train"), (0, "test")]),
    "splits of classes": (
        ["train/b/1.png", "test/a/2.png", "train/a/3.png", "val/c/train/4.png"],
        ("a", "b", "c"),
        [(1, "train"), (0, "test"), (0, "train"), (2, "test")],
    ),
    "splits, not all in folders": (
        ["train/b/1.png", "test/2.png", "train/a/3.png"],
        (),
        [(0, "train"), (0, "test"), (0, "train")],
    ),
    "splits below one folder": (["x/train/1.png", "x/test/2.png"], (), [(0, "train"), (0, "test")]),
    "a split among classes": (
        ["train/1.png", "test/2.png", "car/3.png"],
        ("car", "test", "train"),
        [(2, None), (1, None), (0, None)],
    ),
    "splits of one folder": (
        ["train/x/1.png", "test/x/2.png"],
        (),
        [(0, "train"), (0, "test")],
    ),
    "no train": (["test/1.png", "val/2.png"], ("test", "val"), [(0, None), (1, None)]),
    "similar names": (["ab/1.png", "abc/2.png"], ("ab", "abc"), [(0, None), (1, None)]),
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_mean_classes_and_splits(tmp_path, kind, layout):
    names, classes, places = LAYOUTS[layout]
    path = PACKED[kind](tmp_path / "set", {name: name.encode() for name in names})
    source = open_source("folder", str(path))
    assert source.classes == classes
    found = {x.content.decode(): (x.label, x.split) for x in source.items()}
    assert found == dict(zip(names, places, strict=True))


def test_only_archives_lose_the_folder_that_holds_everything(tmp_path):
    files = {"top/set/a/1.png": b"1", "top/set/b/2.png": b"2", "readme.txt": b"not an image"}
    for kind, expected in [("folder", "top/set/a/1.png"), ("zip", "a/1.png"), ("tar", "a/1.png")]:
        path = PACKED[kind](tmp_path / f"x.{kind}", files)
        assert described(open_source("zip", str(path)))[0] == (expected, b"1", "a", None)


EMOJI = ["emoji/big/1.png", "emoji/big/2.webp", "emoji/sheets/[1].png", "emoji/sheets/b.png"]
SELECTIONS = {  # what is taken, the classes, how many are left out
    "exclude a folder": (Selection(exclude=("emoji/sheets/*",)), EMOJI[:2], (), 2),
    "any text before": (Selection(exclude=("*/sheets/*",)), EMOJI[:2], (), 2),
    "include": (Selection(include=("*.png",)), EMOJI[::2] + EMOJI[3:], ("big", "sheets"), 1),
    "several": (Selection(("*.webp", "*/b.*")), [EMOJI[1], EMOJI[3]], ("big", "sheets"), 2),
    "both": (Selection(("*.png",), ("*/b.*",)), EMOJI[::2], ("big", "sheets"), 2),
    "one character": (Selection(include=("emoji/big/?.*",)), EMOJI[:2], (), 2),
    "a bracket": (Selection(exclude=("*[[]*",)), EMOJI[:2] + EMOJI[3:], ("big", "sheets"), 1),
    "all": (Selection(), EMOJI, ("big", "sheets"), None),
}


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_patterns_choose_among_the_paths(tmp_path, kind, name):
    """What is left out is no class, and is not counted; './' before a path means nothing."""
    selection, taken, classes, left_out = SELECTIONS[name]
    dot = "./" if kind == "tar.gz" else ""
    path = PACKED[kind](tmp_path / "set", {dot + x: x.encode() for x in [*EMOJI, "notes.txt"]})
    source = open_source("folder", str(path), selection=selection)
    assert [x.content.decode() for x in source.items()] == taken
    assert source.classes == classes and source.count == len(taken)
    patterns = f"data.include={selection.include}, data.exclude={selection.exclude}"
    more = "" if left_out is None else f"; images left out by {patterns}: {left_out}"
    assert source.about == f"{len(taken)} images from set; files passed over: 1{more}."


def test_patterns_that_cannot_be_followed(tmp_path):
    path = str(write_zip(tmp_path / "set", {"a/1.png": b"1", "a/2.png": b"2"}))
    text = refused("zip", path, selection=Selection(exclude=("a/1.*", "b/*")))
    expected = "data.exclude: expected a pattern of some image, found 'b/*'; they are like a/1.png"
    assert text == expected
    text = refused("zip", path, selection=Selection(include=("*.PNG",)))  # a case of its own
    assert text.startswith("data.include: expected a pattern of some image, found '*.PNG'")
    text = refused("zip", path, selection=Selection(exclude=("*",)))
    assert text.startswith("data.exclude: expected some of 2 images to stay, found none")
    np.savez(tmp_path / "x.npz", np.zeros((5, 4, 4, 3), np.uint8))
    for name, archive in (("npz", tmp_path / "x.npz"), ("cifar10", ""), ("mnist", tmp_path)):
        text = refused(name, str(archive), selection=Selection(exclude=("x*",)))
        assert text.startswith("data.include, data.exclude: expected images in a folder, zip or")


def test_every_suffix_in_any_case(tmp_path):
    names = [f"{k}{x}" for k, s in enumerate(sources.SUFFIXES) for x in (s, s.upper(), s.title())]
    names.sort()
    write_folder(tmp_path / "x", {name: b"1" for name in [*names, "0.pngs", "0.svg", "png"]})
    assert [x.name for x in open_source("folder", str(tmp_path / "x")).items()] == names
    assert set(sources.SUFFIXES) == {
        *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
    }


def test_natural_order_of_celebahq(tmp_path):
    names = ["10.jpg", "9.jpg", "009b.jpg", "a10.jpg", "a9.jpg", "8/1.jpg", f"{'7' * 99}.jpg"]
    ordered = ["8/1.jpg", "9.jpg", "009b.jpg", "10.jpg", f"{'7' * 99}.jpg", "a9.jpg", "a10.jpg"]
    for kind in ("folder", "zip"):
        path = PACKED[kind](tmp_path / kind, {name: b"1" for name in names})
        source = open_source("celebahq", str(path), accept_incomplete=True)
        assert [x.name for x in source.items()] == ordered


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "npz"])
def test_celebahq_is_counted_and_has_no_classes(tmp_path, kind):
    path = tmp_path / "c"
    if kind == "npz":
        np.savez(tmp_path / "c.npz", images=np.zeros([3, 2, 2, 3], np.uint8), y=np.arange(3))
        path = tmp_path / "c.npz"
    else:
        PACKED[kind](path, {"f/1.png": b"1", "m/2.png": b"2", "m/3.png": b"3"})
    assert "expected 30,000 images, found 3" in refused("celebahq", str(path))
    source = open_source("celebahq", str(path), accept_incomplete=True)
    assert source.classes == () and [x.label for x in source.items()] == [0, 0, 0]
    assert len(open_source("folder", str(path)).classes) > 1


def test_an_array_beside_images_is_passed_over(tmp_path):
    path = write_zip(tmp_path / "x", {"1.png": b"1", "features.npy": b"2"})
    assert described(open_source("folder", str(path))) == [("1.png", b"1", None, None)]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "npz"])
def test_the_count_is_that_of_the_items(tmp_path, kind):
    """Progress and its ETA are told by it; what cannot be read counts too."""
    files = {"a/1.png": b"1", "a/2.jpg": b"", "b/3.png": b"3", "b/notes.txt": b"4"}
    if kind == "npz":
        np.savez(path := tmp_path / "x.npz", np.zeros((5, 4, 4, 3), np.uint8))
    else:
        path = PACKED[kind](tmp_path / "x", files)
    source = open_source(kind, str(path))
    assert source.count == len(list(source.items())) == (5 if kind == "npz" else 3)


def test_what_is_asked_for_wrongly_gets_the_nearest(tmp_path):
    assert refused("cifar") == "data.source: 'cifar' is not known; nearest: cifar10, cifar100"
    assert "there are: cifar10, cifar100, mnist" in refused("???")
    write_folder(tmp_path, {"photos.zip": b"", "other.txt": b""})
    text = refused("zip", str(tmp_path / "photo.zip"))
    assert text == f"data.archive: no file or folder '{tmp_path}/photo.zip'; nearest: photos.zip"
    assert "there are: other.txt, photos.zip" in refused("zip", str(tmp_path / "§§§§"))
    assert refused("zip", str(tmp_path / "no" / "no.zip")).endswith("no.zip'")
    (tmp_path / "two\nlines").write_bytes(b"")
    assert "two\\nlines: expected a folder" in refused("zip", str(tmp_path / "two\nlines"))
    assert "no file or folder" in refused("zip", "nul\0byte") and "\\x00" in refused("zip", "\0")
    assert refused("zip") == "data.archive: zip: cannot be downloaded; give the path of a copy"
    assert refused("mnist").startswith("data.archive: mnist: no folder to download to; give the")


def test_home_is_expanded(tmp_path, monkeypatch):
    write_folder(tmp_path, {"set/1.png": b"1"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert described(open_source("folder", "~/set")) == [("1.png", b"1", None, None)]


def test_nothing_in_it(tmp_path):
    (tmp_path / "empty").mkdir()
    assert refused("folder", str(tmp_path / "empty")).endswith("found nothing")
    for kind in ("folder", "zip", "tar"):
        path = PACKED[kind](tmp_path / f"x.{kind}", {"a.txt": b"1", "b/c.zip": b"2"})
        assert refused("folder", str(path)).endswith("found none among 2 files (a.txt, b/c.zip)")
        path = PACKED[kind](tmp_path / f"l.{kind}", {"x_lmdb/data.mdb": b"1"})
        found = "found an LMDB: give the folder of x_lmdb/data.mdb, unpacked"
        assert refused("lsun", str(path)).endswith(found)
    assert refused("zip", str(write_zip(tmp_path / "none", {}))).endswith("found nothing")


@pytest.mark.parametrize("name", ["folder", "tar", "npz", "celebahq", "cifar10", "cifar100"])
def test_the_wrong_kind_of_file(tmp_path, name):
    wrong = {
        b"\n<!DOCTYPE html><html>": "found a web page",
        b"\x89PNG\r\n\x1a\n....": r"found a file that begins with b'\x89PNG\r\n\x1a\n'",
        b"": "found an empty file",
        bytes(2000): r"found a file that begins with b'\x00\x00\x00\x00\x00\x00\x00\x00'",
    }
    for content, found in wrong.items():
        (tmp_path / "x.zip").write_bytes(content)
        text = refused(name, str(tmp_path / "x.zip"))
        assert text.startswith(f"{tmp_path}/x.zip: expected ") and text.endswith(found)
    os.mkfifo(tmp_path / "pipe")
    assert refused(name, str(tmp_path / "pipe")).endswith("that is neither a file nor a folder")


def lsun(folder, n=50, **more):
    lmdb = pytest.importorskip("lmdb", reason="needs lmdb, which only LSUN is read with")
    with lmdb.open(str(folder), map_size=2**24) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(n):
                transaction.put(hashlib.sha1(b"%d" % k).hexdigest().encode(), noise(5000, k))
            for key, value in more.items():
                transaction.put(key.encode(), value)
    return folder


@pytest.mark.parametrize("name", ["lsun", "folder"])
def test_lsun_equals_what_was_put(tmp_path, name):
    path = lsun(tmp_path / "church_lmdb")
    os.remove(path / "lock.mdb")
    before = listing(tmp_path)
    source = open_source(name, str(path))
    assert source.classes == () and source.about == "50 images from church_lmdb."
    expected = {hashlib.sha1(b"%d" % k).hexdigest(): noise(5000, k) for k in range(50)}
    items = list(source.items())
    assert [(x.name, x.content) for x in items] == sorted(expected.items())
    assert {(x.label, x.split) for x in items} == {(0, None)}
    other = open_source(name, str(path))  # LMDB itself does not open twice
    for a, b, c in zip(source.items(), source.items(), other.items(), strict=True):
        assert a == b == c
    assert listing(tmp_path) == before


def test_lsun_that_is_damaged(tmp_path, monkeypatch):
    path = lsun(tmp_path / "a_lmdb", zero=b"", odd=b"1")
    items = {x.name: x.content for x in open_source("lsun", str(path)).items()}
    assert str(items["zero"]) == "zero: is empty" and items["odd"] == b"1"
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 4999)
    items = {x.name: x.content for x in open_source("lsun", str(path)).items()}
    assert sum("expected at most 4,999 bytes, found 5,000" in str(x) for x in items.values()) == 50
    file = path / "data.mdb"
    size = file.stat().st_size
    os.truncate(file, size - 4096)
    assert f"data.mdb: expected {size:,} bytes, found {size - 4096:,}" in refused("lsun", str(path))
    for content in (b"", b"<html>" * 2000, bytes(8192)):
        file.write_bytes(content)
        assert "a_lmdb: cannot be read: " in refused("lsun", str(path))
    file.unlink()
    os.mkfifo(file)
    assert "data.mdb: expected a regular file" in refused("lsun", str(path))
    assert refused("lsun", str(lsun(tmp_path / "b_lmdb", n=0))).endswith("found an empty LMDB")


def test_lsun_has_no_paths_to_choose_from(tmp_path):
    text = refused("lsun", str(lsun(tmp_path / "a_lmdb", 1)), selection=Selection(("*0*",)))
    assert "found the LMDB a_lmdb; leave these keys out" in text


def test_lsun_without_lmdb(tmp_path, monkeypatch):
    write_folder(tmp_path, {"a_lmdb/data.mdb": b"x"})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert refused("lsun", str(tmp_path / "a_lmdb")).endswith("pip install lmdb")


def test_the_table_and_light_imports():
    assert list(sources.ORIGINS) == [
        *("cifar10", "cifar100", "mnist", "fashion_mnist"),
        *("folder", "zip", "tar", "npz", "lsun", "celebahq"),
    ]
    heavy = "lmdb", "PIL", "jax", "tensorflow_datasets"
    code = f"print([x for x in {heavy} if x in sys.modules])"
    code = f"import sys, diffusion.data.prepare.sources; {code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
