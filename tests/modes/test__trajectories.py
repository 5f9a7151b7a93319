"""What is recorded of a trajectory depends on the seed, the image and the time alone."""

import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from diffusion import experiment
from diffusion.modes import _sampling, figures
from diffusion.modes._common import Trained
from diffusion.modes._trajectories import Trajectories, make_context, rollout
from diffusion.sharding import replicated
from tests import oracle

FIGURES = {
    "names": tuple(figures.FIGURES),
    "seed": 3,
    "num": 6,
    "rows": 2,
    "split": "test",
    "scored": 5,
    "mask": "right",
    "jump": 4,
    "repeats": 2,
    "animation": "gif",
}


def toy_model(workdir=None, figures=None, devices=4, **flat) -> Trained:
    """Returns the tiny digits' model with a network that costs nothing to compile."""
    config = digits.get_config("tiny")
    config.figures = ConfigDict(FIGURES | (figures or {}))
    config.update_from_flattened_dict({"sampler.steps": 20, "sample.batch_size": 4} | flat)
    exp = experiment.build(config)
    traces = []

    def apply(variables, x_t, t, y, train):
        traces.append(x_t.shape)
        shift = 0 if y is None else 0.1 * y.astype(x_t.dtype).reshape(-1, 1, 1, 1)
        return oracle.toy(x_t, t) + shift

    net = types.SimpleNamespace(apply=apply, num_classes=config.model.num_classes, traces=traces)
    chosen, axis_types = jax.devices()[:devices], exp.mesh.axis_types
    mesh = jax.make_mesh((devices,), ("data",), devices=chosen, axis_types=axis_types)
    params = jax.device_put({}, replicated(mesh))
    return Trained(config, exp._replace(net=net, mesh=mesh), workdir, 12, params)


def toy_context(score=None, features=None, **options):
    return make_context(toy_model(**options), score, features)


@pytest.fixture(scope="module")
def context():
    return toy_context()


def record_x(context, *starts):
    return rollout(context, starts, lambda state: state.x)


def test_samples_are_those_of_the_sample_mode(context):
    config = context.config
    [(images, _)] = rollout(context, [Trajectories((0, 20), range(6))])
    sampler = _sampling.compile_sampler(config, context.trained.exp, 8)
    drawn = np.concatenate(list(_sampling.draw(sampler, {}, config.figures.seed, 6)))
    assert images.shape == (2, 6, 8, 8, 1)
    assert np.abs(images[-1].astype(int) - drawn).max() <= 1  # other batches round differently


def test_records_depend_on_neither_batches_nor_devices(context):
    """The same x_t at every position, for 4 at a time on 4 devices and 64 at a time on one."""
    start = Trajectories((0, 3, 11, 20), range(6))
    other = toy_context(devices=1, **{"sample.batch_size": 64})
    [here], [there] = record_x(context, start), record_x(other, start)
    assert here.shape == (4, 6, 8, 8, 1)
    np.testing.assert_allclose(here, there, atol=1e-5)  # float32, other shapes
    assert np.std(here[0]) == pytest.approx(1, abs=0.15)  # x_T, of 384 numbers: four errors
    assert np.abs(here[-1, 0] - here[-1, 1]).max() > 0.1


def test_the_second_half_alone_equals_the_rest_of_the_whole(context):
    [whole] = record_x(context, Trajectories((0, 8, 20), range(3)))
    [rest] = record_x(context, Trajectories((8, 20), range(3), x=whole[1]))
    np.testing.assert_array_equal(rest, whole[1:])


def test_forks_share_the_start_and_differ_afterwards(context):
    fork = np.array([0, 1, 2], np.uint32)
    [x] = record_x(context, Trajectories((0, 20), [4, 4, 4], fork))
    [straight] = record_x(context, Trajectories((0, 20), [4]))
    assert (x[0] == straight[0]).all()
    assert (x[1, 0] == straight[1, 0]).all()  # fork 0 is the sample itself
    assert min(np.abs(x[1, i] - x[1, j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.1


def test_nothing_is_compiled_again_for_another_seed_or_position(context):
    rollout(context, [Trajectories((0, 20), range(4))])
    traces = context.trained.exp.net.traces
    before = len(traces)
    config = context.config.copy_and_resolve_references()
    config.figures.seed = 4
    other = context._replace(trained=context.trained._replace(config=config))
    rollout(other, [Trajectories((0, 7, 13), range(4))])
    assert len(traces) == before > 0


def test_labels_are_those_of_the_sample_mode():
    """All classes in turn, or sample.label; the network adds a tenth of the label to its output."""
    conditional = {"model.num_classes": 10}
    [in_turn] = record_x(toy_context(**conditional), Trajectories((0, 20), range(12)))
    [sevens] = record_x(
        toy_context(**conditional, **{"sample.label": 7}), Trajectories((0, 20), range(12))
    )
    given = np.array([*range(10), 0, 1], np.int32)
    [labelled] = record_x(toy_context(**conditional), Trajectories((0, 20), range(12), label=given))
    np.testing.assert_array_equal(in_turn, labelled)
    equal = [(a == b).all() for a, b in zip(in_turn[1], sevens[1], strict=True)]
    assert equal == [i == 7 for i in range(12)]
