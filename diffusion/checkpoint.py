"""Saves checkpoints in the background, verifies them, and restores the newest good one.

    directory/STEP/ema         the averaged weights, an item of their own: samplers read no more
    directory/STEP/state       step, params, opt_state and what else there is
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
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from diffusion.utils import checkpoint_files as files
from diffusion.utils import digests, io, logging, object_store
from diffusion.utils.errors import WorkdirError
from diffusion.utils.multihost import all_processes, barrier, is_primary

Tree = Any
MAX_FAILURES = 3  # saves in a row that fail before the run ends
MAX_SAVE_S = 300.0  # in an object store one that takes longer counts as a failure, until it ends


class Checkpoints:
    """The checkpoints of one run; created, and each method called, by all processes alike.

    A state is a NamedTuple (step, params, ema, opt_state, ...) of trees of arrays, replicated on
    all devices. Abstract states have jax.ShapeDtypeStruct leaves whose shardings say where the
    arrays are to lie, whatever devices they were saved from.
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
        self._began = 0.0  # when, by the monotonic clock
        self._thread = ThreadPoolExecutor(1)
        if not read_only:
            files.check_writable(self._directory)
            self._on_primary(files.commit_copies, "checkpoint copies committed")
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
        self._manager: ocp.CheckpointManager | None = None
        self._orbax()

    def _orbax(self) -> ocp.CheckpointManager:
        """Returns the manager; a new one after a save that failed, which the old one counts."""
        if self._manager is None:
            self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        return self._manager

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
        if self._is_saved(step):
            return
        # NumPy arrays are copied at once, and the digests need them on the host anyway.
        items = digests.on_host(_split(state))
        manifest = {"step": step, "arrays": digests.types(items), "sha256": digests.sha256(items)}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(**args, manifest=ocp.args.JsonSave(manifest))

        def mark():
            if is_primary():
                files.mark_begun(self._folder(step))

        def begin():
            # force: orbax would decline to save below the newest step.
            if not self._orbax().save(step, args=args, force=True):
                raise RuntimeError("orbax declined to save it")

        self._saving, self._began = step, time.monotonic()
        # First: a store that does not answer says so sooner than orbax, and to all processes alike.
        self._attempt(mark)
        self._attempt(begin)
        self._pending = self._thread.submit(self._finish, step, manifest["sha256"])

    def save_or_warn(self, step: int, state: NamedTuple) -> None:
        """Saves as `save` does, but a failure is a warning until it is the third in a row.

        A full disk or an absent file server must not end a training of days. A failure in the
        background is reported by the next save, which is tried all the same.
        """
        for action in (self.wait, lambda: self.save(step, state)):
            try:
                action()
            except WorkdirError as error:
                self._failures += 1
                if self._failures == MAX_FAILURES:
                    advice = "make room there, or see that it can be reached"
                    message = f"{error}; failure {MAX_FAILURES} in a row: {advice}"
                    raise WorkdirError(message) from error
                count = f"failure {self._failures} of {MAX_FAILURES} in a row"
                logging.warning(f"{error}; training goes on: {count}")
                if self._pending is not None:  # it may still succeed, and only one is written
                    return

    def wait(self) -> None:
        """Waits until the last save is on disk and verified. Raises WorkdirError if it failed."""
        if self._pending is not None:
            left = max(0.0, self._began + MAX_SAVE_S - time.monotonic())
            left = left if io.is_object_store(self._directory) else None
            if not all_processes(bool(futures.wait([self._pending], left).done)):
                what = f"step {self._saving} is still not written after {MAX_SAVE_S:.0f} s"
                raise WorkdirError(f"{self._directory}: {what}")
            pending, self._pending = self._pending, None
            self._attempt(pending.result)
            self._failures = 0

    def close(self) -> None:
        """Waits for the last save and ends all threads. Raises WorkdirError as `wait` does."""
        try:
            self.wait()
        finally:
            if self._manager and self._pending is None:
                self._manager.close()
            self._thread.shutdown(wait=self._pending is None)

    def score(self, step: int, value: float) -> None:
        """Records the score of a step, lower is better, for `keep_best`."""
        path = self._directory / "scores.json"
        try:
            if is_primary():
                io.save_json(path, self._scores() | {step: float(value)})
        except OSError as error:
            logging.warning(f"{path}: not written: {files.root_cause(error)}")

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
                items = dict(self._orbax().restore(step, args=ocp.args.Composite(**args)).items())
                found = digests.sha256(items)
                saved = files.read_manifest(self._folder(step))["sha256"]
                if name := digests.differing(found, {k: saved[k] for k in found}):
                    problem = f"is damaged: {name} is not what was saved"
                elif "state" in items and (inside := int(items["state"]["step"])) != step:
                    problem = f"holds the state of step {inside}"
            except Exception as error:  # orbax and TensorStore raise anything
                problem = f"cannot be restored: {files.root_cause(error)}"
                self._problem(step)  # raises where the store does not answer: that is no damage
            if all_processes(not problem):
                return items, ""
        return {}, problem or "cannot be restored by another process"

    def _problem(self, step: int, abstract: dict[str, Tree] | None = None) -> str:
        """Returns "" for a complete step that has the arrays of `abstract`, else what is wrong."""
        try:
            folder = self._folder(step)
            manifest = files.read_manifest(folder)
            if manifest["step"] != step:
                return f"holds the state of step {manifest['step']}"
            if manifest["sha256"].keys() != manifest["arrays"].keys():
                raise ValueError("a digest is missing")
            types = manifest["arrays"].items()
            found = {k: v for k, v in types if k.split("/")[0] in (abstract or {})}
        except Exception as error:  # any file may be cut, or be something else
            missing = isinstance(error, FileNotFoundError)
            if io.is_object_store(folder) and isinstance(error, OSError) and not missing:
                raise
            return f"is not complete: manifest: {type(error).__name__}: {files.root_cause(error)}"
        if files.lacks_commit(folder):
            return f"is not complete: {files.COMMIT} is missing; a training verifies copied steps"
        for item in files.ITEMS:
            if not (folder / item).is_dir():
                return f"is not complete: {item} is missing"
        expected = digests.types(abstract or {})
        if name := digests.differing(found, expected):
            was, now = found.get(name, "nothing"), expected.get(name, "nothing")
            return f"does not fit: {name} is {was}, expected {now}"
        return ""

    def _finish(self, step: int, expected: dict[str, str]) -> None:
        """Waits until a step is written, reads it back, and deletes older steps; on a thread."""
        self._orbax().wait_until_finished()
        if not is_primary():
            return
        problem = self._problem(step)
        found = digests.sha256(files.read_alone(self._folder(step)))
        if name := digests.differing(found, expected):
            problem = f"{name} differs on disk from what was written"
        if problem:
            self._rename_bad(step)
            raise OSError(problem)
        files.mark_finished(self._folder(step))
        for old in self._expendable(step):
            with contextlib.suppress(OSError):  # what stays now goes with the next save
                files.delete_step(self._folder(old))

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
        """The steps of the directory, complete or not, newest first."""
        return list(files.step_folders(self._directory))

    def _folder(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _on_primary(self, action: Callable[[epath.Path], None], name: str) -> None:
        """Calls action(directory) in process 0; the others wait for it."""
        if is_primary():
            action(self._directory)
        barrier(name)

    def _remove_leftovers(self) -> None:
        self._on_primary(files.remove_leftovers, "checkpoint leftovers removed")

    def _is_saved(self, step: int) -> bool:
        """Returns whether a step is there and complete, in every process alike."""
        saved = False
        with contextlib.suppress(OSError):
            saved = step in self._steps() and not self._problem(step)
        return all_processes(saved)

    def _set_aside(self, step: int) -> str:
        barrier("checkpoint read by all")
        name = self._rename_bad(step) if is_primary() else ""
        barrier("checkpoint renamed")
        self._orbax().reload()
        return name

    def _rename_bad(self, step: int) -> str:
        names = (f"{step}.bad{k}" for k in itertools.count(1))
        name = next(x for x in names if not (self._directory / x).exists())
        self._folder(step).rename(self._directory / name)
        return name

    def _attempt(self, action: Callable[[], Any]) -> None:
        """Runs a part of a save; its failure in one process is a WorkdirError in every process."""
        problem, cause = "", None
        try:
            action()
        except Exception as error:
            problem, cause = files.root_cause(error), error
        if all_processes(not problem):
            return
        with contextlib.suppress(Exception):
            self._manager.close()
        self._remove_leftovers()  # half a step takes room where there may be too little
        self._manager = None
        what = f"step {self._saving} was not saved: {problem or 'another process failed'}"
        raise WorkdirError(f"{self._directory}: {what}") from cause


def _split(state: NamedTuple) -> dict[str, Tree]:
    """The items that a state is stored as, without fields that have no arrays."""
    fields = {name: tree for name, tree in state._asdict().items() if jax.tree.leaves(tree)}
    return {"ema": fields.pop("ema"), "state": fields}
