"""Sources: where images come from: the known data sets as they are published, or a user's own.

Each gives its images one by one, as bytes of files or as pixels, in an order that is the same in
every pass, with labels and splits where it has them. An image that cannot be had is given as the
error that says why; what to do about it is for the caller to decide. No pickle is ever read.
"""

import contextlib
import difflib
import functools
import io
import os
import pathlib
import posixpath
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from diffusion.data.prepare import archives
from diffusion.data.prepare.archives import (
    Item,
    Member,
    Report,
    Source,
    SourceError,
    reading,
    shown,
    some,
)
from diffusion.data.prepare.array_formats import CIFAR10, CIFAR100, check_count, cifar, idx, npz
from diffusion.data.prepare.download import REMOTES, download

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLITS = {"train": "train", "test": "test", "val": "test"}  # folders
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")
IMAGES = "a folder, zip, tar or npz of images, or an LMDB of LSUN"


class Origin(NamedTuple):
    """open: (path, accept_incomplete, report) -> Source. wanted: what the path may lead to."""

    open: Callable[[pathlib.Path, bool, Report], Source]
    wanted: str


def open_source(
    name: str,
    archive: str = "",
    downloads: str = "",
    accept_incomplete: bool = False,
    report: Report = lambda what, done, total: None,
) -> Source:
    """The source ORIGINS[name].

    archive: the file or folder to take it from. '': it is downloaded into the folder `downloads`,
    unless it is there. accept_incomplete: fewer images than were published will do. report: is
    told what is being done, the bytes done, and the bytes in all. Raises SourceError.
    """
    if name not in ORIGINS:
        raise SourceError(f"source: nothing is called {name!r}; {_nearest(name, ORIGINS)}")
    origin, remotes = ORIGINS[name], REMOTES.get(name, ())
    if archive:
        path = _existing(archive)
    elif not remotes or not downloads:
        trouble = "no folder to download to" if remotes else "cannot be downloaded"
        raise SourceError(f"{name}: {trouble}; give data.archive=PATH of {origin.wanted}")
    else:
        path = pathlib.Path(downloads).expanduser()
        for remote in remotes:
            download(remote, path / remote.file, report)
        path /= os.path.dirname(remotes[0].file)
    if len(remotes) == 1 and (path / remotes[0].file).is_file():
        path /= remotes[0].file
    return origin.open(path, accept_incomplete, report)


def _existing(archive: str) -> pathlib.Path:
    path = pathlib.Path(os.path.expanduser(archive))
    if os.path.exists(path):
        return path
    there, parent = "", path.parent
    with contextlib.suppress(OSError, ValueError):
        names = sorted(os.listdir(parent))
        there = f"; {_nearest(path.name, names, most=5)}" if names else f"; {parent} is empty"
    raise SourceError(f"data.archive: no file or folder {archive!r}{there}")


def _nearest(name: str, names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    close = difflib.get_close_matches(name, names, 3)
    return f"nearest: {', '.join(close)}" if close else f"there are: {some(names, most)}"




def _images(path: pathlib.Path, accept_incomplete: bool, report: Report) -> Source:
    """Images of any origin: whatever is at this path."""
    return _pictures(path, report)


def _celebahq(path: pathlib.Path, accept_incomplete: bool, report: Report) -> Source:
    """CelebA-HQ: 30,000 images with any names, 2.jpg before 10.jpg (in a tar: as they lie there).

    Karras et al. 2018, Progressive Growing of GANs, appendix C. It has no classes.
    """
    source = _pictures(path, report, _natural_order)
    check_count(str(path), source.count, 30_000, accept_incomplete)
    return source._replace(items=lambda: (x._replace(label=0) for x in source.items()), classes=())


def _pictures(path: pathlib.Path, report: Report, order: Callable = archives.byte_order) -> Source:
    """Images, told apart by what is there."""
    kind = archives.kind(path, IMAGES)
    if kind == "tar":
        names = [m.name for m in archives.tar_members(path, report)]
        return _tree(path, names, lambda: archives.tar_members(path), strip=True)
    if kind == "zip":
        names = [m.name for m in archives.zip_members(path, order)]
        if any(name.endswith(".npy") for name in names) and not any(map(_is_image, names)):
            return npz(path)
        return _tree(path, names, lambda: archives.zip_members(path, order), strip=True)
    if (path / "data.mdb").exists():
        return _lmdb(path)
    names = sorted(archives.folder_names(path, _is_junk), key=order)
    images = list(filter(_is_image, names))
    return _tree(path, names, lambda: archives.folder_members(path, images), strip=False)


def _tree(
    path: pathlib.Path, names: list[str], members: Callable[[], Iterator[Member]], strip: bool
) -> Source:
    """Images among files in folders. strip: leave the folders that hold everything out of names."""
    names = [name for name in names if not _is_junk(name)]
    images = list(filter(_is_image, names))
    if not images:
        lmdb = next((name for name in names if name.endswith("data.mdb")), None)
        found = f"none among {len(names):,} files ({some(names)})" if names else "nothing"
        found = f"an LMDB: give the folder of {lmdb}, unpacked" if lmdb else found
        raise SourceError(f"{path}: expected images ({', '.join(SUFFIXES)}), found {found}")
    if len(set(images)) < len(images):
        seen = set()
        twice = next(name for name in images if name in seen or seen.add(name))
        raise SourceError(f"{path}: expected each name once, found {twice} again; pack it anew")
    top, classes, place = _layout([x for x in images if not archives.leads_outside(x)])

    def items():
        for member in members():
            if _is_image(member.name):
                name = member.name.removeprefix(top)
                content = archives.content(member)
                yield Item(shown(name if strip else member.name), content, *place(name))

    others = len(names) - len(images)
    passed = f"; files passed over: {others:,}" if others else ""
    about = f"{len(images):,} images from {path.resolve().name}{passed}."
    return Source(items, tuple(map(shown, classes)), about, len(images))


def _layout(names: list[str]) -> tuple[str, list[str], Callable[[str], tuple[int, str | None]]]:
    """The folders that hold everything, the classes, and name without top -> (label, split).

    Below the folders that hold everything: folders `train` and `test` or `val`, and nothing else,
    are the splits; both of the latter are 'test'. Then, if there are several folders and no image
    beside them, they are the classes. Folders below those mean nothing.
    """
    ends = min(names, default=""), max(names, default="")  # what they share, all names share
    top = posixpath.join(posixpath.commonpath(map(posixpath.dirname, ends)), "")
    names = [name.removeprefix(top) for name in names]
    folders, splits = _folders(names), {}
    if {"train"} < folders <= set(SPLITS):
        folders, splits = _folders(name.partition("/")[2] for name in names), SPLITS
    several = len(folders) > 1 and "" not in folders
    classes = sorted(folders, key=archives.byte_order) if several else []
    label = {folder: k for k, folder in enumerate(classes)}

    def place(name):
        folder, _, rest = name.partition("/")
        split = splits.get(folder)
        return label.get(rest.partition("/")[0] if split else folder, 0), split

    return top, classes, place


def _folders(names: Iterable[str]) -> set[str]:
    """The first folder of each name; '' for a file that lies in none."""
    return {name.partition("/")[0] if "/" in name else "" for name in names}


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _is_junk(name)


def _is_junk(name: str) -> bool:
    """Is it hidden, or something that systems leave behind; '..' is neither."""
    parts = name.split("/")
    return any(x in JUNK or (x.startswith(".") and x not in (".", "..")) for x in parts)


def _natural_order(name: str) -> tuple:
    """Numbers in names by their values, of any length; then by bytes."""
    parts = re.split("([0-9]+)", name)
    digits = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(x), x) for x in digits]
    return parts, archives.byte_order(name)




def _lmdb(path: pathlib.Path) -> Source:
    """LSUN as published (github.com/fyu/lsun): an LMDB whose values are files of images."""

    def items():
        with reading(path), _environment(path).begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                name = shown(bytes(key).decode("latin-1"))
                open_it = functools.partial(io.BytesIO, value)  # still where it lies in the file
                content = archives.content(Member(name, len(value), "", open_it))
                yield Item(name, content, 0, None)

    with reading(path):
        n = _environment(path).stat()["entries"]
    if not n:
        raise SourceError(f"{path}: expected images, found an empty LMDB")
    return Source(items, (), f"{n:,} images from {path.resolve().name}.", n)


def _environment(path: pathlib.Path):
    """The LMDB in a folder, only to be read. One process may open it only once at a time."""
    try:
        import lmdb
    except ImportError as error:
        raise SourceError(f"{path}: an LMDB is read with lmdb: pip install lmdb") from error
    file = path / "data.mdb"
    if not file.is_file():
        raise SourceError(f"{file}: expected a regular file")
    real = os.path.realpath(path)
    environment = _environments.get(real)
    if environment is None:
        environment = lmdb.open(real, readonly=True, lock=False, create=False, readahead=False)
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (found := file.stat().st_size) < expected:
            environment.close()  # to read beyond the end of a mapped file ends the process
            raise SourceError(f"{file}: expected {expected:,} bytes, found {found:,}; get it anew")
        _environments[real] = environment
    return environment


_environments = weakref.WeakValueDictionary()  # those that a pass is going through



DIGITS = tuple("0123456789")
# In the order of the labels: github.com/zalandoresearch/fashion-mnist, README.
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FOUR = "the folder of its four files, train-images-idx3-ubyte.gz and so on"

ORIGINS: dict[str, Origin] = {
    "cifar10": Origin(functools.partial(cifar, CIFAR10), "cifar-10-binary.tar.gz"),
    "cifar100": Origin(functools.partial(cifar, CIFAR100), "cifar-100-binary.tar.gz"),
    "mnist": Origin(functools.partial(idx, "MNIST", DIGITS), FOUR),
    "fashion_mnist": Origin(functools.partial(idx, "Fashion-MNIST", CLOTHES), FOUR),
    "folder": Origin(_images, IMAGES),
    "zip": Origin(_images, IMAGES),
    "tar": Origin(_images, IMAGES),
    "npz": Origin(_images, IMAGES),
    "lsun": Origin(_images, IMAGES),
    "celebahq": Origin(_celebahq, IMAGES),
}
