"""A small classifier of the training data, whose features see what tells one image from another.

Random features and pixels weigh all structure alike, whether or not it matters to what an image
shows. Where the data have classes, these features need no download.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax, random

from diffusion.metrics.features import LAYOUT, area_weights

WIDTHS = 32, 64, 128  # channels of the levels; each but the last ends in 2x2 max pooling
NUM_FEATURES = 64
MIN_SIDE, MAX_SIDE = 4, 16  # pixels of the levels; larger images pass strided convolutions first
MIN_IMAGES = 20
CLASSIFIER_VERSION = 1  # of the network and its training, for caches
HELD_OUT = 10  # one image in so many
BATCH_SIZE, STEPS, LEARNING_RATE, WEIGHT_DECAY = 64, 300, 3e-3, 1e-2

Params = Mapping[str, Array]


class Classifier(NamedTuple):
    """Parameters {name: float32 array}, and the share of `held_out` images that they get right."""

    params: Params
    accuracy: float
    held_out: int


def _layout(shape: tuple[int, int, int]) -> list[tuple[str, int, int]]:
    """Returns (name, channels, stride) of the convolutions; a stride of 1 keeps the size."""
    side, layers = min(shape[:2]), []
    while side > MAX_SIDE:
        layers.append((f"stem_{len(layers)}", WIDTHS[0], 2))
        side = -(-side // 2)
    for i, width in enumerate(WIDTHS):
        layers += [(f"level_{i}_{j}", width, 1) for j in (0, 1)]
        if side < 2 * MIN_SIDE or i == len(WIDTHS) - 1:
            return layers
        layers.append(("pool", width, 2))
        side //= 2
    return layers


def initial_params(shape: tuple[int, int, int], num_classes: int, key: Array) -> Params:
    """Returns random parameters for images (h, w, c). Raises ValueError for h or w < 4."""
    if min(shape[:2]) < MIN_SIDE or num_classes < 2:
        found = f"{shape[0]}x{shape[1]} and {num_classes}"
        raise ValueError(f"classifier: expected 4x4 or more and 2 classes or more, found {found}")
    sizes, width = {}, shape[2]
    for name, channels, _ in _layout(shape):
        if name != "pool":
            sizes[name], width = (3, 3, width, channels), channels
    sizes["features"] = MIN_SIDE**2 * width, NUM_FEATURES
    sizes["logits"] = NUM_FEATURES, num_classes
    params = {}
    for i, (name, size) in enumerate(sizes.items()):
        scale = math.sqrt(2 / math.prod(size[:-1]))  # He et al. 2015 (arXiv:1502.01852)
        params[name] = scale * random.normal(random.fold_in(key, i), size)
        params[f"{name}.bias"] = jnp.zeros(size[-1])
    return params


def apply(params: Params, images: Array) -> tuple[Array, Array]:
    """Returns features float32[b, 64] and logits float32[b, k] of images uint8[b, h, w, c]."""
    x = images.astype(jnp.float32) / 127.5 - 1
    for name, _, stride in _layout(images.shape[1:]):
        if name == "pool":
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        else:
            x = lax.conv_general_dilated(
                x,
                params[name],
                (stride, stride),
                "SAME",
                dimension_numbers=LAYOUT,
                precision="highest",
            )
            x = jax.nn.relu(x + params[f"{name}.bias"].reshape(1, 1, 1, -1))
    rows, columns = (jnp.asarray(area_weights(side, MIN_SIDE)) for side in x.shape[1:3])
    x = jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(_dense(params, "features", x))
    return x, _dense(params, "logits", x)


def _dense(params: Params, name: str, x: Array) -> Array:
    return jnp.matmul(x, params[name], precision="highest") + params[f"{name}.bias"][None]


def train(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda done: None,
) -> Classifier:
    """Trains on nine tenths of images uint8[n, h, w, c] with labels int[n]; tests on the others.

    The result is a function of the arguments, on one kind of device. `on_step` is called after each
    of STEPS steps with the number of steps done. Raises ValueError as `initial_params`, and for
    fewer than 20 images.
    """
    if len(images) < MIN_IMAGES:
        raise ValueError(f"classifier: expected {MIN_IMAGES} images or more, found {len(images)}")
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, STEPS)
    tx = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    params = initial_params(images.shape[1:], num_classes, random.key(seed))

    @jax.jit
    def step(params, opt_state, image, label):
        def loss(params):
            logits = apply(params, image)[1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    shuffled, opt_state = np.random.RandomState(seed), tx.init(params)
    held_out, seen = np.split(shuffled.permutation(len(images)), [len(images) // HELD_OUT])
    epochs = -(-STEPS * BATCH_SIZE // len(seen))
    order = np.concatenate([shuffled.permutation(seen) for _ in range(epochs)])
    for i in range(STEPS):
        batch = order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE]
        params, opt_state = step(params, opt_state, images[batch], labels[batch])
        on_step(i + 1)
    right = jax.jit(lambda params, image, label: apply(params, image)[1].argmax(1) == label)
    tests = np.array_split(held_out, -(-len(held_out) // BATCH_SIZE))
    accuracy = np.mean(np.concatenate([right(params, images[i], labels[i]) for i in tests]))
    return Classifier(jax.device_get(params), float(accuracy), len(held_out))
