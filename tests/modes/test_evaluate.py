"""--mode=eval: what is compared with what, under which name; killed, gone on with, refused."""

import json
import shutil

import numpy as np
import pytest

from diffusion import metrics
from diffusion.metrics import Score, extraction, feature_set, features
from diffusion.modes import evaluate
from diffusion.sharding import data_mesh
from diffusion.utils.errors import DDPMError
from diffusion.utils.io import save_npz
from tests.modes.test_train import run, run_twice, start

DIGITS = "--config=configs/digits.py:tiny"
PIXELS = "--config.eval.features=('pixels',)"


def rows(n, d, seed=0, mean=0.0):
    return np.random.RandomState(seed).standard_normal((n, d)).astype(np.float32) + np.float32(mean)


@pytest.fixture(scope="module")
def extractor():
    return extraction.make_extractor(("pixels",), (3, 3, 1), data_mesh())


def test_statistics_are_what_other_programs_publish_and_read(tmp_path, extractor):
    """`mu` and `sigma` as numpy computes them; a file of these alone gives the same distance."""
    x, y = rows(40, 9), rows(50, 9, 1, 0.5)
    sample, other = (feature_set.collect([(z, None)], len(z)) for z in (x, y))
    evaluate.save_statistics(tmp_path / "ours.npz", "pixels", sample)
    with np.load(tmp_path / "ours.npz") as file:
        np.testing.assert_allclose(file["mu"], x.mean(0, dtype=np.float64), atol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(x.T.astype(np.float64)), atol=1e-12)
        np.savez(tmp_path / "theirs.npz", mu=file["mu"], sigma=file["sigma"])
    ours, theirs = (
        evaluate.statistics(tmp_path / f"{name}.npz", extractor)["pixels"]
        for name in ("ours", "theirs")
    )
    assert np.array_equal(ours.features, sample.features) and not len(theirs.features)
    fd = [metrics.evaluate("fd", other, s)["fd"].value for s in (sample, ours, theirs)]
    assert fd[0] > 1 and np.allclose(fd, fd[0], rtol=1e-9)


def test_statistics_of_other_features_get_one_line(tmp_path, extractor):
    np.savez(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(DDPMError, match="expected statistics of pixels 9 features, found 2048"):
        evaluate.statistics(tmp_path / "x.npz", extractor)
    np.savez(tmp_path / "x.npz", mu=np.zeros(9), sigma=-np.eye(9))
    with pytest.raises(DDPMError, match="covariance"):
        evaluate.statistics(tmp_path / "x.npz", extractor)
    save_npz(tmp_path / "x.npz", np.zeros((2, 3, 3, 1), np.uint8))
    assert evaluate.statistics(tmp_path / "x.npz", extractor) is None


def test_a_score_of_several_seeds_is_their_mean_with_its_error():
    each = [{"train": {"fd": Score(value, 9.0)}} for value in (1.0, 2.0, 6.0)]
    entry = evaluate.over_seeds(each)["train"]["fd"]
    assert entry["value"] == 3 and entry["each"] == [1, 2, 6]
    np.testing.assert_allclose(entry["error"], np.sqrt(7 / 3))  # variance 7, of three
    assert evaluate.over_seeds(each[:1])["train"]["fd"]["error"] == 9


def test_the_table_has_a_column_for_each_reference():
    score = {"value": 1.25, "error": 0.5}
    found = {"": {"is": score}, "train": {"fid": score}, "test": {"fid": score | {"error": None}}}
    head, alone, both = evaluate.table("ema", found)
    assert head.split() == ["ema", "against", "train", "against", "test"]
    assert alone.split() == ["is", "1.25", "+-", "0.5"]
    assert both.split() == ["fid", "1.25", "+-", "0.5", "1.25"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "run"
    cache = folder.parent / "cache"
    out, _ = run(DIGITS, f"--workdir={folder}", XDG_CACHE_HOME=cache)
    assert "fd_random" in out and "fd_pixels" in out  # the readings during the training
    return folder, cache


def scores_of(path):
    return json.loads(path.read_text())["scores"]


def test_a_checkpoint_is_scored_and_all_is_written_down(workdir):
    folder, cache = workdir
    both = "--config.eval.weights=('ema','raw')", "--config.eval.seeds=(0,1)"
    out, err = run("--mode=eval", f"--workdir={folder}", *both, XDG_CACHE_HOME=cache)
    assert err == "" and "against train" in out and "reading" in out
    about = json.loads((folder / "eval" / "00000008" / "metrics.json").read_text())
    assert about["samples"] == 6 and about["step"] == 8 and about["seeds"] == [0, 1]
    assert about["sampler"]["steps"] == 20 and about["config"]["train"]["steps"] == 8
    assert about["references"]["train"]["images"] == 1501 and "jax" in about["versions"]
    assert any("covariance is singular" in note for note in about["notes"])
    for weights in ("ema", "raw"):
        for against in ("train", "test"):
            found = about["scores"][weights][against]
            assert {"fd_random", "fd_pixels", "precision_random"} <= found.keys()
            assert len(found["fd_random"]["each"]) == 2 and found["fd_random"]["error"] > 0
            assert not any("fid" in name for name in found)
    assert about["scores"]["ema"] != about["scores"]["raw"]
    assert len(list((folder / "eval" / "00000008").glob("*/grid.png"))) == 4


def test_the_statistics_of_the_data_are_kept_between_runs(workdir):
    folder, cache = workdir
    out, _ = run("--mode=eval", f"--workdir={folder}", PIXELS, XDG_CACHE_HOME=cache)
    out, _ = run("--mode=eval", f"--workdir={folder}", PIXELS, XDG_CACHE_HOME=cache)
    assert "images of train" not in out and "done" in out


def test_an_evaluation_that_was_killed_goes_on(workdir):
    """Killed once the first of three batches is on disk; the scores are those of one go."""
    folder, cache = workdir
    args = "--mode=eval", f"--workdir={folder}", PIXELS, "--config.eval.num=12"
    few = "--config.eval.seeds=(7,)", "--config.sampler.steps=19"
    with start(*args, *few, XDG_CACHE_HOME=cache) as process:
        found = None
        while process.poll() is None and not found:
            found = list((folder / "eval" / "00000008").glob("ema_seed7_*/samples.json"))
        process.kill()
        process.communicate()
    run(*args, *few, XDG_CACHE_HOME=cache)
    scores = scores_of(folder / "eval" / "00000008" / "metrics.json")
    (place,) = (folder / "eval" / "00000008").glob("ema_seed7_*")
    whole = np.load(place / "samples.npz")["arr_0"]
    assert whole.shape == (12, 8, 8, 1)
    for path in place.iterdir():
        path.unlink()
    run(*args, *few, XDG_CACHE_HOME=cache)
    assert np.array_equal(np.load(place / "samples.npz")["arr_0"], whole)
    assert scores_of(folder / "eval" / "00000008" / "metrics.json") == scores


def test_two_processes_whose_caches_differ_score_the_same(workdir, tmp_path):
    """One has the statistics of the data at hand, the other has not."""
    folder, cache = workdir
    args = "--mode=eval", f"--workdir={folder}", PIXELS, "--config.eval.seeds=(9,)"
    run(*args, XDG_CACHE_HOME=cache)
    path = folder / "eval" / "00000008" / "metrics.json"
    alone = scores_of(path)
    for place in (folder / "eval" / "00000008").glob("ema_seed9_*"):
        shutil.rmtree(place)
    said = run_twice(*args, of_each=[{"XDG_CACHE_HOME": c} for c in (cache, tmp_path)])
    assert "images of train" not in said
    for against, named in scores_of(path)["ema"].items():
        for name, entry in named.items():
            np.testing.assert_allclose(
                entry["value"], alone["ema"][against][name]["value"], rtol=1e-2, atol=1e-3
            )


def test_samples_that_were_changed_meanwhile_are_refused(workdir):
    folder, cache = workdir
    args = "--mode=eval", f"--workdir={folder}", PIXELS, "--config.eval.seeds=(3,)"
    run(*args, XDG_CACHE_HOME=cache)
    (place,) = (folder / "eval" / "00000008").glob("ema_seed3_*")
    images = np.load(place / "samples.npz")["arr_0"]
    save_npz(place / "samples.npz", 255 - images)
    _, err = run(*args, XDG_CACHE_HOME=cache, code=4)
    assert err.count("\n") == 1 and "found others" in err


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The digits of the training set in two halves, and noise, each as an npz."""
    from diffusion import data

    images = data.load(data.find("digits", "train")).image
    noise = np.random.default_rng(0).integers(0, 256, images[::2].shape, np.uint8)
    folder = tmp_path_factory.mktemp("halves")
    for name, part in {"one": images[::2], "other": images[1::2], "noise": noise}.items():
        save_npz(folder / f"{name}.npz", part)
    return folder


def compared(folder, a, b):
    inputs = f"--input={folder}/{a}.npz", f"--input={folder}/{b}.npz"
    run("--mode=eval", f"--workdir={folder}/run", *inputs)
    (path,) = (folder / "run" / "eval").glob(f"{a}_*/metrics.json")
    (scores,) = scores_of(path)["input"].values()
    path.unlink()
    return {name: entry["value"] for name, entry in scores.items()}


def test_one_half_is_nearer_to_the_other_than_noise_is_in_every_score(halves):
    near, far = compared(halves, "one", "other"), compared(halves, "noise", "other")
    assert near.keys() == far.keys() and len(near) >= 14
    for name in near:
        better = name.startswith(("fd", "kid"))
        assert near[name] < far[name] if better else near[name] > far[name], name


def test_a_set_against_itself(halves):
    same = compared(halves, "one", "one")
    assert same["fd_random"] < 1e-9 and same["fd_pixels"] < 1e-9
    assert same["precision_random"] == same["recall_random"] == same["coverage_pixels"] == 1


WRONG = {
    "of another size": (["--input=big.npz"], "expected images of 9x9x1"),
    "not comparable": (["--input=big.npz", "--input=small.npz"], "expected images of 9x9x1"),
    "another config's": (["--config.target=v", "--workdir=RUN"], "target: was eps, now v"),
    "a flag of another mode": (["--output=x"], "--output: nothing to --mode=eval"),
    "an option of none": (
        ["--config.sampler.eta=0.5"],
        "sampler.eta: the sampler ancestral has no",
    ),
    "three": (["--input=a", "--input=b", "--input=c"], "one or two"),
    "absent": (["--input=nothing"], "no file or folder"),
    "features": (["--config.eval.features=('vgg',)", "--input=small.npz"], "eval.features: 'vgg'"),
    "reference": (["--config.eval.references=('val',)", "--input=small.npz"], "no split 'val'"),
    "one image": (["--input=one.npz"], "two images or more, found 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_gets_one_line(workdir, tmp_path, name):
    args, words = WRONG[name]
    for stem, n, size in (("big", 3, 9), ("small", 3, 8), ("one", 1, 8)):
        save_npz(tmp_path / f"{stem}.npz", np.zeros((n, size, size, 1), np.uint8))
    args = [a.replace("RUN", str(workdir[0])) for a in args]
    with start("--mode=eval", *args, cwd=tmp_path) as process:
        _, err = process.communicate()
    assert process.returncode in (2, 3, 4)
    assert err.count("\n") == 1 and words in err, err


def test_without_the_inception_weights_the_rest_is_done_first(workdir, tmp_path):
    """A file that is no such weights: what to fetch is said, the samples are there, exit 3."""
    folder, cache = workdir
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    asked = f"--config.eval.inception={tmp_path}/weights.pth", "--config.eval.seeds=(5,)"
    asked += ("--config.eval.features=('inception','pixels')",)
    out, err = run("--mode=eval", f"--workdir={folder}", *asked, XDG_CACHE_HOME=cache, code=3)
    assert err.count("\n") == 1 and "weights.pth" in err and "fd_pixels" in err
    assert "against train" in out
    assert list((folder / "eval" / "00000008").glob("ema_seed5_*/samples.npz"))


def test_features_of_every_table_entry_have_a_name_of_their_own():
    names = [
        metrics.metric_name("fd", kind, 10) for kind in (*features.FEATURES, "inception", "spatial")
    ]
    assert len(set(names)) == len(names)
    assert [n for n in names if "fid" in n] == ["fid@10", "sfid@10"]
