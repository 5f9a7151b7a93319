"""Snapshots of the averages of optim.posthoc: written while training, put together afterwards.

    workdir/snapshots/STEP.npz     LENGTH/PARAMETER float32, and their SHA-256 digests

The averages at a checkpoint's own step are in the checkpoint; files hold those of earlier steps.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion import posthoc_ema
from diffusion.experiment import Experiment
from diffusion.runtime import workdir
from diffusion.runtime.config import Run
from diffusion.sharding import make_global_array, replicated
from diffusion.train_step import TrainState
from diffusion.utils import digests, io, logging
from diffusion.utils.errors import WorkdirError, error_text, one_line
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import human_bytes

Tree = Any


def snapshot_steps(config: ConfigDict) -> list[int]:
    """Returns the steps of train.snapshots, evenly spaced up to train.steps, which is the last."""
    steps = config.train.steps
    n = min(config.train.snapshots, steps) if config.optim.posthoc else 0
    return [-(-steps * i // n) for i in range(1, n + 1)]


def snapshot_path(folder: epath.Path, step: int) -> epath.Path:
    """Returns the file of a step's snapshot in a work directory."""
    return folder / "snapshots" / f"{step:08d}.npz"


def saved_steps(folder: epath.Path) -> list[int]:
    """Returns the steps of the snapshots in a work directory, in order."""
    names = (path.stem for path in (folder / "snapshots").glob("*.npz"))
    return sorted(int(name) for name in names if name.isdecimal())


class Snapshots:
    """Writes a training's snapshots; process 0 does, and a full disk costs the file alone."""

    def __init__(self, run: Run):
        self._workdir, self._lengths = run.workdir, run.config.optim.posthoc
        self._steps = frozenset(snapshot_steps(run.config))

    def forget_after(self, step: int) -> None:
        """Removes snapshots of later steps: those of a training that did not get to here."""
        for later in saved_steps(self._workdir) if is_primary() and self._steps else ():
            if later > step:
                snapshot_path(self._workdir, later).unlink()

    def describe(self, params: Tree) -> str:
        """Returns their number and size, `16 of 2 x 1.2 MB`."""
        size = human_bytes(workdir.tree_bytes(params))
        return f"{len(self._steps)} of {len(self._lengths)} x {size}"

    def due(self, step: int) -> bool:
        """Returns whether a snapshot is to be written after this step."""
        return step in self._steps

    def save(self, step: int, state: TrainState) -> None:
        """Writes the averages of the state after `step`."""
        if not is_primary():
            return
        path, trees = snapshot_path(self._workdir, step), digests.on_host(state.averages)
        arrays = digests.named(dict(zip(map(str, self._lengths), trees, strict=True)))
        about = json.dumps({"step": step, "sha256": digests.sha256(arrays)})
        try:
            io.save_npz(path, about=np.asarray(about), **arrays)
        except OSError as error:
            what = f"{path}: not written: {error_text(error)}"
            logging.warning(f"{what}; averages of other lengths will be less exact")


def load_snapshot(path: epath.Path, step: int, shapes: Mapping[str, Tree]) -> dict[str, Tree]:
    """Returns {relative length: parameters} of a snapshot as they were saved.

    shapes: likewise. Raises WorkdirError for a damaged file and for one of another training.
    """
    try:
        with io.open_binary(path) as content, np.load(content) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if name := digests.differing(digests.sha256(arrays), about["sha256"]):
            raise ValueError(f"{name} is not what was saved")
        if about["step"] != step:
            raise ValueError(f"it is of step {about['step']}")
        if name := digests.differing(digests.types(arrays), digests.types(shapes)):
            raise ValueError(f"{name} does not fit this training")
    except Exception as error:  # a damaged zip file raises almost anything
        advice = "delete it to do without, or restore it from a copy"
        raise WorkdirError(f"{path}: damaged: {one_line(error, 100)}; {advice}") from error
    leaves = (arrays[name] for name in digests.named(shapes))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def reconstruct(
    config: ConfigDict, folder: epath.Path, exp: Experiment, state: TrainState, names: Sequence[str]
) -> list[Tree]:
    """Returns the averages of these names, ema:LENGTH, at the step of a checkpoint's state.

    They are replicated on all devices. What they are made of and how well their profiles are met is
    said. Raises WorkdirError without snapshots and for a damaged one, in every process.
    """
    at, tracked = int(state.step), {str(length): length for length in exp.averages}
    expected = [step for step in snapshot_steps(config) if step < at]
    steps = [step for step in saved_steps(folder) if step < at]
    if expected and not steps:
        what = f"{folder / 'snapshots'}: expected snapshots of the training, found none"
        raise WorkdirError(f"{what}; restore them from a copy, or use the weights ema or raw")
    if missing := [step for step in expected if step not in steps]:
        which = f"step{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        rest = "restore from a copy, or go on with averages that are less exact"
        logging.warning(f"{folder / 'snapshots'}: missing: {one_line(which, 100)}; {rest}")
    times = np.repeat([*steps, at], len(tracked))
    lengths = [*tracked.values()] * (len(steps) + 1)
    fits = []
    for name in names:
        length = float(name.removeprefix("ema:"))
        fits.append(posthoc_ema.fit(times, lengths, at, length))
        parts = f"{len(steps)} snapshots and the checkpoint of step {at:,}"
        logging.info(f"average    {name} of {parts}; its profile is met to {fits[-1][1]:.1%}")
        if length < min(exp.averages):
            what = f"{name} is extrapolated: the shortest average that was tracked is"
            logging.warning(f"weights: {what} {min(exp.averages)}; track shorter ones next time")

    def snapshots() -> Iterator[list[Tree]]:
        shapes = dict(zip(tracked, state.averages, strict=True))
        for step in steps:
            loaded = load_snapshot(snapshot_path(folder, step), step, shapes)
            yield from (loaded[length] for length in tracked)  # trees have theirs sorted
        yield from digests.on_host(state.averages)

    averages, problem = [], ""
    try:
        weights = np.stack([weights for weights, _ in fits], axis=1)
        averages = posthoc_ema.combine(weights, snapshots())
    except WorkdirError as error:
        problem = str(error)
    workdir.raise_together(problem)
    whole = replicated(exp.mesh)
    return jax.tree.map(lambda x: make_global_array(x, whole, x.shape), averages)
