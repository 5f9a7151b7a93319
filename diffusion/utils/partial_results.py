"""Resumable passes: what is accumulated over a set so far, kept on disk under its setting."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from diffusion.utils import io

SAVE_EVERY_S = 10.0  # seconds between two saves of a pass


def save(path: str | os.PathLike, setting: str, **arrays: Any) -> None:
    """Writes the arrays atomically, together with the setting that they follow from."""
    io.save_npz(path, setting=np.asarray(_label(setting, arrays)), **arrays)


def load(path: str | os.PathLike | None, setting: str) -> dict[str, np.ndarray] | None:
    """Returns the arrays that `save` wrote with the same setting, else None.

    A file that is missing, damaged or of another setting is None too: the pass starts anew.
    """
    if path is None:
        return None
    try:
        with io.open_binary(path) as content, np.load(content) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays if str(arrays.pop("setting")) == _label(setting, arrays) else None
    except Exception:  # a damaged zip file raises almost anything
        return None


def _label(setting: str, names: Iterable[str]) -> str:
    """Names the arrays too: a damaged directory of a zip file hides some of them."""
    return f"{setting}; {', '.join(sorted(names))}"
