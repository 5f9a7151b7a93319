"""--mode=frontier: what is best at which cost, added to by later runs, in one process or two."""

import csv
import json

import numpy as np
import pytest

from diffusion.modes import frontier
from diffusion.modes.frontier import Entry
from tests.modes.test_train import run, run_twice

TINY = "--config=configs/digits.py:tiny"


def entry(sampler, steps, evaluations, fd, grid="uniform"):
    return Entry(sampler, grid, steps, evaluations, 0.1, {"fd_random": fd, "fd_pixels": 1 / fd})


def test_a_larger_budget_is_named_only_where_it_pays():
    entries = [
        entry("slow", 40, 40, 3.0),
        entry("ddim", 10, 10, 5.0),
        entry("heun", 5, 9, 7.0),
        entry("ddim", 20, 20, 6.0),
        entry("unipc", 10, 10, 4.0),
    ]
    lines = frontier.advice(entries)
    assert [line.split("=")[1].split()[0] for line in lines] == ["heun", "unipc", "slow"]
    assert [line.split()[3] for line in lines] == ["fd_random"] * 3
    assert "sampler.steps=40" in lines[-1] and "from    40" in lines[-1]


def test_curves_rise_in_cost_and_name_the_grid_only_where_there_are_several():
    entries = [entry("ddim", 20, 20, 2.0), entry("ddim", 10, 10, 4.0)]
    score, curves = frontier.curves(entries)
    assert score == "fd_random" and list(curves) == ["ddim"]
    assert [point[0] for point in curves["ddim"]] == [10, 20]
    _, curves = frontier.curves([*entries, entry("ddim", 10, 10, 4.0, "logsnr")])
    assert list(curves) == ["ddim, uniform", "ddim, logsnr"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier") / "run"
    run(TINY, f"--workdir={folder}", "--config.train.eval_every=0")
    return folder


def drawn(workdir, *args, how=run):
    named = "--config.frontier.samplers=('ddim','heun')", "--config.frontier.grids=('uniform',)"
    out = how("--mode=frontier", f"--workdir={workdir}", *named, *args)
    out = out[0] if isinstance(out, tuple) else out
    path = workdir / "frontier" / "00000008"
    return out, json.loads((path / "frontier.json").read_text())["entries"], path


def test_a_later_run_adds_to_an_earlier_one_on_one_process_or_two(workdir):
    """Its own way, ancestral in 20 steps, is always one of them."""
    out, first, path = drawn(workdir, "--config.frontier.steps=(4,)")
    assert "3 ways, 3 of them to do" in out
    ways = [(e["sampler"], e["steps"], e["evaluations"]) for e in first]
    assert ways == [("ddim", 4, 4), ("heun", 4, 7), ("ancestral", 20, 20)]
    assert list(first[0]["scores"]) == ["fd_random", "fd_pixels"]
    out, both, _ = drawn(workdir, "--config.frontier.steps=(4,6)", how=run_twice)
    assert "5 ways, 2 of them to do" in out and both[:3] == first
    assert [e["evaluations"] for e in both[3:]] == [6, 11]
    with open(path / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and float(rows[0]["fd_random"]) > 0
    np.testing.assert_allclose(float(rows[4]["fd_random"]), both[4]["scores"]["fd_random"], 1e-4)
    assert (path / "frontier.png").stat().st_size > 10_000


def test_given_times_are_the_config_s_own_way_alone(workdir):
    """They say nothing of the other ways' steps."""
    times = "--config.sampler.times=(20,10)", "--config.frontier.steps=(5,)"
    _, entries, _ = drawn(workdir, *times, "--config.frontier.num=4")
    assert {e["sampler"]: e["evaluations"] for e in entries}["ddim"] == 5
