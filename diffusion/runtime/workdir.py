"""Work directories: one run at a time, of one config and one data set, with enough disk space.

All checks are made before anything is compiled. None judges by a wall clock whether another run is
alive: clocks jump, and those of two machines differ.
"""

import atexit
import json
import os
import socket
import traceback
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from diffusion import data
from diffusion.runtime import lock
from diffusion.runtime.config import NETWORK_KEYS, differences, fill_defaults, flatten
from diffusion.utils import io, logging
from diffusion.utils.errors import DataError, WorkdirError, error_text
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import all_processes, is_primary
from diffusion.utils.progress import human_bytes

_held: set[epath.Path] = set()  # the locks of this process


def load_config(workdir: epath.Path) -> dict[str, Any] | None:
    """Returns the config that the work directory was made with, None if it has none."""
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        advice = "check its name and your permission"
        raise WorkdirError(f"{path}: cannot be read: {error_text(error)}; {advice}") from error
    except ValueError as error:
        raise WorkdirError(f"{path}: cannot be read: {error}; restore it from a copy") from error


def check_owner(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises WorkdirError if the work directory was made with another training config.

    What is not known of imported weights may be given later: their "no class", data and training.
    """
    if not (stored := load_config(workdir)):
        return
    old, new = flatten(fill_defaults(stored)), flatten(config)
    free = {"model.null_class"} if old["model.null_class"] == -2 else set()
    if not old["train.steps"]:
        free |= {k for k in new if k == "model.dropout" or not k.startswith(NETWORK_KEYS)}
        free -= {"optim.name", "optim.posthoc"}  # of which the imported state is made
    if changed := differences(old | {key: new[key] for key in free}, new):
        message = f"{workdir}: belongs to another config: {'; '.join(changed)}"
        raise WorkdirError(f"{message}; choose another --workdir, or give the old values")


def open_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Locks the work directory, which is made if missing, and writes config.json."""
    check_owner(workdir, config)
    acquire_lock(workdir)
    try:
        if is_primary():
            save_json(workdir / "config.json", config.to_dict())
    except OSError as error:
        raise WorkdirError(f"{workdir}: cannot be written: {error_text(error)}") from error


def acquire_lock(workdir: epath.Path, beat_s: float = lock.BEAT_S) -> None:
    """Makes this run the only one that trains in the work directory, until the process ends.

    Called by all processes; process 0 holds the lock for all. Raises WorkdirError in every process
    if another run holds it or the work directory cannot be written.
    """
    problem, path = "", io.absolute(workdir) / "lock"
    if is_primary() and path not in _held:
        take = lock.take_object_lock if io.is_object_store(path) else lock.take_file_lock
        try:
            problem, release = take(path, beat_s)
            if not problem:
                _held.add(path)
                atexit.register(release)
        except OSError as error:
            problem = f"{workdir}: cannot be written: {error_text(error)}; choose another --workdir"
    raise_together(problem)


def raise_together(problem: str) -> None:
    """Raises WorkdirError in every process if one of them has a problem; "" is none."""
    if not all_processes(not problem):
        raise WorkdirError(problem or "another process of this run cannot use the work directory")


def tree_bytes(tree: Any) -> int:
    """Returns the size of all arrays, or of their shapes and types, in bytes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def check_disk_space(workdir: epath.Path, state: Any, keep: int) -> None:
    """Raises WorkdirError without space for one more checkpoint; warns if `keep` will not fit."""
    if (free := io.free_bytes(workdir)) is None:
        return
    one = int(1.05 * tree_bytes(state)) + 10**6
    present = len([p for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal()])
    sizes = f"{human_bytes(free)} free, a checkpoint takes {human_bytes(one)}"
    if free < one:
        raise WorkdirError(f"{workdir}: no room: {sizes}; make room, or choose another --workdir")
    if free < one * max(1, keep + 1 - present):
        logging.warning(f"{workdir}: {sizes}; train.keep={keep} needs more")


def check_dataset(workdir: epath.Path, images: data.ImageDataset) -> None:
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
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error_text(error)}; try again") from error
    except ValueError as error:
        raise DataError(f"{path}: cannot be read: {error}; delete it") from error
    if changed := differences(recorded, found, keys=("",)):
        message = f"{workdir} was trained on other data: {'; '.join(changed)}"
        raise DataError(f"data: {message}; choose another --workdir")


def write_traceback(workdir: epath.Path, error: BaseException) -> str:
    """Writes workdir/crash/trace_*.txt if there is a work directory; returns its path, or ""."""
    path = workdir / "crash" / f"trace_{socket.gethostname()}_{os.getpid()}.txt"
    try:
        if not workdir.is_dir():
            return ""
        save_text(path, "".join(traceback.format_exception(error)))
    except OSError:  # a full or read-only disk may be why the run ended
        return ""
    return str(path)
