"""--mode=frontier: the best sampler at each cost; later runs add to earlier ones."""

import csv
import json
import shutil

import numpy as np
import pytest

from diffusion.experiment import build
from diffusion.modes import frontier
from diffusion.modes.frontier import FrontierEntry
from diffusion.runtime.config import Run
from tests.runs import run, run_two_processes
from tests.test_configs import config_of


def entry(sampler, steps, evaluations, fd, grid="uniform"):
    return FrontierEntry(
        sampler, grid, steps, evaluations, 0.1, {"fd_random": fd, "fd_pixels": 1 / fd}
    )


def test_larger_budget_is_named_only_where_it_scores_better():
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
    score, curves = frontier.frontier_curves(entries)
    assert score == "fd_random" and list(curves) == ["ddim"]
    assert [point[0] for point in curves["ddim"]] == [10, 20]
    _, curves = frontier.frontier_curves([*entries, entry("ddim", 10, 10, 4.0, "logsnr")])
    assert list(curves) == ["ddim, uniform", "ddim, logsnr"]


def test_time_that_is_left_is_exact_where_compiling_takes_a_constant():
    """Samplers of 5, 9 and 1,000 evaluations take 3 s each and 0.25 s an evaluation."""
    spent = 3 + 0.25 * 5
    assert frontier.seconds_left(spent, 0.25 * 5, [5], [9, 1000]) == 2 * 3 + 0.25 * 1009
    spent += 3 + 0.25 * 9
    assert frontier.seconds_left(spent, 0.25 * 14, [5, 9], [1000]) == 3 + 0.25 * 1000
    assert frontier.seconds_left(spent, 0.25 * 14, [5, 9], []) == 0


def test_defaults_take_five_minutes_on_the_demo():
    """Two CPU cores, however busy, evaluate the demo's network for 1,000 images a second."""
    config = config_of("digits")
    samplers = frontier.compile_samplers(Run("frontier", config, None, None), build(config))
    evaluations = sum(sampler.evaluations for sampler in samplers.values())
    assert len(samplers) == 16 and evaluations * config.frontier.num <= 250_000


@pytest.fixture
def workdir(trained, tmp_path):
    """A copy of the trained work directory, to write to."""
    return shutil.copytree(trained[0], tmp_path / "run")


def draw(workdir, sampler, *args, run=run):
    """Returns the console's lines, the entries in frontier.json and their folder."""
    options = f"--config.frontier.samplers=('{sampler}',)", "--config.frontier.grids=('uniform',)"
    out = run("--mode=frontier", f"--workdir={workdir}", *options, *args)
    folder = workdir / "frontier" / "00000008"
    out = out[0] if isinstance(out, tuple) else out
    return out, json.loads((folder / "frontier.json").read_text())["entries"], folder


def test_later_run_adds_to_an_earlier_one_on_one_process_or_two(workdir):
    """The config's own sampler, ancestral in 20 steps, is always one of them."""
    out, first, folder = draw(workdir, "heun", "--config.frontier.steps=(4,)")
    announced = out.index("2 samplers, 2 of them to do")
    assert announced < out.index("27 evaluations per image, about") < out.index("heun, uniform")
    names = [(e["sampler"], e["steps"], e["evaluations"]) for e in first]
    assert names == [("heun", 4, 7), ("ancestral", 20, 20)]
    assert list(first[0]["scores"]) == ["fd_random", "fd_pixels"]
    steps = "--config.frontier.steps=(4,6)"
    out, both, _ = draw(workdir, "heun", steps, run=run_two_processes)
    assert "3 samplers, 1 of them to do" in out and both[:2] == first
    assert both[2]["evaluations"] == 11
    with open(folder / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and float(rows[0]["fd_random"]) > 0
    np.testing.assert_allclose(float(rows[2]["fd_random"]), both[2]["scores"]["fd_random"], 1e-4)
    assert (folder / "frontier.png").stat().st_size > 10_000


def test_sampler_times_hold_for_the_config_s_own_sampler_alone(workdir):
    """They say nothing of the other samplers' steps."""
    times = "--config.sampler.times=(20,10)", "--config.frontier.steps=(5,)"
    _, entries, _ = draw(workdir, "ddim", *times, "--config.frontier.num=4")
    assert {e["sampler"]: e["evaluations"] for e in entries} == {"ddim": 5, "ancestral": 2}
