"""Steps that were not finite: what is kept of them, and how one is made again, by one command.

    python main.py --mode=check --workdir=runs/x --replay=runs/x/crash/step_1234.npz

A step is a function of the weights, the batch and its number: the file has all three, and the norm
of every weight. Made again, on one device, it says in which gradient the first NaN stands.
"""

import io
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import random
from ml_collections import ConfigDict

from diffusion import data, experiment, nonfinite, train_step
from diffusion.data import augment, loader
from diffusion.experiment import Experiment
from diffusion.utils import digests
from diffusion.utils.errors import ConfigError, NonFiniteError
from diffusion.utils.io import save_bytes

Tree = Any
ENOUGH = {"skip": 100, "rollback": 10}  # in a row: then it is no accident


class NonFiniteHandler:
    """The steps of a run that were not finite, dealt with as train.on_nonfinite says.

    halt: the run ends (DDPMError, exit code 5). skip: such a step changes nothing. rollback: the last
    checkpoint's weights go on with the batches to come; `returning` is true until that is done.
    The last two halt as well after ENOUGH in a row.
    """

    def __init__(
        self, config: ConfigDict, x: Experiment, images: data.ImageDataset, workdir: pathlib.Path
    ):
        self._config, self._x, self._images, self._workdir = config, x, images, workdir
        self.count = self._row = 0
        self.returning = False

    def good(self) -> None:
        """A step that was finite, where bad ones are skipped; a save, where they are undone."""
        self._row = 0

    def bad(self, step: int, values: dict[str, float], state: train_step.TrainState) -> str:
        """One that was not: the line to warn with. state: of now, guarded. Raises DDPMError to halt."""
        how = self._config.train.on_nonfinite
        self.count, self._row = self.count + 1, self._row + 1
        name = next(k for k, v in values.items() if not np.isfinite(v))
        what = f"{name} is {values[name]} at step {step:,}"
        if self._row < ENOUGH.get(how, 0):
            self.returning = how == "rollback"
            return f"{what}; {'skipped' if how == 'skip' else 'back to the last checkpoint'}"
        if how != "halt":
            what += f", the {self._row}th in a row"
        path = save_crash_step(self._config, self._x, self._images, self._workdir, step, state)
        # One process alone cannot take a step of all.
        found = replay_step(self._config, self._x, path)[1] if jax.process_count() == 1 else None
        where = f", first in {found}" if found else ""
        call = f"python main.py --mode=check --workdir={self._workdir} --replay={path}"
        fate = "nothing of it is saved; lower optim.lr"
        raise NonFiniteError(f"{what}{where}; {fate}; to see it again: {call}")


def save_crash_step(
    config: ConfigDict,
    x: Experiment,
    images: data.ImageDataset,
    workdir: pathlib.Path,
    step: int,
    state: train_step.TrainState,
) -> pathlib.Path:
    """workdir/crash/step_N.npz: the weights before step N, their norms, its batch and its keys."""
    path = workdir / "crash" / f"step_{step}.npz"
    if jax.process_index() > 0:
        return path
    _, key_data, key_step = experiment.training_keys(config.seed)
    at = range(step - 1, step)  # counted from 0, as the data and the keys are
    image, label = next(loader.iterate_shuffled(images, key_data, at, config.train.batch_size))
    params = {f"params/{k}": np.asarray(v) for k, v in digests.named(state.params).items()}
    norms = {f"norm/{k}": v for k, v in nonfinite.norms(state.params).items()}
    key = random.key_data(random.fold_in(key_step, step - 1))
    content = io.BytesIO()
    np.savez(content, step=step, key=key, image=image, label=label, **norms, **params)
    save_bytes(path, content.getvalue())
    return path


def replay_step(
    config: ConfigDict, x: Experiment, path: pathlib.Path
) -> tuple[dict[str, float], str | None, dict[str, float]]:
    """(metrics, where the first number is that is not finite or None, norms of the gradient).

    path: of `dump`. On one device, with the losses, keys and flips of the training. Raises Fatal
    for a file that is none, or is of another network.
    """
    step, image, label, key, params = _read(config, x, path)
    if name := nonfinite.first_non_finite(params):
        return {}, f"the weights before it, {name}", {}
    _, key_data, _ = experiment.training_keys(config.seed)
    x_0 = augment.augment(image, key_data, step - 1, config.data.flip)
    batch = x_0, experiment.drop_labels(config, key, label)
    apply, options = experiment.make_apply_fn(config, x)
    gradient = jax.jit(train_step.make_grad_fn(x.loss, apply, **options))
    gradients, metrics = gradient(params, key, batch)
    name = nonfinite.first_non_finite(gradients)
    found = {k: float(v) for k, v in metrics.items()}
    return found, f"the gradient of {name}" if name else None, nonfinite.norms(gradients)


def run(config: ConfigDict, x: Experiment, path: pathlib.Path, say: Callable[[str], None]) -> None:
    """Takes the step again and tells of it; DDPMError, with code 5, where it is not finite again."""
    metrics, where, norms = replay_step(config, x, path)
    for name, value in metrics.items():
        say(f"{name:10} {value:.6g}")
    for name, value in sorted(norms.items(), key=lambda item: -np.nan_to_num(item[1], nan=np.inf)):
        say(f"gradient   {value:<12.4g} {name}")
    if where:
        raise NonFiniteError(f"{path}: not finite again, first in {where}")
    say("done       finite this time: it was not the arithmetic of this step alone")


def _read(config: ConfigDict, x: Experiment, path: pathlib.Path):
    shapes = experiment.abstract_state(x).params
    try:
        with np.load(path) as file:
            leaves = [file[f"params/{name}"] for name in digests.named(shapes)]
            step, image, label = int(file["step"]), file["image"], file["label"]
            key = random.wrap_key_data(file["key"])
    except Exception as error:  # NumPy raises anything for what is no archive of its own
        what = f"{path}: cannot be replayed: {' '.join(str(error).split())}"
        raise ConfigError(f"--replay: {what}; give a file of crash/") from error
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    if digests.types(params) != digests.types(shapes):
        raise ConfigError(f"--replay: {path} is of another network; give its --workdir")
    return step, image, label, key, params
