"""The work directory as a claim: one run at a time, of one config and one data set, with room.

Everything here is looked at before anything is compiled, and names the directory, what was expected
and what would do. Liveness is never judged by a wall clock: clocks jump, and those of two machines
differ.
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
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion import data
from diffusion.runtime.config import differences
from diffusion.utils import logging
from diffusion.utils.errors import DataError, WorkdirError
from diffusion.utils.io import save_text
from diffusion.utils.progress import human_bytes

BEAT_S = 5.0  # how often the holder of a lock shows that it lives; three missed ones are a death
WIDTH = 500
BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")




def acquire_lock(workdir: pathlib.Path, beat_s: float = BEAT_S) -> None:
    """Makes this run the only one that trains in the work directory, until the process ends.

    Called in all processes; process 0 holds it for all. Two guards: the kernel's lock on the file
    `lock` (flock), which ends with its holder however that ends, and for file systems of several
    machines what is written in it, with a count that grows while the holder lives. Raises DDPMError,
    in every process, where another run holds it.
    """
    trouble = ""
    if jax.process_index() == 0:
        try:
            trouble, release = take_lock(workdir / "lock", beat_s)
            atexit.register(release)
        except OSError as error:
            trouble = f"{workdir}/lock: cannot be written: {error.strerror}"
    raise_together(trouble)


def raise_together(trouble: str) -> None:
    """Ends every process if there is trouble in one of them; all must call it. Raises Fatal."""
    good = not trouble
    if jax.process_count() > 1:
        good = bool(np.all(multihost_utils.process_allgather(np.array(good))))
    if not good:
        message = trouble or "another process of this run cannot use the work directory"
        raise WorkdirError(message)


def take_lock(path: pathlib.Path, beat_s: float) -> tuple[str, Callable[[], None]]:
    """('', release) if the lock is ours now, else (who has it, nothing to do). Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
    ours |= {"start": _start(os.getpid())}
    holder = _holder(path, file, ours, beat_s)
    if holder is not None:
        file.close()
        what = f"is trained in by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        message = f"{path.parent}: {what}; wait for it, stop it, or choose another --workdir"
        return message, lambda: None
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, ours, beat_s, over), daemon=True)
    beating.start()

    def release():
        over.set()
        beating.join()
        with contextlib.suppress(OSError), file:
            file.truncate(0)  # an empty lock is nobody's, on any machine

    return "", release


def _holder(
    path: pathlib.Path, file: io.RawIOBase, ours: dict[str, Any], beat_s: float
) -> dict[str, Any] | None:
    """What another run that holds the lock has written there; None where it is ours now."""
    flocked = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    except OSError:  # a file system without it
        flocked = False
    there = _read(path)
    if there and not _gone(path, there, flocked, beat_s):
        return there
    _write(file, ours | {"beat": 0})
    if flocked:
        return None
    time.sleep(0.2 * beat_s)  # two may have found it free at once: the last that wrote has it
    now = _read(path)
    return None if {key: now.get(key) for key in ours} == ours else now


def _gone(path: pathlib.Path, there: dict[str, Any], flocked: bool, beat_s: float) -> bool:
    """Whether the run that wrote this into the lock has ended."""
    if there.get("host") == socket.gethostname():
        alive = there.get("boot") == _boot() and there.get("start") == _start(there.get("pid"))
        return flocked or not alive
    logging.info(f"waiting    for a sign of life of {there.get('host')}, which trained here last")
    time.sleep(3 * beat_s)
    return _read(path) == there


def _beat(file: io.RawIOBase, ours: dict[str, Any], beat_s: float, over: threading.Event) -> None:
    beat = 0
    while not over.wait(beat_s):
        beat += 1
        with contextlib.suppress(OSError):  # a full disk is not the end of the claim
            _write(file, ours | {"beat": beat})


def _write(file: io.RawIOBase, content: dict[str, Any]) -> None:
    line = json.dumps(content).ljust(WIDTH) + "\n"  # one write over the last: never half, or empty
    os.pwrite(file.fileno(), line.encode(), 0)


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text() or "{}")
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):
        return {}


def _boot() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else ""


def _start(pid: int | None) -> int:
    """When a process began, in ticks since the boot; 0 where there is none, or no telling."""
    try:
        stat = pathlib.Path(f"/proc/{int(pid or 0)}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0




def tree_bytes(tree: Any) -> int:
    """Of all arrays; shapes and types are enough."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def check_disk_space(workdir: pathlib.Path, state: Any, keep: int) -> None:
    """Room for a checkpoint beside the others: less is an error, less than `keep` a warning."""
    free, one = shutil.disk_usage(workdir).free, int(1.05 * tree_bytes(state)) + 10**6
    have = len([p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()])
    wanted = one * max(1, keep + 1 - have)
    sizes = f"{human_bytes(free)} free, a checkpoint takes {human_bytes(one)}"
    if free < one:
        message = f"{workdir}: no room: {sizes}; make room, or choose another --workdir"
        raise WorkdirError(message)
    if free < wanted and jax.process_index() == 0:
        logging.info(f"ddpm: warning: {workdir}: {sizes}; train.keep={keep} needs more", sys.stderr)


def check_dataset(workdir: pathlib.Path, images: data.ImageDataset) -> None:
    """Remembers the data set in data.json, or finds that it is not the one remembered (DDPMError).

    A work directory from before data.json came takes the set that it now sees.
    """
    ours = {"images": images.n, "shape": list(images.shape), "classes": images.num_classes}
    ours |= {"mark": data.fingerprint(images)}
    path = workdir / "data.json"
    try:
        theirs = json.loads(path.read_text())
    except FileNotFoundError:
        theirs = None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; delete it") from error
    if theirs is None:
        if jax.process_index() == 0:
            save_text(path, json.dumps(ours, indent=2) + "\n")
    elif changed := differences(theirs, ours, free=()):
        message = f"{workdir} was trained on other data: {'; '.join(changed)}"
        raise DataError(f"data: {message}; choose another --workdir")


def write_traceback(workdir: pathlib.Path, error: BaseException) -> str:
    """The whole traceback to workdir/crash/, if there is a work directory; where it is, or ''."""
    if not workdir.is_dir():
        return ""
    path = workdir / "crash" / f"trace_{os.getpid()}_process{_process()}.txt"
    try:
        save_text(path, "".join(traceback.format_exception(error)))
    except OSError:  # a disk that is full, or read only, may be why it ended
        return ""
    return str(path)


def _process() -> int:
    """This process's number, also where JAX has not started, or has broken."""
    try:
        return jax.process_index()
    except Exception:
        return 0
