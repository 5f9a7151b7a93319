"""Denoising Diffusion Probabilistic Models: one command line from images to samples.

    python main.py [--config=configs/digits.py] [--workdir=runs/digits] [--mode=train]
                   [--config.a.b=value ...]

A work directory remembers its config: with --workdir alone, a run goes on with it. This file owns
what a run has besides mathematics: the work directory, the screen, the processes and the end. Read
`train_mode` from top to bottom; things happen in that order.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import sys
import time
from typing import NoReturn

import pages
from diffusion import checkpoint, experiment, nonfinite, train_step
from diffusion.bench import parts
from diffusion.modes import (
    _sampling,
    check,
    evaluate,
    export_weights,
    figures,
    frontier,
    import_weights,
    likelihood,
    prepare,
    replay,
    sample,
)
from diffusion.plotting import image_grid
from diffusion.plotting.curves import loss_curve
from diffusion.runtime import preemption, watchdog
from diffusion.runtime.config import (
    CONFIG,
    STOPPED,
    WORKDIR,
    cache_dir,
    check_sampler_options,
    differences,
    exit_with,
    parse,
    resolve,
    typed_flags,
    validate,
)
from diffusion.runtime.workdir import acquire_lock, check_dataset, check_disk_space, write_traceback
from diffusion.sharding import replicated
from diffusion.utils import logging, metric_writer
from diffusion.utils.errors import ConfigError, DataError, Fatal, NonFiniteError, WorkdirError
from diffusion.utils.progress import GoodputTimer, Progress, human_time

if __name__ == "__main__":
    pages.ask()  # the program begins once more here, before it has loaded anything large

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA raises what matters; the rest is remarks
# Cores of a processor wait for each other at the end of a step: as long as a busy one takes.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=86400"
os.environ["XLA_FLAGS"] = f"{PATIENCE} {os.environ.get('XLA_FLAGS', '')}"

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "configs/NAME.py or configs/NAME.py:VARIANT; default configs/digits.py"
)
WORKDIR = flags.DEFINE_string("workdir", None, "where everything goes; default runs/NAME")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        *("train", "sample", "eval", "bpd", "figures", "frontier"),
        *("prepare", "import", "export", "bench", "check"),
    ],
    "what to do; train resumes",
)
INPUT = flags.DEFINE_multi_string(
    "input",
    [],
    "--mode=import: weights; --mode=eval: a folder, zip or npz of images; twice: the one against "
    "the other",
)
OUTPUT = flags.DEFINE_string("output", None, "--mode=export: the folder to write")
REPLAY = flags.DEFINE_string("replay", None, "--mode=check: a file of crash/, a step to see again")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "with --mode=prepare: look, but prepare nothing")
PART = flags.DEFINE_enum("part", "all", ["all", *parts.PARTS], "with --mode=bench: of what")
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "with --part=tpu: the TPUs to compile for")


def train_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains from the work directory's last checkpoint, or from nothing, to train.steps."""
    shares = GoodputTimer()
    c, first = config.train, jax.process_index() == 0
    x = experiment.build(config)
    chain = _sampling.compile_sampler(config, x, c.num_samples)
    images = experiment.load_split(config, x)
    update, inputs = experiment.make_input_pipeline(config, x, images)
    bits = likelihood.make_eval_fn(config, x) if c.eval_every else None
    abstract = experiment.abstract_state(x)
    open_workdir(workdir, config)
    check_dataset(workdir, images)
    check_disk_space(workdir, abstract, c.keep)
    kept = {"keep": c.keep, "keep_every": c.keep_every or None, "keep_best": c.keep_best}
    checkpoints = open_checkpoints(workdir, **kept)
    start, state = last_state(checkpoints, abstract)
    say(f"data       {describe_data(config, images)}")
    say(f"network    {describe_network(x)} on {describe_devices()}")
    say(f"work in    {workdir}; watch it with: tensorboard --logdir={workdir}")
    if start >= c.steps:
        say(f"nothing to do: trained for {start:,} steps already; raise train.steps to go on")
        return

    distances = evaluate.quick(config, x, say) if c.eval_every and config.eval.quick else None
    if state is None:
        state = experiment.make_initial_state(config, x)()
    inputs = inputs(start)
    first_inputs = next(inputs)
    say("compiling  the training step; the next start finds it compiled")
    began = time.monotonic()
    update = jax.jit(nonfinite.guard_update(update, c.on_nonfinite), donate_argnums=0)
    update = update.lower(state, *first_inputs).compile()
    say(f"training   from step {start:,}, after {human_time(time.monotonic() - began)}")

    lr = train_step.warmup_schedule(config.optim.lr, config.optim.warmup)
    writer = metric_writer.open_writer(workdir if first else None, start or -1)
    progress = Progress(c.steps, start, c.batch_size, silent=not first)
    stop, dog = preemption.PreemptionHandler(), watchdog.Watchdog(workdir, c.hang_s)
    mishaps = replay.NonFiniteHandler(config, x, images, workdir)
    pending, window = collections.deque(), []
    shares.so_far("starting")

    def record(step, metrics):
        values = {name: float(v) for name, v in jax.device_get(metrics).items()}
        values = {"loss": values.pop("loss"), **values}
        dog.beat(step)
        if not all(map(np.isfinite, values.values())):
            warn(mishaps.bad(step, values, state))
            return
        if c.on_nonfinite == "skip":
            mishaps.good()
        window.append(values)
        progress(step, values)
        if step % c.log_every == 0 or step == c.steps:
            scalars = {f"train/{k}": np.mean([v[k] for v in window]) for k in values}
            scalars |= {"train/lr": float(lr(step - 1)), "train/steps_per_s": progress.rate()}
            scalars |= {"train/goodput": shares.goodput(), "train/not_finite": mishaps.count}
            writer.write_scalars(step, {k: v for k, v in scalars.items() if v is not None})
            window.clear()

    @contextlib.contextmanager
    def aside(name):
        """What is no step has no part in the rate, is not watched, and is accounted for."""
        with progress.paused(), dog.asleep(), shares(name):
            yield

    with contextlib.closing(checkpoints), contextlib.closing(writer), progress:
        if not start:
            metric_writer.write_config(writer, config.to_dict(), state.params)
        steps = range(start + 1, c.steps + 1)
        for step, batch in zip(steps, itertools.chain([first_inputs], inputs), strict=False):
            state, metrics = update(state, *batch)
            pending.append((step, metrics))
            stopped, last = stop.at(step), step == c.steps
            save = step % c.save_every == 0 or last or stopped
            sample = step % c.sample_every == 0 or last
            # One step late, so that the device has work meanwhile.
            while pending and len(pending) > (0 if save or sample else 1):
                record(*pending.popleft())
            if mishaps.returning:
                state = rolled_back(config, x, checkpoints, step)
                mishaps.returning = False
                pending.clear()
            if save:
                with shares("saving"):
                    writer.flush()  # what is said of a saved step must not be lost
                    save_state(checkpoints, step, state)
                mishaps.good()
            if stopped:
                break
            if bits and step % c.eval_every == 0:
                with aside("readings and pictures"):
                    average, near = bits(state.ema), distances(state.ema) if distances else {}
                if save and c.keep_best:
                    checkpoints.score(step, float(average.mean))
                say(f"bits/dim   {average.mean:.3f} +- {average.error:.3f} on {config.bpd.split}")
                if near:
                    say(f"distance   {', '.join(f'{k} {v:.4g}' for k, v in near.items())}")
                scalars = {"bpd": average.mean, "bpd_error": average.error, **near}
                writer.write_scalars(step, {f"eval/{k}": float(v) for k, v in scalars.items()})
            if sample:
                with aside("readings and pictures"):
                    draw_grids(config, chain, state, step, workdir, writer, stop)
    shared = ", ".join(f"{shares.of(name):.1%} {name}" for name in shares.seconds)
    say(f"time       {shares.goodput():.1%} training, {shared}")
    if stop.asked:
        say(f"stopped    at step {step:,}, saved; the same command goes on from there")
        sys.exit(STOPPED)
    say(f"done       look at {workdir}/samples and {workdir}/figures; more samples:")
    say(f"           python main.py --mode=sample --workdir={workdir}")


def draw_grids(config, chain, state, step, workdir, writer, stop) -> None:
    """Samples of the raw and of the averaged weights, from the same noise, as pictures."""
    n, seed, first = config.train.num_samples, config.sample.seed, jax.process_index() == 0
    evaluations = _sampling.steps_of(chain, n)
    say(f"drawing    {n} samples with raw and with averaged weights")
    with Progress(2 * evaluations, unit="sampling step", silent=not first) as progress:
        for done, (name, params) in enumerate((("raw", state.params), ("ema", state.ema))):

            def report(i, done=done):
                progress(done * evaluations + i)

            images = list(_sampling.draw(chain, params, seed, n, report, lambda: stop.asked))
            if stop.asked:
                return
            grid = image_grid.image_grid(np.concatenate(images))
            writer.write_images(step, {f"samples/{name}": grid[None]})
            if first:
                image_grid.save_png(workdir / "samples" / f"{step:08d}_{name}.png", grid)
    writer.flush()
    if first and step >= config.train.log_every:
        path = workdir / "figures" / "loss.png"
        loss_curve(workdir / "metrics.jsonl", path, "train/loss")


def sample_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """sample.num images from the averaged weights of the last checkpoint."""
    x = experiment.build(config)
    _sampling.compile_sampler(config, x, 1)  # what is wrong with the sampler is said first
    step, ema = last_average(workdir, x)
    x = likelihood.with_analytic(config, x, workdir, step, ema, say)
    sample.run(config, x, workdir, step, ema, say)


def last_average(workdir: pathlib.Path, x: experiment.Experiment):
    """(step, averaged weights) of the newest good checkpoint."""
    with contextlib.closing(trained_checkpoints(workdir)) as checkpoints:
        return checkpoints.restore_ema(experiment.abstract_state(x).ema)


def trained_state(workdir: pathlib.Path, x: experiment.Experiment):
    """(step, state) of the newest good checkpoint."""
    with contextlib.closing(trained_checkpoints(workdir)) as checkpoints:
        step, state = last_state(checkpoints, experiment.abstract_state(x))
    if state is None:
        raise WorkdirError(f"{workdir}: no checkpoint is there; train on to the first")
    return step, state


def trained_checkpoints(workdir: pathlib.Path) -> checkpoint.Checkpoints:
    """The checkpoints of a work directory that was trained in, to read."""
    if not (workdir / "checkpoints").is_dir():
        raise WorkdirError(f"{workdir}: expected a trained work directory, found none; "
            "train first, or name it with --workdir",
        )
    return open_checkpoints(workdir, read_only=True)


def eval_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Scores of eval.num samples of the last checkpoint, or of the images that --input names."""
    x = experiment.build(config)
    if INPUT.value:
        if len(INPUT.value) > 2:
            message = f"--input: expected one or two of them, found {len(INPUT.value)}"
            raise ConfigError(message)
        evaluate.run_input(config, x, workdir, INPUT.value, say)
        return
    _sampling.compile_sampler(config, x, 1)  # what is wrong with the sampler is said first
    step, state = trained_state(workdir, x)
    weights = {}
    for name in config.eval.weights:
        params = {"ema": state.ema, "raw": state.params}[name]
        args = workdir, step, params, say
        weights[name] = likelihood.with_analytic(config, x, *args, name=name), params
    evaluate.run(config, workdir, step, weights, say)


def figures_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """The pictures of the paper that figures.names names, from the last checkpoint."""
    x = experiment.build(config)
    experiment.make_sampler(config, x)  # what is wrong with it is said first
    step, ema = last_average(workdir, x)
    x = likelihood.with_analytic(config, x, workdir, step, ema, say)
    measured = {"quality", "nearest"} & set(config.figures.names)
    measures = evaluate.measures(config, x, say) if measured else ()
    figures.run(config, x, workdir, step, ema, say, *measures)


def frontier_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Quality against cost of many ways to draw from the last checkpoint."""
    x = experiment.build(config)
    frontier.make_chains(config, x)  # what cannot be done is said first
    step, ema = last_average(workdir, x)
    x = likelihood.with_analytic(config, x, workdir, step, ema, say)
    frontier.run(config, x, workdir, step, ema, say)


def bpd_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Bits per dimension of bpd.split under the averaged weights of the last checkpoint."""
    x = experiment.build(config)
    step, ema = last_average(workdir, x)
    likelihood.run(config, x, workdir, step, ema, say)


def prepare_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """data.source -> the data set data.name in data.data_dir; with --dry_run, only a look at it."""
    prepare.run(config, workdir, DRY_RUN.value)


def import_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """A work directory made of the weights that --input names; the config is deduced, or given."""
    if len(INPUT.value) != 1 or WORKDIR.value is None:
        message = "--mode=import: expected one --input=WEIGHTS and a new --workdir"
        raise ConfigError(message)
    given, keys = typed_flags()
    import_weights.import_weights(INPUT.value[0], config if given else None, workdir, say, keys)


def export_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """The last checkpoint as a folder that diffusers loads, with a card that says what it is."""
    if OUTPUT.value is None:
        raise ConfigError("--mode=export: expected --output=FOLDER")
    x = experiment.build(config)
    step, state = trained_state(workdir, x)
    export_weights.export_weights(config, workdir, step, state, pathlib.Path(OUTPUT.value), say)


def bench_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Measures parts of the program on this machine."""
    chosen = parts.EVERY if PART.value == "all" else [PART.value]
    parts.run(config, workdir, chosen, TOPOLOGY.value)


def check_mode(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Tries everything that a training will need, in a minute, and leaves nothing but a picture."""
    x = experiment.build(config)
    if REPLAY.value:
        replay.run(config, x, pathlib.Path(REPLAY.value), say)
    else:
        check_owner(workdir, config)
        check.run(config, x, workdir, say)


def say(message: str) -> None:
    if jax.process_index() == 0:
        logging.info(message)


def warn(message: str) -> None:
    if jax.process_index() == 0:
        logging.info(f"ddpm: warning: {message}", sys.stderr)


def describe_devices() -> str:
    n, kind = jax.device_count(), jax.devices()[0].device_kind
    processes = jax.process_count()
    return f"{n} x {kind}" + (f" of {processes} processes" if processes > 1 else "")


def describe_network(x: experiment.Experiment) -> str:
    n = sum(a.size for a in jax.tree.leaves(experiment.abstract_state(x).params))
    return f"{n:,} parameters"


def describe_data(config: ConfigDict, images) -> str:
    shape = "x".join(map(str, images.shape))
    where = "on every device" if experiment.fits_on_device(config, images) else "streamed"
    return f"{config.data.name or config.data.source}: {images.n:,} images of {shape}, {where}"


def open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the work directory this config's and this run's, or finds that it is another's."""
    check_owner(workdir, config)
    acquire_lock(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            new = workdir / "config.json.tmp"
            new.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            os.replace(new, workdir / "config.json")
    except OSError as error:
        raise WorkdirError(f"{workdir}: cannot write there: {error.strerror}") from error


READS = ("sample", "eval", "bpd", "figures", "frontier", "export")  # from a trained work directory
ONLY = {
    "input": ("eval", "import"),
    "output": ("export",),
    "replay": ("check",),
    "dry_run": ("prepare",),
    "part": ("bench",),
    "topology": ("bench",),
}


def check_flags() -> None:
    """Raises Fatal for a flag, or an option of the sampler, that was typed and would do nothing."""
    for name, modes in ONLY.items():
        if flags.FLAGS[name].present and MODE.value not in modes:
            message = f"--{name}: nothing to --mode={MODE.value}; it is for {' and '.join(modes)}"
            raise ConfigError(message)
    if MODE.value in ("train", "sample", "eval", "figures"):
        check_sampler_options()


def check_owner(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises Fatal if another config made the work directory."""
    theirs = remembered(workdir)
    changed = differences(theirs, config.to_dict()) if theirs else []
    if changed:
        raise WorkdirError(f"{workdir} belongs to another config: {'; '.join(changed)}; "
            "choose another --workdir, or give the old values",
        )


def remembered(workdir: pathlib.Path) -> dict | None:
    """The config that the work directory was made with; None where there is none."""
    try:
        return json.loads((workdir / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{workdir}/config.json: cannot be read: {error}") from error


def open_checkpoints(workdir: pathlib.Path, **options) -> checkpoint.Checkpoints:
    """The work directory's checkpoints; options: of checkpoint.Checkpoints."""
    return checkpoint.Checkpoints(workdir / "checkpoints", warn=warn, **options)


def last_state(checkpoints: checkpoint.Checkpoints, abstract: train_step.TrainState):
    """(step, state) of the newest good checkpoint, or (0, None) where there is none at all."""
    if checkpoints.latest() is None:
        return 0, None
    state = checkpoints.restore(abstract)
    return int(state.step), state


def save_state(checkpoints: checkpoint.Checkpoints, step: int, state: train_step.TrainState) -> None:
    """Saves what is finite. Raises Fatal, CheckpointError."""
    if name := nonfinite.first_non_finite(state._asdict()):
        message = f"{name} is not finite after step {step}; it is not saved; lower optim.lr"
        raise NonFiniteError(message)
    checkpoints.save_or_warn(step, state)


def rolled_back(
    config: ConfigDict, x: experiment.Experiment, checkpoints: checkpoint.Checkpoints, step: int
) -> train_step.TrainState:
    """The last checkpoint's state, as if its next batches up to those of `step` were not there."""
    checkpoints.wait()
    old, state = last_state(checkpoints, experiment.abstract_state(x))
    if state is None:
        state = experiment.make_initial_state(config, x)()
    warn(f"the weights of step {old:,} go on with step {step + 1:,}")
    return state._replace(step=jax.device_put(np.int32(step), replicated(x.mesh)))


def start_processes() -> None:
    """Joins the other processes where the environment tells of them; otherwise there is one.

    TPU pods, SLURM, Open MPI and Kubernetes tell by themselves; anything else by three variables.
    """
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    address, n, i = map(os.environ.get, names)
    try:
        if address and n and i:
            jax.distributed.initialize(address, int(n), int(i))
        else:
            jax.distributed.initialize()
    except ValueError:
        if address:
            raise ConfigError(f"{names[0]} is set: expected {names[1]} and {names[2]} too"
            ) from None


def use_cores(config: ConfigDict) -> None:
    """Without an accelerator, makes each of a few cores a device: the batch is cut over them.

    XLA gives more than one core to its largest operations alone, and small networks have few. What
    JAX_NUM_CPU_DEVICES says goes before; a cluster's processes keep one device each.
    """
    if not {"JAX_NUM_CPU_DEVICES", "JAX_COORDINATOR_ADDRESS"} & set(os.environ):
        jax.config.update("jax_num_cpu_devices", experiment.cpu_devices(config))


def compile_once() -> None:
    """Keeps compiled programs between runs: a second start of the same config compiles nothing."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_dir()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


MODES = {
    "train": train_mode,
    "sample": sample_mode,
    "eval": eval_mode,
    "figures": figures_mode,
    "frontier": frontier_mode,
    "bpd": bpd_mode,
    "prepare": prepare_mode,
    "import": import_mode,
    "export": export_mode,
    "bench": bench_mode,
    "check": check_mode,
}


def end(fatal: Fatal) -> NoReturn:
    """The one line, and out: of several processes without JAX's farewell, which waits for all."""
    try:
        exit_with(fatal)
    finally:
        if jax.distributed.is_initialized():
            time.sleep(watchdog.GRACE_S if jax.process_index() == 0 else 0)  # the others live by it
            os._exit(fatal.code)


def main(argv: list[str]) -> None:
    del argv
    logging.quiet()
    try:
        config, workdir = resolve(CONFIG.value, WORKDIR.value, remembered)
        if MODE.value == "prepare":
            validate(config, devices=1)
        else:
            compile_once()
            validate(config, devices=1)
            use_cores(config)
            start_processes()
            validate(config, jax.device_count())
        check_flags()
        if MODE.value in READS and not INPUT.value:
            check_owner(workdir, config)
        with watchdog.Peers(workdir) if MODE.value != "prepare" else contextlib.nullcontext():
            MODES[MODE.value](config, workdir)
    except Fatal as error:
        if error.__cause__:
            write_traceback(workdir, error)
        end(error)
    except WorkdirError as error:
        write_traceback(workdir, error)
        end(WorkdirError(str(error)))
    except DataError as error:
        write_traceback(workdir, error)
        end(DataError(f"data: {error}"))
    except Exception as error:  # a mistake of this program, or of a library
        trace = write_traceback(workdir, error)
        if not trace:
            raise
        what = " ".join(str(error).split())[:300]
        end(Fatal(1, f"{type(error).__name__}: {what}; the whole of it: {trace}"))
    except KeyboardInterrupt:
        print("ddpm: stopped; what was saved stays, and is gone on with", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
