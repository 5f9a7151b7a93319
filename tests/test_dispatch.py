"""Several training steps in one dispatch: which steps, and that they are the steps of before."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import experiment, nonfinite
from diffusion.dispatch import dispatch_sizes, group_inputs, join_steps
from diffusion.runtime.config import with_overrides
from tests.test_configs import config_of
from tests.test_experiment import build

STEPS = 7


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("start", [0, 1, 4, 29])
def test_dispatches_end_at_every_border_and_are_as_long_as_they_may_be(most, start):
    borders = {3, 4, 10, 17, 24}
    sizes = list(dispatch_sizes(start, 30, most, borders.__contains__))
    ends = start + np.cumsum(sizes)
    assert ends[-1] == 30 and max(sizes) <= most
    assert {b for b in borders if b > start} <= set(ends)
    for n, end in zip(sizes, ends, strict=True):
        assert n == most or end in borders or end == 30


def test_nothing_is_left_to_dispatch_at_the_end():
    assert list(dispatch_sizes(30, 30, 4, lambda step: False)) == []


def test_inputs_are_grouped_in_order_and_filled_up():
    inputs = ((step, "all") for step in itertools.count(5))
    found = list(group_inputs(inputs, iter([3, 1, 2]), 3))
    assert found == [((5, 6, 7), "all", 3), ((8, 8, 8), "all", 1), ((9, 10, 10), "all", 2)]


def count(state, halted, batch, dataset):
    """A step that adds its batch to the state, and that nothing can undo; stops where halted."""
    state = jnp.where(halted, state, state + dataset * batch)
    return state, halted | (batch == 9.0), {"loss": batch, "state": state}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_only_the_first_n_steps_are_taken(n):
    """Sums of 1, 2, 3, 4 times ten, in closed form; the rows of steps not taken stay zero."""
    joined = jax.jit(join_steps(count, 4))
    batches = tuple(jnp.float32(i) for i in (1, 2, 3, 4))
    state, halted, metrics = joined(jnp.float32(0), jnp.bool_(False), batches, 10.0, np.int32(n))
    assert state == 10 * n * (n + 1) / 2 and not halted
    np.testing.assert_array_equal(metrics["loss"], [1, 2, 3, 4][:n] + [0] * (4 - n))
    assert metrics["state"][n - 1] == state


def test_steps_after_one_that_halts_change_nothing():
    batches = tuple(jnp.float32(i) for i in (1, 9, 3))
    args = jnp.float32(0), jnp.bool_(False), batches, 10.0, np.int32(3)
    state, halted, metrics = join_steps(count, 3)(*args)
    assert state == 100 and halted
    np.testing.assert_array_equal(metrics["state"], [10, 100, 100])


def train(config, exp, most, borders=()):
    """Returns the state and the losses after STEPS steps, in dispatches of at most `most`."""
    update, inputs = experiment.make_input_pipeline(config, exp, experiment.load_split(config, exp))
    guarded = nonfinite.guard_update(update, "halt")
    program = jax.jit(join_steps(guarded, most), donate_argnums=(0, 1))
    sizes = dispatch_sizes(0, STEPS, most, borders.__contains__)
    state, halted, losses = experiment.make_initial_state(config, exp), jnp.bool_(False), []
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its step counter with floats
        for batches, dataset, n in group_inputs(inputs(0), sizes, most):
            state, halted, metrics = program(state, halted, batches, dataset, n)
            losses += metrics["loss"][:n].tolist()
    return jax.device_get(state), losses


@pytest.mark.parametrize("on_device_gib", [4.0, 0.0], ids=["resident", "streamed"])
def test_a_training_in_dispatches_is_the_training_step_by_step(on_device_gib):
    """To rounding, as a loop is compiled otherwise; and bit for bit wherever the borders lie."""
    changes = {"data.on_device_gib": on_device_gib, "optim.warmup": 0}
    config = with_overrides(config_of("digits", "tiny"), changes)
    exp = build(config)
    (single, losses), (joined, same) = (train(config, exp, most) for most in (1, 3))
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (single, joined)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    assert joined.step == STEPS and len(set(losses)) == STEPS
    parted, again = train(config, exp, 3, borders={1, 2, 6})
    assert again == same
    jax.tree.map(np.testing.assert_array_equal, parted, joined)


@pytest.mark.parametrize("most", [1, 4])
def test_the_state_is_updated_in_place_and_the_host_is_not_asked(most):
    """Of the compiled program: each array of the state is its own successor; no infeed, no call."""
    config = config_of("digits", "tiny")
    exp = build(config)
    update, inputs = experiment.make_input_pipeline(config, exp, experiment.load_split(config, exp))
    args = next(group_inputs(inputs(0), iter([most]), most))
    guarded = join_steps(nonfinite.guard_update(update, "halt"), most)
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(guarded, donate_argnums=(0, 1)).lower(
            exp.abstract_state, jax.ShapeDtypeStruct((), bool), *args
        )
    text = lowered.compile().as_text()
    donated = text.split("input_output_alias={")[1].split("entry_computation_layout")[0]
    leaves = len(jax.tree.leaves(exp.abstract_state)) + 1  # and the flag `halted`
    assert donated.count("-alias") == leaves
    assert not re.search(r" (infeed|outfeed|send|recv)\(", text)
    assert not any("callback" in name for name in re.findall(r'custom_call_target="(.*?)"', text))
