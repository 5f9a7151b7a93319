"""What a config means: the objects of diffusion/, wired together and compiled.

`build` turns names into functions, `make_update` is one training step, `make_predictor` and
`make_sampler` are what samples are made of.
Configuration ends here: nothing below sees a ConfigDict.
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
from jax import Array, random
from jax.sharding import Mesh
from ml_collections import ConfigDict
from optax import GradientTransformation

from diffusion import data, losses, process, samplers, schedules, targets, train_step, unet
from diffusion.data import augment, loader
from diffusion.runtime.config import call_for_key, data_key_message, lookup
from diffusion.samplers import base, guidance, timesteps
from diffusion.sharding import batch_sharded, data_mesh, local_rows, make_global_array, replicated
from diffusion.utils.errors import DataError


class Experiment(NamedTuple):
    """A config's model and objective, before any data or weights.

    variance: of the reverse steps that was trained with; reverse: the one that samples are drawn
    with.
    """

    p: process.Process
    target: targets.Target
    variance: targets.Variance
    reverse: targets.Variance
    loss: losses.Loss
    net: unet.UNet
    tx: GradientTransformation
    image_shape: tuple[int, int, int]
    mesh: Mesh


def build(config: ConfigDict) -> Experiment:
    """Looks every name up and finds what does not fit together (DDPMError), without computing."""
    c = config
    schedule = lookup(schedules.SCHEDULES, "process.schedule", c.process.schedule)
    target = lookup(targets.TARGETS, "target", c.target)
    variance = lookup(targets.VARIANCES, "variance", c.variance)
    make_loss = lookup(losses.LOSSES, "loss.name", c.loss.name)

    betas = schedule(c.process.T, c.process.beta_start, c.process.beta_end)
    p = call_for_key(process.from_betas, "process", betas)
    loss = call_for_key(make_loss, "loss", p, target, variance, **without(c.loss, "name"))
    shape = image_shape(c)
    net = unet.UNet(**c.model, out_ch=c.data.channels * variance.outputs)
    tx = train_step.make_optimizer(c.optim.lr, c.optim.warmup, c.optim.clip)
    reverse = reverse_variance(c, variance)
    x = Experiment(p, target, variance, reverse, loss, net, tx, shape, data_mesh())
    call_for_key(abstract_state, "model", x)  # sizes that do not divide are found here
    return x


TAKEN = 2**31  # far from what the step folds in or splits off
ANALYTIC = "analytic"  # sampler.variance that is measured: likelihoods.with_analytic


def reverse_variance(config: ConfigDict, trained: targets.Variance) -> targets.Variance:
    """What sampler.variance names; "" and, until it is measured, "analytic": the trained one."""
    name = config.sampler.variance
    known = {n: v for n, v in targets.VARIANCES.items() if v.outputs == trained.outputs}
    known |= {ANALYTIC: trained} if trained.outputs == 1 else {}
    return lookup(known, "sampler.variance", name) if name else trained


SMALL = 16 * 16  # pixels


def cpu_devices(config: ConfigDict) -> int:
    """How many of this machine's cores can share a batch evenly: at most four.

    Each holds a state of its own, so more would cost much memory; XLA has a use for the others.
    Steps on small images are over before the cores have agreed on a gradient: one.
    """
    if math.prod(image_shape(config)[:2]) < SMALL:
        return 1
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts, groups = config.optim.accumulate, config.optim.clip_groups
    shares = [n for n in range(1, min(here or 1, 4) + 1)]
    return max(
        n for n in shares if config.train.batch_size % math.lcm(n * parts, groups * parts) == 0
    )


def image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """(height, width, channels) of the images."""
    c = config.data
    return c.image_size, c.image_width or c.image_size, c.channels


def without(config: ConfigDict, *names: str) -> dict[str, Any]:
    """The other entries: keyword arguments of the function that `names` chose."""
    return {key: value for key, value in config.items() if key not in names}


def training_keys(seed: int) -> Array:
    """The keys of a training: initial parameters, order of the data, randomness of the steps."""
    return random.split(random.key(seed), 3)


def initial_state(x: Experiment, seed: int) -> train_step.TrainState:
    """The state before the first step, a function of the seed."""
    images, times = jnp.zeros((1, *x.image_shape)), jnp.zeros(1)
    params = x.net.init(training_keys(seed)[0], images, times, train=False)["params"]
    return train_step.create_train_state(params, x.tx)


def abstract_state(x: Experiment) -> train_step.TrainState:
    """The shapes, types and shardings of a state: all of it on every device."""
    state = jax.eval_shape(lambda: initial_state(x, 0))
    whole = replicated(x.mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), state)


def make_initial_state(config: ConfigDict, x: Experiment) -> Callable[[], train_step.TrainState]:
    """The compiled `initial_state` of the config's seed, on every device."""
    whole = replicated(x.mesh)
    return jax.jit(lambda: initial_state(x, config.seed), out_shardings=whole)


def make_update(config: ConfigDict, x: Experiment) -> Callable:
    """update(state, images uint8[n, h * w * c], labels int[n]) -> (state, metrics): a whole step.

    The whole set lies on every device, an image a row. Batch, flips, t, eps and dropout follow from
    the seed and state.step alone, so that a resumed run is the uninterrupted one.
    """
    size, flip = config.train.batch_size, config.data.flip
    whole = replicated(x.mesh)

    def draw(key, step, images, labels):
        index = augment.batch_indices(key, step, size, len(labels))
        # By every device for itself: else they would wait for each other within its loop.
        index = jax.lax.with_sharding_constraint(index, whole)
        return augment.gather_batch(images, labels, index, key, step, flip, x.image_shape)

    return _compiled_update(config, x, draw, whole)


def make_streamed_update(config: ConfigDict, x: Experiment) -> Callable:
    """update(state, image uint8[b, h, w, c], label int[b]) -> (state, metrics): the same step.

    The batch comes from outside, cut over the devices; its flips are drawn here, as above.
    """

    def augment(key, step, image, label):
        return augment.augment(image, key, step, config.data.flip), label

    return _compiled_update(config, x, augment, batch_sharded(x.mesh))


def _compiled_update(config, x, batch, sharding):
    """batch: (key, step, *inputs) -> (x_0, label); sharding: of the inputs."""

    apply, options = make_apply_fn(config, x)
    step = train_step.make_train_step(x.loss, apply, x.tx, config.optim.ema, **options)

    def update(state, images, labels):
        _, key_data, key_step = training_keys(config.seed)
        drawn = batch(key_data, state.step, images, labels)
        x_0, label = jax.lax.with_sharding_constraint(drawn, batch_sharded(x.mesh))
        key = random.fold_in(key_step, state.step)
        return step(state, key, (x_0, drop_labels(config, key, label)))

    whole = replicated(x.mesh)
    shardings = {"in_shardings": (whole, sharding, sharding), "out_shardings": whole}
    return jax.jit(update, donate_argnums=0, **shardings)


def apply_model(
    x: Experiment, params: Any, x_t: Array, t: Array, y: Array | None = None, **options
) -> Array:
    """The network's at images x_t [b, h, w, c], times t [b] and labels y int[b] or None.

    Returns [b, h, w, out_ch]. options: of x.net.apply. The images are cut over the devices of
    x.mesh, as ops.convolve wants to be told.
    """
    with jax.sharding.use_abstract_mesh(x.mesh.abstract_mesh):
        return x.net.apply({"params": params}, x_t, t, y, **options)


def make_apply_fn(config: ConfigDict, x: Experiment) -> tuple[Callable, dict[str, Any]]:
    """(apply, options) for train.make_gradient: as the training takes its gradient.

    apply: (params, key, x_t, t, label) -> the network's output, with dropout.
    """

    def apply(params, key, x_t, t, label):
        return apply_model(x, params, x_t, t, label, train=True, rngs={"dropout": key})

    return apply, {k: config.optim[k] for k in ("accumulate", "clip_groups", "clip")}


def drop_labels(config: ConfigDict, key: Array, label: Array) -> Array | None:
    """The labels to train with: none, or some of them taken away, as guidance needs it.

    key: of the step; label: int[b], the data's.
    """
    classes, share = config.model.num_classes, config.train.label_dropout
    if not classes or not share:
        return label if classes else None
    taken = random.bernoulli(random.fold_in(key, TAKEN), share, label.shape)
    return jnp.where(taken, classes, label)


Inputs = Callable[[int], Iterator[tuple[Array, Array]]]  # the step to start from -> of each step


def fits_on_device(config: ConfigDict, images: data.ImageDataset) -> bool:
    """Whether the whole set may lie on every device."""
    return images.nbytes <= config.data.on_device_gib * 2**30


def make_input_pipeline(config: ConfigDict, x: Experiment, images: data.ImageDataset) -> tuple[Callable, Inputs]:
    """(update, inputs: the step to start from -> what update takes at each step).

    A set that fits lies on every device; a larger one is streamed. Both give the same batches.
    Raises DataError, at once or while reading.
    """
    if not fits_on_device(config, images):
        return make_streamed_update(config, x), lambda start: _streamed(config, x, images, start)
    image, label, _ = loader.load_dataset(images)
    arrays = image.reshape(len(image), -1), label

    def inputs(start):
        whole = replicated(x.mesh)
        return itertools.repeat(tuple(make_global_array(a, whole, a.shape) for a in arrays))

    return make_update(config, x), inputs


def _streamed(config, x, images, start):
    """The batches of every step, two of them on the way to the devices while one is used."""
    size, sharding = config.train.batch_size, batch_sharded(x.mesh)
    rows, steps = local_rows(sharding, size), range(start, config.train.steps)
    _, key_data, _ = training_keys(config.seed)
    ahead = collections.deque()
    for batch in loader.iterate_shuffled(images, key_data, steps, size, rows, config.data.workers):
        ahead.append(tuple(make_global_array(a, sharding, (size, *a.shape[1:])) for a in batch))
        if len(ahead) > 2:
            yield ahead.popleft()
    yield from ahead


def make_predictor(config: ConfigDict, x: Experiment, variance: targets.Variance | None = None):
    """(params, label int[b]) -> Predict, on the chain of the training.

    x_0 is clipped, or thresholded, and guided towards the label, as config.sampler says. variance:
    of the reverse steps; None: the one for samples.
    """
    c, classes = config.sampler, config.model.num_classes
    limit = guidance.dynamic_threshold(c.threshold) if c.threshold else c.clip

    def predictor(params: Any, label: Array) -> targets.Predict:
        def apply(x_t, t, y):
            y = y if classes else None
            return apply_model(x, params, x_t, t, y, train=False)

        network = functools.partial(apply, y=label)
        if c.guidance:
            network = guidance.classifier_free_guidance(apply, label, classes, c.guidance)
        return targets.make_predict(x.p, network, x.target, variance or x.reverse, limit)

    return predictor


def make_sampler(config: ConfigDict, x: Experiment) -> tuple[base.Sampler, np.ndarray]:
    """The config's sampler and the times ts, int32[steps + 1], that it visits. Raises Fatal.

    Of the sampler's options those are passed on that it has, and that are not "".
    """
    c = config.sampler
    make = lookup(samplers.SAMPLERS, "sampler.name", c.name)
    grid = lookup(timesteps.GRIDS, "sampler.grid", c.grid)
    known = inspect.signature(make).parameters
    options = {key: value for key, value in c.items() if key in known and value != ""}
    sampler = call_for_key(make, "sampler", x.p, **options)
    if c.times:
        return sampler, call_for_key(timesteps.explicit, "sampler.times", x.p, c.times)
    return sampler, call_for_key(grid, "sampler.steps", x.p, c.steps)


def load_split(config: ConfigDict, x: Experiment, split: str = "train") -> data.ImageDataset:
    """The images of a split, seen to be what the config says they are. Raises Fatal."""
    c = config.data
    source = c.source if c.source in data.SOURCES else "tfds"  # the others are prepared beforehand
    try:
        images = data.open_dataset(source, split, name=c.name, data_dir=c.data_dir)
    except DataError as error:
        raise DataError(data_key_message(error, c)) from error
    if images.shape != x.image_shape:
        found, wanted = ("x".join(map(str, shape)) for shape in (images.shape, x.image_shape))
        message = (
            f"data: expected images of {wanted} (data.image_size, data.image_width, "
            f"data.channels), found {found}; change these keys"
        )
        raise DataError(message)
    if config.model.num_classes not in (0, images.num_classes):
        message = (
            f"model.num_classes: expected the data's {images.num_classes}, or 0 for a model "
            f"without classes, found {config.model.num_classes}"
        )
        raise DataError(message)
    return images
