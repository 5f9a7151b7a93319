"""--mode=check: it tries what a training needs, and ends as the training would."""

import json

import numpy as np
import pytest

from diffusion import data, experiment
from diffusion.modes import check
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils.errors import ConfigError, DataError, DDPMError, WorkdirError
from tests.runs import TINY, run
from tests.test_configs import config_of


def test_the_check_tries_everything_and_leaves_a_picture(tmp_path):
    workdir = tmp_path / "new"
    out, err = run(TINY, f"--workdir={workdir}", "--mode=check")
    assert err == ""
    words = (
        "1,501 images of 8x8x1",
        "pod        1 process of 4 devices; the gradient's 42.4 kB are added exactly in ",
        "on each device",
        "steps/s",
        "bit for bit",
        "finite",
        "nothing stands",
    )
    for word in words:
        assert word in out, out
    files = [p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_file()]
    assert files == ["figures/check.png"]


def test_a_wrong_sum_over_the_devices_ends_the_check(monkeypatch):
    """Of four devices, 1 + 2 + 3 + 4 = 10; then the last gives 5."""
    exp = experiment.build(config_of("digits", "tiny"))
    assert check.time_all_reduce(exp, 1000) > 0
    monkeypatch.setattr(check, "local_rows", lambda sharding, n: np.array([0, 1, 2, 4]))
    match = r"all-reduce: expected 10 on each of 4 devices, found \[11.0, 11.0\] in process 0; "
    with pytest.raises(DDPMError, match=match):
        check.time_all_reduce(exp, 1000)


@pytest.mark.parametrize(
    "key, error", [("optim.lr", ConfigError), ("JAX", ConfigError), ("data", DataError)]
)
def test_a_process_that_was_given_something_else_ends_the_check(tmp_path, monkeypatch, key, error):
    def gathered(text):
        other = json.loads(text) | {key: "other"}
        return [text, text, json.dumps(other)]

    monkeypatch.setattr(check, "gather_texts", gathered)
    config, digits = config_of("digits", "tiny"), data.open_dataset("digits", "train")
    with pytest.raises(
        error, match=f"{key}: expected .* as in process 0, found other in process 2;"
    ):
        check.check_pod(Run("check", config, tmp_path, None), None, digits, 1)


def test_a_folder_that_cannot_be_written_ends_the_check(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkdirError, match="cannot write there: Not a directory"):
        check.temporary_folder(tmp_path / "file" / "run").__enter__()


def test_other_levels_than_the_config_says_are_named(tmp_path, capsys):
    digits = data.open_dataset("digits", "train")
    for levels, said in ((17, False), (256, True)):
        config = with_overrides(config_of("digits", "tiny"), {"data.levels": levels})
        check.check_data(Run("check", config, tmp_path, None), digits)
        out = capsys.readouterr().out
        assert ("17 levels in 512 images, data.levels is 256; is that intended?" in out) == said


def test_images_of_one_grey_end_the_check(tmp_path):
    black = data.open_dataset("digits", "train")._replace(
        read=lambda i: (np.zeros((len(i), 8, 8, 1), np.uint8), np.zeros(len(i), np.int32))
    )
    with pytest.raises(DataError, match="found the one value 0 in 512 of them"):
        check.check_data(Run("check", config_of("digits", "tiny"), tmp_path, None), black)
