"""--mode=sweep: its cells are the single runs, whatever stops it and however many share it."""

import json
import re
import shutil

import pytest
from PIL import Image

from diffusion.modes import likelihood, sweep
from diffusion.modes._sweep_cells import Cell, make_cells
from diffusion.modes._sweep_results import by_setting, effects
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils.errors import NonFiniteError
from tests.runs import TINY, assert_same, latest_state, logged, run
from tests.test_configs import config_of

pytestmark = pytest.mark.slow
FEW = ("--config.train.sample_every=0", "--config.train.steps=6", "--config.bpd.quick=4")
GRID = "--config.sweep.grid=process.T=4,6;seed=0"
ARGS = ("--mode=sweep", TINY, GRID, *FEW)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(work directory, stdout) of a sweep of two trainings."""
    workdir = tmp_path_factory.mktemp("sweep") / "whole"
    out, err = run(*ARGS, f"--workdir={workdir}")
    assert err == ""
    return workdir, out


def results(workdir):
    """Returns sweep.json without what a clock says and without the configuration."""
    content = json.loads((workdir / "sweep.json").read_text())
    for cell in content["cells"]:
        assert cell["readings"].pop("seconds")["mean"] > 0
    del content["config"]
    return content


def test_results_are_the_readings_of_the_cells(whole):
    workdir, out = whole
    content = results(workdir)
    assert content["keys"] == ["process.T"] and [c["cell"] for c in content["cells"]] == [
        "process.T=4",
        "process.T=6",
    ]
    for cell in content["cells"]:
        folder = workdir / "cells" / f"{cell['cell']},seed=0"
        bits = json.loads((folder / "eval" / "00000006" / "bpd.json").read_text())["bits_per_dim"]
        scores = json.loads((folder / "eval" / "00000006" / "metrics.json").read_text())["scores"]
        readings = {name: each["each"] for name, each in cell["readings"].items()}
        assert readings["bits/dim"] == [min(x["mean"] for x in bits.values())] and len(bits) == 2
        assert list(scores["ema"]) == ["train"]
        for name, score in scores["ema"]["train"].items():
            assert readings[name] == [score["value"]]
        assert readings["loss"] == [logged(folder)[6]]
        assert readings["training steps"] == [6]
    header, *rows = (workdir / "sweep.csv").read_text().splitlines()
    assert len(rows) == 2 and "bits/dim" in header
    assert "cell       2/2: process.T=6, seed 0, about " in out
    for name in ("process.T.png", "effects.png"):
        with Image.open(workdir / name) as image:
            assert image.width > image.height > 300
    assert (workdir / "sweep.md").read_text().count("process.T=") >= 3


def test_a_cell_is_the_single_run_whoever_trains_it_and_stops_it(whole, tmp_path, monkeypatch):
    """The second one, trained by hand, is taken as it is; part 2 of 2 is stopped while it reads."""
    workdir = shutil.copytree(whole[0], tmp_path / "sweep")
    cell = workdir / "cells" / "process.T=6,seed=0"
    shutil.rmtree(cell)
    (workdir / "sweep.json").unlink()
    run(TINY, *FEW, "--config.process.T=6", "--config.sampler.steps=6", f"--workdir={cell}")
    assert_same(latest_state(cell), latest_state(whole[0] / "cells" / cell.name))
    assert logged(cell) == logged(whole[0] / "cells" / cell.name) and len(logged(cell)) == 3
    args = (*ARGS, f"--workdir={workdir}")

    def stopped(run):
        raise preemption.Stopped("for a test")

    with monkeypatch.context() as patch:
        patch.setattr(likelihood, "run", stopped)
        run(*args, "--config.sweep.part=2/2", code=75)
    out, _ = run(*args, "--config.sweep.part=1/2")
    assert ", 0 to do" in out and "1 of 2 trainings are left to other parts" in out
    assert not (workdir / "sweep.json").exists()
    out, _ = run(*args, "--config.sweep.part=2/2")
    assert ", 1 to do" in out and "nothing to do: trained for 6 steps already" in out
    assert results(workdir) == results(whole[0])
    out, _ = run("--mode=sweep", f"--workdir={workdir}")
    assert ", 0 to do" in out and "compiling" not in out
    assert results(workdir) == results(whole[0])


def test_what_was_read_otherwise_is_read_again(whole):
    config = with_overrides(config_of("digits", "tiny"), {"sweep.grid": "process.T=4,6;seed=0"})
    config = with_overrides(config, {"train.sample_every": 0, "train.steps": 6, "bpd.quick": 4})
    for changes, found in (({}, True), ({"sweep.evaluations": 3}, False), ({"eval.num": 7}, False)):
        other = Run("sweep", with_overrides(config, changes), whole[0], None)
        (cell, *_) = make_cells(other.config)
        assert (sweep.load_readings(other, cell) is not None) == found, changes


def test_equal_flops_are_fewer_steps_of_a_dearer_network(tmp_path, monkeypatch):
    """The config's own 12 steps: of a network with twice its FLOPs a step 6, with 5 times 2."""
    trained, flops = {}, {8: 4.0, 16: 8.0, 32: 20.0}

    def call(self):
        trained[self.config.model.ch] = self.config.train.steps
        raise NonFiniteError("no training in this test")

    monkeypatch.setattr(sweep, "count_flops", lambda config: flops[config.model.ch])
    sweep_run = sweep.Run.call
    monkeypatch.setattr(
        sweep.Run, "call", lambda self: (sweep_run if self.mode == "sweep" else call)(self)
    )
    args = ("--config.sweep.grid=model.ch=8,16,32;seed=0", "--config.sweep.equal=flops")
    out, _ = run("--mode=sweep", TINY, *args, "--config.train.steps=12", f"--workdir={tmp_path}")
    assert trained == {8: 12, 16: 6, 32: 2}
    assert "model.ch=8: 1 of 1 trainings failed: no training in this test" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (("--config.sweep.name=t",), "sweep.name: 't' is not known"),
        (("--config.sweep.grid=process.T=4,0",), "sweep: process.T=0: process.T: expected an int"),
        (("--config.sweep.grid=target=eps,y",), "sweep: target=y: target: 'y' is not known"),
        (("--config.sweep.grid=model.ch_mult=(1,),(1,2,2,2,2)",), "expected a height and width"),
        (("--config.sweep.name=T", "--config.sweep.part=2/1"), "sweep.part: expected I/N"),
        (("--config.sweep.name=T", "--config.sweep.equal=time"), "sweep.equal: expected steps or"),
        (("--config.sweep.name=T", "--config.sweep.seeds=(1,1)"), "sweep.seeds: expected a tuple"),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_anything_is_trained(tmp_path, args, message):
    out, err = run("--mode=sweep", TINY, *args, f"--workdir={tmp_path}", code=2)
    assert message in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir()) and not re.search("Traceback", err)


def test_samplers_of_one_score_share_a_panel():
    """A line each; bits/dim and the loss, which need none, are as they were."""
    read = {"loss": 0.1, "fd_x": 1.0, "fd_x by ddim": 2.0, "precision_x": 0.5}
    cells = [Cell({"process.T": T}, {}, seed) for T in (4, 6) for seed in (0, 1)]
    settings = by_setting(cells, {cell.name: read for cell in cells})
    config = with_overrides(config_of("digits", "tiny"), {"process.T": 6, "sweep.name": "T"})
    found = {p.reading: p for p in sweep.panels(settings, "process.T", config)}
    assert list(found) == ["loss", "fd_x", "precision_x"]
    assert found["loss"].lines == {"": [(4, 0.1, 0.0), (6, 0.1, 0.0)]} and found["loss"].lower
    by = {"at equal evaluations": 1.0, "by ddim": 2.0}
    assert found["fd_x"].lines == {k: [(4, v, 0.0), (6, v, 0.0)] for k, v in by.items()}
    assert list(found["precision_x"].lines) == [""] and not found["precision_x"].lower


def test_effects_of_all_settings_on_a_reading_share_a_panel():
    cells = [Cell({"process.T": T}, {}, seed) for T in (4, 5, 6) for seed in (0, 1)]
    read = {c.name: {"loss": float(c.values["process.T"]), "precision_x": 0.5} for c in cells}
    found = effects(by_setting(cells, read), {"process.T": 6})
    loss, precision = sweep.effect_panels(found)
    assert loss.effects == {"process.T=4": (-2.0, 0.0), "process.T=5": (-1.0, 0.0)} and loss.lower
    assert precision.reading == "precision_x" and not precision.lower
