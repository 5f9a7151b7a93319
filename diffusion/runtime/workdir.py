"""Work directories: one run at a time, of one config and one data set, with enough disk space.

All checks are made before anything is compiled. None judges by a wall clock whether another run is
alive: clocks jump, and those of two machines differ.
"""

import atexit
import contextlib
import fcntl
import io
import json
import os
import pathlib
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion import data
from diffusion.runtime.config import NETWORK_KEYS, differences, fill_defaults, flatten
from diffusion.utils import logging
from diffusion.utils.errors import DataError, WorkdirError
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import all_processes, is_primary
from diffusion.utils.progress import human_bytes

BEAT_S = 5.0  # how often the holder of a lock writes to it; after three missed beats it is dead
LOCK_BYTES = 500
_held: set[pathlib.Path] = set()  # the locks of this process


def load_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config that the work directory was made with, None if it has none."""
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path}: cannot be read: {error}; restore it from a copy") from error


def check_owner(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises WorkdirError if the work directory was made with another training config.

    What is not known of imported weights may be given later: their "no class", data and training.
    """
    if not (stored := load_config(workdir)):
        return
    old, new = flatten(fill_defaults(stored)), flatten(config)
    free = {"model.null_class"} if old["model.null_class"] == -2 else set()
    if not old["train.steps"]:
        free |= {k for k in new if k == "model.dropout" or not k.startswith(NETWORK_KEYS)}
    if changed := differences(old | {key: new[key] for key in free}, new):
        message = f"{workdir}: belongs to another config: {'; '.join(changed)}"
        raise WorkdirError(f"{message}; choose another --workdir, or give the old values")


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Locks the work directory, which is made if missing, and writes config.json."""
    check_owner(workdir, config)
    acquire_lock(workdir)
    try:
        if is_primary():
            save_json(workdir / "config.json", config.to_dict())
    except OSError as error:
        raise WorkdirError(f"{workdir}: cannot be written: {error.strerror}") from error


def acquire_lock(workdir: pathlib.Path, beat_s: float = BEAT_S) -> None:
    """Makes this run the only one that trains in the work directory, until the process ends.

    Called by all processes; process 0 holds the lock for all. There are two guards: the kernel's
    lock on the file `lock`, which ends with its holder, and, for file systems that several machines
    share, its content with a count that grows while the holder lives. Raises WorkdirError in every
    process if another run holds it.
    """
    problem, path = "", workdir.resolve() / "lock"
    if is_primary() and path not in _held:
        try:
            problem, release = take_lock(path, beat_s)
            if not problem:
                _held.add(path)
                atexit.register(release)
        except OSError as error:
            problem = f"{workdir}: cannot be written: {error.strerror}; choose another --workdir"
    raise_together(problem)


def raise_together(problem: str) -> None:
    """Raises WorkdirError in every process if one of them has a problem; "" is none."""
    if not all_processes(not problem):
        raise WorkdirError(problem or "another process of this run cannot use the work directory")


def take_lock(path: pathlib.Path, beat_s: float) -> tuple[str, Callable[[], None]]:
    """Returns ("", release) once the lock is held, else (who holds it, no-op). Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "run": os.urandom(8).hex()}
    if holder := _other_holder(path, file, own, beat_s):
        file.close()
        what = f"is trained in by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        message = f"{path.parent}: {what}; wait for it, stop it, or choose another --workdir"
        return message, lambda: None
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, own, beat_s, done), daemon=True)
    thread.start()

    def release():
        done.set()
        thread.join()
        with contextlib.suppress(OSError), file:
            file.truncate(0)  # an empty lock is free on every machine

    return "", release


def _other_holder(
    path: pathlib.Path, file: io.RawIOBase, own: dict[str, Any], beat_s: float
) -> dict[str, Any]:
    """Takes the lock and returns {}, or returns what its living holder wrote there."""
    flocked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_lock(path) or {"host": "this machine"}
    except OSError:  # a file system without kernel locks
        flocked = False
    last = _read_lock(path)
    if last and not (flocked and last.get("host") == own["host"]):
        logging.info(
            f"waiting    for a sign of life of {last.get('host')}, which trained here last"
        )
        time.sleep(3 * beat_s)
        if (now := _read_lock(path)) != last:
            return now
    _write_lock(file, own | {"beat": 0})
    if not flocked:
        time.sleep(0.2 * beat_s)  # two may have found it free at once: the last writer has it
        if (now := _read_lock(path)).get("run") != own["run"]:
            return now
    return {}


def _beat(file: io.RawIOBase, own: dict[str, Any], beat_s: float, done: threading.Event) -> None:
    beat = 0
    while not done.wait(beat_s):
        beat += 1
        with contextlib.suppress(OSError):  # a full disk does not end the claim
            _write_lock(file, own | {"beat": beat})


def _write_lock(file: io.RawIOBase, content: dict[str, Any]) -> None:
    line = json.dumps(content).ljust(LOCK_BYTES) + "\n"  # of equal length: never half or empty
    os.pwrite(file.fileno(), line.encode(), 0)


def _read_lock(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text() or "{}")
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def tree_bytes(tree: Any) -> int:
    """Returns the size of all arrays, or of their shapes and types, in bytes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def check_disk_space(workdir: pathlib.Path, state: Any, keep: int) -> None:
    """Raises WorkdirError without space for one more checkpoint; warns if `keep` will not fit."""
    free, one = shutil.disk_usage(workdir).free, int(1.05 * tree_bytes(state)) + 10**6
    present = len([p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()])
    sizes = f"{human_bytes(free)} free, a checkpoint takes {human_bytes(one)}"
    if free < one:
        raise WorkdirError(f"{workdir}: no room: {sizes}; make room, or choose another --workdir")
    if free < one * max(1, keep + 1 - present):
        logging.warning(f"{workdir}: {sizes}; train.keep={keep} needs more")


def check_dataset(workdir: pathlib.Path, images: data.ImageDataset) -> None:
    """Raises DataError if data.json records another data set; records this one if it is missing."""
    path = workdir / "data.json"
    found = {"images": images.n, "shape": list(images.shape), "classes": images.num_classes}
    found |= {"mark": data.fingerprint(images)}
    try:
        recorded = json.loads(path.read_text())
    except FileNotFoundError:
        if (workdir / "checkpoints").exists():
            logging.warning(f"{path}: missing, as in work directories of old; this set is recorded")
        if is_primary():
            save_json(path, found)
        return
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; delete it") from error
    if changed := differences(recorded, found, keys=("",)):
        message = f"{workdir} was trained on other data: {'; '.join(changed)}"
        raise DataError(f"data: {message}; choose another --workdir")


def write_traceback(workdir: pathlib.Path, error: BaseException) -> str:
    """Writes workdir/crash/trace_*.txt if there is a work directory; returns its path, or ""."""
    if not workdir.is_dir():
        return ""
    path = workdir / "crash" / f"trace_{socket.gethostname()}_{os.getpid()}.txt"
    try:
        save_text(path, "".join(traceback.format_exception(error)))
    except OSError:  # a full or read-only disk may be why the run ended
        return ""
    return str(path)
