"""Several training steps in one dispatch, so that no device waits for its host between them.

A dispatch ends where something follows a step, which then finds the state of that step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any


def dispatch_sizes(
    start: int, last: int, most: int, is_border: Callable[[int], bool]
) -> Iterator[int]:
    """Yields how many steps, at most `most`, each dispatch takes from step `start` to `last`.

    is_border: says whether a dispatch has to end with a step.
    """
    while start < last:
        longest = min(most, last - start)
        n = next((n for n in range(1, longest) if is_border(start + n)), longest)
        yield n
        start += n


def group_inputs(
    inputs: Iterator[tuple[Tree, Tree]], sizes: Iterator[int], most: int
) -> Iterator[tuple[tuple[Tree, ...], Tree, np.int32]]:
    """Groups the (batch, fixed) of steps to the (batches, fixed, n) of dispatches.

    Every dispatch has `most` batches, of which only the first n are used.
    """
    for n in sizes:
        batches, (fixed, *_) = zip(*(next(inputs) for _ in range(n)), strict=True)
        yield (*batches, *batches[-1:] * (most - n)), fixed, np.int32(n)


def join_steps(step: Callable, most: int) -> Callable:
    """Joins up to `most` steps to one program.

    Args:
      step: (state, halted, batch, fixed) -> (state, halted, metrics), of nonfinite.guard_update.

    Returns:
      (state, halted, batches, fixed, n int32[]) -> (state, halted, metrics [most]), where n steps
      were taken and the first n rows of the metrics are theirs.
    """

    def guarded(state: Tree, halted: Array, batches: tuple[Tree, ...], fixed: Tree, n: Array):
        if most == 1:
            state, halted, metrics = step(state, halted, batches[0], fixed)
            return state, halted, jax.tree.map(lambda x: x[None], metrics)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

        def body(i: Array, carry: tuple):
            state, halted, rows = carry
            batch = jax.tree.map(lambda x: x[i], stacked)
            state, halted, metrics = step(state, halted, batch, fixed)
            return state, halted, jax.tree.map(lambda all, x: all.at[i].set(x), rows, metrics)

        metrics = jax.eval_shape(step, state, halted, batches[0], fixed)[2]
        rows = jax.tree.map(lambda x: jnp.zeros(most, x.dtype), metrics)
        return jax.lax.fori_loop(0, n, body, (state, halted, rows))

    return guarded
