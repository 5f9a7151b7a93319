"""Files of weights of any kind -> {name: array}, and where the published ones are had from."""

import hashlib
import os
import pathlib
import re

import numpy as np

from diffusion.convert import frozen_graph, inception_names, safetensors_file, torch_file
from diffusion.data.prepare.archives import Report, SourceError
from diffusion.data.prepare.download import Remote, download
from diffusion.utils.errors import IntegrityError

GRAPH = b"\x0a"  # a GraphDef begins with its first node
MOST_GRAPH = 2**30  # bytes: a message is parsed as a whole

# torch-fidelity's file; pytorch-fid's pt_inception-2015-12-05-6726825d.pth is the same, byte for
# byte (github.com/mseitzer/pytorch-fid/releases/tag/fid_weights).
INCEPTION = Remote(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
GIVE = "eval.inception=FILE"
WITHOUT = "fd_random and fd_pixels need no weights"


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, of PyTorch's (.pth, either layout) or a frozen graph (.pb).

    The kind is told by the first bytes. Raises WeightsError naming the file: it is not there, not
    whole, not what it claims, holds NaN, or is of another kind.
    """
    path = pathlib.Path(path).expanduser()
    try:
        return _read(path)
    except IntegrityError as error:
        raise IntegrityError(f"{path}: {error}") from error
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise IntegrityError(f"expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    with open(path, "rb") as file:
        start = file.read(torch_file.START)
        if start[8:9] == b"{":
            return safetensors_file.read(path)
        if torch_file.is_pytorch(start):
            file.seek(0)
            return torch_file.read(file)
        if start.startswith(GRAPH) and path.stat().st_size <= MOST_GRAPH:
            return frozen_graph.read(start + file.read())
    expected = "expected a file of safetensors, of PyTorch or a frozen TensorFlow graph"
    raise IntegrityError(f"{expected}, found one that begins with {start[:4]!r}")




def inception(
    path: str = "", cache: str = "", report: Report = lambda *progress: None
) -> dict[str, np.ndarray]:
    """{torch-fidelity's name: array}, for `convert.from_inception`, which checks names and shapes.

    path: a file of PyTorch, of safetensors with the same names, or the frozen graph of 2015. One
        whose name ends in a digest, as the published one's does, must have it.
    cache: the folder that the published file, 96 MB, is downloaded into on first use; its SHA-256
        is checked on every use.
    Raises WeightsError: one line, with what to fetch and where to put it.
    """
    if path:
        _check_digest(pathlib.Path(path).expanduser())
        return _named(read(path))
    if not cache:
        fetch = f"fetch {INCEPTION.url} and give {GIVE}"
        raise IntegrityError(f"the Inception network's weights are not here: {fetch}; {WITHOUT}")
    found = pathlib.Path(cache).expanduser() / INCEPTION.file
    try:
        download(INCEPTION, found, report, f"{GIVE} of a copy")
    except SourceError as error:
        raise IntegrityError(f"{error}, or put it at {found}; {WITHOUT}") from error
    return _named(read(found))


def _named(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    graph = inception_names.LOGITS["fc.weight"][0] in arrays
    return inception_names.from_tensorflow(arrays) if graph else arrays


def _check_digest(path: pathlib.Path) -> None:
    """NAME-6726825d.pth: the first digits of the SHA-256, as torch.hub names its files."""
    stated = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if stated and path.is_file():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not found.startswith(stated[1]):
            expected = f"expected a SHA-256 that begins with {stated[1]}, found {found[:8]}"
            raise IntegrityError(f"{path}: {expected}; it is damaged: fetch {INCEPTION.url} again")
