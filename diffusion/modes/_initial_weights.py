"""Where a training begins: at its newest checkpoint, at nothing, or at weights of --init_from."""

import contextlib
import json

from etils import epath

from diffusion import experiment
from diffusion.checkpoint import Checkpoints
from diffusion.experiment import Experiment
from diffusion.modes._common import load_models
from diffusion.runtime import workdir
from diffusion.runtime.config import (
    NETWORK_KEYS,
    TRAINING_KEYS,
    Run,
    differences,
    fill_defaults,
    flatten,
)
from diffusion.train_step import TrainState, create_train_state
from diffusion.utils import digests, io, logging
from diffusion.utils.checkpoint_files import step_folders
from diffusion.utils.errors import ConfigError, WorkdirError
from diffusion.utils.multihost import is_primary

RECORD = "init.json"  # in a work directory: whose weights its training began with
# Network keys that weights do not know.
NOT_IN_WEIGHTS = ("model.dropout", "model.dtype", "model.remat")


def restore_or_init(run: Run, exp: Experiment, checkpoints: Checkpoints) -> TrainState:
    """Returns the newest good checkpoint's state; where there is none at all, the initial one."""
    if checkpoints.latest() is None:
        return experiment.make_initial_state(run.config, exp)
    return checkpoints.restore(exp.abstract_state)


def load_initial_state(run: Run, exp: Experiment) -> TrainState | None:
    """Reads the weights that --init_from names, and returns the state that begins with them.

    Optimizer and step are new, the average is the weights. None without the flag, and where the
    work directory has checkpoints of its own, from which it goes on. Nothing is written.

    Raises:
      ConfigError: the weights are of another network, process or target.
      WorkdirError: there are no such weights, or they are damaged.
    """
    own, name = step_folders(run.workdir / "checkpoints"), run.flags.init_from
    if own and name:
        logging.info(f"weights    from {run.workdir}'s own checkpoints; --init_from is not read")
    name = name or _recorded(run.workdir)  # of a training that ended before its first checkpoint
    if own or not name:
        return None
    source, key = io.to_path(name), "--init_from"
    if not (stored := workdir.load_config(source)) or not (source / "checkpoints").is_dir():
        what = "expected a trained work directory, found none"
        raise WorkdirError(f"{key}={name}: {what}; train it first, or name another")
    old, new = flatten(fill_defaults(stored)), flatten(run.config)
    # Stages of a consistency tuning begin with denoising, which learns another target quickly.
    free = (*NOT_IN_WEIGHTS, "target:") if run.config.loss.stage_steps else NOT_IN_WEIGHTS
    if changed := [d for d in differences(old, new, NETWORK_KEYS) if not d.startswith(free)]:
        what = "expected weights of this network, process and target"
        raise ConfigError(f"{key}={name}: {what}, found {'; '.join(changed)}; give its values")
    theirs = run._replace(config=fill_defaults(stored), workdir=source)
    their_exp = experiment.build(theirs.config, exp.mesh)
    [model] = load_models(theirs, their_exp, [run.config.train.init_weights])
    logging.info(f"weights    {model.weights}, step {model.step:,} of {name}")
    if changed := differences(old, new, TRAINING_KEYS):
        logging.info(f"differs    {'; '.join(changed)}")
    trees = model.params, exp.abstract_state.params
    found, expected = map(digests.types, trees)
    if other := digests.differing(found, expected):
        what = f"{other} is {found.get(other, 'missing')}, expected {expected.get(other, 'none')}"
        raise ConfigError(f"{key}={name}: {what}; give the values of its config")
    # On the host: what trains is restored from the checkpoint that `save_initial_state` makes.
    return digests.on_host(
        create_train_state(model.params, exp.tx, exp.timesteps, len(exp.averages))
    )


def _recorded(folder: epath.Path) -> str:
    with contextlib.suppress(OSError, ValueError, LookupError):
        return json.loads((folder / RECORD).read_text())["init_from"]
    return ""


def save_initial_state(run: Run, checkpoints: Checkpoints, state: TrainState) -> None:
    """Saves the state as the checkpoint of step 0, from which the training begins."""
    if is_primary() and run.flags.init_from:
        record = {"init_from": run.flags.init_from, "weights": run.config.train.init_weights}
        record |= {"sha256": digests.sha256(state.params)}
        io.save_json(run.workdir / RECORD, record)
    checkpoints.save(0, state)
    checkpoints.wait()
