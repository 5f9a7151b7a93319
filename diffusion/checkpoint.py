"""Checkpoints: written while training goes on, restored on any number of devices, or said why not.

    directory/STEP/ema      the averaged weights, an item of their own: samplers need no more
    directory/STEP/state    step, parameters, optimiser
    directory/scores.json   {step: score}, where the best of them are to stay

A step is written under another name and renamed when it is whole. Orbax does that, and counts every
directory with a number for a name as a step; what is a good step is decided here: one whose arrays
have the digests that were noted before they were written.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from diffusion.utils import digests, logging
from diffusion.utils.errors import WorkdirError

Tree = Any
ITEMS = ("ema", "state")
FAILURES = 3  # in a row, of which the last is an error
LEFT = ("*.orbax-checkpoint-tmp*", "*.deleted")  # what a killed run leaves half written, or gone


class Checkpoints:
    """The checkpoints of one run. To be made, and every method called, in all processes alike.

    A state is a NamedTuple (step, params, ema, opt_state) of trees of arrays, in several processes
    the same whole arrays on every device. An abstract state or average has jax.ShapeDtypeStruct
    leaves with shardings: where the arrays are to lie, whatever the devices they were saved from.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
        read_only: bool = False,
        warn: Callable[[str], None] = lambda line: print(f"warning: {line}", file=sys.stderr),
    ):
        """Opens, and makes if need be, the directory; it must lie where all processes see it.

        keep: the newest that many steps stay; of the older ones those that are multiples of
        keep_every, and the keep_best of the lowest `score`. read_only: nothing is made or moved,
        for whoever only samples; otherwise no other run may write there meanwhile. warn: is given
        one line for each step passed over. Raises CheckpointError where nothing can be written.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep, keep_every: expected 1 or more, found {keep}, {keep_every}")
        logging.quiet_orbax()
        self._directory = epath.Path(directory).expanduser().resolve()
        self._read_only, self._warn = read_only, warn
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        self._failures = 0
        self._saving: int | None = None  # the step that was last handed to orbax
        self._under_way: Future | None = None  # its way to the disk, and its verification
        self._thread = ThreadPoolExecutor(1)
        if not read_only:
            _probe(self._directory)
            self._sweep()
        self._options = ocp.CheckpointManagerOptions(
            # What goes is decided here: orbax would delete before the new step is verified.
            preservation_policy=ocp.checkpoint_managers.preservation_policy.PreserveAll(),
            read_only=read_only,
            # Else a save that cannot begin leaves threads that hold up the exit for minutes.
            # Its patience is measured by the wall clock: a jump of a day must not end it.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, timeout_secs=10**7
            ),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=self._options)

    def save(self, step: int, state: NamedTuple) -> None:
        """Copies the state and writes it in the background; it may be donated at once.

        There it is read again, compared with what was to be written, and only then older steps are
        deleted. Nothing is done if the step is there already. Raises CheckpointError if this save
        cannot begin, or if the one before it failed.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only=True")
        self.wait()
        if step in self._steps() and self._is_whole(step):
            return
        # NumPy's, which orbax copies at once: of JAX arrays it would ask each where it lies, which
        # takes longer, and the digests need them here too.
        items = digests.on_host(_items(state))
        args = ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()})
        # Without a note orbax casts to other types and takes a renamed step, or a flipped bit, for
        # what was saved, in silence.
        note = {"step": step, "arrays": digests.types(items), "sha256": digests.sha256(items)}

        def begin():  # force: when to save is the caller's decision, also below the newest step
            if not self._manager.save(step, args=args, custom_metadata=note, force=True):
                raise RuntimeError("orbax declined to save it")

        self._saving = step
        self._attempt(begin)
        shapes = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), items)
        self._under_way = self._thread.submit(self._finish, step, shapes, note["sha256"])

    def save_or_warn(self, step: int, state: NamedTuple) -> None:
        """As `save`, but of failures in a row only the third is an error, the others warnings.

        A full disk or a server that is away for an hour must not end a training of days. What
        failed is told at the next save, and this one is tried all the same.
        """
        for _ in ("the one before", "this one"):
            try:
                return self.save(step, state)
            except WorkdirError as error:
                self._failures += 1
                if self._failures >= FAILURES:
                    message = f"{error}; the {FAILURES}rd failure in a row: make room there"
                    raise WorkdirError(message) from error
                again = f"{FAILURES - self._failures} more in a row end the run"
                self._warn(f"{error}; training goes on, {again}")

    def wait(self) -> None:
        """Returns when the last save is on disk and verified. Raises CheckpointError if not."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._attempt(under_way.result)
            self._failures = 0

    def close(self) -> None:
        """Waits, and ends orbax's threads. Raises CheckpointError as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._thread.shutdown()

    def score(self, step: int, value: float) -> None:
        """Notes how good a step is, the lower the better: the keep_best of them stay."""
        if jax.process_index() == 0:
            scores = self._scores() | {step: float(value)}
            new = self._directory / "scores.json.tmp"
            try:
                new.write_text(json.dumps(scores))
                new.replace(self._directory / "scores.json")
            except OSError as error:
                self._warn(f"{self._directory}/scores.json: not written: {_line(error)}")

    def latest(self) -> int | None:
        """The newest step that is whole by its looks; None if there is none at all.

        Raises CheckpointError if there are steps and none is whole: that is no fresh start.
        """
        steps = self._steps()
        whole = next((step for step in steps if self._is_whole(step)), None)
        if steps and whole is None:
            raise self._none_good({step: self._trouble(step) for step in steps})
        return whole

    def restore(self, abstract_state: NamedTuple) -> NamedTuple:
        """The newest state that can be restored and is what its directory's name says.

        Newer steps that cannot are warned of and, once an older one is found good, set aside as
        STEP.bad1: they would be in the way of the saves to come. Raises CheckpointError if no step
        can be restored, or fits; then nothing is moved.
        """
        _, items = self._newest(_items(abstract_state))
        return abstract_state._replace(**items["state"], ema=items["ema"])

    def restore_ema(self, abstract_ema: Tree, step: int | None = None) -> tuple[int, Tree]:
        """(step, averaged weights) of the newest step for which they can be had, or of this one.

        Only they are read. Raises CheckpointError, also if the step asked for cannot be restored.
        """
        step, items = self._newest({"ema": abstract_ema}, step)
        return step, items["ema"]

    def _newest(self, abstract: dict[str, Tree], only: int | None = None) -> tuple[int, dict]:
        """The newest step, or only that one, that gives these items; bad ones are set aside."""
        bad, steps = {}, self._steps()
        if not steps:
            raise WorkdirError(f"{self._directory}: no checkpoint is there")
        if only not in (None, *steps):
            there = ", ".join(map(str, steps))
            raise WorkdirError(f"{self._directory}: no step {only}; there are: {there}")
        for step in steps if only is None else [only]:
            items, trouble = self._read(step, abstract)
            if items is not None:
                break
            bad[step] = trouble
        else:
            raise self._none_good(bad)
        for s, trouble in bad.items():
            aside = "" if self._read_only else f"; set aside as {self._set_aside(s)}"
            self._warn(f"{self._directory}: step {s} {trouble}; step {step} is used instead{aside}")
        return step, items

    def _read(self, step: int, abstract: dict[str, Tree]) -> tuple[dict | None, str]:
        """(the items, '') or (None, what is wrong): the same in every process."""
        items, trouble = None, self._trouble(step, abstract)
        if not _everywhere(not trouble):
            return None, trouble or "another process cannot read it"
        try:
            args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
            items = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
            if name := self._damaged(step, items):
                trouble = f"is damaged: {name} is not what was saved"
        except Exception as error:  # orbax and TensorStore raise anything, at any length
            trouble = f"cannot be restored: {_line(error)}"
        if not trouble and "state" in items and (inside := int(items["state"]["step"])) != step:
            trouble = f"holds the state of step {inside}"
        if not _everywhere(not trouble):
            return None, trouble or "another process cannot restore it"
        return items, ""

    def _trouble(self, step: int, abstract: dict[str, Tree] | None = None) -> str:
        """'' for a step that is whole by its looks and, if given, has the arrays of `abstract`."""
        folder = self._directory / str(step)
        try:
            # Orbax's own reader of this file opens every array as well.
            about = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
            if not about["commit_timestamp_nsecs"]:
                return "is not complete"
            if not all((folder / item / "_METADATA").exists() for item in ITEMS):
                return "is not complete"
            note = about["custom_metadata"]
            if not note.get("sha256"):
                return "has no digests to compare its arrays with"
            if note["step"] != step:
                return f"holds the state of step {note['step']}"
            found = {k: v for k, v in note["arrays"].items() if k.split("/")[0] in (abstract or {})}
        except Exception as error:  # any file may be cut, or be something else
            return f"is not complete: {type(error).__name__}: {_line(error)}"
        wanted = digests.types(abstract or {})
        for k in sorted(wanted | found):
            if wanted.get(k) != found.get(k):
                was, now = found.get(k, "nothing"), wanted.get(k, "nothing")
                return f"does not fit: {k} is {was}, expected {now}"
        return ""

    def _is_whole(self, step: int) -> bool:
        return not self._trouble(step)

    def _damaged(self, step: int, items: dict[str, Tree]) -> str | None:
        """The name of an array that was restored and is not what was saved; None if all are."""
        about = json.loads((self._directory / str(step) / "_CHECKPOINT_METADATA").read_text())
        saved = about["custom_metadata"]["sha256"]
        found = digests.sha256(items)
        return digests.differing(found, {k: v for k, v in saved.items() if k in found})

    def _finish(self, step: int, shapes: dict[str, Tree], expected: dict[str, str]) -> None:
        """What is left of a save, on a thread: written, read again, and older steps deleted."""
        self._manager.wait_until_finished()
        if jax.process_index() > 0:
            return
        found = digests.sha256(_read_alone(self._directory / str(step), shapes))
        if name := digests.differing(found, expected):
            self._move_aside(step)
            raise OSError(f"{name} is on the disk otherwise than it was written")
        for old in sorted(set(filter(self._is_whole, self._steps())) - self._kept() - {step}):
            gone = self._directory / f"{old}.deleted"  # whoever reads now sees all of it or nothing
            with contextlib.suppress(OSError):  # what stays now goes with the next save
                (self._directory / str(old)).rename(gone)
                gone.rmtree()

    def _kept(self) -> set[int]:
        """The steps on disk that are to stay."""
        steps, scores = list(filter(self._is_whole, self._steps())), self._scores()
        best = sorted((scores[s], s) for s in steps if s in scores)[: self._keep_best]
        multiples = [s for s in steps if self._keep_every and s % self._keep_every == 0]
        return {*steps[: self._keep], *multiples, *(s for _, s in best)}

    def _scores(self) -> dict[int, float]:
        try:
            scores = json.loads((self._directory / "scores.json").read_text())
            return {int(step): float(value) for step, value in scores.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _sweep(self) -> None:
        """Removes what killed runs left half written or half deleted."""
        if jax.process_index() == 0:
            for path in itertools.chain.from_iterable(map(self._directory.glob, LEFT)):
                path.rmtree(missing_ok=True)
        if jax.process_count() > 1:
            _sync("swept")

    def _steps(self) -> list[int]:
        """What is on the disk under a step's name, newest first."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted((int(x) for x in names if x.isdecimal() and str(int(x)) == x), reverse=True)

    def _set_aside(self, step: int) -> str:
        if jax.process_count() > 1:
            _sync("all have read it")
        name = self._move_aside(step) if jax.process_index() == 0 else ""
        if jax.process_count() > 1:
            _sync("moved")
        self._manager.reload()
        return name

    def _move_aside(self, step: int) -> str:
        names = (f"{step}.bad{k}" for k in itertools.count(1))
        name = next(x for x in names if not (self._directory / x).exists())
        (self._directory / str(step)).rename(self._directory / name)
        return name

    def _none_good(self, bad: dict[int, str]) -> WorkdirError:
        step, *older = bad
        rest = f"; nor is any of these good: {', '.join(map(str, older))}" if older else ""
        advice = "mend it, or move it away to start anew"
        return WorkdirError(f"{self._directory}: step {step} {bad[step]}{rest}; {advice}")

    def _attempt(self, action: Callable[[], None]) -> None:
        """Part of a save; its error in one line with the step it belongs to, in every process."""
        trouble, cause = "", None
        try:
            action()
        except Exception as error:
            trouble, cause = _line(error), error
        if _everywhere(not trouble):
            return
        with contextlib.suppress(Exception):  # the old manager counts the step as saved
            self._manager.close()
        self._sweep()  # half a step takes room where there may be too little
        self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        what = f"step {self._saving} was not saved: {trouble or 'another process failed'}"
        raise WorkdirError(f"{self._directory}: {what}") from cause


def _read_alone(folder: epath.Path, shapes: dict[str, Tree]) -> dict[str, Tree]:
    """The arrays of a step, to this process's memory, whatever the other processes do."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(),
        active_processes={jax.process_index()},
        barrier_sync_key_prefix="alone",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:

        def read(name):
            args = ocp.args.PyTreeRestore(item=shapes[name], restore_args=as_numpy[name])
            return reader.restore(folder / name, args=args)

        return {name: read(name) for name in shapes}


def _items(state: NamedTuple) -> dict[str, Tree]:
    fields = state._asdict()
    return {"ema": fields.pop("ema"), "state": fields}


def _probe(directory: epath.Path) -> None:
    """Makes the directory and writes into it: better an error now than at the first save."""
    trouble = ""
    if jax.process_index() == 0:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / f".probe{os.getpid()}"
            probe.write_text("x")
            probe.unlink()
        except OSError as error:
            trouble = error.strerror or _line(error)
    if not _everywhere(not trouble):
        trouble = trouble or "process 0 cannot"
        raise WorkdirError(f"{directory}: cannot be written: {trouble}; choose another place")


def _everywhere(good: bool) -> bool:
    """Whether it is so in every process: none may go another way than the others."""
    if jax.process_count() == 1:
        return good
    return bool(np.all(multihost_utils.process_allgather(np.array(good))))


def _sync(name: str) -> None:
    multihost_utils.sync_global_devices(f"checkpoint {name}")


def _line(error: BaseException) -> str:
    """The error at the root, as one short line without TensorStore's dump of its parameters."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split("[tensorstore_spec")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
