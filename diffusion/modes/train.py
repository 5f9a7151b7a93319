"""--mode=train: trains from the newest checkpoint, or from nothing, to train.steps."""

import contextlib

import jax
import numpy as np

from diffusion import experiment, nonfinite
from diffusion.checkpoint import Checkpoints
from diffusion.dispatch import dispatch_sizes, group_inputs
from diffusion.modes._common import describe_data, describe_devices, open_checkpoints
from diffusion.modes._initial_weights import load_initial_state, restore_or_init, save_initial_state
from diffusion.modes._nonfinite import compile_update, not_halted
from diffusion.modes._readings import Readings
from diffusion.modes._session import Session
from diffusion.modes._snapshots import Snapshots
from diffusion.runtime import preemption, workdir
from diffusion.runtime.config import Run
from diffusion.sharding import replicated
from diffusion.train_step import TrainState
from diffusion.utils import logging, metric_writer
from diffusion.utils.errors import NonFiniteError
from diffusion.utils.progress import GoodputTimer


def run(run: Run) -> None:
    """Trains; writes checkpoints/, metrics.jsonl, event files, samples/ and figures/loss.png."""
    config, c, timer = run.config, run.config.train, GoodputTimer()
    exp = experiment.build(config)
    experiment.make_sampler(config, exp)  # what --mode=sample could not use is refused now
    images = experiment.load_split(config, exp)
    update, make_inputs = experiment.make_input_pipeline(config, exp, images)
    readings, snapshots = Readings(run, exp), Snapshots(run)
    begun = load_initial_state(run, exp)
    workdir.open_workdir(run.workdir, config)
    workdir.check_dataset(run.workdir, images)
    workdir.check_disk_space(run.workdir, exp.abstract_state, c.keep)
    keep = {"keep": c.keep, "keep_every": c.keep_every or None, "keep_best": c.keep_best}
    checkpoints = open_checkpoints(run.workdir, **keep)
    if begun:
        save_initial_state(run, checkpoints, begun)
    state = restore_or_init(run, exp, checkpoints)
    start = int(state.step)
    parameters = sum(a.size for a in jax.tree.leaves(state.params))
    where = "on every device" if experiment.fits_on_device(config, images) else "streamed"
    logging.info(f"data       {describe_data(config, images)}, {where}")
    logging.info(f"network    {parameters:,} parameters on {describe_devices()}")
    logging.info(f"workdir    {run.workdir}; watch with: tensorboard --logdir={run.workdir}")
    if exp.averages:
        snapshots.forget_after(start)
        logging.info(f"snapshots  {snapshots.describe(state.params)}")
    unfinished = readings.broken_off(start)
    if start >= c.steps and not unfinished:
        logging.info(f"nothing to do: trained for {start:,} steps already; raise train.steps")
        return
    readings.prepare()

    def is_border(step: int) -> bool:
        return step % c.save_every == 0 or snapshots.due(step) or readings.due(step)

    sizes = dispatch_sizes(start, c.steps, c.steps_per_dispatch, is_border)
    inputs = group_inputs(make_inputs(start), sizes, c.steps_per_dispatch)
    batch, halted = next(inputs, None), not_halted(exp)
    if batch:  # else only the readings of the last step are left
        update = compile_update(update, c.on_nonfinite, state, halted, batch)
    logging.info(f"training   from step {start:,}")
    timer.attribute_elapsed("starting")
    with (
        preemption.defer(),
        contextlib.closing(checkpoints),
        Session(run, exp, images, start, timer) as session,
    ):
        if not start:
            with timer("starting"):
                metric_writer.write_config(session.writer, config.to_dict(), state.params)
        if unfinished and not readings.take(session, checkpoints, start, state):
            raise preemption.Stopped(f"at step {start:,}, saved")
        step, stop = start, False
        while step < c.steps and not stop:
            steps = range(step + 1, step + batch[2] + 1)
            with session.dispatch(steps, state):
                state, halted, metrics = update(state, halted, *batch)
            step = steps[-1]
            last, stop = step == c.steps, preemption.should_stop()
            save = last or stop or step % c.save_every == 0
            session.record(steps, metrics, state, wait=save or is_border(step))
            if session.bad_steps.rolling_back:
                state, halted = roll_back(session, checkpoints, step), not_halted(exp)
            if snapshots.due(step):  # before the checkpoint, so that a resumed run lacks none
                with session.timer("saving"):
                    snapshots.save(step, state)
            if save:
                save_state(session, checkpoints, step, state)
            if not stop and not readings.take(session, checkpoints, step, state, step - start):
                stop = True
                if not save:
                    save_state(session, checkpoints, step, state)
            with timer.part("input"):
                batch = batch if last or stop else next(inputs)
    logging.info(f"time       {timer.describe(step - start)}")
    if stop:
        raise preemption.Stopped(f"at step {step:,}, saved")
    where = f"{run.workdir}/samples and {run.workdir}/figures"
    logging.info(f"done       look at {where}; more samples:")
    logging.info(f"           python main.py --mode=sample --workdir={run.workdir}")


def roll_back(session: Session, checkpoints: Checkpoints, step: int) -> TrainState:
    """Returns the last checkpoint's state, to go on with the batches after `step`."""
    session.bad_steps.rolling_back = False
    session.discard()
    checkpoints.wait()
    state = restore_or_init(session.run, session.exp, checkpoints)
    logging.warning(f"the weights of step {int(state.step):,} go on with step {step + 1:,}")
    return state._replace(step=jax.device_put(np.int32(step), replicated(session.exp.mesh)))


def save_state(session: Session, checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    """Saves a finite state. Raises NonFiniteError, WorkdirError."""
    with session.timer("saving"):
        session.writer.flush()  # what is logged of a saved step must not be lost
        if name := nonfinite.first_non_finite(state._asdict()):
            raise NonFiniteError(f"{name}: not finite after step {step}, not saved; lower optim.lr")
        checkpoints.save_or_warn(step, state)
    session.bad_steps.reset()
