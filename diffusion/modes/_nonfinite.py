"""Training steps that are not finite: the guard, the policy, the crash file, the step taken again.

A step is a function of the weights, the batch and its number; the crash file holds all three.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array, random

from diffusion import data, experiment, nonfinite, train_step
from diffusion.data import augment, loader
from diffusion.dispatch import join_steps
from diffusion.experiment import Experiment
from diffusion.runtime.config import Run
from diffusion.sharding import replicated
from diffusion.timestep_samplers import draw_times
from diffusion.train_step import TrainState
from diffusion.utils import digests, logging
from diffusion.utils.errors import ConfigError, NonFiniteError, one_line
from diffusion.utils.io import save_npz
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import human_time

MAX_IN_A_ROW = {"halt": 0, "skip": 100, "rollback": 10}  # more are no accident


def not_halted(exp: Experiment) -> Array:
    """Returns nonfinite.guard_update's flag of a training that goes on, on every device."""
    return jax.device_put(jnp.zeros((), bool), replicated(exp.mesh))


def compile_update(
    update: Callable, on_nonfinite: str, state: TrainState, halted: Array, inputs: tuple
) -> jax.stages.Compiled:
    """Compiles a dispatch of training steps, each with its guard against NaN and infinity.

    inputs: (batches, fixed, n) as of dispatch.group_inputs.
    """
    most = len(inputs[0])
    if most > 1 and jax.default_backend() == "cpu":
        slow = "XLA's gradients of convolutions take 15 to 35 times as long in a loop there"
        logging.warning(f"train.steps_per_dispatch: expected 1 on a CPU, found {most}; {slow}")
    what = "the training step" if most == 1 else f"up to {most} training steps in one program"
    logging.info(f"compiling  {what}; the next start finds it compiled")
    began = time.monotonic()
    guarded = join_steps(nonfinite.guard_update(update, on_nonfinite), most)
    compiled = jax.jit(guarded, donate_argnums=(0, 1)).lower(state, halted, *inputs).compile()
    logging.info(f"compiled   in {human_time(time.monotonic() - began)}")
    return compiled


class NonFiniteHandler:
    """Treats the bad steps of a training as train.on_nonfinite says.

    halt: the run ends. skip: a bad step changes nothing. rollback: the last checkpoint's weights go
    on with the batches to come; `rolling_back` is true until the loop has done that. The last two
    halt as well after MAX_IN_A_ROW.
    """

    def __init__(self, run: Run, exp: Experiment, images: data.ImageDataset):
        self._run, self._exp, self._images = run, exp, images
        self.count = self._in_a_row = 0
        self.rolling_back = False

    def reset(self) -> None:
        """Ends a row of bad steps: after a good step when skipping, after a save in any case."""
        self._in_a_row = 0

    def handle(self, step: int, values: dict[str, float], state: TrainState) -> str:
        """Returns the warning for a bad step, or raises NonFiniteError to halt.

        values: the step's metrics; state: the present one, left as it was by guard_update.
        """
        policy = self._run.config.train.on_nonfinite
        self.count, self._in_a_row = self.count + 1, self._in_a_row + 1
        name = next(k for k, v in values.items() if not np.isfinite(v))
        what = f"{name} is {values[name]} at step {step:,}"
        if self._in_a_row < MAX_IN_A_ROW[policy]:
            self.rolling_back = policy == "rollback"
            return f"{what}; {'skipped' if policy == 'skip' else 'back to the last checkpoint'}"
        if policy != "halt":
            what += f", the {self._in_a_row}th in a row"
        path = save_crash_step(self._run, self._images, step, state)
        if jax.process_count() == 1:  # a step of several processes cannot be taken by one of them
            where = replay_step(self._run, self._exp, path)[1]
            what += f", first in {where}" if where else ""
        command = f"--mode=check --workdir={self._run.workdir} --replay={path.name}"
        raise NonFiniteError(f"{what}, not saved; lower optim.lr; to take it again: {command}")


def save_crash_step(
    run: Run, images: data.ImageDataset, step: int, state: TrainState
) -> epath.Path:
    """Writes workdir/crash/step_N.npz: the weights before step N, their norms, batch and key."""
    path = run.workdir / "crash" / f"step_{step}.npz"
    if is_primary():
        key = random.fold_in(train_step.training_keys(run.config.seed).steps, step - 1)
        steps = range(step - 1, step)  # counted from 0, as the data and the keys are
        args = images, run.config.seed, steps, run.config.train.batch_size
        image, label = next(loader.iterate_shuffled(*args))
        params = {f"params/{k}": np.asarray(v) for k, v in digests.named(state.params).items()}
        norms = {f"norm/{k}": v for k, v in nonfinite.norms(state.params).items()}
        about = {"step": step, "key": random.key_data(key), "image": image, "label": label}
        times = {f"times/{k}": np.asarray(v) for k, v in digests.named(state.times).items()}
        save_npz(path, **about, **norms, **params, **times)
    return path


def replay_step(
    run: Run, exp: Experiment, path: epath.Path
) -> tuple[dict[str, float], str | None, dict[str, float]]:
    """Takes the step of a crash file again, on one device, with the training's keys and flips.

    Returns (metrics, where the first number is not finite or None, norms of the gradient). Raises
    ConfigError for another file.
    """
    step, image, label, key, params, times = _load(exp, path)
    if name := nonfinite.first_non_finite(params):
        return {}, f"the weights before it, {name}", {}
    c, flips = run.config, train_step.training_keys(run.config.seed).augment
    x_0 = augment.augment(image, flips, step - 1, c.data.flip, exp.levels)
    batch = x_0, experiment.training_labels(c, exp, key, label)
    batch += draw_times(exp.timesteps, key, len(x_0), times)
    grad_fn = jax.jit(experiment.make_config_grad_fn(c, exp))
    gradients, metrics, _ = grad_fn(params, key, batch, np.int32(step - 1))
    name = nonfinite.first_non_finite(gradients)
    found = {k: float(v) for k, v in metrics.items()}
    return found, f"the gradient of {name}" if name else None, nonfinite.norms(gradients)


def _load(exp: Experiment, path: epath.Path):
    state = exp.abstract_state
    shapes = {"params": state.params, "times": state.times}
    try:
        with np.load(path) as file:
            leaves = [file[name] for name in digests.named(shapes)]
            step, image, label = int(file["step"]), file["image"], file["label"]
            key = random.wrap_key_data(file["key"])
    except Exception as error:  # NumPy raises anything for a file that is no npz
        what = f"expected a file of crash/, found {path}: {one_line(error)}"
        raise ConfigError(f"--replay: {what}") from error
    found = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
    if digests.types(found) != digests.types(shapes):
        raise ConfigError(f"--replay: {path} is of another network; give its --workdir")
    return step, image, label, key, found["params"], found["times"]
