"""Resumable passes: what is accumulated over a set so far, kept on disk under its setting."""

import os
import zipfile
from typing import Any

import numpy as np

from diffusion.utils import io

SAVE_EVERY_S = 10.0  # seconds between two saves of a pass


def save(path: str | os.PathLike, setting: str, **arrays: Any) -> None:
    """Writes the arrays atomically, together with the setting that they follow from."""
    io.save_npz(path, setting=np.asarray(setting), **arrays)


def load(path: str | os.PathLike | None, setting: str) -> dict[str, np.ndarray] | None:
    """Returns the arrays that `save` wrote with the same setting, else None.

    A file that is missing, damaged or of another setting is None too: the pass starts anew.
    """
    if path is None:
        return None
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays if str(arrays.pop("setting")) == setting else None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
