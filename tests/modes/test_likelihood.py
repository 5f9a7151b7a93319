"""--mode=bpd, and passes over a split: every image counts once, an interrupted pass resumes."""

import contextlib
import csv
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from PIL import Image
from scipy import stats

from diffusion import data, experiment, probability_flow
from diffusion.data import augment, loader
from diffusion.modes import _split_pass
from diffusion.modes import likelihood as modes_likelihood
from diffusion.modes._common import Trained, open_checkpoints
from diffusion.runtime.config import Run, with_overrides
from diffusion.samplers import analytic
from diffusion.utils import partial_results
from diffusion.utils.errors import ConfigError, DataError
from tests import tiny_tfds
from tests.conftest import ROOT
from tests.modes.test__trajectories import toy_model
from tests.runs import run, run_process
from tests.test_configs import config_of


@pytest.fixture(scope="module")
def setting():
    config = config_of("digits", "tiny")
    return config, experiment.build(config)


def sums_of_pixels(batch):
    """Two values an image: what its bytes sum to, and its number."""
    total = np.asarray(batch.image, np.float64).sum(axis=(1, 2, 3))
    return np.stack([total, np.asarray(batch.number, np.float64)], axis=1)


def make(setting, n=30, batch_size=8):
    config, exp = setting
    config = config.copy_and_resolve_references()
    config.bpd.batch_size = batch_size
    return _split_pass.make_pass(Trained(config, exp, None, 0, None), "test", n)


def test_every_image_counts_once(setting, tmp_path):
    """30 images in batches of 8: the last batch is filled up, and what fills it is not counted."""
    work, told = make(setting), []
    sums = _split_pass.accumulate(work, sums_of_pixels, tmp_path / "kept.npz", told.append)
    images = loader.load_dataset(data.open_dataset("digits", "test"))[0][:30].astype(np.float64)
    values = np.stack([images.sum((1, 2, 3)), np.arange(30.0)], axis=1)
    assert sums.n == 30 and told == [8, 16, 24, 30]
    average = sums.mean_and_stderr()
    np.testing.assert_allclose(average.mean, values.mean(0), rtol=1e-12)
    # The textbook's standard error; sums of squares of numbers up to 1e4 cancel to 1e-10.
    np.testing.assert_allclose(average.error, values.std(0, ddof=1) / np.sqrt(30), rtol=1e-8)


def test_a_killed_pass_goes_on_and_another_config_starts_anew(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(partial_results, "SAVE_EVERY_S", 0)
    kept, seen = tmp_path / "folder" / "kept.npz", []

    def killed(batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(int(batch.number[0]))
        return sums_of_pixels(batch)

    with pytest.raises(KeyboardInterrupt):
        _split_pass.accumulate(make(setting), killed, kept, lambda n: None)

    def noted(batch):
        seen.append(int(batch.number[0]))
        return sums_of_pixels(batch)

    told = []
    resumed = _split_pass.accumulate(make(setting), noted, kept, told.append)
    assert seen == [0, 8, 16, 24] and told == [16, 24, 30]
    straight = _split_pass.accumulate(
        make(setting), sums_of_pixels, tmp_path / "x.npz", told.append
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)
    for other in (make(setting, n=20), make(setting, batch_size=4)):
        seen.clear()
        assert _split_pass.accumulate(other, noted, kept, lambda n: None).n == other.n
        assert seen[0] == 0 and len(seen) == -(-other.n // other.size)
    whole = kept.read_bytes()
    for damaged in (b"", b"cut short", whole[: len(whole) // 2]):
        kept.write_bytes(damaged)
        seen.clear()
        assert _split_pass.accumulate(make(setting), noted, kept, lambda n: None).n == 30
        assert seen == [0, 8, 16, 24]


def test_more_images_than_there_are_is_an_error(setting):
    with pytest.raises(DataError, match="expected at most the 296 images of test, found 300"):
        make(setting, n=300)


def test_analytic_variances_of_as_many_images_as_they_need(tmp_path, monkeypatch, capsys):
    """64 of 96 are enough for the error that 64 have; they are read once for a checkpoint.

    In batches of 16, whatever bpd.seed is: the images' noise follows from the training's seed.
    """
    keys = {"sampler.variance": "analytic", "sampler.estimate": 96, "bpd.batch_size": 16}
    model = toy_model(tmp_path, **keys, **{"bpd.seed": 7})
    exp, chain = model.exp, _split_pass.trained_chain(model)
    images = loader.load_dataset(data.open_dataset("digits", "train"))[0][:96]
    noise = jax.vmap(random.fold_in, (None, 0))(random.key(model.config.seed), np.arange(96))

    @jax.jit
    def errors(x_0):
        predict = chain.predictor({}, np.zeros(96, np.int32))
        return analytic.timestep_errors(exp.process, predict, noise, x_0, levels=exp.levels)

    mse = np.asarray(errors(augment.scale(images, exp.levels)).mse, np.float64)
    means = {n: mse[:n].mean(0) for n in (32, 64)}
    error = {n: (mse[:n].std(0, ddof=1) / np.sqrt(n) / means[n]).max() for n in means}
    assert error[32] > 1.01 * error[64]
    monkeypatch.setattr(_split_pass, "TOLERANCE", 1.001 * error[64])
    found = _split_pass.with_analytic(model).exp.sample_variance
    out = capsys.readouterr().out
    assert re.match(
        r"measuring  .* at most 96 training images, about \S+s\nevaluation \d+/1,920", out
    )
    said = f"of 64 training images, standard error {error[64]:.1%} at most"
    assert out.endswith(f"measured   optimal variances {said}\n")
    [path] = tmp_path.glob("eval/00000012/*")
    with np.load(path) as kept:
        np.testing.assert_allclose(kept["x0_variance"][1:], means[64], rtol=1e-5)
    monkeypatch.setattr(_split_pass.SplitPass, "compile", None)  # nothing is measured again
    model.config.bpd.seed = 8
    again = _split_pass.with_analytic(model).exp.sample_variance
    assert capsys.readouterr().out == f"keeping    optimal variances {said}\n"
    t = jax.numpy.arange(1, 21)
    np.testing.assert_array_equal(*(v.log_var(exp.process, None, t) for v in (found, again)))


@pytest.fixture
def trained_copy(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "run")


def test_readings_get_the_levels_of_the_data(tmp_path, monkeypatch):
    """x_0 of digits is k / 8 - 1 with k = 0..16, for the bound and for the ODE alike."""
    model = toy_model(tmp_path, **{"bpd.batch_size": 8})
    work = _split_pass.make_pass(model, "test", 16)._replace(size=8)

    def reading(p, predict, keys, x_0, levels):
        return 8 * (x_0 + 1), jnp.full(len(x_0), levels)

    k, levels = work.compile(_split_pass.trained_chain(model), reading)({}, next(work.batches())[0])
    assert set(np.unique(k)) <= set(range(17)) and np.max(k) == 16 and set(levels.tolist()) == {17}

    def bits_per_dim(p, eps, keys, x_0, levels):
        np.testing.assert_array_equal(8 * (x_0 + 1), np.rint(8 * (x_0 + 1)))
        return probability_flow.BitsPerDim(np.full(len(x_0), float(levels)), 1)

    monkeypatch.setattr(probability_flow, "bits_per_dim", bits_per_dim)
    assert modes_likelihood.read_ode(model, work)[0].mean == 17


def test_the_loss_gets_the_levels_of_the_data():
    """For x_1 in small noise a coarse level is nearly certain, and a fine one is not."""
    keys = {"loss": {"name": "vlb"}, "target": "x0", "process.T": 1, "process.betas": (1e-3,)}
    x_0 = jnp.full((4, 8, 8, 1), 0.5)
    loss = {}
    for levels in (17, 256):
        config = config_of("digits", "tiny")
        config.update_from_flattened_dict(keys | {"sampler.steps": 1, "data.levels": levels})
        exp = experiment.build(config)
        loss[levels] = exp.loss(lambda x_t, t: x_0, random.key(0), x_0)[0].mean()
    # The decoder's standard deviation is sqrt(1e-3) = 0.032, half a level 1/16 and 1/255.
    for levels, bits in loss.items():
        mass = stats.norm.cdf(1 / (levels - 1), scale=1e-3**0.5) * 2 - 1
        np.testing.assert_allclose(bits, -np.log2(mass), rtol=0.02)


def test_optimal_variances_of_a_learned_one_are_refused():
    """Before hours are spent on measuring them."""
    changes = {"variance": "learned", "loss.name": "vlb", "bpd.estimate": 8}
    config = with_overrides(config_of("digits", "tiny"), changes)
    message = r"^bpd\.estimate: expected 0 for a network that has learned .*, found 8$"
    with pytest.raises(ConfigError, match=message):
        modes_likelihood.check(Run("bpd", config, None, None), experiment.build(config))


def test_bits_per_dimension_add_up_whatever_the_batches_and_devices(trained_copy):
    """The whole report of 24 images, on four devices and on one, in other batches."""
    workdir = trained_copy
    folder = workdir / "eval" / "00000008"
    every = ("--mode=bpd", f"--workdir={workdir}", "--config.bpd.num=24")
    more = ("--config.bpd.estimate=8", "--config.bpd.steps=(5,)", "--config.bpd.ode=4")
    out, err = run(*every, *more)
    assert err == "" and "Table 4" not in out  # these are no CIFAR-10 images
    about = json.loads((folder / "bpd.json").read_text())
    assert (about["step"], about["images"], about["split"]) == (8, 24, "test")
    bits = list(about["bits_per_dim"].values())
    assert len(bits) == 4 and all(np.isfinite(x["mean"]) and x["error"] > 0 for x in bits)
    assert abs(about["rate"]["mean"] + about["L_0"]["mean"] - bits[0]["mean"]) < 1e-6
    with open(folder / "rate_distortion.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == list(range(20, 0, -1))
    assert float(rows[-1]["rate"]) == pytest.approx(about["rate"]["mean"], rel=1e-5)
    # An unweighted check of the columns: the rate grows by L_{t-1} from row to row.
    grown = np.diff([float(row["rate"]) for row in rows])
    np.testing.assert_allclose(grown, [float(row["L_t-1"]) for row in rows[:-1]], atol=2e-5)
    with Image.open(folder / "rate_distortion.png") as image:
        assert image.size[0] > 2 * image.size[1]
    assert not list(folder.glob("*partial*"))
    run_process(*every, "--config.bpd.batch_size=7", JAX_NUM_CPU_DEVICES=1)
    again = json.loads((folder / "bpd.json").read_text())["bits_per_dim"]
    # Float32 sums in another order, through 20 steps.
    assert next(iter(again.values()))["mean"] == pytest.approx(bits[0]["mean"], rel=1e-5)


def test_a_damaged_image_of_the_test_split_ends_in_one_line(tmp_path):
    """Training does not read it; the bound does, and says which image it was."""
    tiny = [f"--config={ROOT}/configs/cifar10.py:tiny", f"--workdir={tmp_path / 'run'}"]
    tiny += [f"--config.data.data_dir={tmp_path}"]
    tiny_tfds.write(tmp_path, "cifar10", n=8, damaged=True)
    config = config_of("cifar10", "tiny")
    state = experiment.make_initial_state(config, experiment.build(config))
    with contextlib.closing(open_checkpoints(tmp_path / "run")) as checkpoints:
        checkpoints.save(0, state)
    _, err = run(*tiny, "--mode=bpd", code=3)
    assert err.count("\n") == 1 and "test image " in err and "cannot identify" in err
