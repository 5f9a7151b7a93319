"""Object stores such as Google Cloud Storage and S3, through fsspec.

Objects are written and read whole. A failure is an OSError, as for a local file; those of gs://
have a text, and come after a bounded time.
Nothing is imported before the first path with a scheme is met.
"""

import asyncio
import errno
import functools
import importlib
import os
import time
from typing import Any

from diffusion.utils.errors import ConfigError, one_line

STORES = {  # of each scheme: what to import, and what to install
    "gs": (("gcsfs", "google.cloud.storage"), "gcsfs google-cloud-storage"),
    "s3": (("s3fs",), "s3fs"),
    "az": (("adlfs",), "adlfs"),
}
REQUEST_S = 300.0  # longest time of one request with its repetitions
FIRST_REQUEST_S = 10.0  # at the start and after a failure, until there is an answer
DOWN_S = 5.0  # after a request without an answer, others fail at once for so long

_deadline_s = FIRST_REQUEST_S
_down_until_s, _down_text = 0.0, ""


def scheme_of(path: str | os.PathLike) -> str:
    """Returns gs for gs://bucket/name, and "" for a local path."""
    scheme, separator, _ = os.fspath(path).partition("://")
    return scheme if separator else ""


@functools.cache
def connect(scheme: str) -> Any:
    """Returns the fsspec file system of a scheme. Raises ConfigError without its packages."""
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise ConfigError(f"{scheme}://: expected a folder, or one of {known}, found neither")
    modules, packages = STORES[scheme]
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        wanted = f"expected the packages {packages}, found no {error.name or packages}"
        raise ConfigError(f"{scheme}://: {wanted}; pip install {packages}") from error
    os.environ.setdefault("EPATH_USE_TF", "false")  # etils would prefer an installed TensorFlow
    import fsspec

    for name in (scheme, "gcs") if scheme == "gs" else (scheme,):
        # Another process may have written what a cached listing lacks.
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
        if scheme == "gs":
            fsspec.register_implementation(name, _gcs_class(), clobber=True)
    if scheme == "gs" and "token" not in fsspec.config.conf["gcs"]:  # FSSPEC_GCS_TOKEN
        fsspec.config.conf["gs"].setdefault("token", _gcs_token())
    return fsspec.filesystem(scheme)


def _gcs_token() -> str:
    """Returns gcsfs's name of Google's default credentials, or of none where there are none.

    gcsfs's own search goes on to ask a server of Google's machines, elsewhere for 16 seconds.
    Raises ConfigError where GOOGLE_APPLICATION_CREDENTIALS names a file that is no credentials.
    """
    import google.auth.exceptions

    try:
        google.auth.default()
    except google.auth.exceptions.GoogleAuthError as error:
        if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            wanted = f"expected a file of credentials, found {named}: {one_line(error)}"
            raise ConfigError(
                f"GOOGLE_APPLICATION_CREDENTIALS: {wanted}; unset it, or name another"
            ) from error
        return "anon"
    return "google_default"


@functools.cache
def _gcs_class() -> type:
    import logging

    import gcsfs.core
    import gcsfs.retry

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it also raises

    # The class that gcsfs has for buckets of other kinds asks for a bucket's kind without a limit.
    class GCSFileSystem(gcsfs.core.GCSFileSystem):
        """gcsfs's own, but that each error is an OSError with a text, after a bounded time."""

        async def _isdir(self, path):
            try:
                return (await self._info(path))["type"] == "directory"
            except FileNotFoundError:  # any other error means that it is not known
                return False

        async def _call(self, method, path, *args, **kwargs):
            if time.monotonic() < _down_until_s:
                raise OSError(errno.EIO, _down_text)
            try:
                call = super()._call(method, path, *args, **kwargs)
                answer = await asyncio.wait_for(call, _deadline_s)
                _note_answer()
                return answer
            except FileNotFoundError as error:
                raise FileNotFoundError(errno.ENOENT, "no such object or bucket") from error
            except FileExistsError as error:
                raise FileExistsError(errno.EEXIST, "the object exists") from error
            except Exception as error:  # of asyncio, aiohttp, google.auth and gcsfs
                text = one_line(error) or "no answer"
                if isinstance(error, TimeoutError) or gcsfs.retry.is_retriable(error):
                    _note_failure(text)
                code = errno.EACCES if "Forbidden" in text else errno.EIO
                # No TimeoutError: fsspec would replace it by one without a text.
                raise OSError(code, text) from error

    return GCSFileSystem


def _note_answer() -> None:
    global _deadline_s
    _deadline_s = REQUEST_S


def _note_failure(text: str) -> None:
    """Makes an absent store cost a save seconds, and not seconds for each of its requests."""
    global _deadline_s, _down_until_s, _down_text
    _deadline_s, _down_until_s, _down_text = FIRST_REQUEST_S, time.monotonic() + DOWN_S, text
