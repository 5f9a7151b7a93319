"""workdir.py: one run at a time, of one config and one data set, with space."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from configs import default
from diffusion import data
from diffusion.runtime import workdir
from diffusion.runtime.config import YOUNGER, flatten, unflatten, with_overrides
from diffusion.utils import io
from diffusion.utils.errors import DataError, WorkdirError


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


def test_imported_weights_keep_the_optimiser_that_their_state_is_of(tmp_path):
    """All else of a training that is not known may be given later."""
    config = with_overrides(default.get_config(), {"train.steps": 0})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    workdir.check_owner(tmp_path, with_overrides(config, {"optim.lr": 0.5, "optim.clip": 9.0}))
    for change in ({"optim.name": "muon"}, {"optim.posthoc": (0.05, 0.1)}):
        with pytest.raises(WorkdirError, match=r"another config: optim\.\w+: was .*, now"):
            workdir.check_owner(tmp_path, with_overrides(config, change))


def test_too_little_space_is_an_error_or_a_warning(tmp_path, monkeypatch, capsys):
    state = {"a": jax.ShapeDtypeStruct((250_000,), "float32")}
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(io.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(WorkdirError, match=r"1\.0 MB free, a checkpoint takes"):
        workdir.check_disk_space(tmp_path, state, 3)
    monkeypatch.setattr(io.shutil, "disk_usage", lambda path: usage(10**9, 0, 5 * 10**6))
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
