"""main.py as a user runs it: in its own process, judged by what it prints and leaves behind."""

import concurrent.futures
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion import checkpoint, data, experiment
from diffusion.modes import _sampling
from diffusion.plotting import image_grid
from tests import tiny_tfds
from tests.conftest import ROOT
from tests.data.prepare.test_image_decoding import MALFORMED
from tests.test_configs import config_of

TINY = "--config=configs/digits.py:tiny"


def environment(**extra):
    """The tests' own settings of JAX alone; conftest's XLA_FLAGS go along."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), "JAX_PLATFORMS": "cpu"}
    cache["XDG_CACHE_HOME"] = str(ROOT / ".cache" / "home")  # nothing is left in the user's
    return keep | cache | {k: str(v) for k, v in extra.items()}


def start(*args, cwd=ROOT, **extra):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *map(str, args)],
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args, code=0, **extra):
    with start(*args, **extra) as process:
        out, err = process.communicate()
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def run_twice(*args, of_each=({}, {})):
    """One run of two processes of two devices each; what they say. of_each: more environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cluster = {"JAX_NUM_CPU_DEVICES": 2, "JAX_NUM_PROCESSES": 2, "JAX_COORDINATOR_ADDRESS": address}
    both = [start(*args, JAX_PROCESS_ID=i, **cluster, **extra) for i, extra in enumerate(of_each)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    # Only process 0 speaks, and Gloo, which connects them; its threads cut each other short, down
    # to a number or the end of a line, but each of its messages ends one line and no more.
    silent = outputs[1][0]
    assert silent.count("\n") == silent.count("[Gloo]"), silent
    said = [line for line in silent.splitlines() if "Gloo" not in line]
    said = [line for line in said if line.strip() and not line.strip().isdigit()]
    assert [line for line in said if "peer ranks" not in line] == []
    return outputs[0][0]


def stop_after(process, line, with_signal):
    """Sends the signal once a line of the console matches; returns all of the console."""
    seen = []
    for text in process.stdout:
        seen.append(text)
        if re.match(line, text):
            process.send_signal(with_signal)
            break
    out, err = process.communicate()
    return "".join(seen) + out, err


def last_state(workdir, variant="tiny"):
    """The newest checkpoint as a dict of arrays, restored on this process's four devices."""
    config = config_of("digits", variant)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
    with contextlib.closing(checkpoints):
        state = checkpoints.restore(experiment.abstract_state(experiment.build(config)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def logged(workdir, name="train/loss"):
    """{step: value} of a metric."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same(a, b, rtol=0.0, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished tiny run: its work directory and what the console said."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    out, err = run(TINY, f"--workdir={workdir}")
    return workdir, out, err


def test_a_run_leaves_what_it_promises(trained):
    workdir, out, err = trained
    assert err == ""
    for word in ("images of 8x8x1", "parameters", "compiling", "done", "steps/s"):
        assert word in out, out
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == 8
    losses = logged(workdir)
    assert list(losses) == [2, 4, 6, 8] and all(np.isfinite(list(losses.values())))
    assert (workdir / "checkpoints" / "4").is_dir() and (workdir / "checkpoints" / "8").is_dir()
    assert list(workdir.glob("events.out.tfevents.*"))
    for kind in ("raw", "ema"):
        with Image.open(workdir / "samples" / f"00000008_{kind}.png") as image:
            assert min(image.size) >= 2 * 64  # four digits, two by two, enlarged


def test_the_first_learning_rate_is_zero_and_the_step_counts_from_one(trained):
    """Warm-up of 2 steps: rates 0, lr/2, lr, ...; the line of step 2 has the rate of its update."""
    rates = logged(trained[0], "train/lr")
    lr = config_of("digits").optim.lr
    np.testing.assert_allclose([rates[2], rates[4]], [lr / 2, lr], rtol=1e-6)


def test_a_finished_run_says_so(trained):
    out, _ = run(TINY, f"--workdir={trained[0]}")
    assert "nothing to do" in out and "train.steps" in out


def test_the_work_directory_remembers_its_config(trained):
    out, _ = run(f"--workdir={trained[0]}")
    assert "nothing to do" in out  # the embedded default would be another config: an error


def test_a_work_directory_from_before_a_key_came_goes_on(trained, tmp_path):
    """Its config.json lacks what later versions added; nothing of that has a part in training."""
    workdir = tmp_path / "old"
    shutil.copytree(trained[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    del config["bpd"], config["data"]["workers"], config["data"]["image_width"]
    (workdir / "config.json").write_text(json.dumps(config))
    for args in ([], [TINY]):
        out, _ = run(f"--workdir={workdir}", *args)
        assert "nothing to do" in out


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """SIGKILL somewhere in a long run, then on to step n; against n steps without a break."""
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    args = (TINY, "--config.train.save_every=5", "--config.train.sample_every=100000")
    process = start(*args, f"--workdir={killed}", "--config.train.steps=100000")
    out, _ = stop_after(process, r"step (?!1/)", signal.SIGKILL)
    assert re.search(r"step [\d,]+/100,000  0%  ETA \S+  loss \S+ .* steps/s  .* images/s", out)
    assert process.returncode == -signal.SIGKILL
    steps = [int(p.name) for p in (killed / "checkpoints").iterdir() if p.name.isdigit()]
    n = max(steps) + 7
    out, _ = run(*args, f"--workdir={killed}", f"--config.train.steps={n}")
    resumed_from = int(re.search(r"from step ([\d,]+)", out)[1].replace(",", ""))
    assert 0 < resumed_from < n
    run(*args, f"--workdir={straight}", f"--config.train.steps={n}")
    assert_same(last_state(killed), last_state(straight))
    # The mean of the interval that was cut short by the kill is of fewer steps, all others agree.
    ours, theirs = logged(killed), logged(straight)
    assert ours.keys() == theirs.keys()
    assert sum(ours[step] != theirs[step] for step in ours) <= 1


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_stopped_saves_and_goes_on(tmp_path, with_signal):
    args = (TINY, f"--workdir={tmp_path}", "--config.train.sample_every=100000")
    process = start(*args, "--config.train.steps=100000", "--config.train.save_every=100000")
    out, err = stop_after(process, r"step ", with_signal)
    assert process.returncode == 75, out + err
    assert err == ""
    step = int(re.search(r"stopped +at step ([\d,]+), saved", out)[1].replace(",", ""))
    out, _ = run(*args, f"--config.train.steps={step + 2}", "--config.train.save_every=100000")
    assert f"from step {step:,}" in out


def test_the_second_signal_ends_it_at_once(tmp_path):
    """Two different ones: of two alike, so near to each other, the system may deliver one."""
    args = (TINY, f"--workdir={tmp_path}", "--config.train.sample_every=100000")
    args += ("--config.train.steps=100000", "--config.train.save_every=100000")
    with start(*args) as process:
        next(line for line in process.stdout if line.startswith("step "))
        process.send_signal(signal.SIGINT)
        said = next(line for line in process.stdout if not line.startswith("step "))
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert "once more" in said
    assert process.returncode == 128 + signal.SIGTERM  # it comes long before the save is done


STREAMED = ("--config.data.on_device_gib=0", "--config.data.workers=1")


@pytest.fixture(scope="session")
def by_devices(tmp_path_factory):
    """The same run on one device, on four, and on two processes of two devices each, streamed too.

    The streamed run stops half-way and is resumed.
    """
    folder = tmp_path_factory.mktemp("devices")
    args = (TINY, "--config.train.sample_every=100000")

    def two_processes(name, *more):
        return run_twice(*args, *more, f"--workdir={folder / name}")

    run(*args, f"--workdir={folder / '1'}", JAX_NUM_CPU_DEVICES=1)
    run(*args, f"--workdir={folder / '4'}", JAX_NUM_CPU_DEVICES=4)
    assert "on every device" in two_processes("2x2")
    two_processes("2x2 streamed", *STREAMED, "--config.train.steps=4")
    said = two_processes("2x2 streamed", *STREAMED)
    assert ", streamed" in said and "from step 4" in said
    return folder


@pytest.mark.parametrize("other", ["4", "2x2", "2x2 streamed"])
def test_devices_and_processes_change_nothing_but_rounding(by_devices, other):
    """Eight Adam steps at 2e-3 amplify the rounding of a sum of gradients in another order.

    Adam divides by the gradient's own size: where that is near 0, a rounding error becomes a step
    of a size up to the learning rate, for single weights. So the bulk is held tight, the worst
    loosely.
    """
    one, many = last_state(by_devices / "1"), last_state(by_devices / other)
    assert one.keys() == many.keys()
    difference = np.concatenate([np.ravel(np.abs(one[k] - many[k])) for k in one if "params" in k])
    assert np.median(difference) < 1e-6
    assert difference.max() < 2 * 8 * 2e-3
    losses = [list(logged(by_devices / w).values()) for w in ("1", other)]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_prepare_names_what_cannot_be_used_and_makes_a_set_of_the_rest(tmp_path):
    """A folder with one of every malformed kind and a few good ones: looked at, prepared, read."""
    folder = tmp_path / "mine"
    bad = {re.sub("[/:]", "", f"{name}.png"): x for name, (x, _) in MALFORMED.items()}
    bad = {name: content for name, content in bad.items() if isinstance(content, bytes)}
    good = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), np.uint8)
    for i, image in enumerate(good):
        image_grid.save_png(folder / f"good{i}.png", image)
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.png")
    (folder / "away.png").symlink_to("/etc/passwd")
    (folder / "notes.txt").write_text("no picture")
    config = f"--config={ROOT}/configs/folder.py"
    size = ("--config.data.image_size=16", "--config.data.image_width=24")
    args = (config, f"--config.data.archive={folder}", *size)

    out, err = run("--mode=prepare", *args, "--dry_run", cwd=tmp_path)
    assert err == "" and "5 images" in out and f"{len(bad) + 2} skipped" in out
    assert not (tmp_path / "data").exists()
    with Image.open(tmp_path / "runs" / "folder" / "figures" / "data.png") as picture:
        assert min(picture.size) > 64

    out, err = run("--mode=prepare", *args, cwd=tmp_path)
    assert err == "" and f"{len(bad) + 2} skipped" in out
    said = (tmp_path / "runs" / "folder" / "figures" / "skipped.txt").read_text()
    assert {line.partition(":")[0] for line in said.splitlines()} == {*bad, "pipe.png", "away.png"}
    there = data.open_dataset("tfds", "train", name="images", data_dir=str(tmp_path / "data"))
    assert (there.n, there.shape, there.num_classes) == (5, (16, 24, 3), 0)

    fail = (*args, "--config.data.name=other", "--config.data.on_error=fail")
    _, err = run("--mode=prepare", *fail, cwd=tmp_path, code=3)
    assert err.count("\n") == 1
    assert not (tmp_path / "data" / "other").exists()
    _, err = run("--mode=prepare", *args, cwd=tmp_path, code=3)
    assert err.count("\n") == 1 and "expected no such data set yet" in err


def test_samples_do_not_depend_on_the_batch(trained):
    """Six in batches of four, then three in batches of two: the same first three images.

    Batch shapes change the order of float32 sums, so that a value at .5 may round to its neighbour.
    """
    workdir = trained[0]
    out, _ = run("--mode=sample", f"--workdir={workdir}")
    assert "samples.npz" in out
    folder = workdir / "samples" / "00000008_seed0"
    first = np.load(folder / "samples.npz")["arr_0"]
    how = json.loads((folder / "how.json").read_text())
    assert first.shape == (6, 8, 8, 1) and first.dtype == np.uint8
    assert how["step"] == 8 and how["weights"] == "ema"
    with Image.open(folder / "grid.png") as image:
        assert image.size[0] > 64
    few = ("--config.sample.num=3", "--config.sample.batch_size=2")
    run("--mode=sample", f"--workdir={workdir}", *few, JAX_NUM_CPU_DEVICES=2)
    again = np.load(folder / "samples.npz")["arr_0"].astype(int)
    assert again.shape[0] == 3
    assert np.abs(again - first[:3]).max() <= 1
    run("--mode=sample", f"--workdir={workdir}", *few, "--config.sample.seed=1")
    other = np.load(workdir / "samples" / "00000008_seed1" / "samples.npz")["arr_0"]
    assert np.abs(other.astype(int) - again).mean() > 1


def test_bits_per_dimension_add_up_whatever_the_batches_and_devices(trained):
    """The whole report of 24 images, on four devices and on one, in other batches."""
    workdir = trained[0]
    folder = workdir / "eval" / "00000008"
    every = ("--mode=bpd", f"--workdir={workdir}", "--config.bpd.num=24")
    more = ("--config.bpd.estimate=8", "--config.bpd.steps=(5,)", "--config.bpd.ode=4")
    out, err = run(*every, *more, JAX_NUM_CPU_DEVICES=4)
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
    run(*every, "--config.bpd.batch_size=7", JAX_NUM_CPU_DEVICES=1)
    again = json.loads((folder / "bpd.json").read_text())["bits_per_dim"]
    # Float32 sums in another order, through 20 steps.
    assert next(iter(again.values()))["mean"] == pytest.approx(bits[0]["mean"], rel=1e-5)


def test_a_damaged_image_of_the_test_split_ends_in_one_line(trained, tmp_path):
    """Training does not read it; the bound does, and says which image it was."""
    tiny = ["--config=configs/cifar10.py:tiny", f"--workdir={tmp_path / 'run'}"]
    tiny += [f"--config.data.data_dir={tmp_path}", "--config.train.sample_every=1000"]
    tiny_tfds.write(tmp_path, "cifar10", n=8, damaged=True)
    run(*tiny, "--config.train.steps=2")
    _, err = run(*tiny, "--mode=bpd", code=3)
    assert err.count("\n") == 1 and "test image " in err and "cannot identify" in err


def test_a_training_logs_its_bits_per_dimension(trained):
    bits, errors = (logged(trained[0], f"eval/{name}") for name in ("bpd", "bpd_error"))
    assert list(bits) == [4, 8] and all(errors[step] > 0 for step in bits)


def test_a_second_start_compiles_nothing(tmp_path):
    cache = tmp_path / "cache"
    # A config that no other test has compiled into memory or cache.
    args = (TINY, "--config.train.batch_size=24", "--config.train.num_samples=3")
    entries = []
    for name in ("first", "second"):
        run(*args, f"--workdir={tmp_path / name}", JAX_COMPILATION_CACHE_DIR=cache)
        entries.append({p.name for p in cache.iterdir() if not p.name.endswith("-atime")})
    assert len(entries[0]) > 3
    assert entries[0] == entries[1]


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
    "sampler steps": (["--config.sampler.steps=21"], 2, ["sampler", "21", "20"]),
    "simple and learned": (["--config.variance=learned"], 2, ["loss", "variance", "vlb"]),
    "devices": (["--config.train.batch_size=15"], 2, ["train.batch_size", "15", "12 or 16"]),
    "size": (["--config.data.image_size=9"], 2, ["9x9", "divisible by 2"]),
    "size of the data": (["--config.data.image_size=16"], 3, ["16x16x1", "8x8x1"]),
    "no data_dir": (["--config=configs/cifar10.py:tiny"], 3, ["data_dir"]),
    "no data there": (
        ["--config=configs/cifar10.py:tiny", "--config.data.data_dir=/nowhere"],
        3,
        ["/nowhere"],
    ),
    "config file": (["--config=configs/digit.py"], 2, ["configs/digit.py", "configs/digits.py"]),
    "variant": (["--config=configs/digits.py:tyni"], 2, ["tyni", "tiny"]),
    "flag": (["--wrokdir=x"], 2, ["wrokdir", "--workdir"]),
    "mode": (["--mode=sampel"], 2, ["sampel", "sample"]),
    "no flag": (["train"], 2, ["train", "--mode"]),
    "source to prepare": (
        ["--mode=prepare", "--config.data.source=flder"],
        2,
        ["data.source", "flder", "nearest: folder"],
    ),
    "no archive": (["--mode=prepare", "--config.data.source=zip"], 3, ["data.archive=PATH"]),
    "archive not there": (
        ["--mode=prepare", "--config.data.source=folder", "--config.data.archive=/nowhere"],
        3,
        ["data.archive", "/nowhere"],
    ),
    "on_error": (["--config.data.on_error=ignore"], 2, ["data.on_error", "skip or fail"]),
    "nothing trained": (["--mode=sample"], 4, ["trained"]),
    "work directory is a file": (["--workdir={file}/run"], 4, ["{file}"]),
}


@pytest.fixture(scope="session")
def wrong(tmp_path_factory):
    """Runs all of WRONG, two at a time: (exit code, stderr, what was written) by name."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("")

    def one(item):
        name, (args, _, _) = item
        cwd = folder / name.replace(" ", "_")
        cwd.mkdir()
        args = [a.format(file=folder / "file") for a in args]
        args = [a.replace("=configs", f"={ROOT}/configs") for a in args]
        if not any(a.startswith("--config=") for a in args):
            args.insert(0, f"--config={ROOT}/configs/digits.py:tiny")
        process = start(*args, cwd=cwd, JAX_NUM_CPU_DEVICES=4)
        out, err = process.communicate()
        return name, (process.returncode, err, out, list(cwd.rglob("*")))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(one, WRONG.items())), folder


@pytest.mark.parametrize("name", WRONG)
def test_what_is_typed_wrong_gets_one_line(wrong, name):
    _, code, words = WRONG[name]
    results, folder = wrong
    returncode, err, out, written = results[name]
    assert returncode == code, err + out
    assert err.count("\n") == 1 and err.startswith(f"ddpm: error[{code}]: "), err
    for word in words:
        assert word.format(file=folder / "file") in err, err
    assert written == []


def test_a_work_directory_of_another_config_is_refused(trained):
    workdir = trained[0]
    before = (workdir / "config.json").read_text()
    args = ("--config.optim.lr=0.5", "--config.target=x0", "--config.train.steps=99")
    _, err = run(TINY, f"--workdir={workdir}", *args, code=4)
    assert err.count("\n") == 1
    assert "optim.lr: was 0.002, now 0.5" in err and "target: was eps, now x0" in err
    assert "train.steps" not in err  # may change
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step_and_sampler_lower_for_tpu_and_cuda(dtype):
    """On a machine that has neither; the shapes of the paper's CIFAR-10 experiment."""
    config = config_of("cifar10", "conditional")
    config.model.dtype = dtype
    x = experiment.build(config)
    state = experiment.abstract_state(x)
    images = jax.ShapeDtypeStruct((50_000, 32 * 32 * 3), np.uint8)
    labels = jax.ShapeDtypeStruct((50_000,), np.int32)
    platforms = ["tpu", "cuda"]
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies its counter with floats
        step = jax.export.export(experiment.make_update(config, x), platforms=platforms)
        exported = step(state, images, labels)
    assert exported.platforms == tuple(platforms)
    chain = _sampling.compile_sampler(config, x, 64)
    seed, indices = jax.ShapeDtypeStruct((), np.uint32), jax.ShapeDtypeStruct((64,), np.int32)
    of_class = jax.ShapeDtypeStruct((), np.int32)
    keys, label, carry = jax.eval_shape(chain.start, seed, of_class, indices)
    times = jax.ShapeDtypeStruct((41,), np.int32)
    for program, arguments in [
        (chain.start, (seed, of_class, indices)),
        (chain.advance, (state.params, keys, label, carry, times)),
        (chain.finish, (carry.x,)),
    ]:
        assert jax.export.export(program, platforms=platforms)(*arguments).nr_devices == 4
