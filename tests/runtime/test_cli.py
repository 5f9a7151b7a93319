"""The command line: what is typed wrong ends in one line, and nothing is imported in vain."""

import errno
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys

import jax
import pytest

import main
from configs import default
from diffusion.modes import check
from diffusion.runtime import cli
from diffusion.runtime import config as config_
from diffusion.utils.errors import ConfigError
from tests.conftest import ROOT
from tests.runs import TINY, environment, run, run_process

PREPARE = ["--mode=prepare", "--config.data.name=mine"]

LEARNED = ["--config.loss.name=hybrid", "--config.variance=learned_range"]

# What is typed wrong: arguments, exit code, and what the one line must name.
WRONG = {
    "unknown key": (["--config.train.stepz=3"], 2, ["train.stepz", "train.steps"]),
    "unknown section": (["--config.trian.steps=3"], 2, ["trian.steps", "train.steps"]),
    "wrong type": (["--config.train.steps=many"], 2, ["train.steps", "int", "many"]),
    "float for an int": (["--config.train.steps=1e3"], 2, ["train.steps", "int", "1e3"]),
    "out of range": (["--config.optim.lr=nan"], 2, ["optim.lr", "nan"]),
    "negative": (["--config.train.batch_size=-3"], 2, ["train.batch_size", "-3"]),
    "schedule": (["--config.process.schedule=linaer"], 2, ["linaer", "nearest: linear"]),
    "loss": (["--config.loss.name=simpel"], 2, ["simpel", "nearest: simple"]),
    "sampler": (["--config.sampler.name=ancestor"], 2, ["ancestor", "nearest: ancestral"]),
    "target": (["--config.target=epsilon"], 2, ["epsilon", "eps"]),
    "betas": (["--config.process.betas=(0.1,0.2)"], 2, ["betas", "20 numbers", "found 2"]),
    "profile": (["--config.train.profile=(5,)"], 2, ["train.profile", "two ints", "(5,)"]),
    "no step": (["--config.train.profile=(0,5)"], 2, ["train.profile", "1 or more", "(0, 5)"]),
    "beta": (["--config.process.betas=(0.1,2)"], 2, ["process.betas", "in (0, 1]", "(0.1, 2)"]),
    "times": (["--config.sampler.times=(5.5,)"], 2, ["sampler.times", "ints", "5.5"]),
    "sampler steps": (["--config.sampler.steps=21"], 2, ["sampler", "21", "20"]),
    "simple and learned": (["--config.variance=learned"], 2, ["loss", "variance", "vlb"]),
    "simple and a range": (["--config.variance=learned_range"], 2, ["loss", "vlb or hybrid"]),
    "hybrid and fixed": (["--config.loss.name=hybrid"], 2, ["loss", "use learned_range"]),
    "variance": (["--config.variance=learned_rang"], 2, ["variance", "nearest: learned_range"]),
    "weighting": (["--config.loss.weighting=minsnr"], 2, ["weighting", "nearest: min_snr"]),
    "timesteps": (["--config.train.timesteps=important"], 2, ["timesteps", "nearest: importance"]),
    "weighting of another loss": (
        ["--config.loss.name=vlb", "--config.loss.weighting=min_snr"],
        2,
        ["loss.weighting", "expected 'simple', as the loss vlb", "found 'min_snr'"],
    ),
    "option of another loss": (
        ["--config.loss.vlb_weight=0.1"],
        2,
        ["loss.vlb_weight", "expected 0.001, as the loss simple has no", "found 0.1"],
    ),
    "option of another weighting": (
        ["--config.loss.weighting=min_snr", "--config.loss.k=2"],
        2,
        ["loss.k", "expected 1.0 for weighting min_snr", "found 2.0"],
    ),
    "weights without bound": (
        ["--config.process.schedule=jsd", "--config.loss.weighting=p2"],
        2,
        ["loss.weighting", "alpha_bar_T = 0", "use the target x0 or v"],
    ),
    "variance of samples": (
        [*LEARNED, "--config.sampler.variance=analytic"],
        2,
        ["sampler.variance", "expected learned_range", "'analytic'"],
    ),
    "devices": (["--config.train.batch_size=15"], 2, ["train.batch_size", "15", "12 or 16"]),
    "size": (
        ["--config.data.image_size=9", "--config.model.ch_mult=(1,2)"],
        2,
        ["9x9", "divisible by 2"],
    ),
    "size of the data": (["--config.data.image_size=16"], 3, ["16x16x1", "8x8x1"]),
    "no data_dir": (["--config=configs/cifar10.py:tiny"], 3, ["data_dir"]),
    "no data there": (
        ["--config=configs/cifar10.py:tiny", "--config.data.data_dir=/nowhere"],
        3,
        ["/nowhere"],
    ),
    "config file": (["--config=configs/digit.py"], 2, ["configs/digit.py", "configs/digits.py"]),
    "nothing to replay": (["--mode=replay"], 2, ["--replay=FILE"]),
    "variant": (["--config=configs/digits.py:tyni"], 2, ["tyni", "tiny"]),
    "flag": (["--wrokdir=x"], 2, ["wrokdir", "--workdir"]),
    "mode": (["--mode=sampel"], 2, ["sampel", "sample"]),
    "moved key": (["--config.train.num_samples=3"], 2, ["train.preview.num=3"]),
    "option of another sampler": (
        ["--config.sampler.eta=0.5"],
        2,
        ["sampler.eta", "ancestral has no", "ddim"],
    ),
    "flag of another mode": (["--output=x"], 2, ["--output", "--mode=export"]),
    "no flag": (["train"], 2, ["train", "--mode"]),
    "source to prepare": (
        ["--mode=prepare", "--config.data.source=flder"],
        2,
        ["data.source", "flder", "nearest: folder"],
    ),
    "no archive": (
        [*PREPARE, "--config.data.source=zip"],
        3,
        ["data.archive", "cannot be downloaded"],
    ),
    "archive not there": (
        [*PREPARE, "--config.data.source=folder", "--config.data.archive=/nowhere"],
        3,
        ["data.archive", "/nowhere"],
    ),
    "on_error": (["--config.data.on_error=ignore"], 2, ["data.on_error", "skip or fail"]),
    "nothing trained": (["--mode=sample"], 4, ["trained"]),
    "work directory is a file": (["--workdir={file}/run"], 4, ["{file}"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_line_gets_one_line(name, tmp_path):
    args, code, words = WRONG[name]
    (tmp_path / "file").write_text("")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    args = [a.format(file=tmp_path / "file") for a in args]
    if not any(a.startswith("--config=") for a in args):
        args.insert(0, TINY)
    out, err = run(*args, code=code, cwd=cwd)
    assert err.count("\n") == 1 and err.startswith(f"ddpm: error[{code}]: "), err + out
    assert len(err) <= 320, err
    for word in words:
        assert word.format(file=tmp_path / "file") in err, err
    assert not list(cwd.rglob("*"))


@pytest.mark.parametrize("name", ["unknown key", "nothing trained"])
def test_so_it_does_in_a_process_of_its_own(name, tmp_path):
    args, code, words = WRONG[name]
    _, err = run_process(TINY, *args, code=code, cwd=tmp_path)
    assert err.count("\n") == 1 and all(word in err for word in words), err


def test_a_config_is_found_from_any_directory(tmp_path, trained):
    _, err = run("--config=configs/digits.py:tiny", "--mode=sample", code=4, cwd=tmp_path)
    assert "expected a trained work directory" in err
    _, err = run("--config=configs/digits.py", f"--workdir={trained[0]}", code=4, cwd=tmp_path)
    assert "belongs to another config" in err  # and is not taken for the default
    args = ("--mode=sample", "--input=x_T.npy")
    _, err = run("--config=configs/digits.py", f"--workdir={trained[0]}", *args, code=4)
    assert "belongs to another config" in err  # although --input is no weights here


def test_a_cluster_that_is_not_numbered_is_refused(monkeypatch):
    for name, value in zip(cli.CLUSTER, ("localhost:1", "two", "0"), strict=True):
        monkeypatch.setenv(name, value)
    message = r"JAX_COORDINATOR_ADDRESS: expected the numbers .*, found .*'two'"
    with pytest.raises(ConfigError, match=message):
        cli.start_distributed(default.get_config())


def test_the_coordinator_listens_on_the_address_that_is_given(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    for name, value in zip(cli.CLUSTER, ("localhost:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    cli.start_distributed(default.get_config())
    assert given["coordinator_bind_address"] == "localhost:1"


def test_help_lists_flags_and_every_key():
    """Every key once, with a comment; what it prints, typed, is the default configuration."""
    out, err = run("--help")
    assert err == "" and "--workdir" in out and run("--mode=help")[0] == out
    lines = out.partition("Keys of the configuration:\n")[2].splitlines()
    typed = [word for line in lines for word in shlex.split(line, comments=True)]
    keys = [word.removeprefix("--config.").partition("=")[0] for word in typed]
    assert sorted(keys) == sorted(config_.flatten(default.get_config()))
    found = config_.resolve(main.define_flags(), ["main.py", TINY, *typed], lambda workdir: None)
    assert found.config.to_dict() == default.get_config().to_dict()
    for above, line in itertools.pairwise(lines):
        assert " # " in line or not line or above.startswith("  # "), f"no comment: {line}"
    sections = [key.partition(".")[0] for key in keys if "." in key]
    assert [s for s, _ in itertools.groupby(sections)] == [*dict.fromkeys(sections)]


def test_keys_may_be_typed_before_the_config():
    """They get their types from the config, wherever it stands."""
    keys = ["--config.model.ch=24", "--config.data.flip=True", "--config.eval.seeds=(1,2)"]
    for argv in ([*keys, TINY], [TINY, *keys], [keys[0], "--mode=sample", TINY, *keys[1:]]):
        found = config_.resolve(main.define_flags(), ["main.py", *argv], lambda workdir: None)
        config = found.config
        assert (config.model.ch, config.data.flip, config.eval.seeds) == (24, True, (1, 2))


def modules_after(*args):
    """Returns the modules that a process has imported at the end of a command line."""
    code = "import sys, main; main.main(sys.argv); print('\\n'.join(sys.modules))"
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines())


def test_help_imports_nothing_heavy():
    assert not {"jax", "numpy", "flax", "tensorboard"} & modules_after("--help")


def test_sampling_imports_no_other_mode(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    args = ("--mode=sample", f"--workdir={workdir}", "--config.sample.num=2")
    imported = modules_after(*args, "--config.sample.seed=7")
    modes = {m for m in imported if m.startswith("diffusion.modes.")}
    shared = {"_common", "_sampling", "_snapshots"}
    assert modes == {f"diffusion.modes.{m}" for m in ("sample", *shared)}
    assert not {"tensorboard", "sklearn", "scipy.optimize"} & imported


def test_a_work_directory_of_another_config_is_refused(trained):
    workdir = trained[0]
    before = (workdir / "config.json").read_text()
    args = ("--config.optim.lr=0.5", "--config.target=x0", "--config.train.steps=99")
    _, err = run(TINY, f"--workdir={workdir}", *args, code=4)
    assert err.count("\n") == 1
    assert "optim.lr: was 0.004, now 0.5" in err and "target: was eps, now x0" in err
    assert "train.steps" not in err  # may change
    assert (workdir / "config.json").read_text() == before


def test_a_work_directory_from_before_a_key_came_goes_on(trained, tmp_path):
    """Its config.json lacks keys that later versions added, and has keys by their former names."""
    workdir = tmp_path / "old"
    shutil.copytree(trained[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    del config["bpd"], config["data"]["workers"], config["model"]["remat"]
    config["train"]["num_samples"] = config["train"].pop("preview")["num"]
    (workdir / "config.json").write_text(json.dumps(config))
    for args in ([], [TINY]):
        out, _ = run(f"--workdir={workdir}", *args)
        assert "nothing to do" in out


@pytest.mark.parametrize(
    "error, code, line",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 4, r"/x/y: No space .*goes on"),
        (OSError(errno.EIO, "no answer"), 4, r"run: no answer; the same command goes on"),
        (OSError(errno.EACCES, "Permission denied"), 4, r"Permission denied; give this user"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, r"the traceback: .*crash/trace"),
    ],
)
def test_an_error_of_the_storage_is_one_line_and_any_other_a_defect(
    tmp_path, monkeypatch, error, code, line
):
    def fail(run):
        raise error

    monkeypatch.setattr(check, "run", fail)
    (tmp_path / "run").mkdir()
    _, err = run("--mode=check", TINY, f"--workdir={tmp_path / 'run'}", code=code)
    assert err.count("\n") == 1 and re.search(line, err), err
