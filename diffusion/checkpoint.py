"""Saves checkpoints in the background, verifies them, and restores the newest good one.

    directory/STEP/ema         the averaged weights, an item of their own: samplers read no more
    directory/STEP/state       step, params and opt_state
    directory/STEP/manifest    JSON: the step, and the type and SHA-256 of every array
    directory/scores.json      {step: score}, for `keep_best`

Orbax writes a step under a temporary name and renames it, or, in an object store, ends it with a
file of its own. But it restores a flipped bit in silence and takes any directory with a number for
a name as a step. So every restored array is compared with the manifest, and a step without a good
manifest is never restored.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion.utils import digests, io, logging, object_store
from diffusion.utils.errors import WorkdirError, error_text
from diffusion.utils.multihost import all_processes, barrier, is_primary

Tree = Any
ITEMS = ("ema", "state")
MAX_FAILURES = 3  # saves in a row that fail before the run ends
LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleted")  # what a killed run leaves behind
COMMIT = "commit_success.txt"  # orbax's sign of a complete step in an object store


class Checkpoints:
    """The checkpoints of one run; created, and each method called, by all processes alike.

    A state is a NamedTuple (step, params, ema, opt_state) of trees of arrays, replicated on all
    devices. Abstract states have jax.ShapeDtypeStruct leaves whose shardings say where the arrays
    are to lie, whatever devices they were saved from.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        """Opens the directory, which is made if missing. Raises WorkdirError if it is not writable.

        Args:
          directory: on a file system that all processes share, or in an object store.
          keep: how many of the newest steps to keep.
          keep_every: multiples of this step are kept too.
          keep_best: how many of the steps with the lowest `score` are kept too.
          read_only: nothing is written, moved or deleted; else no other run may write there.
        """
        if object_store.scheme_of(directory) not in ("", "gs"):
            what = "expected a local folder or gs://, the only store that orbax writes to"
            raise WorkdirError(f"{directory}: {what}; choose another --workdir")
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep, keep_every: expected 1 or more, found {keep}, {keep_every}")
        logging.quiet_orbax()
        self._directory = io.absolute(directory)
        self._read_only = read_only
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._failures = 0
        self._saving: int | None = None  # the step last handed to orbax
        self._pending: Future | None = None  # its writing and verification
        self._thread = ThreadPoolExecutor(1)
        self._commit_copies()
        if not read_only:
            _check_writable(self._directory)
            self._remove_leftovers()
        self._options = ocp.CheckpointManagerOptions(
            # Orbax would delete older steps before the new one is verified.
            preservation_policy=ocp.checkpoint_managers.preservation_policy.PreserveAll(),
            read_only=read_only,
            # A save that cannot begin must not leave threads that hold up the exit; and the timeout
            # is measured by the wall clock, which may jump by a day.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, timeout_secs=10**7
            ),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=self._options)

    def save(self, step: int, state: NamedTuple) -> None:
        """Copies the state, which may then be donated, and writes it in the background.

        The written step is read back and verified, and only then are older steps deleted. A step
        that is on disk already is not saved again. Raises WorkdirError if this save cannot begin or
        the one before failed.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only=True")
        self.wait()
        self._remove_leftovers()
        if step in self._steps() and not self._problem(step):
            return
        # NumPy arrays are copied at once, and the digests need them on the host anyway.
        items = digests.on_host(_split(state))
        manifest = {"step": step, "arrays": digests.types(items), "sha256": digests.sha256(items)}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**args, manifest=ocp.args.JsonSave(manifest))

        def begin():
            # force: orbax would decline to save below the newest step.
            if not self._manager.save(step, args=args, force=True):
                raise RuntimeError("orbax declined to save it")

        self._saving = step
        self._attempt(begin)
        self._pending = self._thread.submit(self._finish, step, manifest["sha256"])

    def save_or_warn(self, step: int, state: NamedTuple) -> None:
        """Saves as `save` does, but a failure is a warning until it is the third in a row.

        A full disk or an absent file server must not end a training of days. A failure in the
        background is reported by the next save, which is tried all the same.
        """
        for _ in ("the save before", "this save"):
            try:
                return self.save(step, state)
            except WorkdirError as error:
                self._failures += 1
                if self._failures == MAX_FAILURES:
                    message = f"{error}; failure {MAX_FAILURES} in a row: make room there"
                    raise WorkdirError(message) from error
                count = f"failure {self._failures} of {MAX_FAILURES} in a row"
                logging.warning(f"{error}; training goes on: {count}")

    def wait(self) -> None:
        """Waits until the last save is on disk and verified. Raises WorkdirError if it failed."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._attempt(pending.result)
            self._failures = 0

    def close(self) -> None:
        """Waits for the last save and ends all threads. Raises WorkdirError as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._thread.shutdown()

    def score(self, step: int, value: float) -> None:
        """Records the score of a step, lower is better, for `keep_best`."""
        path = self._directory / "scores.json"
        try:
            if is_primary():
                io.save_json(path, self._scores() | {step: float(value)})
        except OSError as error:
            logging.warning(f"{path}: not written: {_root_cause(error)}")

    def latest(self) -> int | None:
        """Returns the newest complete step; if none is complete the newest, None if there is none.

        None means that training starts anew, so it must not come of damage.
        """
        steps = self._steps()
        complete = (step for step in steps if not self._problem(step))
        return next(complete, steps[0] if steps else None)

    def restore(self, abstract_state: NamedTuple) -> NamedTuple:
        """Returns the newest state that can be restored, with every array verified.

        Bad newer steps get a warning and are renamed to STEP.bad1, out of the way of later saves.
        Raises WorkdirError if no step can be restored or has these arrays; then nothing is renamed.
        """
        _, items = self._restore_newest(_split(abstract_state))
        return abstract_state._replace(**items["state"], ema=items["ema"])

    def restore_ema(self, abstract_ema: Tree, step: int | None = None) -> tuple[int, Tree]:
        """Returns (step, averaged weights) of the given or newest good step, reading nothing else.

        Raises WorkdirError as `restore` does, or if the given step cannot be restored.
        """
        step, items = self._restore_newest({"ema": abstract_ema}, step)
        return step, items["ema"]

    def _restore_newest(self, abstract: dict[str, Tree], only: int | None = None):
        """Returns (step, items) of the newest good step, or of one step; renames bad newer ones."""
        problems, steps = {}, self._steps()
        if only not in (None, *steps):
            there = ", ".join(map(str, steps))
            raise WorkdirError(f"{self._directory}: no step {only}; there are: {there}")
        if not steps:
            raise WorkdirError(f"{self._directory}: no checkpoint is there")
        for step in steps if only is None else [only]:
            items, problems[step] = self._restore_step(step, abstract)
            if not problems[step]:
                break
        else:
            (first, problem), *older = problems.items()
            rest = f"; nor is any of these good: {', '.join(str(s) for s, _ in older)}"
            message = f"{self._directory}: step {first} {problem}{rest if older else ''}"
            raise WorkdirError(f"{message}; mend it, or move it away to start anew")
        for bad in list(problems)[:-1]:
            renamed = "" if self._read_only else f"; set aside as {self._set_aside(bad)}"
            message = f"step {bad} {problems[bad]}; step {step} is used instead{renamed}"
            logging.warning(f"{self._directory}: {message}")
        return step, items

    def _restore_step(self, step: int, abstract: dict[str, Tree]) -> tuple[dict, str]:
        """Returns (items, "") or ({}, problem), in every process alike."""
        items, problem = {}, self._problem(step, abstract)
        if all_processes(not problem):
            try:
                args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
                items = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
                found, saved = digests.sha256(items), self._manifest(step)["sha256"]
                if name := digests.differing(found, {k: saved[k] for k in found}):
                    problem = f"is damaged: {name} is not what was saved"
                elif "state" in items and (inside := int(items["state"]["step"])) != step:
                    problem = f"holds the state of step {inside}"
            except Exception as error:  # orbax and TensorStore raise anything
                problem = f"cannot be restored: {_root_cause(error)}"
            if all_processes(not problem):
                return items, ""
        return {}, problem or "cannot be restored by another process"

    def _manifest(self, step: int) -> dict[str, Any]:
        """Reads {"step": int, "arrays": {name: type}, "sha256": {name: digest}} of a step."""
        folder = self._directory / str(step)
        path = folder / "manifest" / "metadata"
        if not path.exists():  # version 1 had it in a file of orbax's
            return json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
        return json.loads(path.read_text())

    def _problem(self, step: int, abstract: dict[str, Tree] | None = None) -> str:
        """Returns "" for a complete step that has the arrays of `abstract`, else what is wrong."""
        try:
            folder, manifest = self._directory / str(step), self._manifest(step)
            if manifest["step"] != step:
                return f"holds the state of step {manifest['step']}"
            if manifest["sha256"].keys() != manifest["arrays"].keys():
                raise ValueError("a digest is missing")
            types = manifest["arrays"].items()
            found = {k: v for k, v in types if k.split("/")[0] in (abstract or {})}
        except Exception as error:  # any file may be cut, or be something else
            return f"is not complete: manifest: {type(error).__name__}: {_root_cause(error)}"
        if self._lacks_commit(step):
            return f"is not complete: {COMMIT} is missing"
        for item in ITEMS:
            if not (folder / item).is_dir():
                return f"is not complete: {item} is missing"
        expected = digests.types(abstract or {})
        if name := digests.differing(found, expected):
            was, now = found.get(name, "nothing"), expected.get(name, "nothing")
            return f"does not fit: {name} is {was}, expected {now}"
        return ""

    def _finish(self, step: int, expected: dict[str, str]) -> None:
        """Waits until a step is written, reads it back, and deletes older steps; on a thread."""
        self._manager.wait_until_finished()
        if not is_primary():
            return
        problem = self._problem(step)
        found = digests.sha256(_read_alone(self._directory / str(step)))
        if name := digests.differing(found, expected):
            problem = f"{name} differs on disk from what was written"
        if problem:
            self._rename_bad(step)
            raise OSError(problem)
        for old in self._expendable(step):
            with contextlib.suppress(OSError):  # what stays now goes with the next save
                self._delete(old)

    def _delete(self, step: int) -> None:
        """Deletes a step so that a reader sees all of it or nothing."""
        folder = self._directory / str(step)
        if io.is_object_store(folder):
            (folder / COMMIT).unlink()
        else:
            folder = folder.rename(self._directory / f"{step}.deleted")
        folder.rmtree()

    def _expendable(self, newest: int) -> set[int]:
        """The complete steps that no rule keeps."""
        steps, scores = [s for s in self._steps() if not self._problem(s)], self._scores()
        best = sorted(scores.keys() & {*steps}, key=lambda s: (scores[s], s))[: self._keep_best]
        multiples = [s for s in steps if self._keep_every and s % self._keep_every == 0]
        return {*steps} - {newest, *steps[: self._keep], *best, *multiples}

    def _scores(self) -> dict[int, float]:
        try:
            scores = json.loads((self._directory / "scores.json").read_text())
            return {int(step): float(value) for step, value in scores.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _steps(self) -> list[int]:
        """The directories that are named as steps are, newest first."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted((int(x) for x in names if x.isdecimal() and str(int(x)) == x), reverse=True)

    def _remove_leftovers(self) -> None:
        if is_primary():
            paths = itertools.chain.from_iterable(map(self._directory.glob, LEFTOVERS))
            uncommitted = (self._directory / str(s) for s in self._steps() if self._lacks_commit(s))
            for path in (*paths, *uncommitted):
                with contextlib.suppress(OSError):  # TensorStore may still be writing there
                    path.rmtree(missing_ok=True)
        barrier("checkpoint leftovers removed")

    def _lacks_commit(self, step: int) -> bool:
        """Returns whether orbax would take a step for an unfinished one."""
        folder = self._directory / str(step)
        return io.is_object_store(folder) and not (folder / COMMIT).exists()

    def _commit_copies(self) -> None:
        """Commits complete steps without orbax's sign: those that were copied from a local disk."""
        for step in self._steps() if is_primary() else ():
            if not self._lacks_commit(step):
                continue
            folder = self._directory / str(step)
            try:
                found = digests.sha256(_read_alone(folder))
                if found == self._manifest(step)["sha256"]:
                    for path in (*(folder / item for item in (*ITEMS, "manifest")), folder):
                        io.save_text(path / COMMIT, f"Verified and committed as {folder}\n")
            except Exception:  # another run may be writing it; orbax and TensorStore raise anything
                continue
        barrier("checkpoint copies committed")

    def _set_aside(self, step: int) -> str:
        barrier("checkpoint read by all")
        name = self._rename_bad(step) if is_primary() else ""
        barrier("checkpoint renamed")
        self._manager.reload()
        return name

    def _rename_bad(self, step: int) -> str:
        names = (f"{step}.bad{k}" for k in itertools.count(1))
        name = next(x for x in names if not (self._directory / x).exists())
        (self._directory / str(step)).rename(self._directory / name)
        return name

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Runs a part of a save; its failure in one process is a WorkdirError in every process."""
        problem, cause = "", None
        try:
            action()
        except Exception as error:
            problem, cause = _root_cause(error), error
        if all_processes(not problem):
            return
        with contextlib.suppress(Exception):
            self._manager.close()
        self._remove_leftovers()  # half a step takes room where there may be too little
        # The old manager counts the step as saved.
        self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        what = f"step {self._saving} was not saved: {problem or 'another process failed'}"
        raise WorkdirError(f"{self._directory}: {what}") from cause


def _read_alone(folder: epath.Path) -> dict[str, Tree]:
    """Reads a step as NumPy arrays in this process, without waiting for the others."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="alone",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return {item: handler.restore(folder / item) for item in ITEMS}


def _split(state: NamedTuple) -> dict[str, Tree]:
    """The items that a state is stored as."""
    fields = state._asdict()
    return {"ema": fields.pop("ema"), "state": fields}


def _check_writable(directory: epath.Path) -> None:
    """Makes the directory and writes into it: better an error now than at the first save."""
    problem = ""
    if is_primary():
        try:
            io.save_text(directory / ".probe", "")
            (directory / ".probe").unlink()
        except OSError as error:
            problem = error_text(error)
    if not all_processes(not problem):
        problem = problem or "process 0 cannot write there"
        raise WorkdirError(f"{directory}: cannot be written: {problem}; choose another place")


def _root_cause(error: BaseException) -> str:
    """Returns the innermost message as one short line, without TensorStore's dump of parameters."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split("[tensorstore_spec")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
