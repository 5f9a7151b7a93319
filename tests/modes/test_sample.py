"""--mode=sample: what it writes, and which set of samples a command means."""

import contextlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffusion import experiment
from diffusion.checkpoint import Checkpoints
from diffusion.modes import _sampling, sample
from diffusion.modes._common import Trained, load_trained
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, with_overrides
from diffusion.sharding import replicated
from diffusion.utils.errors import ConfigError
from tests.modes.test__trajectories import toy_model


def images_in(workdir):
    """{folder: images} of all sets of samples."""
    sets = {}
    for path in (workdir / "samples").glob("*/samples.npz"):
        with np.load(path) as file:
            sets[path.parent.name] = file["arr_0"]
    return sets


def test_samples_depend_on_neither_batch_nor_devices(tmp_path, capsys):
    """Six in batches of four on four devices, then three in batches of two on two devices.

    Batch shapes change the order of float32 sums, so that a value at .5 may round to its neighbour.
    """
    config = digits.get_config("tiny")
    exp = experiment.build(config)
    params = experiment.make_initial_state(config, exp).params
    sample.save_samples(Trained(config, exp, tmp_path / "a", 8, params))
    [(name, six)] = images_in(tmp_path / "a").items()
    assert six.shape == (6, 8, 8, 1) and six.dtype == np.uint8
    assert name.startswith("00000008_ema_seed0_ancestral20_")
    folder = tmp_path / "a" / "samples" / name
    how = json.loads((folder / "how.json").read_text())
    assert (how["step"], how["weights"], how["images"]) == (8, "ema", 6)
    with Image.open(folder / "grid.png") as image:
        assert image.size[0] > 64
    assert f"{folder}/samples.npz (uint8 [6, 8, 8, 1] in arr_0)" in capsys.readouterr().out
    few = with_overrides(config, {"sample.num": 3, "sample.batch_size": 2})
    axis_types = exp.mesh.axis_types
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=axis_types)
    params = jax.device_put(jax.device_get(params), replicated(mesh))
    sample.save_samples(Trained(few, experiment.build(few, mesh), tmp_path / "b", 8, params))
    [(same_name, three)] = images_in(tmp_path / "b").items()
    assert same_name == name and len(three) == 3
    assert np.abs(three.astype(int) - six[:3]).max() <= 1


def test_a_set_is_kept_or_extended_and_another_setting_is_another_set(tmp_path, capsys):
    first = None
    for num in (6, 3, 9):
        sample.save_samples(toy_model(tmp_path, **{"sample.num": num}))
        [(name, images)] = images_in(tmp_path).items()
        said = capsys.readouterr().out
        assert ("keeping    6 samples" in said) == (num == 3)
        assert ("resuming   6 samples" in said) == (num == 9)
        first = images if num == 6 else first
        np.testing.assert_array_equal(images[:6], first)
        assert len(images) == max(6, num)
    others = ({"sample.seed": 1}, {"sampler.name": "ddim"}, {"sampler.steps": 10})
    for keys in others:
        sample.save_samples(toy_model(tmp_path, **{"sample.num": 3}, **keys))
    sets = images_in(tmp_path)
    assert len(sets) == 1 + len(others)
    assert len(sets.pop(name)) == 9  # as it was
    assert all(np.abs(other.astype(int) - first[:3]).mean() > 1 for other in sets.values())


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """(work directory with a checkpoint of step 0, config) of the tiny digits."""
    workdir = tmp_path_factory.mktemp("untrained")
    return workdir, save_initial_state(workdir)


def save_initial_state(workdir):
    config = digits.get_config("tiny")
    state = experiment.make_initial_state(config, experiment.build(config))
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(0, state)
    return config


def test_the_mode_stops_when_asked_and_resumes(untrained, monkeypatch, capsys):
    """After a stop in the second batch, the images are those of an uninterrupted run."""
    workdir, config = untrained
    count = iter(range(25))  # parts of one step, 20 in each batch
    with monkeypatch.context() as patch, pytest.raises(preemption.Stopped):
        patch.setattr(preemption, "should_stop", lambda: next(count, None) is None)
        sample.run(Run("sample", config, workdir, None))
    assert images_in(workdir) == {}
    capsys.readouterr()
    sample.run(Run("sample", config, workdir, None))
    assert "resuming   4 samples" in capsys.readouterr().out
    [images] = images_in(workdir).values()
    exp = experiment.build(config)
    params = load_trained(Run("sample", config, workdir, None), exp).params
    sampler = _sampling.compile_sampler(config, exp, 4)
    straight = np.concatenate(list(_sampling.draw(sampler, params, 0, 6)))
    np.testing.assert_array_equal(images, straight)


def test_a_wrong_sampler_is_refused_before_weights_are_read(tmp_path):
    config = with_overrides(digits.get_config("tiny"), {"sampler.steps": 21})
    with pytest.raises(ConfigError, match=r"sampler\.steps"):  # and not that nothing is trained
        sample.run(Run("sample", config, tmp_path, None))
