"""Files that are written whole or not at all."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file that replaces `path` once it is complete; an error leaves `path` as it was.

    Missing folders are made. Raises OSError.
    """
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


def save_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def save_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text atomically."""
    save_bytes(path, text.encode("utf-8", "backslashreplace"))


def save_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON atomically; a ConfigDict as a dict, a NumPy scalar as a number."""

    def plain(x):
        return x.item() if isinstance(x, np.generic) else x.to_dict()

    save_text(path, json.dumps(content, indent=2, default=plain) + "\n")


def save_npz(path: str | os.PathLike, *arrays: np.ndarray, **named: np.ndarray) -> None:
    """Writes an uncompressed npz atomically; arrays without a name become arr_0, arr_1, ..."""
    with atomic_write(path) as file:
        np.savez(file, *arrays, **named)
