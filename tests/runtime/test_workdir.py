"""workdir.py: one run at a time, of one config and one data set, with space."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import default
from diffusion import data
from diffusion.runtime import workdir
from diffusion.runtime.config import YOUNGER, flatten, unflatten, with_overrides
from diffusion.utils.errors import DataError, WorkdirError
from tests.conftest import ROOT

HOLD = """
import pathlib, sys
from diffusion.runtime import workdir
from diffusion.utils.errors import WorkdirError
try:
    workdir.acquire_lock(pathlib.Path(sys.argv[1]), beat_s=0.1)
except WorkdirError as error:
    print(error)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(directory):
    command = [sys.executable, "-c", HOLD, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **pipes)


def test_a_work_directory_has_one_trainer_at_a_time(tmp_path):
    """Held; refused; taken over after SIGKILL; left empty at the end."""
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        with holder(tmp_path) as second:
            said, _ = second.communicate()
        assert said.startswith(f"{tmp_path}: is trained in by process {first.pid} on ")
        first.kill()
        first.wait()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid
    with holder(tmp_path) as third:
        assert third.stdout.readline() == "held\n"
        third.communicate("")
    assert (tmp_path / "lock").read_text() == ""


def take(path, **holder):
    """Takes a lock that `holder` was written into; returns "" or who has it."""
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "beat": 3} | holder))
    problem, release = workdir.take_lock(path, 0.01)
    release()
    assert problem or path.read_text() == ""
    return problem


def keep_beating(monkeypatch, path, host):
    """Lets another process write to the lock during each wait."""
    beats = iter(range(10, 20))

    def beat(seconds):
        path.write_text(json.dumps({"host": host, "pid": 7, "run": "a", "beat": next(beats)}))

    monkeypatch.setattr(workdir.time, "sleep", beat)


def test_on_one_machine_the_kernel_tells_that_the_holder_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: pytest.fail("there is no wait"))
    assert take(tmp_path / "lock") == ""


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_without_the_kernel_only_a_growing_count_is_a_sign_of_life(
    tmp_path, monkeypatch, capsys, host
):
    """The holder is on another machine, or the file system has no kernel locks."""

    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    if host == socket.gethostname():
        monkeypatch.setattr(workdir.fcntl, "flock", unsupported)
    path = tmp_path / "lock"
    assert take(path, host=host) == ""
    assert f"waiting    for a sign of life of {host}" in capsys.readouterr().out
    keep_beating(monkeypatch, path, host)
    assert f"is trained in by process 7 on {host}; wait for it" in take(path, host=host)


def test_without_kernel_locks_the_last_of_two_writers_has_it(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", unsupported)
    keep_beating(monkeypatch, tmp_path / "lock", "elsewhere")
    problem, _ = workdir.take_lock(tmp_path / "lock", 0.01)
    assert "is trained in by process 7 on elsewhere" in problem


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match=r"file/run: cannot be written: Not a directory; choose"):
        workdir.open_workdir(tmp_path / "file" / "run", default.get_config())


def test_remembers_its_config_and_refuses_another(tmp_path):
    config = default.get_config()
    assert workdir.load_config(tmp_path) is None
    workdir.open_workdir(tmp_path / "run", config)
    assert workdir.load_config(tmp_path / "run")["seed"] == config.seed
    config.train.steps += 1  # no part of what a training is
    workdir.check_owner(tmp_path / "run", config)
    config.model.ch += 1
    match = rf"run: belongs to another config: model.ch: was \d+, now {config.model.ch}; choose"
    with pytest.raises(WorkdirError, match=match):
        workdir.check_owner(tmp_path / "run", config)
    (tmp_path / "run/config.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"config.json: cannot be read"):
        workdir.load_config(tmp_path / "run")


def test_keys_that_an_old_config_lacks_have_their_defaults(tmp_path):
    flat = flatten(default.get_config())
    old = {key: value for key, value in flat.items() if key not in YOUNGER}
    assert len(old) + len(YOUNGER) == len(flat)
    (tmp_path / "config.json").write_text(json.dumps(unflatten(old)))
    workdir.check_owner(tmp_path, default.get_config())
    other = with_overrides(default.get_config(), {"model.norm_eps": 1e-5, "process.betas": (0.1,)})
    match = r"model.norm_eps: was 1e-06, now 1e-05; process.betas: was \(\), now \(0.1,\)"
    with pytest.raises(WorkdirError, match=match):
        workdir.check_owner(tmp_path, other)


def test_too_little_space_is_an_error_or_a_warning(tmp_path, monkeypatch, capsys):
    state = {"a": jax.ShapeDtypeStruct((250_000,), "float32")}
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(WorkdirError, match=r"1\.0 MB free, a checkpoint takes"):
        workdir.check_disk_space(tmp_path, state, 3)
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage(10**9, 0, 5 * 10**6))
    workdir.check_disk_space(tmp_path, state, 3)  # of four checkpoints of 2.05 MB
    assert "train.keep=3 needs more" in capsys.readouterr().err
    workdir.check_disk_space(tmp_path, state, 1)
    assert capsys.readouterr().err == ""


def test_another_data_set_is_refused(tmp_path, capsys):
    images = data.open_dataset("digits", "train")
    workdir.check_dataset(tmp_path, images)
    workdir.check_dataset(tmp_path, images)
    fewer = images._replace(n=1000)
    with pytest.raises(DataError, match=r"images: was 1501, now 1000; mark: was .*, now"):
        workdir.check_dataset(tmp_path, fewer)

    def altered(i):
        image, label = images.read(i)
        return image + (np.asarray(i) == 700).astype(np.uint8)[:, None, None, None], label

    with pytest.raises(DataError, match=r"other data: mark: was \w+, now \w+; choose"):
        workdir.check_dataset(tmp_path, images._replace(read=altered))
    assert capsys.readouterr().err == ""


def test_an_old_work_directory_without_a_data_set_gets_one_warning(tmp_path, capsys):
    images = data.open_dataset("digits", "train")
    (tmp_path / "checkpoints").mkdir()
    for lines in (1, 0):
        workdir.check_dataset(tmp_path, images)
        err = capsys.readouterr().err
        assert err.count("\n") == lines and ("data.json: missing" in err) == bool(lines)


def test_a_traceback_is_written_where_there_is_a_work_directory(tmp_path):
    try:
        raise RuntimeError("of two\nlines")
    except RuntimeError as error:
        path = workdir.write_traceback(tmp_path, error)
        assert workdir.write_traceback(tmp_path / "missing", error) == ""
    text = (tmp_path / "crash" / os.path.basename(path)).read_text()
    assert text.startswith("Traceback") and text.endswith("RuntimeError: of two\nlines\n")
