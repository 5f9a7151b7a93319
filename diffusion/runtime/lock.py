"""Locks of a work directory: one run at a time, whatever file system it is on.

A holder writes a growing count into its lock, by which others see that it lives: no wall clock is
asked, for clocks jump, and those of two machines differ.
"""

import contextlib
import fcntl
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from diffusion.utils import logging
from diffusion.utils.errors import WorkdirError
from diffusion.utils.io import create, read_bytes, save_bytes

BEAT_S = 5.0  # how often the holder of a lock writes to it
DEAD_AFTER = 3  # missed beats
DEAD_AFTER_IN_STORE = 12  # the holder's own requests may be repeated for half a minute
LOCK_BYTES = 500
Taken = tuple[str, Callable[[], None]]  # ("", release), or (who holds the lock, no-op)


def take_file_lock(path: epath.Path, beat_s: float = BEAT_S) -> Taken:
    """Takes a lock on a file system: the kernel's, which ends with its holder, and the count.

    The count is for file systems that several machines share. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    own = _identity()
    if holder := _other_file_holder(path, file, own, beat_s):
        file.close()
        return _held_by(path, holder), lambda: None

    def write(beat):
        with contextlib.suppress(OSError):  # a full disk does not end the claim
            _write_file(file, own | {"beat": beat})

    end = _keep_beating(write, beat_s)

    def release():
        end()
        with contextlib.suppress(OSError), file:
            file.truncate(0)  # an empty lock is free on every machine

    return "", release


def take_object_lock(path: epath.Path, beat_s: float = BEAT_S) -> Taken:
    """Takes a lock in an object store: of the objects PATH-1, PATH-2, ... the last has its holder.

    A run makes the next one, which the store grants to one of several (generation precondition),
    where the last one was released or its holder is dead. A holder that was silent so long that
    another run took over ends when it notices. Raises OSError.
    """
    own = _identity()
    number, holder = _last_object(path)
    if (
        holder
        and not _is_gone(holder)
        and _is_alive(lambda: _last_object(path), holder, DEAD_AFTER_IN_STORE * beat_s)
    ):
        return _held_by(path, _last_object(path)[1]), lambda: None
    number += 1
    created = create(_numbered(path, number), json.dumps(own | {"beat": 0}).encode())
    # Whoever was quicker by a whole run has left a higher number.
    last, holder = _last_object(path)
    if not created or last != number:
        if created:
            _numbered(path, number).unlink(missing_ok=True)
        return _held_by(path, holder), lambda: None
    with contextlib.suppress(OSError):
        for old in range(max(1, number - 2), number):
            _numbered(path, old).unlink(missing_ok=True)

    def write(beat):
        with contextlib.suppress(OSError):
            if _last_object(path)[0] > number:
                what = f"{path.parent}: another run took it over while this one was silent"
                os.write(2, f"ddpm: error[{WorkdirError.code}]: {what}\n".encode())
                os._exit(WorkdirError.code)
            save_bytes(_numbered(path, number), json.dumps(own | {"beat": beat}).encode())

    end = _keep_beating(write, beat_s)

    def release():
        end()
        with contextlib.suppress(OSError):
            save_bytes(_numbered(path, number), b"{}")

    return "", release


def _identity() -> dict[str, Any]:
    """Returns what names this process: among all, for a reader, and for `_is_gone`."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "run": os.urandom(8).hex()}
    return own | {"kernel": _kernel(), "started": _started(os.getpid())}


def _held_by(path: epath.Path, holder: dict[str, Any]) -> str:
    what = f"is trained in by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return f"{path.parent}: {what}; wait for it, stop it, or choose another --workdir"


def _is_alive(read: Callable[[], Any], holder: dict[str, Any], seconds: float) -> bool:
    """Returns whether the lock changes within this time."""
    before = read()
    logging.info(f"waiting    for a sign of life of {holder.get('host')}, which trained here last")
    time.sleep(seconds)
    return read() != before


def _keep_beating(write: Callable[[int], None], beat_s: float) -> Callable[[], None]:
    """Calls write(1), write(2), ... in a thread, until the function that it returns is called."""
    done = threading.Event()

    def beat():
        count = 0
        while not done.wait(beat_s):
            write(count := count + 1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()

    def end():
        done.set()
        thread.join()

    return end


# On a file system


def _other_file_holder(
    path: epath.Path, file: io.RawIOBase, own: dict[str, Any], beat_s: float
) -> dict[str, Any]:
    """Takes the lock and returns {}, or returns what its living holder wrote there."""
    flocked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path) or {"host": "this machine"}
    except OSError:  # a file system without kernel locks
        flocked = False
    last = _read(path)
    if last and not (flocked and last.get("host") == own["host"]):
        if _is_alive(lambda: _read(path), last, DEAD_AFTER * beat_s):
            return _read(path)
    _write_file(file, own | {"beat": 0})
    if not flocked:
        time.sleep(0.2 * beat_s)  # two may have found it free at once: the last writer has it
        if (now := _read(path)).get("run") != own["run"]:
            return now
    return {}


def _write_file(file: io.RawIOBase, content: dict[str, Any]) -> None:
    line = json.dumps(content).ljust(LOCK_BYTES) + "\n"  # of equal length: never half or empty
    os.pwrite(file.fileno(), line.encode(), 0)


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text() or "{}")
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


# In an object store


def _numbered(path: epath.Path, number: int) -> epath.Path:
    return path.with_name(f"{path.name}-{number}")


def _last_object(path: epath.Path, tries: int = 3) -> tuple[int, dict[str, Any]]:
    """Returns the highest number, 0 if there is none, and its object's content. Raises OSError."""
    names = [other.name.rpartition("-")[2] for other in path.parent.glob(f"{path.name}-*")]
    number = max((int(name) for name in names if name.isdecimal()), default=0)
    try:
        return number, json.loads(read_bytes(_numbered(path, number))) if number else {}
    except ValueError:
        return number, {}
    except FileNotFoundError:  # whoever has a higher number has just removed it
        if tries == 1:
            raise
        return _last_object(path, tries - 1)


def _is_gone(holder: dict[str, Any]) -> bool:
    """Returns whether the holder was a process of this machine, container and boot that ended."""
    same = holder.get("host") == socket.gethostname() and holder.get("kernel") == _kernel()
    return same and bool(_kernel()) and _started(holder.get("pid")) != holder.get("started")


def _kernel() -> str:
    """Returns what tells this boot and this process namespace from all others; "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: Any) -> str:
    """Returns when a process started, in the kernel's ticks; "" if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
