"""What several modes share: a trained model, folders written whole, lines of the console."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from diffusion import data, experiment
from diffusion.checkpoint import Checkpoints
from diffusion.experiment import Experiment
from diffusion.modes._snapshots import reconstruct
from diffusion.runtime.config import Run
from diffusion.train_step import TrainState
from diffusion.utils import io
from diffusion.utils.errors import ConfigError, WorkdirError, error_text
from diffusion.utils.multihost import barrier, is_primary


class Trained(NamedTuple):
    """A trained model: the weights of a checkpoint and what they belong to.

    params: the averaged weights, the raw ones, or others that were put together afterwards, as
    `weights` ("ema", "raw", "ema:0.07") says.
    """

    config: ConfigDict
    exp: Experiment
    workdir: epath.Path
    step: int
    params: Any
    weights: str = "ema"

    def folder(self, kind: str) -> epath.Path:
        """Returns where results are kept: workdir/KIND/STEP, or STEP_WEIGHTS if not of "ema"."""
        name = "" if self.weights == "ema" else f"_{weights_in_files(self.weights)}"
        return self.workdir / kind / f"{self.step:08d}{name}"


def weights_in_files(weights: str) -> str:
    """Returns the name of weights without its colon, which not every file system has."""
    return weights.replace(":", "")


def load_trained(run: Run, exp: Experiment) -> Trained:
    """Restores the config's `weights` of the newest good checkpoint. Raises WorkdirError."""
    return load_models(run, exp, [run.config.weights])[0]


def load_models(run: Run, exp: Experiment, names: Sequence[str]) -> list[Trained]:
    """Restores the newest good checkpoint with each of the weights, "ema", "raw" or "ema:LENGTH".

    Raises ConfigError for a length where no snapshots were kept, WorkdirError.
    """
    others = [name for name in names if name not in ("ema", "raw")]
    if others and not exp.averages:
        found = f"found {others[0]}, of which only a training with optim.posthoc keeps snapshots"
        raise ConfigError(f"weights: expected ema or raw, {found}; use one of these")
    if [*names] == ["ema"]:  # an item of its own, of which no more is read
        with contextlib.closing(_trained_checkpoints(run)) as checkpoints:
            step, ema = checkpoints.restore_ema(exp.abstract_state.ema)
        weights = {"ema": ema}
    else:
        state = load_state(run, exp)
        weights, step = {"ema": state.ema, "raw": state.params}, int(state.step)
        if others:
            trees = reconstruct(run.config, run.workdir, exp, state, others)
            weights |= dict(zip(others, trees, strict=True))
    exps = [experiment.with_learned_process(exp, weights[name]) for name in names]
    args = zip(exps, names, strict=True)
    return [Trained(run.config, e, run.workdir, step, weights[name], name) for e, name in args]


def load_state(run: Run, exp: Experiment) -> TrainState:
    """Restores the newest good checkpoint. Raises WorkdirError."""
    with contextlib.closing(_trained_checkpoints(run)) as checkpoints:
        return checkpoints.restore(exp.abstract_state)


def _trained_checkpoints(run: Run) -> Checkpoints:
    if not (run.workdir / "checkpoints").is_dir():
        raise WorkdirError(
            f"{run.workdir}: expected a trained work directory, found none; "
            "train first, or name it with --workdir"
        )
    return open_checkpoints(run.workdir, read_only=True)


def open_checkpoints(workdir: epath.Path, **options) -> Checkpoints:
    """Opens the checkpoints of a work directory; options: of checkpoint.Checkpoints."""
    return Checkpoints(workdir / "checkpoints", **options)


def describe_devices() -> str:
    """Returns the devices in words, `4 x TPU v4 in 2 processes`."""
    n, kind, processes = jax.device_count(), jax.devices()[0].device_kind, jax.process_count()
    return f"{n} x {kind}" + (f" in {processes} processes" if processes > 1 else "")


def describe_data(config: ConfigDict, images: data.ImageDataset) -> str:
    """Returns a data set in words, `digits: 1,501 images of 8x8x1`."""
    shape = "x".join(map(str, images.shape))
    return f"{config.data.name or config.data.source}: {images.n:,} images of {shape}"


def batch_size(exp: Experiment, most: int, n: int) -> int:
    """Returns min(most, n), rounded up to a multiple of the devices."""
    return -(-min(most, n) // exp.mesh.size) * exp.mesh.size


def check_empty(folder: epath.Path, flag: str) -> None:
    """Raises WorkdirError if the folder named by a flag holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WorkdirError(
            f"{flag}={folder}: expected a new or empty folder, found files; choose another {flag}"
        )


@contextlib.contextmanager
def atomic_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields a folder to write into, which becomes `folder` once all processes are done with it.

    In an object store it is `folder` itself, of which an error leaves nothing. Raises WorkdirError.
    """
    folder, complete = io.absolute(folder), False
    staged = io.staging_folder(folder)
    try:
        if is_primary() and staged != folder:
            io.remove_folder(staged)
            staged.mkdir(parents=True)
        barrier("atomic_folder made")
        yield staged
        barrier("atomic_folder written")
        if is_primary():
            io.publish_folder(staged, folder)
        complete = True
        barrier("atomic_folder moved")
    except OSError as error:
        raise WorkdirError(f"{folder}: cannot be written: {error_text(error)}") from error
    finally:
        if is_primary() and not complete:
            with contextlib.suppress(OSError):
                io.remove_folder(staged)
