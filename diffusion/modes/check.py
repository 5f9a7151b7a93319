"""--mode=check: everything that a training will need, tried in a minute, before it takes a week.

Devices, data, room, memory, a few steps with their pace, a checkpoint saved and restored, and one
picture: what the network will see. Each trial says one line, or ends the check with the exit code
that the training would have had.
"""

import contextlib
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from ml_collections import ConfigDict

from diffusion import checkpoint, data, experiment, nonfinite, process
from diffusion.data import augment
from diffusion.experiment import Experiment
from diffusion.plotting import image_grid
from diffusion.runtime.workdir import check_disk_space, tree_bytes
from diffusion.utils import digests
from diffusion.utils.errors import DataError, NonFiniteError, WorkdirError
from diffusion.utils.progress import human_bytes, human_time

LOOKED_AT = 512  # images of the data set
STEPS, SECONDS = 20, 10.0  # of training: the first of the two that is over
SHARES = (0.0, 0.02, 0.1, 0.2, 0.4, 0.7, 1.0)  # of the chain, in the picture

Say = Callable[[str], None]


def run(config: ConfigDict, x: Experiment, workdir: pathlib.Path, say: Say) -> None:
    """All trials, in the order of a training. Raises DDPMError, CheckpointError, DataError."""
    devices = jax.devices()
    say(f"devices    {len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}")
    images = experiment.load_split(config, x)
    sample = look_at_data(config, images, say)
    abstract = experiment.abstract_state(x)
    size = tree_bytes(abstract)
    with a_folder_in(workdir) as folder:
        check_disk_space(folder, abstract, config.train.keep)
        free = human_bytes(shutil.disk_usage(folder).free)
        kept = human_bytes(size * (config.train.keep + 1))
        say(f"room       {free} free; checkpoints will take {kept} (train.keep + 1 of them)")
        state = take_steps(config, x, images, say)
        drill(folder, abstract, state, say)
    picture = workdir / "figures" / "check.png"
    draw(x, sample, picture)
    say(f"picture    {picture}: the data, and what the network sees of it at rising t")
    say("done       nothing stands in the way of --mode=train")


def look_at_data(config: ConfigDict, images: data.ImageDataset, say: Say) -> np.ndarray:
    """Some of the images, evenly spread: uint8[8, h, w, c]. Raises DDPMError where all are one grey."""
    at = np.unique(np.linspace(0, images.n - 1, LOOKED_AT).astype(int))
    some, _ = images.read(at)
    low, high, mean = int(some.min()), int(some.max()), float(some.mean())
    shape = "x".join(map(str, images.shape))
    name = config.data.name or config.data.source
    say(f"data       {name}: {images.n:,} images of {shape}, values {low}..{high}, mean {mean:.1f}")
    if low == high:
        message = f"data: expected images, found the one value {low} in {len(some)} of them"
        raise DataError(f"{message}; look at how they were prepared")
    if high < 64:
        say(f"           dark: no value above {high} of 255; were they meant to be so?")
    if images.n < config.train.batch_size:
        say(f"           few: a batch of {config.train.batch_size} has some of them twice")
    return some[np.linspace(0, len(some) - 1, 8).astype(int)]


@contextlib.contextmanager
def a_folder_in(workdir: pathlib.Path):
    """A folder that goes again, made where the checkpoints will lie. Raises Fatal."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix="check_", dir=workdir))
    except OSError as error:
        raise WorkdirError(f"{workdir}: cannot write there: {error.strerror}") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_steps(config: ConfigDict, x: Experiment, images: data.ImageDataset, say: Say) -> Any:
    """The state after a few steps of the compiled training. Raises DDPMError where it is not finite."""
    update, inputs = experiment.make_input_pipeline(config, x, images)
    state, inputs = experiment.make_initial_state(config, x)(), inputs(0)
    batch = next(inputs)
    began = time.monotonic()
    update = jax.jit(nonfinite.guard_update(update, "halt"), donate_argnums=0)
    update = update.lower(state, *batch).compile()
    say(f"compiled   in {human_time(time.monotonic() - began)}; {memory(update)}")
    state, metrics = update(state, *batch)
    jax.block_until_ready(state)
    began, done, most = time.monotonic(), 0, min(STEPS, config.train.steps - 1)
    while done < most and time.monotonic() - began < SECONDS:
        state, metrics = update(state, *next(inputs))
        jax.block_until_ready(state)
        done += 1
    values = {name: float(v) for name, v in metrics.items()}
    for name, value in values.items():
        if not np.isfinite(value):
            raise NonFiniteError(f"{name} is {value} at once; lower optim.lr")
    pace = (time.monotonic() - began) / max(done, 1)
    if done:
        rate = config.train.batch_size / pace
        rest = human_time(pace * config.train.steps)
        say(f"pace       {1 / pace:.3g} steps/s, {rate:.3g} images/s; all steps take {rest}")
    say(f"numbers    {', '.join(f'{k} {v:.4g}' for k, v in values.items())}: finite")
    return state


def memory(compiled: Any) -> str:
    """What a compiled program needs on each device, and what there is, in words."""
    about = compiled.memory_analysis()
    need = about.argument_size_in_bytes + about.output_size_in_bytes + about.temp_size_in_bytes
    need -= about.alias_size_in_bytes
    there = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {human_bytes(there)}" if there else ""
    return f"a step needs {human_bytes(need)}{of} on each device"


def drill(folder: pathlib.Path, abstract: Any, state: Any, say: Say) -> None:
    """A checkpoint, saved, restored and compared bit for bit. Raises CheckpointError."""
    began = time.monotonic()
    with contextlib.closing(checkpoint.Checkpoints(folder / "drill")) as checkpoints:
        step = int(state.step)
        checkpoints.save(step, state)
        blocked = time.monotonic() - began
        checkpoints.wait()
        saved = time.monotonic() - began
        back = checkpoints.restore(abstract)
    took = time.monotonic() - began - saved
    if name := digests.differing(digests.sha256(back), digests.sha256(state)):
        raise WorkdirError(f"{folder}: {name} came back otherwise than it was saved")
    times = f"training waits {human_time(blocked)}, on disk in {human_time(saved)}"
    say(f"checkpoint saved and restored bit for bit: {times}, back in {human_time(took)}")


def draw(x: Experiment, images: np.ndarray, path: pathlib.Path) -> None:
    """One row for each share of the chain: x_t of the same images, t rising downwards."""
    x_0 = augment.scale(jnp.asarray(images))
    rows, T = [], len(x.p.alpha_bar) - 1
    for i, share in enumerate(SHARES):
        t = jnp.full(len(images), round(share * T), jnp.int32)
        eps = random.normal(random.fold_in(random.key(0), i), x_0.shape)
        rows.append(np.asarray(augment.unscale(process.q_sample(x.p, x_0, t, eps))))
    image_grid.save_png(path, image_grid.image_grid(np.concatenate(rows), len(images)))
