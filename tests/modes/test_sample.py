"""--mode=sample: what it writes, and which set of samples a command means."""

import contextlib
import hashlib
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from diffusion import experiment, process
from diffusion.checkpoint import Checkpoints
from diffusion.modes import _sampling, sample
from diffusion.modes._common import Trained, load_trained
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, with_overrides
from diffusion.sharding import replicated
from diffusion.utils.errors import ConfigError, DataError
from tests.modes.test__trajectories import toy_model

NO_INPUT = SimpleNamespace(input=[])


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


@pytest.mark.parametrize("levels", [2, 17])
def test_samples_are_on_the_levels_of_the_data(tmp_path, levels):
    """Bytes that are evenly spaced from 0 to 255, and more than one of them."""
    sample.save_samples(toy_model(tmp_path, **{"data.levels": levels}))
    [images] = images_in(tmp_path).values()
    allowed = np.rint(np.arange(levels) * 255 / (levels - 1))
    assert np.isin(images, allowed).all() and len(np.unique(images)) > 1


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


def own_noise(n):
    """The x_T of seed 0 by its definition."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(n))
    return np.array(process.sample_noise(keys, 0, np.zeros((n, 8, 8, 1), np.float32)))


def test_chains_start_from_given_noise(tmp_path, capsys):
    """By DDIM, which draws none later: own x_T give the own images, and each x_T its image."""
    trained = toy_model(tmp_path, **{"sampler.name": "ddim"})
    sample.save_samples(trained)
    [own] = images_in(tmp_path).values()
    assert len(np.unique(own.reshape(6, -1), axis=0)) == 6
    for order in (np.arange(6), np.arange(5, -1, -1), np.full(6, 3)):
        x_T, before = own_noise(6)[order], set(images_in(tmp_path))
        sample.save_samples(trained, x_T)
        assert "from the noise of --input" in capsys.readouterr().out
        [name] = set(images_in(tmp_path)) - before
        digest = hashlib.sha256(x_T.tobytes()).hexdigest()
        assert f"_seed0_noise{digest[:6]}_ddim20_" in name
        how = json.loads((tmp_path / "samples" / name / "how.json").read_text())
        assert how["x_T"] == digest
        # The noise is not compiled here: a value at .5 may round to its neighbour.
        assert np.abs(images_in(tmp_path)[name].astype(int) - own[order]).max() <= 1


def test_as_many_images_as_there_is_noise_for(tmp_path, monkeypatch):
    """Or as are typed; not as the configuration says by itself."""
    path, config = tmp_path / "x_T.npy", digits.get_config("tiny")
    np.save(path, own_noise(5))
    drawn, exp = [], SimpleNamespace(image_shape=(8, 8, 1))
    monkeypatch.setattr(experiment, "build", lambda config: exp)
    monkeypatch.setattr(_sampling, "load_for_sampling", lambda run, exp: run.config.sample.num)
    monkeypatch.setattr(sample, "save_samples", lambda n, x_T: drawn.append((n, x_T.shape)))
    for typed in ({}, {"sample.num": 3}, {"sample.num": 6}):
        flags, own = SimpleNamespace(input=[str(path)]), with_overrides(config, typed)
        with pytest.raises(ConfigError) if 6 in typed.values() else contextlib.nullcontext():
            sample.run(Run("sample", own, tmp_path, flags, typed))
    assert drawn == [(5, (5, 8, 8, 1)), (3, (5, 8, 8, 1))]
    two = SimpleNamespace(input=["a.npy", "b.npy"])
    with pytest.raises(ConfigError, match="expected one npy file, found 2"):
        sample.run(Run("sample", config, tmp_path, two))


NOISE = np.zeros((2, 8, 8, 1), np.float32)
NO_NOISE = {  # what the message says: array
    r"expected float32\[n, 8, 8, 1\], found float64\[2, 8, 8, 1\]": NOISE.astype(np.float64),
    r"found >f4\[2, 8, 8, 1\]|found float32": NOISE.astype(">f4"),
    r"found float32\[2, 1, 8, 8\]": NOISE.reshape(2, 1, 8, 8),
    r"found float32\[8, 8, 1\]": NOISE[0],
    r"found float32\[\]": NOISE[0, 0, 0, 0],
    "npy file: .*mmap|found float32\\[0, 8, 8, 1\\]": NOISE[:0],
    "expected finite numbers": NOISE + np.inf,
    "npy file: Array can't be memory-mapped": np.array([None]),
}


def test_what_is_no_noise_is_refused(tmp_path):
    path = tmp_path / "x_T.npy"
    for message, array in NO_NOISE.items():
        np.save(path, array)
        with pytest.raises(DataError, match=message) as error:
            sample.load_noise(str(path), (8, 8, 1))
        assert len(str(error.value)) <= 300 + len(str(path))
    whole = path.read_bytes()
    np.save(path, NOISE)
    for content in (b"", b"1 2 3", path.read_bytes()[:-1], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="expected an npy file"):
            sample.load_noise(str(path), (8, 8, 1))
    np.savez(tmp_path / "x_T.npz", NOISE)
    for name in ("x_T.npz", "nowhere.npy"):
        with pytest.raises(DataError, match="expected an npy file"):
            sample.load_noise(str(tmp_path / name), (8, 8, 1))


def test_a_column_of_the_picture_is_a_class(tmp_path):
    """Image i is of class i modulo the classes, here also its grey value; 66 pixels are a tile."""
    for classes, n, shape in ((3, 64, (10, 3)), (10, 64, (7, 10)), (30, 200, (3, 30))):
        grey = (8 * (np.arange(n) % classes)).astype(np.uint8)
        grid = sample.sample_grid(np.broadcast_to(grey[:, None, None, None], (n, 8, 8, 1)), classes)
        middles = grid[34::66, 34::66, 0]
        assert middles.shape == shape
        shown = min(n, shape[0] * classes)
        wanted = np.tile(8 * np.arange(classes), shape[0])[:shown]
        np.testing.assert_array_equal(middles.ravel()[:shown], wanted)
        assert (middles.ravel()[shown:] == 255).all()  # nothing there
    for classes in (0, 65, 200):  # one class or none; not all of them are drawn, or fit
        grid = sample.sample_grid(np.zeros((64, 8, 8, 1), np.uint8), classes)
        assert grid[34::66, 34::66].shape[:2] == (8, 8)
    for label, columns in ((-1, 10), (3, 5)):  # 20 images of one class: 4 rows of 5
        keys = {"model.num_classes": 10, "sample.num": 20, "sample.label": label}
        sample.save_samples(toy_model(tmp_path / str(label), **keys, **{"sampler.steps": 2}))
        [path] = (tmp_path / str(label)).glob("samples/*/grid.png")
        with Image.open(path) as image:
            assert image.width == 66 * columns + 2


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
        patch.setattr(_sampling, "PART_S", 0)  # no part is short
        sample.run(Run("sample", config, workdir, NO_INPUT))
    assert images_in(workdir) == {}
    capsys.readouterr()
    sample.run(Run("sample", config, workdir, NO_INPUT))
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
        sample.run(Run("sample", config, tmp_path, NO_INPUT))
