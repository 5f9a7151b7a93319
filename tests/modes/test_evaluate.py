"""--mode=eval: what is scored against what; resuming, two processes, one line for each error."""

import json
import re
import shutil
import time

import numpy as np
import pytest

from diffusion import data
from diffusion.data.loader import load_dataset
from diffusion.metrics import Score
from diffusion.modes import _sampling, evaluate
from diffusion.utils.io import save_json, save_npz
from tests import runs
from tests.runs import TINY, run, start
from tests.test_configs import config_of

PIXELS = "--config.eval.features=('pixels',)"


def test_score_of_several_seeds_is_their_mean_with_its_error():
    each = [{"train": {"fd": Score(value, 9.0)}} for value in (1.0, 2.0, 6.0)]
    entry = evaluate.over_seeds(each)["train"]["fd"]
    assert entry["value"] == 3 and entry["each"] == [1, 2, 6]
    np.testing.assert_allclose(entry["error"], np.sqrt(7 / 3))  # variance 7, of three
    assert evaluate.over_seeds(each[:1])["train"]["fd"]["error"] == 9


def test_table_has_a_column_for_each_reference():
    score = {"value": 1.25, "error": 0.5}
    found = {"": {"is": score}, "train": {"fid": score}, "test": {"fid": score | {"error": None}}}
    head, alone, both = evaluate.table("ema", found)
    assert head.split() == ["ema", "against", "train", "against", "test"]
    assert alone.split() == ["is", "1.25", "+-", "0.5"]
    assert both.split() == ["fid", "1.25", "+-", "0.5", "1.25"]


@pytest.fixture(scope="module")
def workdir(trained, tmp_path_factory):
    """A copy of the trained work directory, to write to."""
    return shutil.copytree(trained[0], tmp_path_factory.mktemp("eval") / "run")


def evaluated(workdir, *args):
    """Evaluates in this process; returns the scores in metrics.json."""
    run("--mode=eval", f"--workdir={workdir}", PIXELS, *args)
    return scores_of(workdir / "eval" / "00000008" / "metrics.json")


def scores_of(path):
    return json.loads(path.read_text())["scores"]


def sample_folder(workdir, seed):
    (folder,) = (workdir / "eval" / "00000008").glob(f"ema_seed{seed}_*")
    return folder


def test_training_reads_quick_distances(trained):
    assert "fd_random" in trained[1] and "fd_pixels" in trained[1]


def test_checkpoint_is_scored_and_everything_written_down(workdir):
    both = "--config.eval.weights=('ema','raw')", "--config.eval.seeds=(0,1)"
    out, err = run("--mode=eval", f"--workdir={workdir}", *both)
    assert err == "" and "against train" in out
    assert "scoring    fd_random, fd_pixels and others" in out
    # Six images in two batches of twenty steps.
    assert re.search(r"sampling step 40/40 .* images/s\n", out) and "image 6/6" in out
    content = json.loads((workdir / "eval" / "00000008" / "metrics.json").read_text())
    assert content["samples"] == 6 and content["step"] == 8 and content["seeds"] == [0, 1]
    assert content["sampler"]["steps"] == 20 and content["config"]["train"]["steps"] == 8
    assert content["references"]["train"]["images"] == 1501 and "jax" in content["versions"]
    assert any("covariance is singular" in note for note in content["notes"])
    assert any("kid against train: 100 random subsets of 6" in note for note in content["notes"])
    for weights in ("ema", "raw"):
        for against in ("train", "test"):
            found = content["scores"][weights][against]
            assert {"fd_random", "fd_pixels", "precision_random"} <= found.keys()
            assert len(found["fd_random"]["each"]) == 2 and found["fd_random"]["error"] > 0
            assert not any("fid" in name for name in found)
    assert content["scores"]["ema"] != content["scores"]["raw"]
    assert len(list((workdir / "eval" / "00000008").glob("*/grid.png"))) == 4


def test_killed_evaluation_resumes(workdir):
    """Killed with a few of fifteen batches on disk; the scores are those of one go."""
    args = "--config.eval.num=60", "--config.eval.seeds=(7,)"
    mode = "--mode=eval", f"--workdir={workdir}", PIXELS
    with start(*mode, *args, JAX_NUM_CPU_DEVICES=4) as process:
        while process.poll() is None and not list(workdir.glob("eval/*/ema_seed7_*/part_*.npz")):
            time.sleep(0.01)
        process.kill()
        process.communicate()
    folder = sample_folder(workdir, 7)
    assert not (folder / "samples.npz").exists()
    scores = evaluated(workdir, *args)
    images = np.load(folder / "samples.npz")["arr_0"]
    assert images.shape == (60, 8, 8, 1)
    shutil.rmtree(folder)
    assert evaluated(workdir, *args) == scores
    assert np.array_equal(np.load(folder / "samples.npz")["arr_0"], images)


def test_two_processes_whose_caches_differ_score_the_same(workdir, tmp_path, monkeypatch):
    """Process 0 has the statistics of the data in its cache, process 1 has not."""
    seed = "--config.eval.seeds=(9,)"
    alone = evaluated(workdir, seed)
    shutil.rmtree(sample_folder(workdir, 9))
    environment = runs.environment

    def with_own_cache(**extra):
        cache = {"XDG_CACHE_HOME": tmp_path} if extra["JAX_PROCESS_ID"] else {}
        return environment(**extra, **cache)

    monkeypatch.setattr(runs, "environment", with_own_cache)
    out = runs.run_two_processes("--mode=eval", f"--workdir={workdir}", PIXELS, seed)
    assert "images of train" not in out
    together = scores_of(workdir / "eval" / "00000008" / "metrics.json")
    for against, named in together["ema"].items():
        for name, entry in named.items():
            expected = alone["ema"][against][name]["value"]
            np.testing.assert_allclose(entry["value"], expected, rtol=1e-2, atol=1e-3)


def test_damaged_samples_give_one_line(workdir):
    setting = _sampling.sample_setting(config_of("digits", "tiny"), 8, "ema", seed=3)
    folder = workdir / "eval" / "00000008" / _sampling.sample_name(setting)
    save_json(folder / "samples.json", {"setting": setting})
    (folder / "samples.npz").write_bytes(b"PK\x03\x04")
    seed = "--config.eval.seeds=(3,)"
    _, err = run("--mode=eval", f"--workdir={workdir}", PIXELS, seed, code=4)
    assert err.count("\n") == 1 and f"{folder}: cannot be read" in err and "delete it" in err


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """800 digits of the training set in two halves, and noise, each as an npz."""
    images = load_dataset(data.open_dataset("digits", "train"))[0][:800]
    noise = np.random.default_rng(0).integers(0, 256, images[::2].shape, np.uint8)
    folder = tmp_path_factory.mktemp("halves")
    for name, part in {"one": images[::2], "other": images[1::2], "noise": noise}.items():
        save_npz(folder / f"{name}.npz", part)
    return folder


def compared(folder, a, b):
    """Returns {score: value} of the images `a` against the images `b`."""
    inputs = f"--input={folder}/{a}.npz", f"--input={folder}/{b}.npz"
    run(TINY, "--mode=eval", f"--workdir={folder}/run", *inputs)
    (path,) = (folder / "run" / "eval").glob(f"{a}_*/metrics.json")
    (scores,) = scores_of(path)["input"].values()
    shutil.rmtree(path.parent)
    return {name: entry["value"] for name, entry in scores.items()}


def test_half_scores_better_than_noise_against_the_other_half(halves):
    near, far = compared(halves, "one", "other"), compared(halves, "noise", "other")
    assert near.keys() == far.keys() and len(near) >= 14
    for name in near:
        lower = name.startswith(("fd", "kid", "mmd"))
        assert near[name] < far[name] if lower else near[name] > far[name], name


def test_set_scores_best_against_itself(halves):
    same = compared(halves, "one", "one")
    assert same["fd_random"] < 1e-9 and same["fd_pixels"] < 1e-9
    assert same["precision_random"] == same["recall_random"] == same["coverage_pixels"] == 1


WRONG = {  # {what is wrong: (command line, exit code, words of the message)}
    "another size": (["--input=big.npz"], 3, "found 8x8x1; give --config of their data, or --conf"),
    "sizes that differ": (["--input=big.npz", "--input=small.npz"], 3, "expected images of 9x9x1"),
    "another config": (["--config.target=v", "--workdir=RUN"], 4, "target: was eps, now v"),
    "flag of another mode": (["--output=x"], 2, "--output: not used by --mode=eval"),
    "option of another sampler": (["--config.sampler.eta=0.5"], 2, "the sampler ancestral has no"),
    "three inputs": (["--input=a", "--input=b", "--input=c"], 2, "one or two"),
    "missing file": (["--input=nothing"], 3, "no file or folder"),
    "features": (["--config.eval.features=('vgg',)", "--input=small.npz"], 2, "eval.features: 'vg"),
    "reference": (
        ["--config.eval.references=('val',)", "--input=small.npz"],
        3,
        "expected a split 'val'",
    ),
    "one image": (["--input=one.npz"], 3, "2 or more images, found 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_command_line_gives_one_line(workdir, tmp_path, name):
    args, code, words = WRONG[name]
    for stem, n, size in (("big", 3, 9), ("small", 3, 8), ("one", 1, 8)):
        save_npz(tmp_path / f"{stem}.npz", np.zeros((n, size, size, 1), np.uint8))
    args = [a.replace("RUN", str(workdir)) for a in args]
    _, err = run("--mode=eval", *args, code=code, cwd=tmp_path)
    assert err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize(
    "names, code, scored",
    [
        (("available",), 0, "fd_classifier, fd_random, fd_pixels"),
        (("inception", "pixels"), 3, "fd_pixels"),
        (("inception",), 3, ""),
    ],
)
def test_missing_inception_weights_are_an_error_where_they_are_asked_for(
    halves, tmp_path, names, code, scored
):
    """A file that holds no such weights: said before the scores or after them, once."""
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    args = f"--config.eval.inception={tmp_path}/weights.pth", f"--config.eval.features={names}"
    args += f"--input={halves}/one.npz", f"--workdir={tmp_path}/run"
    out, err = run(TINY, "--mode=eval", *args, code=code)
    assert err.count("\n") == (code > 0)
    lines = (out + err).splitlines()
    assert sum("weights.pth: expected a file" in line for line in lines) == 1
    assert len(set(lines)) == len(lines)
    assert (f"scoring    {scored} and others" in out) == ("\nfd_pixels" in out) == bool(scored)


def test_images_of_another_size_are_resized(tmp_path):
    """As by --mode=prepare, which metrics.json states."""
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)
    save_npz(tmp_path / "big.npz", images.repeat(4, 1).repeat(4, 2))
    run(TINY, "--mode=eval", "--input=big.npz", "--config.eval.resize=True", cwd=tmp_path)
    (path,) = tmp_path.glob("runs/*/eval/big_*/metrics.json")
    content = json.loads(path.read_text())
    assert any(note.startswith("resized from 16x16") for note in content["notes"])
    assert content["config"]["eval"]["resize"] and scores_of(path)["input"].keys() >= {"train"}
