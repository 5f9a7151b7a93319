"""The folders of checkpoints: which steps are complete, and what is left of others.

An object store cannot rename a folder. There orbax ends a step with the file COMMIT.
"""

import contextlib
import itertools
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion.utils import digests, io
from diffusion.utils.errors import WorkdirError, error_text, one_line
from diffusion.utils.multihost import all_processes, is_primary

ITEMS = ("ema", "state")
COMMIT = "commit_success.txt"
BEGUN = ".begun"  # STEP.begun: this program writes a step in an object store
LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleted")  # what a killed run leaves behind


def step_folders(directory: epath.Path) -> dict[int, epath.Path]:
    """Returns the folders that are named as steps are, {step: folder}, newest first.

    Raises OSError: a store that does not answer is not an empty one.
    """
    if not directory.is_dir():
        return {}
    paths = [path for path in directory.iterdir() if path.is_dir()]
    named = {int(p.name): p for p in paths if p.name.isdecimal() and str(int(p.name)) == p.name}
    return dict(sorted(named.items(), reverse=True))


def read_manifest(step: epath.Path) -> dict[str, Any]:
    """Reads {"step": int, "arrays": {name: type}, "sha256": {name: digest}} of a step."""
    path = step / "manifest" / "metadata"
    if not path.exists():  # version 1 had it in a file of orbax's
        return json.loads((step / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    return json.loads(path.read_text())


def lacks_commit(step: epath.Path) -> bool:
    """Returns whether orbax would take the step for an unfinished one."""
    return io.is_object_store(step) and not (step / COMMIT).exists()


def commit_copies(directory: epath.Path) -> None:
    """Commits complete steps without orbax's sign: those that were copied from a local disk."""
    for step in filter(lacks_commit, step_folders(directory).values()):
        try:
            if digests.sha256(read_alone(step)) == read_manifest(step)["sha256"]:
                for path in (*(step / item for item in (*ITEMS, "manifest")), step):
                    io.save_text(path / COMMIT, f"Verified and committed as {step}\n")
        except Exception:  # another run may be writing it; orbax and TensorStore raise anything
            continue


def remove_leftovers(directory: epath.Path) -> None:
    """Removes what killed or failed saves left; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        for folder in itertools.chain.from_iterable(map(directory.glob, LEFTOVERS)):
            with contextlib.suppress(OSError):  # TensorStore may still be writing there
                io.remove_folder(folder)
        for mark in directory.glob(f"*{BEGUN}"):  # steps that others put there stay
            step = mark.with_name(mark.name.removesuffix(BEGUN))
            if lacks_commit(step):
                io.remove_folder(step)
            mark.unlink(missing_ok=True)


def mark_begun(step: epath.Path) -> None:
    """Notes that a step is being written, so that what a kill leaves of it can be removed."""
    if io.is_object_store(step):
        io.save_text(step.with_name(step.name + BEGUN), "")


def mark_finished(step: epath.Path) -> None:
    """Removes the note of `mark_begun`."""
    step.with_name(step.name + BEGUN).unlink(missing_ok=True)


def delete_step(step: epath.Path) -> None:
    """Deletes a step so that a reader sees all of it or nothing. Raises OSError."""
    if io.is_object_store(step):
        (step / COMMIT).unlink()
    else:
        step = step.rename(step.with_name(f"{step.name}.deleted"))
    io.remove_folder(step)


def read_alone(step: epath.Path) -> dict[str, Any]:
    """Reads a step as NumPy arrays in this process, without waiting for the others."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="alone",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return {item: handler.restore(step / item) for item in ITEMS}


def check_writable(directory: epath.Path) -> None:
    """Makes the directory and writes into it: better an error now than at the first save.

    Raises WorkdirError in every process.
    """
    problem = ""
    if is_primary():
        try:
            io.try_writing(directory)
        except OSError as error:
            problem = error_text(error)
    if not all_processes(not problem):
        problem = problem or "process 0 cannot write there"
        raise WorkdirError(f"{directory}: cannot be written: {problem}; choose another place")


def root_cause(error: BaseException) -> str:
    """Returns the innermost message as one short line, without TensorStore's dump of parameters."""
    while error.__cause__ and not getattr(error, "strerror", None):
        error = error.__cause__
    return one_line(str(error).split("[tensorstore_spec")[0]) or type(error).__name__
