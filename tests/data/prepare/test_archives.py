"""Hostile and broken archives: each is named, does no harm, and leaves the rest usable."""

import contextlib
import gzip
import io
import os
import socket
import stat
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from diffusion.data.prepare import archives
from diffusion.data.prepare.sources import open_source
from tests.data.prepare.test_sources import (
    PACKED,
    described,
    listing,
    noise,
    refused,
    write_folder,
    write_tar,
    write_zip,
)


def test_a_folder_with_one_of_everything_that_is_no_image(tmp_path):
    """Each is named, none blocks, none crashes, and the rest comes."""
    folder, outside = tmp_path / "set", tmp_path / "outside"
    write_folder(folder, {"good.png": b"good", "sub/good.png": b"too", "zero.png": b""})
    write_folder(outside, {"secret.png": b"secret"})
    os.mkfifo(folder / "pipe.png")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(os.path.relpath(folder / "socket.png"))  # a socket's path is a short one
    with open(folder / "huge.png", "wb") as file:
        file.truncate(archives.MAX_FILE_BYTES + 1)  # holes: it takes no room
    links = {
        "broken.png": "nowhere.png",
        "itself.png": "itself.png",
        "out.png": "../outside/secret.png",
        "absolute.png": str(outside / "secret.png"),
        "device.png": "/dev/zero",
        "inside.png": "sub/good.png",
        "sub/up": "..",
        "sub/out": "../../outside",
        "sub/up.png": "..",
        "new\nline é.png": "nowhere",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkdir(folder / "folder.png")
    os.rename(folder / "good.png", os.fsencode(folder) + b"/g\too\xff.png")
    found = described(open_source("folder", str(folder)))
    trouble = {name: content for name, content, _, _ in found if isinstance(content, str)}
    good = {name: content for name, content, _, _ in found if isinstance(content, bytes)}
    out = "is a link that leads out of the folder"
    assert trouble == {
        "absolute.png": f"absolute.png: {out}",
        "broken.png": "broken.png: cannot be read: No such file or directory",
        "device.png": f"device.png: {out}",
        "huge.png": "huge.png: expected at most 268,435,456 bytes, found 268,435,457",
        "itself.png": "itself.png: cannot be read: Too many levels of symbolic links",
        "new\\nline é.png": "new\\nline é.png: cannot be read: No such file or directory",
        "out.png": f"out.png: {out}",
        "pipe.png": "pipe.png: is not a regular file",
        "socket.png": "socket.png: is not a regular file",
        "zero.png": "zero.png: is empty",
    }
    assert good == {"inside.png": b"too", "g\\too\\udcff.png": b"good", "sub/good.png": b"too"}


def test_what_is_junk_is_not_even_entered(tmp_path):
    write_folder(tmp_path, {"a/1.png": b"1", "a/.git/2.png": b"2", "a/3.png": b"3"})
    assert sorted(archives.folder_names(tmp_path, {".git", "3.png"}.__contains__)) == ["a/1.png"]


def test_files_that_cannot_be_read_or_change_meanwhile(tmp_path):
    write_folder(tmp_path, {f"{k}.png": b"x" * 9 for k in range(4)})
    source = open_source("folder", str(tmp_path))
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").chmod(0)
    items = source.items()
    first = next(items)
    assert str(first.content) == "0.png: cannot be read: No such file or directory"
    if os.geteuid():  # for root, all files can be read
        assert "1.png: cannot be read: Permission denied" in str(next(items).content)
    member = archives.Member("a", 3, "", lambda: io.BytesIO(b"1234"))
    assert str(archives.read_member(member)) == "a: expected 3 bytes, found more"
    assert str(archives.read_member(member._replace(size=5))) == "a: expected 5 bytes, found 4"
    assert archives.read_member(member._replace(size=4)) == b"1234"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_a_pass_holds_one_image_at_a_time(tmp_path, kind):
    """32 images of 512 KiB, incompressible: the peak is a few of them."""
    path = PACKED[kind](tmp_path / "x", {f"{k}.png": noise(2**19, k) for k in range(32)})
    source = open_source("folder", str(path))
    tracemalloc.start()
    try:
        assert [len(x.content) for x in source.items()] == [2**19] * 32
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_pass_through_a_tar_keeps_no_headers(tmp_path):
    """2,000 members: tarfile would keep a kilobyte of each.

    The least of three passes counts: threads that earlier tests left allocate memory too.
    """
    path = write_tar(tmp_path / "x", {f"{k}.png": b"1" for k in range(2000)})
    source, peaks = open_source("folder", str(path)), []
    tracemalloc.start()
    try:
        for _ in range(3):
            tracemalloc.reset_peak()
            assert sum(1 for _ in source.items()) == 2000
            peaks.append(tracemalloc.get_traced_memory()[1])
        assert min(peaks) < 2**16
    finally:
        tracemalloc.stop()


def test_folders_among_the_members_are_no_images(tmp_path):
    path = write_tar(tmp_path / "tar", {"a.png": (tarfile.DIRTYPE,), "a.png/b.png": b"1"})
    assert described(open_source("folder", str(path))) == [("b.png", b"1", None, None)]
    path = write_zip(tmp_path / "zip", {"a.png/": b"", "a.png/b.png": b"1"})
    assert described(open_source("folder", str(path))) == [("b.png", b"1", None, None)]


def test_a_zip_of_windows_has_folders(tmp_path):
    path = write_zip(tmp_path / "x", {"s\\b\\1.png": b"1", "s\\a\\2.png": b"2"})
    expected = [("a/2.png", b"2", "a", None), ("b/1.png", b"1", "b", None)]
    assert described(open_source("folder", str(path))) == expected


PNG = b"\x89PNG" + bytes(range(200))


def patched(path, *changes):
    """A file with other bytes at some offsets, counted from the end if below zero."""
    content = bytearray(path.read_bytes())
    for at, new in changes:
        at %= len(content)
        content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def zip_of(path, name="a.png", **fields):
    info = zipfile.ZipInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return write_zip(path, {info: PNG})


def zip_saying(path, content, at, value):
    """A zip of `a.png`, with a field of its local header, and the same of its central one, set."""
    write_zip(path, {"a.png": content})
    central = path.read_bytes().rindex(b"PK\1\2")
    return patched(path, (at, value), (central + at + 2, value))


def zip_claiming(path, content, size):
    return zip_saying(path, content, 22, struct.pack("<I", size))


def header(name, size, kind=tarfile.REGTYPE):
    """A tar's header, of any size, also below zero."""
    info = tarfile.TarInfo(name)
    info.type = kind
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    raw[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + 8 * 32 + sum(raw[156:512]))
    return bytes(raw)


def pax(**values):
    """An extended header, which overrides what the next header says."""
    text = "".join(f"{len(f' {k}={v}') + 3} {k}={v}\n" for k, v in values.items()).encode()
    return header("pax", len(text), tarfile.XHDTYPE) + text.ljust(512, b"\0")


END = bytes(1024)
BODY = PNG.ljust(512, b"\0")
GOOD = header("good.png", len(PNG)) + BODY
LONG = tarfile.GNUTYPE_LONGNAME


def tar(path, *parts):
    path.write_bytes(b"".join(parts))
    return path


def gz(path, *parts):
    path.write_bytes(gzip.compress(b"".join(parts)))
    return path


def typed(path, kind):
    return write_tar(path, {"a.png": (kind,)})


def npz(path, text, values=b"", version=1, length=None):
    """An npz of an array `x` with this header."""
    text = text.encode().ljust(117) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", length or len(text))
    head = b"\x93NUMPY" + bytes([version, 0]) + length + text
    return write_zip(path, {"x.npy": head + values}, zipfile.ZIP_STORED)


def shaped(path, *shape):
    return npz(path, f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}", b"1234")


def saved(path, **arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


OUT = "its path leads out of the archive"
LINK = stat.S_IFLNK | 0o777
# What writes it to a path, and words of the error; where Pythons differ, one of several.
BAD_MEMBERS = {
    "zip: up": (lambda p: zip_of(p, "../../up.png"), OUT),
    "zip: absolute": (lambda p: zip_of(p, "/etc/a.png"), OUT),
    "zip: a drive": (lambda p: zip_of(p, "C:\\a.png"), OUT),
    "zip: up on Windows": (lambda p: zip_of(p, "a\\..\\..\\b.png"), OUT),
    "zip: a link": (lambda p: zip_of(p, external_attr=LINK << 16), "is a link or a device"),
    "zip: encrypted": (lambda p: zip_saying(p, PNG, 6, b"\1"), "is encrypted: pack it without"),
    "zip: other bytes": (lambda p: patched(zip_of(p), (60, b"!")), "Bad CRC-32"),
    "zip: no deflate": (
        lambda p: patched(write_zip(p, {"a.png": PNG}), (36, b"\xff" * 60)),
        "Error -3",
    ),
    "zip: a bomb": (lambda p: write_zip(p, {"a.png": bytes(2**25 + 1)}), "claims to unpack 32,6"),
    "zip: a secret bomb": (lambda p: zip_claiming(p, bytes(2**25 + 1), 100), "Bad CRC-32"),
    "zip: too large": (lambda p: zip_claiming(p, PNG, 2**24), "expected 16,777,216 bytes, found"),
    "zip: gigabytes": (lambda p: zip_claiming(p, PNG, 2**32 - 2), "claims to unpack 2"),
    "zip: bzip2": (
        lambda p: write_zip(p, {"a.png": bytes(2**25)}, zipfile.ZIP_BZIP2),
        "expected it stored or deflated, found method 12",
    ),
    "tar: up": (lambda p: tar(p, header("../up.png", 204), BODY, END), OUT),
    "tar: absolute": (lambda p: tar(p, header("/etc/a.png", 204), BODY, END), OUT),
    "tar: a link": (lambda p: typed(p, tarfile.SYMTYPE), "is a link: pack the file itself"),
    "tar: a hard link": (lambda p: typed(p, tarfile.LNKTYPE), "is a link: pack the file itself"),
    "tar: a device": (lambda p: typed(p, tarfile.CHRTYPE), "is not a regular file"),
    "tar: a pipe": (lambda p: typed(p, tarfile.FIFOTYPE), "is not a regular file"),
    "tar: holes": (lambda p: tar(p, header("a.png", 0, b"S"), END), "is not a regular file"),
}
BAD_ARCHIVES = {
    "zip: cut short": (lambda p: p.write_bytes(zip_of(p).read_bytes()[:-9]), "is not a zip file"),
    "zip: twice": (lambda p: write_zip(p, {"a.png": b"1", "./a.png": b"2"}), "found a.png again"),
    "zip: no name": (lambda p: zip_of(p, "\0"), "x: "),
    "tar: too large": (lambda p: tar(p, GOOD, header("a.png", 2**50), END), "a header claims 1,1"),
    "tar: endless": (lambda p: tar(p, header("a.png", 2**80), END), "a header claims 1,2"),
    "gz: too large": (lambda p: gz(p, GOOD, header("a.png", 2**40), END), "a header claims 1,0"),
    "tar: below zero": (lambda p: tar(p, GOOD, header("a.png", -1024), END), "a size of -1,024"),
    "gz: below zero": (lambda p: gz(p, pax(size=-1024), GOOD, END), "a size of -1,024"),
    "tar: a name below zero": (
        lambda p: tar(p, GOOD, header("a.png", -1024, tarfile.XHDTYPE), END),
        ("a header of -1,024 bytes", "without the mark of its end"),
    ),
    "tar: in circles": (
        lambda p: tar(p, GOOD, header("a.png", -2048, b"S"), END),
        ("a header leads backwards", "without the mark of its end"),
    ),
    "gz: a name of 64 MiB": (
        lambda p: gz(p, header("a", 2**26, LONG), bytes(2**26)),
        "a header of 67,108,864 bytes",
    ),
    "tar: 2,000 names": (lambda p: tar(p, (header("a", 1, LONG) + BODY) * 2000), "0 are left"),
    "gz: a bomb": (
        lambda p: gz(p, header("a.bin", 2**26), bytes(2**26), GOOD, END),
        "a header claims 67,",
    ),
    "tar: cut in an image": (lambda p: tar(p, GOOD, GOOD[:700]), "it may be damaged or cut short"),
    "tar: cut after an image": (lambda p: tar(p, GOOD), "without the mark of its end"),
    "tar: a bad header": (lambda p: tar(p, GOOD, b"?" + GOOD[1:], END), "without the mark of its"),
    "gz: cut short": (lambda p: p.write_bytes(gz(p, GOOD, END).read_bytes()[:-20]), "file ended"),
    "gz: other bytes": (lambda p: patched(gz(p, GOOD, END), (-8, b"????")), "CRC check failed"),
    "gz: no tar": (lambda p: gz(p, b"hello" * 200), "cannot be read: "),
    "npz: a pickle": (
        lambda p: saved(p, x=np.array([{}, 1], object)),
        "holds Python objects, a pi",
    ),
    "npz: more than it has": (lambda p: shaped(p, 9, 2, 2), "expected 36 bytes of values, found 4"),
    "npz: endless": (lambda p: shaped(p, 2**70, 1, 1), "303,424 bytes of values, found 4"),
    "npz: below zero": (lambda p: shaped(p, -1, -2, 2), "not empty, found [-1, -2, 2]"),
    "npz: a header of 4 GiB": (
        lambda p: npz(p, "{", bytes(2**24), version=2, length=2**32 - 1),
        "EOF: reading array header, expected 4294967295 bytes got 65524",
    ),
    "npz: code": (lambda p: npz(p, "__import__('os').abort()", b"1"), "cannot be read: "),
    "npz: bzip2": (
        lambda p: write_zip(p, {"x.npy": bytes(2**25)}, zipfile.ZIP_BZIP2),
        "x.npy: expected it stored or deflated, found method 12",
    ),
    "npz: other bytes": (
        lambda p: patched(saved(p, x=np.ones([9, 99, 99], np.uint8)), (80_000, b"!")),
        "Bad CRC-32",
    ),
}


@pytest.mark.parametrize("attack", BAD_MEMBERS | BAD_ARCHIVES)
def test_hostile_archives(tmp_path, attack):
    """One line each, with 64 MiB at most, and nothing is made or changed anywhere near it."""
    write, words = (BAD_MEMBERS | BAD_ARCHIVES)[attack]
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "x")
    before = listing(tmp_path)
    tracemalloc.start()
    try:
        if attack in BAD_ARCHIVES:
            text = refused("zip", str(folder / "x"))
        else:
            ((name, text, _, split),) = described(open_source("zip", str(folder / "x")))
            assert text.startswith(f"{name}: ") and split is None
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert any(x in text for x in ([words] if isinstance(words, str) else words)), text
    assert listing(tmp_path) == before


def test_the_rest_of_a_hostile_archive_is_good(tmp_path):
    files = {"../up.png": b"0", "a/1.png": b"1", "b/2.png": b"2", "b/3.png": b""}
    for kind in ("zip", "tar"):
        source = open_source("zip", str(PACKED[kind](tmp_path / kind, files)))
        items = described(source)
        assert source.classes == ("a", "b")  # the one that leads out is no third class
        assert items[1:3] == [("a/1.png", b"1", "a", None), ("b/2.png", b"2", "b", None)]
        assert "leads out" in items[0][1] and items[3][1] == "b/3.png: is empty"
