"""--mode=check: tries in a minute everything that a training needs, before it takes a week.

Devices, data, a sum over all devices, storage, room, memory, a few steps with their pace, a
checkpoint saved and restored, and a picture of what the network will see. Each trial prints one
line, or ends the check with the exit code that the training would have had.
"""

import contextlib
import errno
import json
import secrets
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import random

from diffusion import checkpoint, data, experiment, process
from diffusion.data import augment
from diffusion.data.prepare.pipeline import MAX_FEW_LEVELS, evenly_spaced_levels
from diffusion.dispatch import dispatch_sizes, group_inputs
from diffusion.experiment import Experiment
from diffusion.modes._common import describe_data, describe_devices
from diffusion.modes._nonfinite import compile_update, not_halted
from diffusion.plotting.image_grid import image_grid, save_png
from diffusion.runtime import workdir
from diffusion.runtime.config import Run, flatten
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils import digests, io, logging
from diffusion.utils.errors import (
    ConfigError,
    DataError,
    DDPMError,
    NonFiniteError,
    WorkdirError,
    error_text,
)
from diffusion.utils.multihost import barrier, broadcast_from_primary, gather_texts, is_primary
from diffusion.utils.progress import human_bytes, human_time

SAMPLE = 512  # images of the data set that are looked at
DARK = 64  # largest grey level of images that are probably a mistake
STEPS, SECONDS = 20, 10.0  # of training, whichever is over first
SHARES = (0.0, 0.02, 0.1, 0.2, 0.4, 0.7, 1.0)  # of T, the rows of the picture


def run(run: Run) -> None:
    """Runs all trials in the order of a training. Raises DDPMError."""
    config, exp = run.config, experiment.build(run.config)
    workdir.check_owner(run.workdir, config)
    logging.info(f"devices    {describe_devices()}, JAX {jax.__version__}")
    images = experiment.load_split(config, exp)
    sample = check_data(run, images)
    abstract = exp.abstract_state
    check_pod(run, exp, images, sum(a.size for a in jax.tree.leaves(abstract.params)))
    with temporary_folder(run.workdir) as folder:
        workdir.check_disk_space(folder, abstract, config.train.keep)
        free = io.free_bytes(folder)
        room = "unlimited" if free is None else f"{human_bytes(free)} free"
        kept = human_bytes(workdir.tree_bytes(abstract) * (config.train.keep + 1))
        logging.info(f"room       {room}; checkpoints will take {kept} (train.keep + 1)")
        state = take_steps(run, exp, images)
        check_checkpoint(folder, abstract, state)
    picture = run.workdir / "figures" / "check.png"
    if is_primary():
        save_png(picture, noising_grid(exp, sample))
    logging.info(f"picture    {picture}: the data, and what the network sees of it at rising t")
    logging.info("done       nothing stands in the way of --mode=train")


def check_data(run: Run, images: data.ImageDataset) -> np.ndarray:
    """Returns eight of the images, evenly spread. Raises DataError where all are one grey."""
    at = np.unique(np.linspace(0, images.n - 1, SAMPLE).astype(int))
    sample, _ = images.read(at)
    low, high, mean = int(sample.min()), int(sample.max()), float(sample.mean())
    values = f"values {low}..{high}, mean {mean:.1f}"
    logging.info(f"data       {describe_data(run.config, images)}, {values}")
    if low == high:
        found = f"the one value {low} in {len(sample)} of them"
        raise DataError(f"data: expected images, found {found}; look at how they were prepared")
    if high < DARK:
        logging.info(f"           dark: no value above {high} of 255; is that intended?")
    occurring, said = np.zeros(256, bool), run.config.data.levels
    occurring[sample] = True
    levels = evenly_spaced_levels(occurring)
    if levels != said and (said == 256 or said <= MAX_FEW_LEVELS):
        found = f"{levels} levels in {len(sample)} images, data.levels is {said}"
        logging.info(f"           {found}; is that intended?")
    if images.n < run.config.train.batch_size:
        logging.info(f"           few: a batch of {run.config.train.batch_size} repeats some")
    return sample[np.linspace(0, len(sample) - 1, 8).astype(int)]


def check_pod(run: Run, exp: Experiment, images: data.ImageDataset, parameters: int) -> None:
    """Compares what the processes were given, and adds numbers over all devices.

    Raises ConfigError, DataError where a process has another config or data set than process 0;
    DDPMError for a wrong sum.
    """
    given = flatten(run.config) | {"JAX": jax.__version__, "data": data.fingerprint(images)}
    first, *others = map(json.loads, gather_texts(json.dumps(given)))
    for i, other in enumerate(others, 1):
        if key := digests.differing(other, first):
            what = f"{key}: expected {first.get(key)} as in process 0, found {other.get(key)}"
            advice = "start every process with the same command, versions and data"
            error = DataError if key == "data" else ConfigError
            raise error(f"{what} in process {i}; {advice}")
    took = time_all_reduce(exp, parameters)
    n, devices = len(others) + 1, jax.local_device_count()
    who = f"{n} process{'es' * (n > 1)} of {devices} device{'s' * (devices > 1)}"
    same = ", same config and data" if others else ""
    what = f"the gradient's {human_bytes(4 * parameters)} are added exactly in {1e3 * took:.3g} ms"
    logging.info(f"pod        {who}{same}; {what}")


def time_all_reduce(exp: Experiment, size: int) -> float:
    """Adds `size` numbers of every device as gradients are added; returns the seconds it takes.

    Device i of n gives i + 1, so that each has to have n (n + 1) / 2, which float32 holds exactly
    up to 5,792 devices. Raises DDPMError in every process if one device has another sum.
    """
    n, sharded = exp.mesh.size, batch_sharded(exp.mesh)
    own = 1 + local_rows(sharded, n)[:, None].astype(np.float32)
    given = make_global_array(own, sharded, (n, 1))
    given = jax.jit(lambda x: jnp.broadcast_to(x, (n, size)), out_shardings=sharded)(given)
    add = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=replicated(exp.mesh))
    jax.block_until_ready(add(given))  # compiles and connects
    began = time.monotonic()
    sums = jax.block_until_ready(add(given))
    took = time.monotonic() - began
    copies = [shard.data for shard in sums.addressable_shards]
    found = [min(float(x.min()) for x in copies), max(float(x.max()) for x in copies)]
    for i, text in enumerate(gather_texts(json.dumps(found))):
        if json.loads(text) != [n * (n + 1) / 2] * 2:
            wanted = f"expected {n * (n + 1) / 2:g} on each of {n} devices"
            advice = "look at its devices and the network between them"
            raise DDPMError(f"all-reduce: {wanted}, found {text} in process {i}; {advice}")
    return took


@contextlib.contextmanager
def temporary_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """Makes a folder where the checkpoints will lie and removes it again; called by all processes.

    Raises WorkdirError.
    """
    path, problem = folder / f"check_{broadcast_from_primary(secrets.randbits(31))}", ""
    if is_primary():
        try:
            try_storage(path)
        except OSError as error:
            problem = f"{folder}: cannot write there: {error_text(error)}"
    workdir.raise_together(problem)
    try:
        yield path
        barrier("check folder read")
    finally:
        with contextlib.suppress(OSError):
            if is_primary():
                io.remove_folder(path)


def try_storage(folder: epath.Path) -> None:
    """Writes, reads, replaces, lists and deletes a file; prints what each took. Raises OSError."""
    path, took = folder / "probe", []

    def timed(name, action):
        began = time.monotonic()
        found = action()
        took.append(f"{name} {1e3 * (time.monotonic() - began):.3g} ms")
        return found

    timed("write", lambda: io.save_bytes(path, b"one"))
    timed("read", lambda: io.read_bytes(path))
    timed("replace", lambda: io.save_bytes(path, b"two"))
    if timed("list", lambda: list(folder.iterdir())) != [path] or io.read_bytes(path) != b"two":
        raise OSError(errno.EIO, "what was written there is not what is read")
    io.save_bytes(folder / "stays", b"")  # an object store has no empty folders
    timed("delete", path.unlink)
    where = "the bucket" if io.is_object_store(folder) else "the disk"
    logging.info(f"storage    {where}: {', '.join(took)}")


def take_steps(run: Run, exp: Experiment, images: data.ImageDataset) -> Any:
    """Returns the state after a few steps. Raises NonFiniteError where a metric is not finite."""
    config = run.config
    update, make_inputs = experiment.make_input_pipeline(config, exp, images)
    most = config.train.steps_per_dispatch
    sizes = dispatch_sizes(0, config.train.steps, most, lambda step: False)
    inputs = group_inputs(make_inputs(0), sizes, most)
    state = experiment.make_initial_state(config, exp)
    halted, batch = not_halted(exp), next(inputs)
    compiled = compile_update(update, "halt", state, halted, batch)
    logging.info(f"memory     {describe_memory(compiled)}")
    state, halted, metrics = jax.block_until_ready(compiled(state, halted, *batch))
    began, done, most = time.monotonic(), 0, min(STEPS, config.train.steps - batch[2])
    # One process decides for all: their clocks differ, and a step takes all of them.
    while done < most and broadcast_from_primary(time.monotonic() - began < SECONDS):
        batch = next(inputs)
        state, halted, metrics = jax.block_until_ready(compiled(state, halted, *batch))
        done += int(batch[2])
    values = {name: float(v[batch[2] - 1]) for name, v in metrics.items()}
    for name, value in values.items():
        if not np.isfinite(value):
            raise NonFiniteError(f"{name}: {value} in the first steps; lower optim.lr")
    if done:
        pace = (time.monotonic() - began) / done
        rate, total = config.train.batch_size / pace, human_time(pace * config.train.steps)
        steps = f"{1 / pace:.3g} steps/s, {rate:.3g} images/s"
        logging.info(f"pace       {steps}; all steps take {total}")
    logging.info(f"numbers    {', '.join(f'{k} {v:.4g}' for k, v in values.items())}: finite")
    return state


def describe_memory(compiled: Any) -> str:
    """Returns in words what a compiled program needs of each device's memory."""
    memory = compiled.memory_analysis()
    need = memory.argument_size_in_bytes + memory.output_size_in_bytes
    need += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {human_bytes(limit)}" if limit else ""
    return f"a step needs {human_bytes(need)}{of} on each device"


def check_checkpoint(folder: epath.Path, abstract: Any, state: Any) -> None:
    """Saves and restores a checkpoint and compares it bit for bit. Raises WorkdirError."""
    began = time.monotonic()
    with contextlib.closing(checkpoint.Checkpoints(folder / "checkpoints")) as checkpoints:
        checkpoints.save(int(state.step), state)
        blocked = time.monotonic() - began
        checkpoints.wait()
        saved = time.monotonic() - began
        restored = checkpoints.restore(abstract)
    took = time.monotonic() - began - saved
    if name := digests.differing(digests.sha256(restored), digests.sha256(state)):
        raise WorkdirError(f"{folder}: expected {name} as it was saved, found it changed")
    times = f"training waits {human_time(blocked)}, on disk in {human_time(saved)}"
    logging.info(f"checkpoint saved, restored bit for bit: {times}, back in {human_time(took)}")


def noising_grid(exp: Experiment, images: np.ndarray) -> np.ndarray:
    """Returns x_t of the images uint8[n, h, w, c] as a grid, a row for each share of the chain."""
    x_0, T, rows = augment.scale(jnp.asarray(images), exp.levels), exp.process.T, []
    for i, share in enumerate(SHARES):
        t = jnp.full(len(images), round(share * T), jnp.int32)
        eps = random.normal(random.fold_in(random.key(0), i), x_0.shape)
        x_t = process.q_sample(exp.process, x_0, t, eps)
        rows.append(np.asarray(augment.unscale(x_t, exp.levels)))
    return image_grid(np.concatenate(rows), len(images))
