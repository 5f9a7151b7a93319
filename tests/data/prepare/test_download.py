"""Downloads from a local server that cuts connections, lies and refuses."""

import hashlib
import http.server
import os
import threading

import pytest

from diffusion.data.prepare import download, sources
from diffusion.data.prepare.sources import open_source
from diffusion.utils.errors import DataError
from tests.data.prepare.test_array_formats import cifar10, cifar_files, mnist
from tests.data.prepare.test_sources import noise


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`, as far as `cuts` lets it: bytes per connection, while there are any."""

    content, ranges, cuts, code, asked = b"", True, [], 200, []
    length = True  # is told beforehand
    lie = ""  # a Content-Range that is not the one asked for

    def do_GET(self):
        asked = self.headers["Range"]
        self.asked.append(asked)
        start = int(asked[6:-1]) if asked and self.ranges else 0
        if self.code != 200:
            return self.send_error(self.code)
        if start and start >= len(self.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            last = len(self.content) - 1
            self.send_header("Content-Range", self.lie or f"bytes {start}-{last}/{last + 1}")
        if self.length:
            self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        cut = self.cuts.pop(0) if self.cuts else len(self.content)
        self.wfile.write(self.content[start : start + cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """serve(content, ...) -> (Remote, the ranges that were asked for)"""
    running = []

    def serve(content, sha256="", size=None, **settings):
        handler = type("Handler", (Server,), {"content": content, "asked": [], **settings})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        url = f"http://127.0.0.1:{server.server_port}/x.tar.gz"
        sha256 = sha256 or hashlib.sha256(content).hexdigest()
        size = len(content) if size is None else size
        return download.Remote("x.tar.gz", url, size, sha256), handler.asked

    yield serve
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def quiet(*args):
    pass


def failed(remote, path):
    with pytest.raises(DataError) as caught:
        download.download(remote, path, quiet)
    text = str(caught.value)
    assert "\n" not in text and remote.url in text and "give data.archive=PATH of a copy" in text
    return text


def test_download(tmp_path, serve):
    content, seen, path = noise(3 * 2**20 + 5), [], tmp_path / "new" / "x.tar.gz"
    remote, asked = serve(content)
    download.download(remote, path, lambda *x: seen.append(x))
    assert path.read_bytes() == content and os.listdir(path.parent) == ["x.tar.gz"]
    assert seen == [("downloading x.tar.gz", min(k * 2**20, len(content)), len(content))
                    for k in (1, 2, 3, 4)]  # fmt: skip
    download.download(remote, path, quiet)
    assert asked == [None]  # it was there
    path.write_bytes(content[:-1] + b"?")  # of the right size
    download.download(remote, path, quiet)
    assert asked == [None, None] and path.read_bytes() == content


def test_download_goes_on_where_it_broke(tmp_path, serve):
    content, path = noise(10_000), tmp_path / "x"
    remote, asked = serve(content, cuts=[4000, 3000])
    download.download(remote, path, quiet)  # by itself, as long as each try brings something
    assert asked == [None, "bytes=4000-", "bytes=7000-"] and path.read_bytes() == content


def test_download_goes_on_in_a_later_call(tmp_path, serve):
    content, path = noise(10_000), tmp_path / "x"
    remote, asked = serve(content, cuts=[4000, 0])
    assert "expected 10000 bytes, the connection ended at 4000" in failed(remote, path)
    assert os.listdir(tmp_path) == ["x.part"]
    assert (tmp_path / "x.part").read_bytes() == content[:4000]
    download.download(remote, path, quiet)
    assert asked == [None, "bytes=4000-", "bytes=4000-"]
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "settings", [{"ranges": False}, {"lie": "bytes 0-9999/10000"}, {"lie": "bytes 4000-9999/*"}]
)
def test_download_starts_anew_where_the_server_does_not_go_on(tmp_path, serve, settings):
    content, path = noise(10_000), tmp_path / "x"
    (tmp_path / "x.part").write_bytes(b"?" * 4000)
    remote, asked = serve(content, **settings)
    download.download(remote, path, quiet)
    assert asked[0] == "bytes=4000-" and path.read_bytes() == content


def test_download_of_what_came_whole_but_was_not_named_yet(tmp_path, serve):
    content, path = noise(10_000), tmp_path / "x"
    (tmp_path / "x.part").write_bytes(content)
    remote, asked = serve(content)
    download.download(remote, path, quiet)
    assert asked == [] and path.read_bytes() == content and os.listdir(tmp_path) == ["x"]


def test_download_takes_no_more_than_it_should(tmp_path, serve):
    content, path = noise(10_000), tmp_path / "x"
    remote, _ = serve(content + b"more", size=10_000, length=False)
    digest = hashlib.sha256(content).hexdigest()
    download.download(remote._replace(sha256=digest), path, quiet)
    assert path.read_bytes() == content


def test_download_of_a_part_that_is_too_long_or_elsewhere(tmp_path, serve):
    content, path, part = noise(10_000), tmp_path / "in" / "x", tmp_path / "in" / "x.part"
    part.parent.mkdir()
    remote, asked = serve(content)
    part.write_bytes(b"?" * 10_001)
    download.download(remote, path, quiet)
    path.unlink()
    (tmp_path / "mine").write_bytes(b"mine")
    part.symlink_to(tmp_path / "mine")  # nothing is written through it
    download.download(remote, path, quiet)
    assert asked == [None, None] and path.read_bytes() == content
    assert (tmp_path / "mine").read_bytes() == b"mine"
    part.write_bytes(b"?" * 9_999)
    path.unlink()
    remote, asked = serve(content[:9_000], size=10_000)  # 416: fewer than are here
    assert "expected 10000 bytes, found 9000 of " in failed(remote, path)
    assert asked == ["bytes=9999-", None]


def test_download_that_is_not_what_it_should_be(tmp_path, serve):
    content, path = noise(10_000), tmp_path / "x"
    path.write_bytes(b"old")
    remote, _ = serve(content, sha256="0" * 64)
    digest = hashlib.sha256(content).hexdigest()
    text = failed(remote, path)
    assert f"expected SHA-256 {'0' * 16}, found {digest[:16]}; it was removed" in text
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    remote, _ = serve(b"<html>", size=10_000)
    assert "expected 10000 bytes, found 6 of text/plain" in failed(remote, path)
    remote, _ = serve(content, code=404)
    assert "the server answers 404 Not Found" in failed(remote, path)
    remote, _ = serve(content, code=503)
    assert "the server answers 503 Service Unavailable" in failed(remote, path)
    assert "Connection refused" in failed(remote._replace(url="http://127.0.0.1:1/x"), path)
    assert "unknown url type" in failed(remote._replace(url="nonsense://x"), path)
    assert path.read_bytes() == b"old"


def test_download_to_a_full_disk(tmp_path, serve):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    remote, _ = serve(noise(10_000))
    with open("/dev/full", "wb", buffering=0) as full:
        real = open

        def opened(path, mode="r", *args):
            return real(full.fileno(), mode, closefd=False) if "b" in mode else real(path, mode)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(download, "open", opened, raising=False)
            text = failed(remote, tmp_path / "x")
    assert "x.part: cannot be written: No space left on device; it was to hold" in text
    (tmp_path / "file").write_bytes(b"")
    assert "x.part: cannot be written: File exists; it was to hold" in failed(
        remote, tmp_path / "file" / "x"
    )


def test_open_source_downloads_what_is_not_there(tmp_path, serve, monkeypatch):
    files = mnist_files = tmp_path / "made"
    files.mkdir()
    made = mnist(mnist_files)
    remotes, asked = [], []
    for name in sorted(os.listdir(files)):
        remote, requests = serve((files / name).read_bytes())
        remotes.append(remote._replace(file=f"mnist/{name}"))
        asked.append(requests)
    archive = cifar10(tmp_path / "c", cifar_files()).read_bytes()
    remote, requests = serve(archive)
    known = {"mnist": tuple(remotes), "cifar10": (remote,)}
    monkeypatch.setattr(sources, "published_files", known.__getitem__)
    for _ in range(2):
        source = open_source("mnist", downloads=str(tmp_path / "d"), accept_incomplete=True)
        assert [x.label for x in source.items()][:4] == made["train"][1].tolist()
        source = open_source("cifar10", "", str(tmp_path / "d"), accept_incomplete=True)
        assert len(list(source.items())) == 18
    assert asked == [[None]] * 4 and requests == [None]
    assert sorted(os.listdir(tmp_path / "d")) == ["mnist", "x.tar.gz"]


# Of the published files, as TensorFlow Datasets 4.9.10 and other loaders list them.
SHA256 = {
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd": "cifar-10-binary.tar.gz",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec": "cifar-100-binary.tar.gz",
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609":
        "mnist/train-images-idx3-ubyte.gz",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c":
        "mnist/train-labels-idx1-ubyte.gz",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6":
        "mnist/t10k-images-idx3-ubyte.gz",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6":
        "mnist/t10k-labels-idx1-ubyte.gz",
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84":
        "fashion_mnist/train-images-idx3-ubyte.gz",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845":
        "fashion_mnist/train-labels-idx1-ubyte.gz",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073":
        "fashion_mnist/t10k-images-idx3-ubyte.gz",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5":
        "fashion_mnist/t10k-labels-idx1-ubyte.gz",
}  # fmt: skip


def test_published_files():
    files = [x for name in download.DOWNLOADS for x in download.published_files(name)]
    assert {x.sha256: x.file for x in files} == SHA256 and len(files) == 10
    assert all(os.path.basename(x.url) == os.path.basename(x.file) for x in files)
    assert sum(x.size for x in files) == 381_039_271
    assert download.published_files("folder") == ()
