"""Guards the training state against NaN and infinity, and finds where they are.

The guard reads two numbers that a step computes anyway, and it does so on the device, because the
host, one step behind, would see them only after they had spoilt the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffusion.utils import digests

Tree = Any
WATCHED = ("loss", "grad_norm")
ON_NONFINITE = ("halt", "skip", "rollback")


def guard_update(update: Callable, on_nonfinite: str) -> Callable:
    """Wraps an update so that a step with a non-finite loss or gradient norm is not applied.

    Args:
      update: (state, *inputs) -> (state, metrics), where the state is a NamedTuple with `step`.
      on_nonfinite: "skip" counts the step and changes nothing else; "halt" and "rollback" set
        `halted`, after which no step is applied or counted.

    Returns:
      (state, halted, *inputs) -> (state, halted, metrics). halted: bool[], False at the start.
    """
    if on_nonfinite not in ON_NONFINITE:
        expected = ", ".join(ON_NONFINITE)
        raise ValueError(f"on_nonfinite: expected one of {expected}, found {on_nonfinite!r}")
    skip = on_nonfinite == "skip"

    def guarded(state: NamedTuple, halted: Array, *inputs: Any):
        new, metrics = update(state, *inputs)
        watched = jnp.stack([metrics[name].astype(jnp.float32) for name in WATCHED])
        apply = jnp.isfinite(watched).all() & ~halted
        unchanged = state._replace(step=state.step + 1) if skip else state
        state = jax.tree.map(lambda a, b: jnp.where(apply, a, b), new, unchanged)
        return state, halted if skip else ~apply, metrics

    return guarded


def first_non_finite(tree: Tree) -> str | None:
    """Returns the name of the first leaf with a NaN or infinity, 'params/conv/kernel', or None."""
    leaves = digests.named(tree)
    finite = jax.device_get(_are_finite(leaves))
    return next((name for name in leaves if not finite[name]), None)


@jax.jit
def _are_finite(leaves: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), leaves)


def norms(tree: Tree) -> dict[str, float]:
    """Returns {'conv/kernel': Euclidean norm of the leaf, ...}."""
    leaves = digests.named(tree)
    found = jax.device_get(_norms(leaves))
    return {name: float(found[name]) for name in leaves}


@jax.jit
def _norms(leaves: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum()), leaves)
