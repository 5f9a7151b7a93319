"""Reads the files of folders, zips and tars in memory, whoever made them.

All three are a sequence of members, each with a name, a size and a way to open it. Nothing is
unpacked to disk, so no path can lead anywhere, and no link is followed out of its folder. What a
header claims is a limit for what is read, never an amount to trust.
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

from diffusion.data import escape, mismatch
from diffusion.utils.errors import DataError, error_text

MAX_FILE_BYTES = 2**28  # of one image's file: no camera writes so much
# A file that unpacks to more than FREE_BYTES and to more than MAX_RATIO times its size is a bomb:
# compressed images hardly shrink again, and bare pixels of drawings do so by 50.
FREE_BYTES, MAX_RATIO = 2**25, 200
HEADER_BYTES = 2**14  # all that a tar may say about one member; most take 512 to 2,048
CHUNK = 2**20

Report = Callable[[str, int, int | None], None]  # (what is done, bytes so far, total bytes)


class Item(NamedTuple):
    """One image of a source."""

    name: str  # unique: 'cats/0001.jpg', 'data_batch_1.bin[17]'
    content: bytes | np.ndarray | DataError  # a file of any format, uint8[h, w, c], or why neither
    label: int  # 0 where there are no classes
    split: str | None  # 'train', 'test', or None where the source has no splits


class Source(NamedTuple):
    """A set of images to prepare.

    `items` starts a pass, in the same order each time, that holds a few images at a time. It raises
    DataError if all that follows is lost; one lost image is an Item whose content is the error.
    """

    items: Callable[[], Iterator[Item]]
    classes: tuple[str, ...]  # their names, or ()
    about: str  # a sentence for the description of the data set
    count: int  # of items


class Member(NamedTuple):
    """A file in an archive or a folder, not read yet."""

    name: str  # its path, with '/'
    size: int  # bytes, as claimed
    problem: str  # why it must not be read, or ''
    open: Callable[[], BinaryIO]  # ends after `size`; callable until the next member is taken


def read_member(member: Member) -> bytes | DataError:
    """Returns all bytes of a member, 1 to MAX_FILE_BYTES of them, or why it has none."""
    problem, size = member.problem, member.size
    if not problem and not size:
        problem = "is empty"
    if not problem and size > MAX_FILE_BYTES:
        problem = f"expected at most {MAX_FILE_BYTES:,} bytes, found {size:,}"
    try:
        if not problem:
            data = io.BytesIO()  # grows without the second copy that joining chunks would make
            with member.open() as file:
                while chunk := file.read(min(CHUNK, size + 1 - data.tell())):
                    data.write(chunk)
            if (found := data.tell()) == size:
                return data.getvalue()
            problem = f"expected {size:,} bytes, found {'more' if found > size else f'{found:,}'}"
    except Exception as error:  # zipfile, its decompressors and the system raise anything
        problem = f"cannot be read: {error_text(error)}"
    return DataError(f"{escape(member.name)}: {problem}")


@contextlib.contextmanager
def reading(path: os.PathLike) -> Iterator[None]:
    """Turns any error of a library inside into a DataError about this file or folder."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        of_system = isinstance(error, OSError) and error.errno
        advice = "mend that" if of_system else "it may be damaged or cut short: get it anew"
        raise DataError(f"{path}: cannot be read: {error_text(error)}; {advice}") from error


def byte_order(name: str) -> bytes:
    """Returns a key that sorts names alike on all file systems and in all languages."""
    return name.encode("utf-8", "surrogateescape")  # surrogates stand for bytes that are no UTF-8


def leads_outside(name: str) -> bool:
    """Returns whether a path is absolute or contains '..', also as Windows would read it."""
    return ".." in re.split(r"[/\\]", name) or bool(re.match(r"[/\\]|[A-Za-z]:", name))


def archive_kind(path: pathlib.Path, expected: str) -> str:
    """Returns 'folder', 'zip' or 'tar' (compressed or not), by the first bytes, not by the name."""
    with reading(path):
        if path.is_dir():
            return "folder"
        found = "something that is neither a file nor a folder"
        if path.is_file():
            with open(path, "rb") as file:
                head = file.read(tarfile.BLOCKSIZE)
            if head.startswith((b"PK\3\4", b"PK\5\6")):
                return "zip"
            if head.startswith(tuple(DECOMPRESSORS)) or _is_tar_header(head):
                return "tar"
            found = f"a file that begins with {head[:8]!r}" if head else "an empty file"
            found = "a web page" if head.lstrip().startswith(b"<") else found
        raise mismatch(path, expected, found)


def _is_tar_header(head: bytes) -> bool:
    try:  # the old format has no magic number, but every header has a checksum
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _normalize(name: str) -> str:
    """Removes './' and '//', so that one file has one name; hostile paths stay as they are."""
    if leads_outside(name):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def folder_names(root: pathlib.Path, is_junk: Callable[[str], bool]) -> list[str]:
    """Returns the paths, relative to root, of all that is not a folder, unsorted.

    Links to folders are skipped: their targets lie in root as well, or do not belong to it.
    """

    def fail(error: OSError) -> None:
        raise error

    names, start = [], len(os.path.join(root, ""))
    with reading(root):
        for folder, subfolders, files in os.walk(root, onerror=fail):
            subfolders[:] = [name for name in subfolders if not is_junk(name)]
            names += [os.path.join(folder, name)[start:] for name in files if not is_junk(name)]
    return names


def folder_members(root: pathlib.Path, names: Iterable[str]) -> Iterator[Member]:
    """Yields the files of these names. A link is followed only to a target inside root."""
    inside = os.path.join(os.path.realpath(root), "")
    for name in names:
        path, size, problem = os.path.join(root, name), 0, ""
        try:
            if os.path.islink(path) and not os.path.realpath(path).startswith(inside):
                problem = "is a link that leads out of the folder"
            else:
                status = os.stat(path)
                size = status.st_size
                if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
                    problem = "is not a regular file"
        except OSError as error:
            problem = f"cannot be read: {error_text(error)}"
        yield Member(name, size, problem, functools.partial(open, path, "rb"))


def zip_members(path: pathlib.Path, order: Callable = byte_order) -> Iterator[Member]:
    """Yields the files of a zip, sorted by order(name). Raises DataError if it is damaged."""
    with reading(path), zipfile.ZipFile(path) as archive:
        # Old programs on Windows write backslashes.
        named = [(_normalize(x.filename.replace("\\", "/")), x) for x in archive.infolist()]
        for name, info in sorted(named, key=lambda pair: order(pair[0])):
            if not info.is_dir():
                open_member = functools.partial(archive.open, info)
                yield Member(name, info.file_size, zip_problem(name, info), open_member)


def zip_problem(name: str, info: zipfile.ZipInfo) -> str:
    """Returns why a member of a zip must not be read, or ''."""
    if leads_outside(name):
        return "its path leads out of the archive"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: packed on Windows
        return "is a link or a device"
    if info.flag_bits & 1:
        return "is encrypted: pack it without a password"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile does not bound what the other methods unpack at once.
        return f"expected it stored or deflated, found method {info.compress_type}: pack it anew"
    if info.file_size > max(FREE_BYTES, MAX_RATIO * info.compress_size):
        return f"claims to unpack {info.compress_size:,} bytes to {info.file_size:,}"
    return ""


def tar_members(path: pathlib.Path, report: Report = lambda *_: None) -> Iterator[Member]:
    """Yields the files of a tar in its own order, as a compressed tar can only be read forwards.

    report is called with the bytes read so far. Raises DataError where the tar is damaged.
    """
    with reading(path), open(path, "rb") as file, _decompress(file) as stream:
        total = os.fstat(file.fileno()).st_size
        limit = total if stream is file else max(FREE_BYTES, MAX_RATIO * total)
        forward = _ForwardStream(stream, limit)
        tar = tarfile.TarFile(fileobj=forward)
        while info := tar.next():
            tar.members.clear()  # tarfile would keep them all
            if info.size < 0:
                raise tarfile.ReadError(f"a size of {info.size:,} bytes")
            if not info.isdir():
                forward.seek(info.offset_data)
                open_member = functools.partial(_TarFile, forward, info.size)
                yield Member(_normalize(info.name), info.size, _tar_problem(info), open_member)
            forward.header_budget = HEADER_BYTES
            report(f"looking through {path.name}", file.tell(), total)
        if forward.last != bytes(tarfile.BLOCKSIZE):  # tarfile ends silently at a bad header
            raise DataError(f"{path}: ends without the mark of its end: it is cut short")
        forward.take(CHUNK)  # at the end of the padding, decompressors compare their checksums


def _tar_problem(info: tarfile.TarInfo) -> str:
    if leads_outside(info.name):
        return "its path leads out of the archive"
    if info.islnk() or info.issym():
        return "is a link: pack the file itself (tar --dereference --hard-dereference)"
    return "" if info.isreg() and not info.issparse() else "is not a regular file"


class _ForwardStream:
    """The stream under a tar, which tarfile may only read forwards, within limits.

    tarfile trusts the lengths in headers: a name of gigabytes, or a negative size that loops.
    """

    def __init__(self, stream: BinaryIO, limit: int):
        self.stream, self.limit, self.position = stream, limit, 0
        self.header_budget = HEADER_BYTES  # bytes that tarfile may still read for headers
        self.last = b""  # its latest read

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        if position < self.position:
            raise tarfile.ReadError("a header leads backwards")
        if position > self.limit:
            raise tarfile.ReadError(f"a header claims {position:,} bytes, beyond {self.limit:,}")
        self.position = self.stream.seek(position)

    def read(self, n: int) -> bytes:
        if not 0 <= n <= self.header_budget:
            budget = f"{self.header_budget:,} are left"
            raise tarfile.ReadError(f"a header of {n:,} bytes, where {budget}")
        self.header_budget -= n
        self.last = self.take(n)
        return self.last

    def take(self, n: int) -> bytes:
        data = self.stream.read(min(n, self.limit - self.position))
        self.position += len(data)
        return data


class _TarFile(io.RawIOBase):
    """The next `size` bytes of a tar, as a file."""

    def __init__(self, forward: _ForwardStream, size: int):
        self.forward, self.left = forward, size

    def read(self, n: int) -> bytes:
        data = self.forward.take(min(n, self.left))
        self.left -= len(data)
        return data


DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}


def _decompress(file: io.BufferedReader) -> BinaryIO:
    """Returns a stream of what a gz, bz2 or xz file holds, or the file itself."""
    head = file.peek(8)
    magic = next(filter(head.startswith, DECOMPRESSORS), None)
    return DECOMPRESSORS[magic](file) if magic else file


def open_unzipped(path: pathlib.Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """Opens a file for reading, through gzip if it is compressed."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")
