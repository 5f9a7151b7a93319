"""Downloads: taken up where they broke, checked by size and SHA-256, and only then named.

What has come lies in NAME.part until the digest is right; a later call goes on from there.
"""

import contextlib
import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

from diffusion.data.prepare.archives import CHUNK, Report, SourceError, line

TIMEOUT = 60  # seconds without a byte
TRIES = 10  # connections, as long as each brings something


class Remote(NamedTuple):
    """A file that can be downloaded, and what it is known to be. file: its name here."""

    file: str
    url: str
    size: int
    sha256: str


class _Broken(SourceError):
    """A connection that ended too soon: what has come is good, and the rest can be asked for."""


def download(
    remote: Remote,
    path: pathlib.Path,
    report: Report,
    instead: str = "data.archive=PATH of a copy",
) -> None:
    """Makes `path` the file described, unless it is. Raises SourceError naming the address.

    A file that is here is taken for what it is only after its digest was computed, 0.2 s for CIFAR.
    instead: what a user may give who has the file already, for the error's advice.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        if _size(path) == remote.size and _sha256(path) == remote.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.is_symlink():
            part.unlink()  # nothing is written outside of the folder
        _complete(remote, part, report)
        if (found := _sha256(part)) != remote.sha256:
            part.unlink()
            raise SourceError(f"expected SHA-256 {remote.sha256}, found {found}; it was removed")
        os.replace(part, path)
    except SourceError as error:
        advice = f"try again, or give {instead}"
        raise SourceError(f"{remote.url}: {error}; {advice}") from error
    except OSError as error:
        what = f"{part}: cannot be written: {line(error)}; it was to hold {remote.url}"
        advice = f"make room, choose another folder, or give {instead}"
        raise SourceError(f"{what}; {advice}") from error


def _complete(remote: Remote, part: pathlib.Path, report: Report) -> None:
    """Transfers until all is there, over several connections as long as each brings something."""
    for left in reversed(range(TRIES)):
        before = _size(part)
        if before == remote.size:
            return
        try:
            return _transfer(remote, part, before if before < remote.size else 0, report)
        except _Broken:
            if not left or _size(part) <= before:
                raise


def _transfer(remote: Remote, part: pathlib.Path, have: int, report: Report) -> None:
    """One connection: adds to `part` what is missing, or all if the server only sends all."""
    response = _answer(remote.url, have)
    goes_on = f"bytes {have}-{remote.size - 1}/{remote.size}"
    if response.status == 206 and response.headers["Content-Range"] == goes_on:
        mode = "ab"
    else:
        if response.status != 200:
            response.close()
            response = _answer(remote.url)
        mode, have = "wb", 0
    with response:
        if (length := response.headers["Content-Length"]) not in (None, str(remote.size - have)):
            found = f"{length} of {response.headers.get_content_type()}"
            raise SourceError(f"expected {remote.size - have} bytes, found {found}")
        with open(part, mode) as file:
            while have < remote.size:
                with _network():
                    chunk = response.read(min(CHUNK, remote.size - have))
                if not chunk:
                    raise _Broken(f"expected {remote.size} bytes, the connection ended at {have}")
                file.write(chunk)
                have += len(chunk)
                report(f"downloading {remote.file}", have, remote.size)


def _answer(url: str, have: int = 0) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """The server's answer to a request for all but the first `have` bytes. May be a 416."""
    headers = {"User-Agent": "ddpm"} | ({"Range": f"bytes={have}-"} if have else {})
    with _network():
        try:
            request = urllib.request.Request(url, headers=headers)
            return urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if have and error.code == 416:  # it has fewer bytes than we: not what we began with
                return error
            error.close()
            raise SourceError(f"the server answers {error.code} {error.reason}") from error


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Broken(line(getattr(error, "reason", None) or error)) from error


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()



MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist"
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"  # the digests hold

# Sizes and digests: tensorflow_datasets 4.9.10, url_checksums/{cifar10,cifar100,mnist,...}.txt.
REMOTES: dict[str, tuple[Remote, ...]] = {
    "cifar10": (
        Remote(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
    "cifar100": (
        Remote(
            "cifar-100-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
    "mnist": (
        Remote(
            "mnist/train-images-idx3-ubyte.gz",
            f"{MNIST}/train-images-idx3-ubyte.gz",
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        Remote(
            "mnist/train-labels-idx1-ubyte.gz",
            f"{MNIST}/train-labels-idx1-ubyte.gz",
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        Remote(
            "mnist/t10k-images-idx3-ubyte.gz",
            f"{MNIST}/t10k-images-idx3-ubyte.gz",
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        Remote(
            "mnist/t10k-labels-idx1-ubyte.gz",
            f"{MNIST}/t10k-labels-idx1-ubyte.gz",
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "fashion_mnist": (
        Remote(
            "fashion_mnist/train-images-idx3-ubyte.gz",
            f"{FASHION_MNIST}/train-images-idx3-ubyte.gz",
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Remote(
            "fashion_mnist/train-labels-idx1-ubyte.gz",
            f"{FASHION_MNIST}/train-labels-idx1-ubyte.gz",
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Remote(
            "fashion_mnist/t10k-images-idx3-ubyte.gz",
            f"{FASHION_MNIST}/t10k-images-idx3-ubyte.gz",
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Remote(
            "fashion_mnist/t10k-labels-idx1-ubyte.gz",
            f"{FASHION_MNIST}/t10k-labels-idx1-ubyte.gz",
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
}
