"""Checkpoints: written while training goes on, restored on any number of devices, or said why not.

    directory/STEP/ema      the averaged weights, an item of their own: samplers need no more
    directory/STEP/state    step, parameters, optimiser

A step is written under another name and renamed when it is whole. Orbax does that, and counts every
directory with a number for a name as a step; what is a good step is decided here.
"""

import contextlib
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl.logging import get_absl_logger
from etils import epath
from jax.experimental import multihost_utils

Tree = Any
ITEMS = ("ema", "state")
ORBAX = f"{os.sep}orbax{os.sep}"  # in the path of all its files


class CheckpointError(Exception):
    """One line: which directory and step, what is wrong with it, and what was done or is to do."""


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
        read_only: bool = False,
        warn: Callable[[str], None] = lambda line: print(f"warning: {line}", file=sys.stderr),
    ):
        """Opens, and makes if need be, the directory; it must lie where all processes see it.

        keep: the newest that many steps stay; keep_every: of the older ones, the multiples of it.
        read_only: nothing is made or moved, for whoever only samples. warn: is given one line for
        each step passed over. Raises CheckpointError where nothing can be written.
        """
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep, keep_every: expected 1 or more, found {keep}, {keep_every}")
        _hush()
        self._directory = epath.Path(directory).expanduser().resolve()
        self._read_only, self._warn = read_only, warn
        self._saving: int | None = None  # the step that was last handed to orbax
        if not read_only:
            _probe(self._directory)
        policies = ocp.checkpoint_managers.preservation_policy
        kept = [policies.LatestN(keep)]
        kept += [policies.EveryNSteps(keep_every)] if keep_every else []
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            read_only=read_only,
            # Else a save that cannot begin leaves threads that hold up the exit for minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = ocp.CheckpointManager(self._directory, options=self._options)

    def save(self, step: int, state: NamedTuple) -> None:
        """Copies the state and writes it in the background; it may be donated at once.

        Nothing is done if the step is there already. Raises CheckpointError if this save cannot
        begin, or if the one before it failed.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened with read_only=True")
        self.wait()
        if step in self._manager.all_steps() and self._is_whole(step):
            return
        items = _items(state)
        args = ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()})
        # Without a note orbax casts to other types and takes a renamed step for another in silence.
        note = {"step": step, "arrays": _types(items)}

        def begin():  # force: when to save is the caller's decision, also below the newest step
            if not self._manager.save(step, args=args, custom_metadata=note, force=True):
                raise RuntimeError("orbax declined to save it")

        self._saving = step
        self._attempt(begin)

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises CheckpointError if it failed."""
        self._attempt(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, and ends orbax's threads. Raises CheckpointError as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

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
            raise CheckpointError(f"{self._directory}: no checkpoint is there")
        if only not in (None, *steps):
            there = ", ".join(map(str, steps))
            raise CheckpointError(f"{self._directory}: no step {only}; there are: {there}")
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
        except Exception as error:  # orbax and TensorStore raise anything, at any length
            trouble = f"cannot be restored: {_line(error)}"
        if items and "state" in items and (inside := int(items["state"]["step"])) != step:
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
            if note["step"] != step:
                return f"holds the state of step {note['step']}"
            found = {k: v for k, v in note["arrays"].items() if k.split("/")[0] in (abstract or {})}
        except Exception as error:  # any file may be cut, or be something else
            return f"is not complete: {type(error).__name__}: {_line(error)}"
        wanted = _types(abstract or {})
        for k in sorted(wanted | found):
            if wanted.get(k) != found.get(k):
                was, now = found.get(k, "nothing"), wanted.get(k, "nothing")
                return f"does not fit: {k} is {was}, expected {now}"
        return ""

    def _is_whole(self, step: int) -> bool:
        return not self._trouble(step)

    def _steps(self) -> list[int]:
        """What is on the disk under a step's name, newest first."""
        if not self._directory.is_dir():
            return []
        names = [path.name for path in self._directory.iterdir() if path.is_dir()]
        return sorted((int(x) for x in names if x.isdecimal() and str(int(x)) == x), reverse=True)

    def _set_aside(self, step: int) -> str:
        names = (f"{step}.bad{k}" for k in itertools.count(1))
        name = next(x for x in names if not (self._directory / x).exists())
        _sync("named")
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(self._directory / name)
        _sync("renamed")
        self._manager.reload()
        return name

    def _none_good(self, bad: dict[int, str]) -> CheckpointError:
        step, *older = bad
        rest = f"; nor is any of these good: {', '.join(map(str, older))}" if older else ""
        advice = "mend it, or move it away to start anew"
        return CheckpointError(f"{self._directory}: step {step} {bad[step]}{rest}; {advice}")

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
        self._manager = ocp.CheckpointManager(self._directory, options=self._options)
        what = f"step {self._saving} was not saved: {trouble or 'another process failed'}"
        raise CheckpointError(f"{self._directory}: {what}") from cause


def _items(state: NamedTuple) -> dict[str, Tree]:
    fields = state._asdict()
    return {"ema": fields.pop("ema"), "state": fields}


def _types(tree: Tree) -> dict[str, str]:
    """{'state/params/kernel': 'float32[3, 3, 8, 8]', ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(k, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for k, x in leaves}


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
        raise CheckpointError(f"{directory}: cannot be written: {trouble}; choose another place")


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


def _hush() -> None:
    """Once: orbax and its threads repeat on the console, in pages, what they raise as well."""
    get_absl_logger().addFilter(_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_not_abandoned)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return ORBAX not in record.pathname


def _not_abandoned(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in str(record.msg)


class _Hook(NamedTuple):
    """A sys.unraisablehook that passes over what orbax abandons when one of its reads fails."""

    hook: Callable[[Any], None]

    def __call__(self, unraisable: Any) -> None:
        frame = getattr(unraisable.exc_traceback, "tb_frame", None)
        codes = getattr(frame, "f_code", None), getattr(unraisable.object, "cr_code", None)
        of_orbax = any(code and ORBAX in code.co_filename for code in codes)
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)
