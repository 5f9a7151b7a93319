"""A step whose loss or gradient is not finite: it is not applied, and it is taken apart.

The check costs nothing that is seen: it reads two numbers that the step gives anyway, on the
device, so that no state is spoilt while the host, one step behind, still reads the last numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any
WATCHED = ("loss", "grad_norm")


def guard_update(update: Callable, on_nonfinite: str) -> Callable:
    """update' (state, *inputs) -> (state, metrics) of an update; state: a NamedTuple with `step`.

    Where the loss or the gradient's norm is NaN or infinite, parameters, average and optimiser stay
    as they were. "skip": the step counts all the same, and the next batch is taken. "halt" and
    "rollback": the state stops for good, whatever follows, before step k + 1 with state.step = ~k,
    a negative number. Raises ValueError for another word.
    """
    if on_nonfinite not in AFTER:
        expected = ", ".join(AFTER)
        raise ValueError(f"on_nonfinite: expected one of {expected}, found {on_nonfinite!r}")
    after = AFTER[on_nonfinite]

    def step(state: NamedTuple, *inputs: Any):
        new, metrics = update(state, *inputs)
        numbers = jnp.stack([metrics[name].astype(jnp.float32) for name in WATCHED])
        good = jnp.isfinite(numbers).all() & (state.step >= 0)
        passed = state._replace(step=after(state.step))
        return jax.tree.map(functools.partial(jnp.where, good), new, passed), metrics

    return step


def _stopped(step):
    return jnp.where(step < 0, step, ~step)


# What becomes of the step's number when the step is not applied.
AFTER = {"halt": _stopped, "skip": lambda step: step + 1, "rollback": _stopped}


def first_non_finite(tree: Tree) -> str | None:
    """The name of the first leaf with a NaN or an infinity, 'params/conv/kernel'; None if none."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    good = jax.device_get(_finite([leaf for _, leaf in leaves]))
    bad = (path for (path, _), fine in zip(leaves, good, strict=True) if not fine)
    path = next(bad, None)
    return None if path is None else jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _finite(leaves: list[Array]) -> list[Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def norms(tree: Tree) -> dict[str, float]:
    """{'conv/kernel': the Euclidean norm of the leaf, ...}; NaN or infinite where it is."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = jax.device_get(_norms([leaf for _, leaf in leaves]))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return dict(zip(names, map(float, np.asarray(found)), strict=True))


@jax.jit
def _norms(leaves: list[Array]) -> Array:
    return jnp.stack([jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum()) for x in leaves])
