"""Archives and folders, read in memory, whoever made them; and what all sources give.

A zip, a tar and a folder are the same thing here: a walk over members, each with a name, a size
and a way to read it. Nothing is unpacked, so no path can lead anywhere, and no link is followed
out of its folder. What a header claims is a limit for what is read, never an amount to trust.
"""

import bz2
import contextlib
import functools
import gzip
import io
import lzma
import os
import pathlib
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

MAX_FILE_BYTES = 2**28  # of one image's file: no camera writes so much
# What unpacks to more than FREE_BYTES and to more than MAX_RATIO times its size is a bomb: images
# that were compressed before hardly shrink again, and bare pixels of drawings do by 50.
FREE_BYTES, MAX_RATIO = 2**25, 200
HEADER_BYTES = 2**14  # of all that a tar may say about one member; most take 512 to 2,048
CHUNK = 2**20

Report = Callable[[str, int, int | None], None]  # what is done, bytes so far, bytes in all


class SourceError(Exception):
    """Images that cannot be had; one line: what was expected, what was found, what to do."""

    def __init__(self, text: str):
        super().__init__(shown(text))  # names of files may hold line breaks


class Item(NamedTuple):
    """One image. Bytes: a file's, of any format; pixels: uint8[h, w, c]; error: it cannot be had.

    name: 'cats/0001.jpg', 'data_batch_1.bin[17]', each once. label: 0 where there are no classes.
    split: 'train', 'test', or None where the source does not say.
    """

    name: str
    content: bytes | np.ndarray | SourceError
    label: int
    split: str | None


class Source(NamedTuple):
    """Where images come from.

    items: starts a pass, in the same order each time, that holds a few images at a time and raises
    SourceError if all that follows is lost. classes: their names, or (). about: for a description.
    count: how many items there are.
    """

    items: Callable[[], Iterator[Item]]
    classes: tuple[str, ...]
    about: str
    count: int


class Member(NamedTuple):
    """A file in an archive or a folder, not read yet.

    name: its path, with '/'. size: bytes, as claimed. trouble: why it is not to be read, else ''.
    open: called while this member is the walk's latest, gives the file, which ends after `size`.
    """

    name: str
    size: int
    trouble: str
    open: Callable[[], BinaryIO]


def content(member: Member) -> bytes | SourceError:
    """All bytes of a member, 1 to MAX_FILE_BYTES of them, or the error that says why not."""
    trouble, size = member.trouble, member.size
    if not trouble and not size:
        trouble = "is empty"
    if not trouble and size > MAX_FILE_BYTES:
        trouble = f"expected at most {MAX_FILE_BYTES:,} bytes, found {size:,}"
    try:
        if not trouble:
            data = io.BytesIO()  # grows without a second copy, as joining pieces would make
            with member.open() as file:
                while chunk := file.read(min(CHUNK, size + 1 - data.tell())):
                    data.write(chunk)
            if (found := data.tell()) == size:
                return data.getvalue()
            trouble = f"expected {size:,} bytes, found {'more' if found > size else f'{found:,}'}"
    except Exception as error:  # zipfile, its decompressors and the system raise anything
        trouble = f"cannot be read: {line(error)}"
    return SourceError(f"{member.name}: {trouble}")


@contextlib.contextmanager
def reading(path: os.PathLike) -> Iterator[None]:
    """Whatever goes wrong inside becomes a SourceError of one line about this file or folder."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:  # the formats' libraries raise what their parsers stumble over
        of_system = isinstance(error, OSError) and error.errno
        advice = "mend that" if of_system else "it may be damaged or cut short: get it anew"
        raise SourceError(f"{path}: cannot be read: {line(error)}; {advice}") from error


def shown(name: str) -> str:
    """A file's name on one line: what cannot be printed of it is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def some(names: list[str], most: int = 3) -> str:
    """The first few names, in one line."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def line(error: BaseException) -> str:
    """What an error says, on one short line."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())[:200] or type(error).__name__


def byte_order(name: str) -> bytes:
    """The key that sorts names alike on all file systems and in all languages."""
    return name.encode("utf-8", "surrogateescape")  # which stands for bytes that are no UTF-8


def leads_outside(name: str) -> bool:
    """Is this path absolute, or does it go up; also as Windows would read it."""
    return ".." in re.split(r"[/\\]", name) or bool(re.match(r"[/\\]|[A-Za-z]:", name))


def kind(path: pathlib.Path, expected: str) -> str:
    """'folder', 'zip' or 'tar' (compressed or not), told by the first bytes, not by the name.

    Raises SourceError, which says what was expected, for everything else.
    """
    with reading(path):
        if path.is_dir():
            return "folder"
        found = "something that is neither a file nor a folder"
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(tarfile.BLOCKSIZE)
            if head.startswith((b"PK\3\4", b"PK\5\6")):
                return "zip"
            if head.startswith(tuple(COMPRESSED)) or _is_tar(head):
                return "tar"
            found = f"a file that begins with {head[:8]!r}" if head else "an empty file"
            found = "a web page" if head.lstrip().startswith(b"<") else found
        raise SourceError(f"{path}: expected {expected}, found {found}")


def _is_tar(head: bytes) -> bool:
    try:  # the old format has no magic number, but every header has a check sum
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _tidy(name: str) -> str:
    """Without './' and '//', so that one file has one name; paths that lead outside stay as is."""
    if leads_outside(name):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))




def folder_names(root: pathlib.Path, is_junk: Callable[[str], bool]) -> list[str]:
    """Paths, relative to root, of all that is no folder, unsorted. Raises SourceError.

    Links to folders are passed over: what they lead to lies in root as well, or is none of it.
    """
    names, folders = [], [""]
    while folders:
        folder = folders.pop()
        with reading(root / folder), os.scandir(root / folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{entry.name}/")
                elif not (entry.is_symlink() and os.path.isdir(entry.path)):
                    names.append(f"{folder}{entry.name}")
    return names


def folder_members(root: pathlib.Path, names: Iterable[str]) -> Iterator[Member]:
    """The files of these names, in this order. A link is followed only where it stays in root."""
    inside = os.path.join(os.path.realpath(root), "")
    for name in names:
        path, size, trouble = os.path.join(root, name), 0, ""
        try:
            if os.path.islink(path) and not os.path.realpath(path).startswith(inside):
                trouble = "is a link that leads out of the folder"
            else:
                status = os.stat(path)
                size = status.st_size
                if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
                    trouble = "is not a regular file"
        except OSError as error:
            trouble = f"cannot be read: {line(error)}"
        yield Member(name, size, trouble, functools.partial(open, path, "rb"))




def zip_members(path: pathlib.Path, order: Callable = byte_order) -> Iterator[Member]:
    """The files of a zip, sorted by order(name). Raises SourceError if it is no whole zip.

    zipfile keeps the archive's directory in memory, 0.8 kB for each file.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: order(_zip_name(info))):
            if not info.is_dir():
                name, open_it = _zip_name(info), functools.partial(archive.open, info)
                yield Member(name, info.file_size, zip_trouble(name, info), open_it)


def _zip_name(info: zipfile.ZipInfo) -> str:
    return _tidy(info.filename.replace("\\", "/"))  # as old programs on Windows write


def zip_trouble(name: str, info: zipfile.ZipInfo) -> str:
    """Why a member of a zip is not to be read, or ''."""
    if leads_outside(name):
        return "its path leads out of the archive"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: packed on Windows
        return "is a link or a device"
    if info.flag_bits & 1:
        return "is encrypted: pack it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile lets the others unpack as much at once as they like.
        return f"expected it stored or deflated, found method {info.compress_type}: pack it anew"
    if info.file_size > max(FREE_BYTES, MAX_RATIO * info.compress_size):
        return f"claims to unpack {info.compress_size:,} bytes to {info.file_size:,}"
    return ""




def tar_members(path: pathlib.Path, report: Report = lambda *_: None) -> Iterator[Member]:
    """The files of a tar, in its own order: a compressed one can only be read on.

    report: is told how far the walk has come. Raises SourceError where the tar is damaged.
    """
    with reading(path), open(path, "rb") as file, _decompressed(file) as stream:
        in_all = os.fstat(file.fileno()).st_size
        most = in_all if stream is file else max(FREE_BYTES, MAX_RATIO * in_all)
        forward = _Forward(stream, most)
        tar = tarfile.TarFile(fileobj=forward)
        while info := tar.next():
            tar.members.clear()  # it would keep them all
            if info.size < 0:
                raise tarfile.ReadError(f"a size of {info.size:,} bytes")
            if not info.isdir():
                forward.seek(info.offset_data)
                open_it = functools.partial(_Part, forward, info.size)
                yield Member(_tidy(info.name), info.size, _tar_trouble(info), open_it)
            forward.budget = HEADER_BYTES
            report(f"looking through {path.name}", file.tell(), in_all)
        if forward.last != bytes(tarfile.BLOCKSIZE):  # tarfile ends silently at what is no header
            raise SourceError(f"{path}: ends without the mark of its end: it is cut short")
        forward.take(CHUNK)  # of padding: at the end the decompressors compare their check sums


def _tar_trouble(info: tarfile.TarInfo) -> str:
    if leads_outside(info.name):
        return "its path leads out of the archive"
    if info.islnk() or info.issym():
        return "is a link: pack the file itself (tar --dereference --hard-dereference)"
    return "" if info.isreg() and not info.issparse() else "is not a regular file"


class _Forward:
    """The stream under a tar, on which tarfile may only go on, within limits.

    tarfile takes lengths from headers as they are: a name of gigabytes, or a negative size that
    sends it in circles. budget: bytes it may still read for headers. last: the latest it has read.
    """

    def __init__(self, stream: BinaryIO, most: int):
        self.stream, self.most = stream, most
        self.at, self.budget, self.last = 0, HEADER_BYTES, b""

    def tell(self) -> int:
        return self.at

    def seek(self, to: int) -> None:
        if to < self.at:
            raise tarfile.ReadError("a header leads backwards")
        if to > self.most:
            raise tarfile.ReadError(f"a header claims {to:,} bytes, beyond {self.most:,}")
        self.at = self.stream.seek(to)

    def read(self, n: int) -> bytes:
        if not 0 <= n <= self.budget:
            raise tarfile.ReadError(f"a header of {n:,} bytes, where {self.budget:,} are left")
        self.budget -= n
        self.last = self.take(n)
        return self.last

    def take(self, n: int) -> bytes:
        data = self.stream.read(min(n, self.most - self.at))
        self.at += len(data)
        return data


class _Part(io.RawIOBase):
    """The next `size` bytes of a tar, as a file."""

    def __init__(self, forward: _Forward, size: int):
        self.forward, self.left = forward, size

    def read(self, n: int) -> bytes:
        data = self.forward.take(min(n, self.left))
        self.left -= len(data)
        return data


COMPRESSED = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}


def _decompressed(file: io.BufferedReader) -> BinaryIO:
    """What a gz, bz2 or xz file holds; the file itself if it is none of them."""
    head = file.peek(8)
    return next((read(file) for magic, read in COMPRESSED.items() if head.startswith(magic)), file)


def unzipped(path: pathlib.Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file opened for reading, through gzip if it is compressed."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")
