"""Who watches a run while it goes on: for signals, for the other processes, for a standstill.

Each watcher is a thread of its own, because the main one may wait for a device for minutes. They
count their own waits instead of reading clocks: a machine that was asleep, or a process that was
stopped and woken, has missed nothing.
"""

import contextlib
import faulthandler
import os
import pathlib
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion.runtime.config import PEER, STOPPED
from diffusion.utils.errors import DDPMError

TICK_S = 0.25


GRACE_S = 3.0


BEAT_S = 1.0  # how often processes greet each other


# A process that is not heard of for so long counts as lost.
HEARTBEAT_S = float(os.environ.get("DDPM_HEARTBEAT_S", 60))


def abort(workdir: pathlib.Path, name: str, message: str) -> NoReturn:
    """One line; where all threads stand, to workdir/crash/NAME.txt; and out, from any thread."""
    console = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # JAX, in C++, is about to dump its registers
    path = workdir / "crash" / f"{name}_process{jax.process_index()}.txt"
    message = f"{message}; where it stood: {path}"
    os.write(console, f"ddpm: error[{PEER}]: {message}\n".encode())
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            faulthandler.dump_traceback(file)
    os._exit(PEER)


class Watchdog:
    """Ends the process if `beat` is not called for limit_s seconds (0: never), as it would hang.

    A collective that waits for a dead switch, a file server that does not answer: nothing raises
    there, and a machine is paid for until somebody looks.
    """

    def __init__(self, workdir: pathlib.Path, limit_s: float):
        self._workdir, self._limit_s, self._waited, self._at = workdir, limit_s, 0.0, 0
        self._awake = False  # until the first step is done, which may take its time
        if limit_s:
            threading.Thread(target=self._watch, daemon=True).start()

    def beat(self, step: int) -> None:
        self._waited, self._at, self._awake = 0.0, step, True

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """While what is done is no step, and takes its own time."""
        self._awake = False
        try:
            yield
        finally:
            self._awake, self._waited = True, 0.0

    def _watch(self) -> None:
        while self._waited <= self._limit_s:
            time.sleep(TICK_S)
            self._waited += TICK_S if self._awake else 0.0
        what = f"no step for {self._limit_s:g} s after step {self._at} (train.hang_s)"
        abort(self._workdir, "hang", f"{what}; the same command goes on from the last save")


class Peers:
    """The processes of a run, each of which ends with code 7 when another is killed or frozen.

        with Peers(workdir):
            ...

    Process 0 has a connection to every other one and tells all of them who was lost. The kernel
    closes the connections of a process that dies, so that its death is known at once; one that is
    frozen sends nothing for HEARTBEAT_S. JAX's own watch takes minutes and ends in a dump of
    registers. To be entered and left by all processes alike; alone there is nothing to watch.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._number = workdir, jax.process_index()
        self._others: dict[socket.socket, int] = {}
        self._closing = threading.Event()

    def __enter__(self) -> "Peers":
        if jax.process_count() > 1:
            self._others = _serve() if self._number == 0 else _join()
            multihost_utils.sync_global_devices("watched")
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """How it ends is said to the others, who may be about to end in the same way."""
        if self._others and kind and not issubclass(kind, DDPMError | SystemExit):
            time.sleep(GRACE_S)  # it may come of a death elsewhere, which the watch tells better
        self._closing.set()
        good = kind is None or (kind is SystemExit and error.code == STOPPED)
        for connection in self._others:
            with contextlib.suppress(OSError):
                connection.sendall(b"q" if good else b"e")
                connection.shutdown(socket.SHUT_RDWR)

    def _watch(self) -> None:
        others, silent, since = selectors.DefaultSelector(), {}, 0.0
        for connection, number in self._others.items():
            others.register(connection, selectors.EVENT_READ, number)
            silent[number] = 0.0
        while others.get_map():
            heard = others.select(TICK_S)
            for key, _ in heard:
                number, said = key.data, _received(key.fileobj)
                silent[number] = 0.0
                if said.endswith(b"q"):
                    others.unregister(key.fileobj)
                    del silent[number]
                elif said.endswith(b"e"):
                    if not self._closing.wait(GRACE_S):
                        self._end(number, "ended with an error")
                elif said[:1] == b"L":
                    self._end(int.from_bytes(said[1:5], "big"), "was lost")
                elif not said and not self._closing.is_set():
                    self._end(number, "is gone")
            if heard:
                continue  # what is to be read comes before what was not heard
            since += TICK_S
            for number in silent:
                silent[number] += TICK_S
                if silent[number] > HEARTBEAT_S:
                    self._end(number, f"has not been heard of for {HEARTBEAT_S:g} s")
            if since >= BEAT_S:
                since = 0.0
                self._send(b".")

    def _send(self, what: bytes) -> None:
        for connection in self._others:
            with contextlib.suppress(OSError):
                connection.send(what, socket.MSG_DONTWAIT)

    def _end(self, number: int, how: str) -> NoReturn:
        if self._number == 0:
            self._send(b"L" + number.to_bytes(4, "big"))
        n = jax.process_count()
        what = f"process {number} of {n} {how}; the same command goes on from the last save"
        abort(self._workdir, "peer", what)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""


def _serve() -> dict[socket.socket, int]:
    """Process 0: tells the others where it listens, and waits for all of them."""
    with socket.create_server(("", 0)) as server:
        hosts = {os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0]: None}
        hosts |= {socket.gethostname(): None, _outward(): None}
        _broadcast(f"{server.getsockname()[1]} {' '.join(filter(None, hosts))}")
        server.settimeout(60)
        others = {}
        while len(others) < jax.process_count() - 1:
            connection, _ = server.accept()
            others[connection] = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
        return others


def _join() -> dict[socket.socket, int]:
    port, *hosts = _broadcast("").split()
    for host in hosts:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((host, int(port)), timeout=10)
            connection.settimeout(None)
            connection.sendall(jax.process_index().to_bytes(4, "big"))
            return {connection: 0}
    message = f"process 0 cannot be reached at {', '.join(hosts)}, port {port}; open the network"
    raise Fatal(PEER, message)


def _broadcast(text: str) -> str:
    """What process 0 says, of at most 512 bytes, in every process."""
    letters = np.zeros(512, np.uint8)
    letters[: len(text)] = np.frombuffer(text.encode(), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(letters)).rstrip(b"\0").decode()


def _outward() -> str:
    """The address under which this machine is seen; nothing is sent to learn it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
        return way.getsockname()[0]
    return ""
