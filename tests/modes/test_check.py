"""--mode=check: it tries what a training needs, and ends as the training would."""

import numpy as np
import pytest

from diffusion import data
from diffusion.modes import check
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils.errors import DataError, WorkdirError
from tests.runs import TINY, run
from tests.test_configs import config_of


def test_the_check_tries_everything_and_leaves_a_picture(tmp_path):
    workdir = tmp_path / "new"
    out, err = run(TINY, f"--workdir={workdir}", "--mode=check")
    assert err == ""
    words = (
        "1,501 images of 8x8x1",
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
