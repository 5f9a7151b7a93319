"""Single files of any format, and how the Inception network's weights are found."""

import re

import pytest

from diffusion.convert import files
from diffusion.data.prepare.download import Remote
from diffusion.utils.errors import DDPMError, IntegrityError
from tests.convert.test_torch_file import VALUES, refused, saved
from tests.data.prepare.test_download import serve  # noqa: F401


def test_unknown_formats_are_refused(tmp_path):
    refused(files.read, tmp_path, "expected a file, found a folder")
    refused(files.read, tmp_path / "none", "expected a file, found nothing")
    path = tmp_path / "x"
    for content in (b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(20)):
        path.write_bytes(content)
        refused(
            files.read,
            path,
            "expected a file of safetensors, of PyTorch or a frozen TensorFlow graph",
        )


def test_the_published_file():
    """Its name carries the first digits of its digest, as torch.hub wants it."""
    assert files.INCEPTION.file == files.INCEPTION.url.rsplit("/", 1)[1]
    assert re.search(r"-([0-9a-f]{8})\.pth$", files.INCEPTION.file)[1] == files.INCEPTION.sha256[:8]
    assert len(files.INCEPTION.sha256) == 64


def test_inception_is_downloaded_once(tmp_path, monkeypatch, serve):  # noqa: F811
    remote, asked = serve(saved("zip"))
    monkeypatch.setattr(files, "INCEPTION", remote)
    for _ in range(2):
        assert files.inception(cache=str(tmp_path / "cache")).keys() == VALUES.keys()
    assert asked == [None]


def test_without_inception_weights_the_error_says_what_to_do(tmp_path, monkeypatch, serve):  # noqa: F811
    def failed(remote, *words, **arguments):
        monkeypatch.setattr(files, "INCEPTION", remote)
        with pytest.raises(DDPMError) as caught:
            files.inception(**arguments)
        text = str(caught.value)
        assert "\n" not in text and remote.url in text
        for word in (*words, "eval.inception=FILE", "fd_random and fd_pixels need no weights"):
            assert word in text, text

    cache = str(tmp_path / "cache")
    failed(Remote("x.pth", "http://127.0.0.1:1/x.pth", 9, "0" * 64), "refused", cache=cache)
    failed(serve(saved("zip"), sha256="0" * 64)[0], "expected SHA-256 000", cache=cache)
    failed(serve(saved("zip"), code=404)[0], "404", f"or a copy in {cache}", cache=cache)
    failed(files.INCEPTION, "found none")


def test_a_digest_in_the_name_is_checked(tmp_path):
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(saved("zip"))
    with pytest.raises(
        IntegrityError, match=r"begins with 6726825d, found .*; it is damaged"
    ) as error:
        files.inception(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    other = path.rename(tmp_path / "own.pth")
    assert files.inception(str(other)).keys() == VALUES.keys()
