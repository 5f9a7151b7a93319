"""nonfinite.py: a step with NaN or infinity changes nothing, and the leaf it is in is named."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import nonfinite


class State(NamedTuple):
    step: Any
    params: Any


def run_steps(on_nonfinite, bad_steps, value=np.nan, steps=5):
    """Five updates that add 0.5 + step to the weights, and `value` at the bad steps."""

    def update(state, x):
        bad = jnp.isin(state.step, jnp.array([*bad_steps, -99]))
        change = jnp.where(bad, value, state.step.astype(jnp.float32))
        params = jax.tree.map(lambda p: p + change + x, state.params)
        return State(state.step + 1, params), {"loss": change, "grad_norm": change}

    guarded = jax.jit(nonfinite.guard_update(update, on_nonfinite), donate_argnums=(0, 1))
    state = State(jnp.int32(0), {"a": jnp.full(3, 10.0), "b": jnp.float32(0)})
    halted = jnp.zeros((), bool)
    for _ in range(steps):
        state, halted, _ = guarded(state, halted, jnp.float32(0.5))
    return int(state.step), bool(halted), np.asarray(state.params["a"]), float(state.params["b"])


@pytest.mark.parametrize("on_nonfinite", ["halt", "rollback"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_step_halts_the_state_before_it(on_nonfinite, value):
    step, halted, a, b = run_steps(on_nonfinite, [2], value)
    assert (step, halted) == (2, True)
    np.testing.assert_array_equal(a, 10 + (0 + 0.5) + (1 + 0.5))
    assert b == (0 + 0.5) + (1 + 0.5)


def test_a_skipped_step_changes_nothing_but_the_count():
    step, halted, a, _ = run_steps("skip", [2, 3])
    assert (step, halted) == (5, False)
    np.testing.assert_array_equal(a, 10 + (0 + 1 + 4) + 3 * 0.5)


@pytest.mark.parametrize("on_nonfinite", nonfinite.ON_NONFINITE)
def test_finite_steps_are_applied(on_nonfinite):
    step, halted, a, _ = run_steps(on_nonfinite, [])
    assert (step, halted) == (5, False)
    np.testing.assert_array_equal(a, 10 + (0 + 1 + 2 + 3 + 4) + 5 * 0.5)


def test_rejects_an_unknown_reaction():
    with pytest.raises(ValueError, match="one of halt, skip, rollback, found 'go on'"):
        nonfinite.guard_update(lambda state: (state, {}), "go on")


def test_names_the_first_leaf_that_is_not_finite():
    tree = {"a": np.ones(3), "b": {"c": np.array([1, np.inf]), "d": np.array(np.nan)}, "e": 7}
    assert nonfinite.first_non_finite(tree) == "b/c"
    assert nonfinite.first_non_finite({"a": np.ones(3), "n": np.int32(1)}) is None


def test_norms_are_euclidean():
    norms = nonfinite.norms({"a": np.array([3.0, 4.0]), "b": {"c": np.full((2, 2), -1.0)}})
    assert norms.keys() == {"a", "b/c"}
    np.testing.assert_allclose([norms["a"], norms["b/c"]], [5.0, 2.0], rtol=1e-6)
