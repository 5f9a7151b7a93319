"""Opens the sources of images: known data sets as they are published, or a user's own files.

A source gives its images one by one, as bytes of files or as pixels, in an order that is the same
in every pass, with labels and splits where it has them. No pickle is ever read.
"""

import contextlib
import fnmatch
import functools
import io
import os
import pathlib
import posixpath
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from diffusion.data import escape, mismatch, suggest_names
from diffusion.data.prepare import archives
from diffusion.data.prepare.archives import Item, Member, Report, Source, reading
from diffusion.data.prepare.array_formats import CIFAR10, CIFAR100, check_count, cifar, idx, npz
from diffusion.data.prepare.download import download, published_files
from diffusion.utils.errors import DataError
from diffusion.utils.io import local_copy

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SPLIT_FOLDERS = {"train": "train", "test": "test", "val": "test"}
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")
IMAGES = "a folder, zip, tar or npz of images, or an LMDB of LSUN"


class Selection(NamedTuple):
    """Patterns of fnmatch on the whole path of an image in its folder or archive."""

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __call__(self, name: str) -> bool:
        """Returns whether an image is taken."""
        taken, left_out = (any(fnmatch.fnmatchcase(name, p) for p in ps) for ps in self)
        return taken and not left_out


ALL_IMAGES = Selection()


def open_source(
    name: str,
    archive: str = "",
    downloads: str = "",
    accept_incomplete: bool = False,
    report: Report = lambda what, done, total: None,
    selection: Selection = ALL_IMAGES,
) -> Source:
    """Opens the source ORIGINS[name].

    archive is the file or folder to read; '' downloads what is published into the folder
    `downloads`, unless it is there. accept_incomplete allows fewer images than were published.
    selection chooses among files. report is called with what is being done, the bytes done, and the
    total. Raises DataError.
    """
    if name not in ORIGINS:
        raise DataError(f"data.source: {name!r} is not known; {suggest_names(name, ORIGINS)}")
    remotes = published_files(name)
    if remotes:
        _refuse(selection, name)
    if archive:
        path = local_copy(archive)
        _check_exists(path, archive)
    elif not remotes or not downloads:
        problem = "no folder to download to" if remotes else "cannot be downloaded"
        raise DataError(f"data.archive: {name}: {problem}; give the path of a copy")
    else:
        path = pathlib.Path(downloads).expanduser()
        for remote in remotes:
            download(remote, path / remote.file, report)
        path /= os.path.dirname(remotes[0].file)
    if len(remotes) == 1 and (path / remotes[0].file).is_file():
        path /= remotes[0].file
    options = {} if remotes else {"selection": selection}
    return ORIGINS[name](path, accept_incomplete, report, **options)


def _check_exists(path: pathlib.Path, archive: str) -> None:
    if os.path.exists(path):
        return
    there = ""
    with contextlib.suppress(OSError, ValueError):
        names = sorted(os.listdir(path.parent))
        there = f"; {suggest_names(path.name, names, 5)}" if names else f"; {path.parent} is empty"
    raise DataError(f"data.archive: no file or folder {archive!r}{there}")


def _refuse(selection: Selection, what: str) -> None:
    """Raises DataError for patterns where no image has a path."""
    if selection != ALL_IMAGES:
        expected = "images in a folder, zip or tar to choose from"
        raise mismatch("data.include, data.exclude", expected, what, "leave these keys out")


def _images(
    path: pathlib.Path,
    accept_incomplete: bool,
    report: Report,
    selection: Selection,
    order: Callable = archives.byte_order,
) -> Source:
    """Opens images of any origin, told apart by what is there."""
    kind = archives.archive_kind(path, IMAGES)
    if kind == "tar":
        names = [m.name for m in archives.tar_members(path, report)]
        return _tree(path, names, lambda: archives.tar_members(path), selection, strip=True)
    if kind == "zip":
        names = [m.name for m in archives.zip_members(path, order)]
        if any(name.endswith(".npy") for name in names) and not any(map(_is_image, names)):
            _refuse(selection, f"the arrays of {path.name}")
            return npz(path)
        members = functools.partial(archives.zip_members, path, order)
        return _tree(path, names, members, selection, strip=True)
    if (path / "data.mdb").exists():
        _refuse(selection, f"the LMDB {path.name}")
        return _lmdb(path)
    names = sorted(archives.folder_names(path, _is_junk), key=order)
    images = [name for name in names if _is_image(name) and selection(name)]
    members = functools.partial(archives.folder_members, path, images)
    return _tree(path, names, members, selection, strip=False)


def _celebahq(
    path: pathlib.Path, accept_incomplete: bool, report: Report, selection: Selection
) -> Source:
    """Opens CelebA-HQ (Karras et al. 2018, arXiv:1710.10196, app. C): 30,000 images, no classes.

    Any names will do; 2.jpg comes before 10.jpg, but in a tar, which is read as it lies.
    """
    source = _images(path, accept_incomplete, report, selection, _natural_order)
    check_count(str(path), source.count, 30_000, accept_incomplete)
    return source._replace(items=lambda: (x._replace(label=0) for x in source.items()), classes=())


def _tree(
    path: pathlib.Path,
    names: list[str],
    members: Callable[[], Iterator[Member]],
    selection: Selection,
    strip: bool,
) -> Source:
    """Returns the images among files in folders. strip: drop the top folders from their names."""
    names = [name for name in names if not _is_junk(name)]
    there = list(filter(_is_image, names))
    if not there:
        lmdb = next((name for name in names if name.endswith("data.mdb")), None)
        some = ", ".join(names[:3]) + ", …" * (len(names) > 3)
        found = f"none among {len(names):,} files ({some})" if names else "nothing"
        found = f"an LMDB: give the folder of {lmdb}, unpacked" if lmdb else found
        raise mismatch(path, f"images ({', '.join(SUFFIXES)})", found)
    images = _select(there, selection)
    if len(set(images)) < len(images):
        seen = set()
        twice = next(name for name in images if name in seen or seen.add(name))
        raise mismatch(path, "each name once", f"{twice} again", "pack it anew")
    top, classes, place = _layout([x for x in images if not archives.leads_outside(x)])

    def items():
        for member in members():
            if _is_image(member.name) and selection(member.name):
                name = member.name.removeprefix(top)
                content = archives.read_member(member)
                yield Item(escape(name if strip else member.name), content, *place(name))

    others, left_out = len(names) - len(there), len(there) - len(images)
    passed = f"; files passed over: {others:,}" if others else ""
    if selection != ALL_IMAGES:
        patterns = f"data.include={selection.include}, data.exclude={selection.exclude}"
        passed += f"; images left out by {patterns}: {left_out:,}"
    about = f"{len(images):,} images from {path.resolve().name}{passed}."
    return Source(items, tuple(map(escape, classes)), about, len(images))


def _select(images: list[str], selection: Selection) -> list[str]:
    """Returns the chosen names. Raises DataError for a pattern like none, and if all go."""
    like = f"they are like {images[0]}"
    for key, patterns in selection._asdict().items():
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in images):
                raise mismatch(f"data.{key}", "a pattern of some image", repr(pattern), like)
    chosen = list(filter(selection, images))
    if not chosen:
        raise mismatch("data.exclude", f"some of {len(images):,} images to stay", "none", like)
    return chosen


def _layout(names: list[str]) -> tuple[str, list[str], Callable[[str], tuple[int, str | None]]]:
    """Returns the top folders, the classes, and a function from a name below top to (label, split).

    The top folders are those that hold everything. Below them, folders `train` and `test` or `val`,
    and nothing else, are the splits. Then several folders without an image beside them are the
    classes. Folders below those mean nothing.
    """
    ends = min(names, default=""), max(names, default="")  # what they share, all names share
    top = posixpath.join(posixpath.commonpath(map(posixpath.dirname, ends)), "")
    names = [name.removeprefix(top) for name in names]
    folders, splits = _first_folders(names), {}
    if {"train"} < folders <= set(SPLIT_FOLDERS):
        splits = SPLIT_FOLDERS
        folders = _first_folders(name.partition("/")[2] for name in names)
    several = len(folders) > 1 and "" not in folders
    classes = sorted(folders, key=archives.byte_order) if several else []
    label = {folder: k for k, folder in enumerate(classes)}

    def place(name: str) -> tuple[int, str | None]:
        folder, _, rest = name.partition("/")
        split = splits.get(folder)
        return label.get(rest.partition("/")[0] if split else folder, 0), split

    return top, classes, place


def _first_folders(names: Iterable[str]) -> set[str]:
    """Returns the first folder of each name; '' for a file that lies in none."""
    return {name.partition("/")[0] if "/" in name else "" for name in names}


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not _is_junk(name)


def _is_junk(name: str) -> bool:
    """Returns whether a path is hidden, or left behind by a system; '..' is neither."""
    parts = name.split("/")
    return any(x in JUNK or (x.startswith(".") and x not in (".", "..")) for x in parts)


def _natural_order(name: str) -> tuple:
    """Returns a key that sorts numbers in names by value, of any length; then by bytes."""
    parts = re.split("([0-9]+)", name)
    digits = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(x), x) for x in digits]
    return parts, archives.byte_order(name)


def _lmdb(path: pathlib.Path) -> Source:
    """Opens LSUN as published (github.com/fyu/lsun): an LMDB whose values are files of images."""

    def items():
        with reading(path), _open_lmdb(path).begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                name = bytes(key).decode("latin-1")
                member = Member(name, len(value), "", functools.partial(io.BytesIO, value))
                yield Item(escape(name), archives.read_member(member), 0, None)

    with reading(path):
        n = _open_lmdb(path).stat()["entries"]
    if not n:
        raise mismatch(path, "images", "an empty LMDB")
    return Source(items, (), f"{n:,} images from {path.resolve().name}.", n)


def _open_lmdb(path: pathlib.Path):
    """Opens the LMDB in a folder for reading, once at a time in a process, as LMDB demands."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(f"{path}: an LMDB is read with lmdb: pip install lmdb") from error
    file = path / "data.mdb"
    if not file.is_file():
        raise DataError(f"{file}: expected a regular file")
    real = os.path.realpath(path)
    environment = _open_environments.get(real)
    if environment is None:
        environment = lmdb.open(real, readonly=True, lock=False, create=False, readahead=False)
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if (found := file.stat().st_size) < expected:
            environment.close()  # to read beyond the end of a mapped file ends the process
            raise mismatch(file, f"{expected:,} bytes", f"{found:,}", "get it anew")
        _open_environments[real] = environment
    return environment


_open_environments = weakref.WeakValueDictionary()


DIGITS = tuple("0123456789")
# In the order of the labels: github.com/zalandoresearch/fashion-mnist, README.
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

# Functions of (path, accept_incomplete, report); those that cannot be downloaded, of a Selection.
ORIGINS: dict[str, Callable[..., Source]] = {
    "cifar10": functools.partial(cifar, CIFAR10),
    "cifar100": functools.partial(cifar, CIFAR100),
    "mnist": functools.partial(idx, "MNIST", DIGITS),
    "fashion_mnist": functools.partial(idx, "Fashion-MNIST", CLOTHES),
    **dict.fromkeys(("folder", "zip", "tar", "npz", "lsun"), _images),
    "celebahq": _celebahq,
}
