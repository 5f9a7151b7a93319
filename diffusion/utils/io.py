"""Files that are written whole or not at all, on a local file system or in an object store.

Locally a file gets its name once it is complete. An object store knows whole objects only: what is
written there replaces the object at once, and folders are no more than the names of their objects.
Nothing else asks which of the two it is.
"""

import atexit
import contextlib
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from diffusion.utils import logging, object_store
from diffusion.utils.errors import ConfigError, DataError, error_text

PathLike = str | os.PathLike
MAGIC = frozenset("*?[]")  # of patterns, which fsspec looks for in every name


def to_path(name: PathLike) -> epath.Path:
    """Returns the path that a user has named, with ~ expanded: a pathlib.Path, or gs://bucket/name.

    Raises ConfigError for an unknown scheme and for one whose packages are not installed.
    """
    name = os.path.expanduser(name)
    if scheme := object_store.scheme_of(name):
        object_store.connect(scheme)
        if not name.partition("://")[2].strip("/") or MAGIC & set(name):
            wanted = "expected a name in a bucket, without * ? [ ]"
            raise ConfigError(f"{name}: {wanted}, as in {scheme}://bucket/name")
        return epath.Path(name.rstrip("/"))
    if name.startswith(tuple(f"{scheme}:/" for scheme in object_store.STORES)):
        raise ConfigError(f"{name}: expected two slashes, as in gs://bucket/name, found one")
    return pathlib.Path(name)  # etils would take /gs/name for gs://name


def is_object_store(path: PathLike) -> bool:
    """Returns whether the path is in an object store."""
    return bool(object_store.scheme_of(path))


def absolute(path: PathLike) -> epath.Path:
    """Returns the path, a local one from the root."""
    path = to_path(path)
    return path if is_object_store(path) else path.resolve()


def _store(path: PathLike) -> Any:
    return object_store.connect(object_store.scheme_of(path))


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` once it is complete; an error leaves `path` as it was.

    Missing folders are made. Raises OSError.
    """
    if is_object_store(path):
        file = io.BytesIO()
        yield file
        _store(path).pipe_file(os.fspath(path), file.getvalue())
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: the same file system
    try:
        with open(new, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a name must not outlive a power cut that its bytes did not
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def create(path: PathLike, content: bytes) -> bool:
    """Writes an object unless there is one; returns whether it did, as one of several writers does.

    The content must be the caller's alone. Raises OSError.
    """
    try:
        _store(path).pipe_file(os.fspath(path), content, mode="create")
    except FileExistsError:  # also of a repeated request whose first answer was lost
        return read_bytes(path) == content
    return True


def try_writing(folder: PathLike) -> None:
    """Makes a folder, writes a file into it and removes that again. Raises OSError."""
    path = to_path(folder) / ".probe"
    save_text(path, "")
    path.unlink()


def read_bytes(path: PathLike) -> bytes:
    """Returns the content of a file or an object. Raises OSError."""
    if is_object_store(path):
        return _store(path).cat_file(os.fspath(path))
    return pathlib.Path(path).read_bytes()


def open_binary(path: PathLike) -> BinaryIO:
    """Opens a file to read it; an object is read whole. Raises OSError."""
    return io.BytesIO(read_bytes(path)) if is_object_store(path) else open(path, "rb")


def files_in(folder: PathLike) -> list[str]:
    """Returns the names of all files below a folder, sorted, with / between their parts."""
    folder = os.fspath(folder)
    if is_object_store(folder):
        top = folder.partition("://")[2].rstrip("/") + "/"
        return sorted(name.removeprefix(top) for name in _store(folder).find(folder))
    paths = pathlib.Path(folder).rglob("*")
    return sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())


def local_copy(name: PathLike) -> pathlib.Path:
    """Returns a local path to what a user has named: itself, or a copy until this process ends.

    Raises ConfigError, as `to_path`, and DataError.
    """
    path = to_path(name)
    if not is_object_store(path):
        return pathlib.Path(path)
    store, path = _store(path), os.fspath(path)
    copy = pathlib.Path(_temporary_folder()) / os.path.basename(path)
    logging.info(f"copying    {path} to {copy.parent}")
    try:
        store.get(path, str(copy), recursive=not store.isfile(path))
    except Exception as error:  # downloads of gcsfs raise its own errors
        raise DataError(f"{path}: cannot be read: {error_text(error)}") from error
    return copy


def _temporary_folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="ddpm-", ignore_cleanup_errors=True)
    atexit.register(folder.cleanup)
    return folder.name


def remove_folder(folder: PathLike) -> None:
    """Removes a folder and all that is below it; none is no error. Raises OSError."""
    if is_object_store(folder):
        for name in files_in(folder):
            _store(folder).rm_file(f"{os.fspath(folder)}/{name}")
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def free_bytes(folder: PathLike) -> int | None:
    """Returns the room on a folder's disk; None in an object store, which has no end."""
    return None if is_object_store(folder) else shutil.disk_usage(folder).free


def staging_folder(folder: epath.Path) -> epath.Path:
    """Returns where a folder's files are to be written before `publish_folder`.

    In an object store, where nothing can be renamed at once, it is the folder itself.
    """
    return folder if is_object_store(folder) else folder.with_name(f".{folder.name}.unfinished")


def publish_folder(staged: epath.Path, folder: epath.Path) -> None:
    """Gives a staging folder its name. Raises OSError if there are files of that name."""
    if staged != folder:
        os.replace(staged, folder)


def upload_folder(local: pathlib.Path, folder: PathLike, last: str = "") -> None:
    """Copies all files of a local folder into an object store, `last` at the end.

    Raises OSError.
    """
    for name in sorted(files_in(local), key=lambda name: (name == last, name)):
        _store(folder).put_file(str(local / name), f"{os.fspath(folder)}/{name}")


def save_bytes(path: PathLike, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def save_text(path: PathLike, text: str) -> None:
    """Writes a UTF-8 text atomically."""
    save_bytes(path, text.encode("utf-8", "backslashreplace"))


def save_json(path: PathLike, content: Any) -> None:
    """Writes JSON atomically; a ConfigDict as a dict, a NumPy scalar as a number."""

    def plain(x):
        return x.item() if hasattr(x, "item") else x.to_dict()

    save_text(path, json.dumps(content, indent=2, default=plain) + "\n")


def save_npz(path: PathLike, *arrays: Any, **named: Any) -> None:
    """Writes an uncompressed npz atomically; arrays without a name become arr_0, arr_1, ..."""
    import numpy as np  # not for --help

    with atomic_write(path) as file:
        np.savez(file, *arrays, **named)
