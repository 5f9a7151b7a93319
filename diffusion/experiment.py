"""The factory: what a configuration means, as the objects of diffusion/, wired and compiled.

Configuration ends here: nothing below this layer sees a ConfigDict.
"""

import collections
import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, random
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion import (
    continuous,
    data,
    gradients,
    losses,
    optimisers,
    samplers,
    schedules,
    targets,
    train_step,
    unet,
)
from diffusion.data import augment, loader
from diffusion.data.loader import load_dataset
from diffusion.kernels import group_norm, rms_norm, winograd
from diffusion.process import Process, from_betas
from diffusion.runtime import objective
from diffusion.runtime.config import call_for_key, lookup
from diffusion.samplers import guidance, timesteps
from diffusion.sharding import (
    batch_sharded,
    data_mesh,
    local_rows,
    make_global_array,
    replicated,
)
from diffusion.timestep_samplers import TIMESTEP_SAMPLERS, TimestepSampler
from diffusion.utils.errors import ConfigError, DataError

# Of the evaluated and of the trained network: functions with the signature of group_norm.
NORMALIZATIONS = {
    "group": (group_norm.group_norm, group_norm.group_norm_with_vjp),
    "rms": (rms_norm.rms_norm, rms_norm.rms_norm),
}
ANALYTIC = "analytic"  # a sampler.variance that is measured first (modes._common.with_analytic)
MIN_PIXELS_PER_DEVICE = 16 * 16  # smaller images are over before CPU devices have synchronised
MAX_CPU_DEVICES = 4  # each holds a replica of the state
PREFETCH = 2  # streamed batches on their way to the devices while one is used


class Experiment(NamedTuple):
    """A model and its objective, before any data or weights.

    net: the network as samplers and likelihoods apply it; train_net: with the training kernels.
    variance: of the reverse steps in training; sample_variance: the one that samples have.
    """

    process: Process
    target: targets.Target
    variance: targets.Variance
    sample_variance: targets.Variance
    loss: losses.Loss
    net: unet.UNet
    train_net: unet.UNet
    tx: optax.GradientTransformation
    timesteps: TimestepSampler | None
    continuous: bool  # whether the loss is the bound in continuous time
    schedule: str  # of continuous.GAMMAS; the parameters of a learned one are params["schedule"]
    image_shape: tuple[int, int, int]
    levels: int  # of a pixel value; see data.augment.scale
    mesh: Mesh
    averages: tuple[float, ...] = ()  # relative lengths of those tracked; see posthoc_ema.py
    # A training's shapes, dtypes and shardings: replicated on every device.
    abstract_state: train_step.TrainState | None = None


def build(config: ConfigDict, mesh: Mesh | None = None) -> Experiment:
    """Looks up every name and checks what must fit together, without computing anything.

    mesh: None: of all devices. Raises ConfigError.
    """
    c, mesh = config, mesh or data_mesh()
    schedule = lookup(schedules.SCHEDULES, "process.schedule", c.process.schedule)
    target = lookup(targets.TARGETS, "target", c.target)
    variance = lookup(targets.VARIANCES, "variance", c.variance)

    process = call_for_key(from_betas, "process", c.process.betas or _betas(c, schedule))
    loss = objective.build_loss(c, process, target, variance)
    make_timesteps = lookup(TIMESTEP_SAMPLERS, "train.timesteps", c.train.timesteps)
    network = dict(c.model)
    norm = lookup(NORMALIZATIONS, "model.normalization", network.pop("normalization"))
    make_net = functools.partial(unet.UNet, **network, out_ch=c.data.channels * variance.outputs)
    exp = Experiment(
        process,
        target,
        variance,
        _sample_variance(c, variance),
        loss,
        net=make_net(conv=functools.partial(winograd.conv, mesh=mesh), norm=norm[0]),
        train_net=make_net(conv=functools.partial(winograd.conv_with_vjp, mesh=mesh), norm=norm[1]),
        tx=make_config_optimizer(c),
        timesteps=make_timesteps(process),
        continuous=losses.LOSSES[c.loss.name] is continuous.continuous,
        schedule=c.loss.get("schedule", "linear"),
        image_shape=image_shape(c),
        levels=c.data.levels,
        mesh=mesh,
        averages=tuple(c.optim.posthoc),
    )
    # Sizes that do not divide are found here.
    return exp._replace(abstract_state=call_for_key(_abstract_state, "model", exp))


def _betas(config: ConfigDict, schedule: Callable) -> np.ndarray:
    """Returns the schedule's betas between those of its bounds that it has."""
    bounds = list(inspect.signature(schedule).parameters)[1:]
    return call_for_key(schedule, "process", config.process.T, *map(config.process.get, bounds))


def make_lr_schedule(config: ConfigDict) -> optax.Schedule:
    """Builds step -> learning rate of the update after `step` others. Raises ConfigError."""
    c = config.optim
    schedule = lookup(optimisers.LR_SCHEDULES, "optim.schedule", c.schedule)
    return call_for_key(schedule, "optim.schedule", c.lr, c.warmup, config.train.steps)


def make_config_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Builds the optimiser of config.optim. Raises ConfigError."""
    c, schedule = config.optim, make_lr_schedule(config)
    lookup(optimisers.OPTIMISERS, "optim.name", c.name)
    args = c.name, schedule, c.clip, c.weight_decay
    return call_for_key(optimisers.make_optimizer, "optim", *args)


def _sample_variance(config: ConfigDict, trained: targets.Variance) -> targets.Variance:
    """What sampler.variance names; "" and, until it is measured, "analytic": the trained one."""
    name = config.sampler.variance
    if trained.outputs == 2:
        if name not in ("", config.variance):
            wanted = f"expected {config.variance}, which this network has learned, or none"
            raise ConfigError(f"sampler.variance: {wanted}, found {name!r}")
        return trained
    known = {n: v for n, v in targets.VARIANCES.items() if v.outputs == 1} | {ANALYTIC: trained}
    return lookup(known, "sampler.variance", name) if name else trained


def with_learned_process(exp: Experiment, params: Any) -> Experiment:
    """Returns the experiment on the chain that the parameters have learned, if they have one."""
    if not continuous.GAMMAS[exp.schedule]:
        return exp
    learned = continuous.learned_process(exp.process, exp.schedule, params["schedule"])
    return exp._replace(process=learned)


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images."""
    c = config.data
    return c.image_size, c.image_width or c.image_size, c.channels


def cpu_devices(config: ConfigDict) -> int:
    """Returns how many of this machine's cores can share a batch evenly as devices of their own.

    XLA gives more than one core only to its largest operations, and small networks have few.
    """
    if math.prod(image_shape(config)[:2]) < MIN_PIXELS_PER_DEVICE:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts, groups = config.optim.accumulate, config.optim.clip_groups
    return max(
        n
        for n in range(1, min(cores or 1, MAX_CPU_DEVICES) + 1)
        if config.train.batch_size % math.lcm(n * parts, groups * parts) == 0
    )


# Training


def initial_state(exp: Experiment, key: Array) -> train_step.TrainState:
    """Returns the state before the first step; key: TrainingKeys.params."""
    images, times = jnp.zeros((1, *exp.image_shape)), jnp.zeros(1)
    labels = jnp.zeros(1, jnp.int32) if exp.net.num_classes else None
    params = exp.net.init(key, images, times, labels, train=False)["params"]
    if schedule := continuous.GAMMAS[exp.schedule]:
        key = random.fold_in(key, 1)
        params["schedule"] = schedule.init(key, *continuous.gamma_ends(exp.process))
    return train_step.create_train_state(params, exp.tx, exp.timesteps, len(exp.averages))


def _abstract_state(exp: Experiment) -> train_step.TrainState:
    state = jax.eval_shape(functools.partial(initial_state, exp), random.key(0))
    sharding = replicated(exp.mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state)


def make_initial_state(config: ConfigDict, exp: Experiment) -> train_step.TrainState:
    """Computes the `initial_state` of the config's seed, replicated on every device."""
    sharding = replicated(exp.mesh)
    keys = replicated_keys(config.seed, exp)
    make = jax.jit(functools.partial(initial_state, exp), out_shardings=sharding)
    return make(keys.params)


def replicated_keys(seed: int, exp: Experiment) -> train_step.TrainingKeys:
    """Returns the keys of a training, typed keys of shape [], on every device.

    Programs take them as arguments, so that another seed finds these compiled.
    """
    everywhere = replicated(exp.mesh)
    return jax.jit(train_step.training_keys, static_argnums=0, out_shardings=everywhere)(seed)


def make_apply_fn(exp: Experiment) -> Callable:
    """Builds (params, dropout key, x_t, t, label) -> output, as training applies the network."""

    def apply(params, key, x_t, t, label):
        variables, rngs = {"params": params}, {"dropout": key}
        return exp.train_net.apply(variables, x_t, t, label, train=True, rngs=rngs)

    return apply


def make_config_grad_fn(config: ConfigDict, exp: Experiment) -> Callable:
    """Builds gradients.make_grad_fn's function with the options of config.optim."""
    options = {key: config.optim[key] for key in ("accumulate", "clip_groups", "clip")}
    return gradients.make_grad_fn(exp.loss, make_apply_fn(exp), **options)


def make_update(config: ConfigDict, exp: Experiment, resident: bool) -> Callable:
    """Compiles one training step: (state, batch, (keys, dataset)) -> (state, metrics).

    Batch, flips, t, eps and dropout follow from the seed and state.step alone, so that a resumed
    run equals the uninterrupted one. The state is donated. keys: of `replicated_keys`.

    Args:
      resident: batch is dataset indices int32[b], and dataset is whole on every device, uint8
        [n, h * w * c] and labels int32[n]; else batch was read elsewhere, uint8[b, h, w, c] and
        labels int32[b], sharded over the devices, and dataset is ().
    """
    grad_fn, ema = make_config_grad_fn(config, exp), config.optim.ema
    step = train_step.make_train_step(grad_fn, exp.tx, ema, exp.timesteps, exp.averages)
    whole, sharded = replicated(exp.mesh), batch_sharded(exp.mesh)

    def update(state, batch, fixed):
        keys, dataset = fixed
        if resident:
            batch = augment.gather_batch(*dataset, batch, exp.image_shape)
        image, label = jax.lax.with_sharding_constraint(batch, sharded)
        x_0 = augment.augment(image, keys.augment, state.step, config.data.flip, exp.levels)
        key = random.fold_in(keys.steps, state.step)
        return step(state, key, (x_0, training_labels(config, exp, key, label)))

    shardings = whole, whole if resident else sharded, whole
    return jax.jit(update, in_shardings=shardings, out_shardings=whole, donate_argnums=0)


def training_labels(config: ConfigDict, exp: Experiment, key: Array, label: Array) -> Array | None:
    """Returns a step's labels int[b], a share of them hidden; None for a model without classes."""
    if not exp.net.num_classes:
        return None
    return train_step.drop_labels(key, label, exp.net.null_label, config.train.label_dropout)


def fits_on_device(config: ConfigDict, images: data.ImageDataset) -> bool:
    """Returns whether the whole data set may lie on every device."""
    return images.nbytes <= config.data.on_device_gib * 2**30


def make_input_pipeline(
    config: ConfigDict, exp: Experiment, images: data.ImageDataset
) -> tuple[Callable, Callable[[int], Iterator[tuple[Any, Any]]]]:
    """Returns (update, start -> iterator over (batch, (keys, dataset)) of steps start, ...).

    A data set that fits lies on every device; a larger one is streamed. Both give the same batches.
    Raises ConfigError, and DataError at once or while reading.
    """
    if not config.train.steps:
        why = "as these weights came without their training"
        raise ConfigError(f"train.steps: expected 1 or more, found 0, {why}; give it")
    size, whole = config.train.batch_size, replicated(exp.mesh)
    if not fits_on_device(config, images):
        return make_update(config, exp, False), functools.partial(_stream, config, exp, images)
    image, label = load_dataset(images)
    image = image.reshape(len(image), -1)  # a TPU would copy images of another shape as a whole
    resident = tuple(make_global_array(a, whole, a.shape) for a in (image, label))
    fixed = replicated_keys(config.seed, exp), resident
    indices = loader.make_batch_indices(images.n, size, config.seed)

    def inputs(start):
        for step in itertools.count(start):
            yield make_global_array(indices(step), whole, (size,)), fixed

    return make_update(config, exp, True), inputs


def _stream(config, exp, images, start):
    """Yields each step's batch, with PREFETCH of them on their way to the devices."""
    size, sharding = config.train.batch_size, batch_sharded(exp.mesh)
    rows, steps = local_rows(sharding, size), range(start, config.train.steps)
    ahead, fixed = collections.deque(), (replicated_keys(config.seed, exp), ())
    args = images, config.seed, steps, size, rows, config.data.workers
    for batch in loader.iterate_shuffled(*args):
        batch = tuple(make_global_array(a, sharding, (size, *a.shape[1:])) for a in batch)
        ahead.append((batch, fixed))
        if len(ahead) > PREFETCH:
            yield ahead.popleft()
    yield from ahead


# Sampling


def apply_model(exp: Experiment, params: Any, x_t: Array, t: Array, y: Array | None) -> Array:
    """Returns the network's output [b, h, w, out_ch] at x_t [b, h, w, c], t [b], labels y int[b].

    A model without classes ignores y.
    """
    y = y if exp.net.num_classes else None
    return exp.net.apply({"params": params}, x_t, t, y, train=False)


def make_predictor(
    config: ConfigDict, exp: Experiment, variance: targets.Variance | None = None
) -> Callable[[Any, Array], targets.Predict]:
    """Builds (params, label int[b]) -> Predict, on the chain of the training.

    x_0 is clipped or thresholded, and guided towards the label, as config.sampler says. variance:
    of the reverse steps; None: exp.sample_variance.
    """
    c = config.sampler
    clip = c.clip and functools.partial(jnp.clip, min=-c.clip_range, max=c.clip_range)
    if c.threshold:
        clip = guidance.dynamic_threshold(c.threshold, c.threshold_max or np.inf)

    def predictor(params: Any, label: Array) -> targets.Predict:
        apply = functools.partial(apply_model, exp, params)
        network = functools.partial(apply, y=label)
        if c.guidance:
            null = exp.net.null_label
            network = guidance.classifier_free_guidance(apply, label, null, c.guidance)
        used = variance or exp.sample_variance
        return targets.make_predict(exp.process, network, exp.target, used, clip)

    return predictor


def make_sampler(config: ConfigDict, exp: Experiment) -> tuple[samplers.Sampler, np.ndarray]:
    """Returns the config's sampler and the times int32[steps + 1] that it visits.

    Of config.sampler's options the sampler gets those that it has and that are not "". Raises
    ConfigError.
    """
    c, process = config.sampler, exp.process
    make = lookup(samplers.SAMPLERS, "sampler.name", c.name)
    grid = lookup(samplers.GRIDS, "sampler.grid", c.grid)
    known = inspect.signature(make).parameters
    options = {key: value for key, value in c.items() if key in known and value != ""}
    sampler = call_for_key(make, "sampler", process, **options)
    if c.times:
        return sampler, call_for_key(timesteps.explicit, "sampler.times", process, c.times)
    return sampler, call_for_key(grid, "sampler.steps", process, c.steps)


def load_split(config: ConfigDict, exp: Experiment, split: str = "train") -> data.ImageDataset:
    """Opens a split and checks that its images are what the config says.

    Raises ConfigError, DataError.
    """
    c = config.data
    if not c.source:
        why = "as these weights came without their data"
        how = "give it, data.name and data.data_dir, and to train also train.steps"
        raise ConfigError(f"data.source: expected a source, found none, {why}; {how}")
    source = c.source if c.source in data.SOURCES else "tfds"  # the others are prepared beforehand
    images = data.open_dataset(source, split, name=c.name, data_dir=c.data_dir)
    if images.shape != exp.image_shape:
        found, wanted = ("x".join(map(str, shape)) for shape in (images.shape, exp.image_shape))
        keys = "data.image_size, data.image_width, data.channels"
        raise DataError(f"data: expected images of {wanted} ({keys}), found {found}; change these")
    found = config.model.num_classes
    labels = found - (0 < found == config.model.null_class + 1)  # a last one that is "no class"
    if labels not in (0, images.num_classes):
        wanted = f"the data's {images.num_classes}, or 0 for a model without classes"
        raise DataError(f"model.num_classes: expected {wanted}, found {found}")
    return images
