"""Reads single files of weights of any format, and finds those of the FID Inception network."""

import hashlib
import os
import pathlib
import re

import numpy as np

from diffusion.convert import frozen_graph, inception_names, safetensors_file, torch_file
from diffusion.convert.validation import integrity_errors
from diffusion.data.prepare.download import Remote, download
from diffusion.utils.errors import IntegrityError

# torch-fidelity's file; pytorch-fid's pt_inception-2015-12-05-6726825d.pth has the same bytes
# (github.com/mseitzer/pytorch-fid/releases/tag/fid_weights).
INCEPTION = Remote(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
INSTEAD = "eval.inception=FILE"
WITHOUT = "fd_random and fd_pixels need no weights"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, of PyTorch's (either layout) or a frozen graph.

    The format is recognised by the first bytes. Raises IntegrityError naming the file if it is
    missing, damaged, holds NaN, or has another format.
    """
    path = pathlib.Path(path).expanduser()
    with integrity_errors(path):
        if not path.is_file():
            raise ValueError(f"expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
        with path.open("rb") as file:
            start = file.read(64)
        if start[8:9] == b"{":
            return safetensors_file.read(path)
        if torch_file.is_pytorch(start):
            return torch_file.read(path)
        if start.startswith(b"\x0a"):  # the first node of a GraphDef
            return frozen_graph.read(path)
        expected = "a file of safetensors, of PyTorch or a frozen TensorFlow graph"
        raise ValueError(f"expected {expected}, found one that begins with {start[:4]!r}")


def inception(path: str = "", cache: str = "") -> dict[str, np.ndarray]:
    """Returns {torch-fidelity's name: array}, for `convert.from_inception`, which checks them.

    Args:
      path: a file of PyTorch, of safetensors with the same names, or the frozen graph of 2015. A
        digest in its name, as in the published file's, is checked.
      cache: folder that the published file (96 MB) is downloaded into; checked on every use.

    Raises: IntegrityError or the download's DataError, which say what to do instead.
    """
    if path:
        found = pathlib.Path(path).expanduser()
        _check_digest(found)
    elif cache:
        found = pathlib.Path(cache).expanduser() / INCEPTION.file
        instead = f"{INSTEAD} or a copy in {found.parent}; {WITHOUT}"
        download(INCEPTION, found, lambda *progress: None, instead)
    else:
        how = f"fetch {INCEPTION.url} and give {INSTEAD}; {WITHOUT}"
        raise IntegrityError(f"eval.inception: expected the network's weights, found none; {how}")
    arrays = read(found)
    is_graph = inception_names.LOGITS["fc.weight"][0] in arrays
    return inception_names.from_tensorflow(arrays) if is_graph else arrays


def _check_digest(path: pathlib.Path) -> None:
    """Checks the first digits of the SHA-256 in a name like torch.hub's, NAME-6726825d.pth."""
    stated = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if stated and path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(stated[1]):
            expected = f"expected a SHA-256 that begins with {stated[1]}, found {found[:8]}"
            raise IntegrityError(f"{path}: {expected}; it is damaged: fetch {INCEPTION.url} again")
