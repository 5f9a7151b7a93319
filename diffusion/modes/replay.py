"""--mode=check --replay=step_N.npz: takes a step again that was not finite."""

import numpy as np

from diffusion import experiment
from diffusion.modes._nonfinite import replay_step
from diffusion.runtime.config import Run
from diffusion.utils import io, logging
from diffusion.utils.errors import ConfigError, NonFiniteError


def run(run: Run) -> None:
    """Prints the step's metrics and the norm of every gradient.

    Raises NonFiniteError where the step is not finite again, ConfigError for another file.
    """
    if not run.flags.replay:
        raise ConfigError("--mode=replay: expected --replay=FILE, a step_N.npz of crash/")
    exp, path = experiment.build(run.config), io.to_path(run.flags.replay)
    if not path.exists():
        path = run.workdir / "crash" / path  # as the message of the training has it
    metrics, where, norms = replay_step(run, exp, path)
    for name, value in metrics.items():
        logging.info(f"{name:10} {value:.6g}")
    for name, value in sorted(norms.items(), key=lambda item: -np.nan_to_num(item[1], nan=np.inf)):
        logging.info(f"gradient   {value:<12.4g} {name}")
    if where:
        raise NonFiniteError(f"{path}: not finite again, first in {where}; lower optim.lr")
    logging.info("done       finite this time: not the arithmetic of this step alone")
