"""Downloads files, resuming broken transfers, and checks their size and SHA-256.

What has come lies in NAME.part until its digest is right; a later call resumes from there.
"""

import contextlib
import hashlib
import http.client
import importlib.util
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import NamedTuple

from diffusion.data.prepare.archives import CHUNK, Report
from diffusion.utils.errors import DataError, error_text

TIMEOUT_S = 60  # without a byte
MAX_CONNECTIONS = 10  # as long as each brings something


class Remote(NamedTuple):
    """A file that can be downloaded; `file` is its name here."""

    file: str
    url: str
    size: int
    sha256: str


class _ConnectionLost(DataError):
    """A connection that ended too soon: what has come is good, and the rest can be requested."""


def download(
    remote: Remote,
    path: pathlib.Path,
    report: Report,
    instead: str = "data.archive=PATH of a copy",
) -> None:
    """Makes `path` the file described, unless it is already.

    report is called with the bytes so far; `instead` names the setting for a copy of the file.
    Raises DataError naming the address.
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
            wanted = f"expected SHA-256 {remote.sha256[:16]}, found {found[:16]}"
            raise DataError(f"{wanted}; it was removed")
        os.replace(part, path)
    except DataError as error:
        raise DataError(f"{remote.url}: {error}; try again, or give {instead}") from error
    except OSError as error:
        what = f"{part}: cannot be written: {error_text(error)}; it was to hold {remote.url}"
        advice = f"make room, choose another folder, or give {instead}"
        raise DataError(f"{what}; {advice}") from error


def _complete(remote: Remote, part: pathlib.Path, report: Report) -> None:
    """Transfers until all is there, over several connections as long as each brings something."""
    for left in reversed(range(MAX_CONNECTIONS)):
        before = _size(part)
        if before == remote.size:
            return
        try:
            return _transfer(remote, part, before if before < remote.size else 0, report)
        except _ConnectionLost:
            if not left or _size(part) <= before:
                raise


def _transfer(remote: Remote, part: pathlib.Path, have: int, report: Report) -> None:
    """Adds to `part` what is missing, or writes all of it if the server cannot send a part."""
    response = _request(remote.url, have)
    resumes = f"bytes {have}-{remote.size - 1}/{remote.size}"
    if response.status == 206 and response.headers["Content-Range"] == resumes:
        mode = "ab"
    else:
        if response.status != 200:
            response.close()
            response = _request(remote.url)
        mode, have = "wb", 0
    with response:
        if (length := response.headers["Content-Length"]) not in (None, str(remote.size - have)):
            found = f"{length} of {response.headers.get_content_type()}"
            raise DataError(f"expected {remote.size - have} bytes, found {found}")
        with open(part, mode) as file:
            while have < remote.size:
                with _network_errors():
                    chunk = response.read(min(CHUNK, remote.size - have))
                if not chunk:
                    text = f"expected {remote.size} bytes, the connection ended at {have}"
                    raise _ConnectionLost(text)
                file.write(chunk)
                have += len(chunk)
                report(f"downloading {remote.file}", have, remote.size)


def _request(url: str, have: int = 0) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """Asks the server for all but the first `have` bytes; the answer may be a 416."""
    headers = {"User-Agent": "ddpm"} | ({"Range": f"bytes={have}-"} if have else {})
    with _network_errors():
        try:
            request = urllib.request.Request(url, headers=headers)
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if have and error.code == 416:  # it has fewer bytes than we: another file
                return error
            error.close()
            raise DataError(f"the server answers {error.code} {error.reason}") from error


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _ConnectionLost(error_text(getattr(error, "reason", None) or error)) from error


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def published_files(name: str) -> tuple[Remote, ...]:
    """Returns the files of a data set in DOWNLOADS, with the sizes and digests that TFDS keeps."""
    if name not in DOWNLOADS:
        return ()
    package = importlib.util.find_spec("tensorflow_datasets").origin  # found, not imported
    table = pathlib.Path(package).with_name("url_checksums") / f"{name}.txt"
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    folder = f"{name}/" if len(rows) > 1 else ""  # MNIST and Fashion-MNIST share names of files
    return tuple(Remote(folder + file, url, int(size), sha) for url, size, sha, file in rows)


DOWNLOADS = ("cifar10", "cifar100", "mnist", "fashion_mnist")
