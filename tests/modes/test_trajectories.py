"""studio.py: what is seen on the way depends on the seed, the image and the time alone."""

import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.modes import _sampling, _trajectories, figures
from diffusion.sharding import replicated
from tests import oracle
from tests.test_configs import config_of

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


def make(figures=None, devices=4, **flat):
    """(config, experiment) of the tiny digits, with a network that costs nothing to compile."""
    config = config_of("digits", "tiny")
    config.figures = ConfigDict(FIGURES | (figures or {}))
    config.update_from_flattened_dict({"sampler.steps": 20, "sample.batch_size": 4} | flat)
    x = experiment.build(config)

    traces = []

    def apply(variables, x_t, t, y, train):
        traces.append(x_t.shape)
        shift = 0 if y is None else 0.1 * y.astype(x_t.dtype).reshape(-1, 1, 1, 1)
        return oracle.toy(x_t, t) + shift

    net = types.SimpleNamespace(apply=apply, num_classes=config.model.num_classes, traces=traces)
    mesh = jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=x.mesh.axis_types
    )
    return config, x._replace(net=net, mesh=mesh)


def make_studio(figures=None, devices=4, score=None, features=None, **flat):
    config, x = make(figures, devices, **flat)
    params = jax.device_put({}, replicated(x.mesh))
    return _trajectories.make_context(config, x, params, SAID.append, score, features)


SAID = []


@pytest.fixture(scope="module")
def one():
    return make_studio()


def test_samples_are_those_of_the_sample_mode(one):
    config, x = one.config, one.x
    [(images, _)] = _trajectories.rollout(one, [_trajectories.from_noise(one, 6, (0, 20))])
    chain = _sampling.compile_sampler(config, x, 8)
    drawn = np.concatenate(list(_sampling.draw(chain, {}, config.figures.seed, 6)))
    # Two programs of the same formulas, in float32: a level's border may be crossed.
    assert np.abs(images[-1].astype(int) - drawn).max() <= 1
    assert images.shape == (2, 6, 8, 8, 1)


def test_what_is_seen_depends_on_neither_batches_nor_devices(one):
    """The same x_t at every place, for 4 at a time on 4 devices and 64 at a time on one."""
    places = (0, 3, 11, 20)
    other = make_studio(devices=1, **{"sample.batch_size": 64})
    [here] = _trajectories.rollout(one, [_trajectories.from_noise(one, 6, places)], lambda c: c.x)
    [there] = _trajectories.rollout(other, [_trajectories.from_noise(other, 6, places)], lambda c: c.x)
    assert here.shape == (4, 6, 8, 8, 1)
    np.testing.assert_allclose(here, there, atol=1e-5)  # float32, other shapes
    assert np.std(here[0]) == pytest.approx(1, abs=0.15)  # x_T, of 384 numbers: four errors
    assert np.abs(here[-1, 0] - here[-1, 1]).max() > 0.1


def test_a_walk_from_its_middle_is_the_rest_of_the_walk(one):
    [whole] = _trajectories.rollout(one, [_trajectories.from_noise(one, 3, (0, 8, 20))], lambda c: c.x)
    n = np.arange(3)
    start = _trajectories.numbered_samples(one, n, 0 * n, (8, 20), whole[1])
    [rest] = _trajectories.rollout(one, [start], lambda c: c.x)
    np.testing.assert_array_equal(rest, whole[1:])


def test_nothing_is_compiled_again_for_another_seed_or_place(one):
    _trajectories.rollout(one, [_trajectories.from_noise(one, 4, (0, 20))])
    before = len(one.x.net.traces)
    config = one.config.copy_and_resolve_references()
    config.figures.seed = 4
    other = one._replace(config=config)
    _trajectories.rollout(other, [_trajectories.from_noise(other, 4, (0, 7, 13))])
    assert len(one.x.net.traces) == before > 0


def test_classes_are_those_of_the_sample_mode():
    s = make_studio(**{"model.num_classes": 10})
    assert _trajectories.from_noise(s, 12, (0,)).label.tolist() == [*range(10), 0, 1]
    s.config.sample.label = 7
    assert set(_trajectories.from_noise(s, 12, (0,)).label) == {7}
    assert _trajectories.from_noise(make_studio(), 2, (0,)).label.tolist() == [-1, -1]
