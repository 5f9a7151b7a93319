"""--mode=prepare as a user runs it: what it prints, writes and refuses."""

import json
import os
import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffusion import data
from diffusion.modes import prepare
from diffusion.plotting import image_grid
from diffusion.utils.errors import DataError
from tests.conftest import ROOT
from tests.data.prepare.test_image_decoding import MALFORMED
from tests.runs import run, run_process


@pytest.fixture
def folder(tmp_path):
    """A folder with one of every malformed kind and five good images."""
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
    (folder / "notes.txt").write_text("no image")
    return folder, {*bad, "pipe.png", "away.png"}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_prepare_names_what_cannot_be_used_and_makes_a_set_of_the_rest(tmp_path, folder):
    """The folder is surveyed, prepared twice into one work directory, and read."""
    folder, bad = folder
    size = ("--config.data.image_size=16", "--config.data.image_width=24")
    args = (f"--config={ROOT}/configs/folder.py", f"--config.data.archive={folder}", *size)
    args = ("--mode=prepare", *args, "--config.data.workers=1")

    out, err = run(*args, "--dry_run", cwd=tmp_path)
    assert err == "" and "5 images" in out and f"{len(bad)} skipped" in out
    assert not (tmp_path / "data").exists()
    assert "16x24 (height x width), 8 bits, RGB: the largest centred crop" in out
    figures = tmp_path / "runs" / "folder" / "figures"
    with Image.open(figures / "dry_run-images.png") as picture:
        assert min(picture.size) > 64

    out, err = run(*args, cwd=tmp_path)
    assert err == "" and f"{len(bad)} skipped" in out
    lines = (figures / "data-images-skipped.txt").read_text().splitlines()
    assert {line.partition(":")[0] for line in lines} == bad
    there = data.open_dataset("tfds", "train", name="images", data_dir=str(tmp_path / "data"))
    assert (there.n, there.shape, there.num_classes) == (5, (16, 24, 3), 0)

    fail = (*args, "--config.data.name=other", "--config.data.on_error=fail")
    _, err = run(*fail, cwd=tmp_path, code=3)
    assert err.count("\n") == 1
    assert not (tmp_path / "data" / "other").exists()
    _, err = run(*args, cwd=tmp_path, code=3)
    assert err.count("\n") == 1 and "expected no such data set yet" in err

    before = (figures / "data-images.png").read_bytes()
    other = "--config.data.name=other", "--config.data.fit=pad", "--config.data.exclude=[!g]*"
    out, err = run(*args, *other, cwd=tmp_path)  # a second one, of the good images alone
    assert err == "" and "5 images" in out and "0 skipped" in out
    assert sorted(x.name for x in (tmp_path / "data").iterdir()) == ["images", "other"]
    assert sorted(x.name for x in figures.iterdir()) == [
        *("data-images-skipped.txt", "data-images.png", "data-other.png"),
        *("dry_run-images-skipped.txt", "dry_run-images.png"),
    ]
    assert (figures / "data-images.png").read_bytes() == before
    info = json.loads((tmp_path / "data" / "other" / "1.0.0" / "dataset_info.json").read_text())
    for text in (out, info["description"]):
        assert "data.include=('*',), data.exclude=('[!g]*',)" in text
        assert (
            "the whole image, padded to this aspect, on a background of RGB (255, 255, 255)" in text
        )


@pytest.mark.parametrize("dry_run", [(), ("--dry_run",)])
@pytest.mark.parametrize("name", ["my photos", "photos/2024"])
def test_a_name_that_no_set_can_have_is_refused_before_anything_is_read(tmp_path, name, dry_run):
    args = f"--config={ROOT}/configs/folder.py", "--config.data.archive=/nowhere", *dry_run
    _, err = run("--mode=prepare", *args, f"--config.data.name={name}", code=3, cwd=tmp_path)
    assert "data.name: expected a-z, 0-9 and _, a letter first, at most 200" in err
    assert repr(name) in err and not list(tmp_path.iterdir())


def test_prepare_in_processes_of_its_own(tmp_path):
    for i in range(3):
        image_grid.save_png(tmp_path / "mine" / f"{i}.png", np.full((9, 9, 3), i, np.uint8))
    out, err = run_process(
        *("--mode=prepare", f"--config={ROOT}/configs/folder.py", "--config.data.image_size=8"),
        *(f"--config.data.archive={tmp_path}/mine", "--config.data.workers=2"),
        cwd=tmp_path,
    )
    assert err == "" and "3 images: 3 in train; 0 skipped" in out


def test_names_to_hold_out_come_from_a_file(tmp_path):
    config = ConfigDict({"holdout": 0.5, "holdout_names": ""})
    assert prepare._holdout(config) == 0.5
    config.holdout_names = str(tmp_path / "names.txt")
    with pytest.raises(DataError, match=r"data\.holdout_names: .*names\.txt.*: No such file"):
        prepare._holdout(config)
    (tmp_path / "names.txt").write_text("a.png\n\nb.png\n")
    assert prepare._holdout(config) == ["a.png", "b.png"]
