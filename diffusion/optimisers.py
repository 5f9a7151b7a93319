"""Optimisers and learning-rate schedules.

Adam behind a clip, with linear warm-up, is the official code's (utils.make_optimizer). The others
are optax's, behind the same clip and with the same warm-up.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

Tree = Any
MUON_RMS = 0.2  # of an update: about Adam's, so that a learning rate means the same for both
NOT_MUON = ("conv_in", "conv_out")  # the first and the last layer


def warmup_schedule(lr: float, steps: int) -> optax.Schedule:
    """Returns lr * min(step / steps, 1): as in the official code the first update has rate 0.

    optax's own warm-up counts down from lr and so loses four digits of the first rates.
    """
    return lambda step: lr * jnp.minimum(jnp.float32(step) / steps, 1.0) if steps else lr


def constant_rate(lr: float, warmup: int, steps: int) -> optax.Schedule:
    """Builds the paper's schedule: lr after `warmup` steps, until the end."""
    return warmup_schedule(lr, warmup)


def cosine_rate(lr: float, warmup: int, steps: int) -> optax.Schedule:
    """Builds lr (1 + cos(pi s)) / 2, s from 0 at the end of the warm-up to 1 at step `steps`.

    Loshchilov and Hutter 2016 (arXiv:1608.03983), without restarts. A training that ends within its
    warm-up does not come to the fall.
    """
    warm = warmup_schedule(lr, warmup)

    def schedule(step):
        share = jnp.clip((jnp.float32(step) - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return warm(step) * 0.5 * (1 + jnp.cos(jnp.pi * share))

    return schedule


def adam(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Builds Adam (0.9, 0.999, 1e-8), the paper's.

    optax adds epsilon to the bias-corrected root, TensorFlow 1 to the uncorrected one. The updates
    differ only where |gradient| is within a few orders of magnitude of 1e-8.
    """
    _check_no_decay("adam", weight_decay)
    return optax.adam(schedule)


def adamw(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Builds Adam that also takes lr * weight_decay of every parameter (arXiv:1711.05101)."""
    return optax.adamw(schedule, weight_decay=weight_decay)


def radam(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Builds Adam with its first steps rectified (arXiv:1908.03265); the first five are momentum's.

    Their size is that of the gradient.
    """
    _check_no_decay("radam", weight_decay)
    return optax.radam(schedule)


def muon(schedule: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Builds Muon: the nearest orthogonal matrix to the momentum of every kernel, by Newton-Schulz.

    Jordan et al. 2024, with the scale of Liu et al. 2025 (arXiv:2502.16982): the root of the mean
    square of an update is MUON_RMS * lr. `muon_dimensions` says what is a matrix; all else is
    taken by Adam with Nesterov's momentum, at the same learning rate.
    """
    return optax.contrib.muon(
        schedule,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=muon_dimensions,
        consistent_rms=MUON_RMS,
    )


def muon_dimensions(params: Tree) -> Tree:
    """Returns which parameters are matrices for Muon, from all their inputs to their outputs.

    Kernels are: [in, out], and [h, w, in, out] as [h w in, out]. Biases, normalisations, embeddings
    and the kernels of the first and the last layer are not: None.
    """

    def of(path, x):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or set(NOT_MUON) & set(names):
            return None
        return MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(of, params)


def _check_no_decay(name: str, weight_decay: float) -> None:
    if weight_decay:
        raise ValueError(f"weight_decay: expected 0 for {name}, found {weight_decay}; use adamw")


def make_optimizer(
    name: str, schedule: optax.Schedule, clip: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Returns an optimiser of OPTIMISERS behind a clip of the gradient's global norm.

    Raises ValueError for a weight decay that it does not have.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip), OPTIMISERS[name](schedule, float(weight_decay))
    )


OPTIMISERS: dict[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = {
    "adam": adam,
    "adamw": adamw,
    "radam": radam,
    "muon": muon,
}
LR_SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "constant": constant_rate,
    "cosine": cosine_rate,
}
