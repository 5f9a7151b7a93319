"""--mode=frontier: the best sampler at each cost; later runs add to earlier ones."""

import csv
import itertools
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


def entry(sampler, steps, evaluations, fd, grid="uniform", precision=1.0, coverage=1.0, noise=0.0):
    """An entry of three seeds, whose distances are off by the noise, relative to them."""
    scores = {"fd": [fd * (1 + noise * z) for z in (-1, 0, 1)]}
    scores |= {"precision": [precision] * 3, "coverage": [coverage] * 3}
    scores |= {"fd_pixels": [1 / fd] * 3}
    return FrontierEntry(sampler, grid, steps, evaluations, 0.1, scores)


def test_errors_are_pooled_over_entries():
    """Of logarithms of distances and of fractions, over three seeds."""
    entries = [entry("a", 5, 5, 2.0), entry("b", 5, 5, 10.0)]
    entries[0].scores["fd"] = [2 * np.exp(z) for z in (-0.1, 0, 0.1)]
    entries[1].scores["fd"] = [10 * np.exp(z) for z in (-0.3, 0, 0.3)]
    entries[0].scores["precision"] = [0.4, 0.5, 0.6]
    found = frontier.summaries(entries)
    np.testing.assert_allclose(found["fd"].mean, [2, 10])
    pooled = np.sqrt((0.1**2 + 0.3**2) / 2 / 3)
    np.testing.assert_allclose(found["fd"].error, [2 * pooled, 10 * pooled])
    np.testing.assert_allclose(found["precision"].error, np.sqrt(0.1**2 / 2 / 3) * np.ones(2))
    one = [entry._replace(scores={"fd": [3.0]}) for entry in entries]
    assert frontier.summaries(one)["fd"].error.tolist() == [0, 0]


def test_error_of_a_difference_is_that_of_pairs():
    """What a seed does to all samplers alike is no error of their differences."""
    entries = [entry(name, 5, 5, 1.0) for name in "abcd"]
    rng = np.random.default_rng(0)
    alike, own = rng.normal(0, 0.5, 40), rng.normal(0, 0.05, (4, 40))
    for each, noise in zip(entries, own, strict=True):
        each.scores["fd"] = list(np.exp(alike + noise))
    real = FrontierEntry("real images", "test", 9, 0, 0.0, {"fd": list(np.exp(alike[::-1]))})
    found = frontier.summaries(
        [real, *(e._replace(scores={"fd": e.scores["fd"]}) for e in entries)]
    )
    np.testing.assert_allclose(found["fd"].paired, 0.05 * np.sqrt(2 / 40), rtol=0.2)
    np.testing.assert_allclose(
        found["fd"].error / found["fd"].mean, alike.std() / np.sqrt(40), rtol=0.1
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
    assert [line.split("=")[1].split()[0] for line in lines[:-3]] == ["heun", "unipc", "slow"]
    assert "sampler.steps=40" in lines[2] and "from    40" in lines[2]
    assert lines[3].startswith("recommended --config.sampler.name=slow")
    noises = itertools.cycle(itertools.permutations((-1, 0, 1)))
    for each, noise in zip(entries, noises, strict=False):
        each.scores["fd"] = list(np.exp(np.log(each.scores["fd"]) + np.array(noise)))
    named = [line.split("=")[1].split()[0] for line in frontier.advice(entries)[:-3]]
    assert named == ["heun"]  # deviations by a factor of e make all of them equal


def test_cheapest_of_equals_is_recommended():
    """Pairs of three seeds differ by 10 %, so 6 % are no difference and 60 % are one."""

    def noisy(sampler, evaluations, fd, *noise):
        each = entry(sampler, evaluations, evaluations, fd)
        each.scores["fd"] = [fd * np.exp(z) for z in noise]
        return each

    real = FrontierEntry("real images", "test", 9, 0, 0.0, entry("", 1, 1, 0.1).scores)
    best, near = noisy("a", 1000, 1.0, -0.1, 0, 0.1), noisy("b", 20, 1.06, 0.1, 0, -0.1)
    far, nearer = noisy("c", 5, 1.6, 0, 0.1, -0.1), noisy("d", 20, 1.05, 0, -0.1, 0.1)
    entries = [real, best, near, far, nearer]
    assert entries[frontier.recommended(entries)] == nearer
    assert entries[frontier.recommended([real, best, far])] == best
    # Equal in distance, but not in precision: of two judgements one is lost.
    for each, values in ((best, [0.8, 0.81, 0.82]), (nearer, [0.6, 0.62, 0.61])):
        each.scores["precision"] = values
    assert entries[frontier.recommended([real, best, nearer])] == best
    best.scores["coverage"], nearer.scores["coverage"] = [0.1] * 3, [0.9] * 3
    assert [real, best, nearer][frontier.recommended([real, best, nearer])] == nearer


def test_panels_rise_in_cost_and_name_the_grid_only_where_there_are_several():
    entries = [
        FrontierEntry("real images", "test", 9, 0, 0.0, entry("", 1, 1, 0.5).scores),
        entry("ddim", 20, 20, 2.0),
        entry("ddim", 10, 10, 4.0),
    ]
    panels = frontier.frontier_panels(entries)
    assert [panel.score for panel in panels] == ["fd", "precision", "coverage", "fd"]
    assert [panel.lower for panel in panels] == [True, False, False, True]
    assert panels[0].lines == {"ddim": [(10, pytest.approx(4), 0), (20, pytest.approx(2), 0)]}
    assert panels[0].floor == (pytest.approx(0.5), 0)
    assert panels[3].cost == "seconds per image" and panels[3].lines["ddim"][0][0] == 0.1
    panels = frontier.frontier_panels([*entries, entry("ddim", 10, 10, 4.0, "logsnr")])
    assert list(panels[0].lines) == ["ddim, uniform", "ddim, logsnr"]


def test_time_that_is_left_is_exact_where_compiling_takes_a_constant():
    """Samplers of 5, 9 and 1,000 evaluations take 3 s each and 0.25 s an evaluation."""
    spent = 3 + 0.25 * 5
    assert frontier.seconds_left(spent, 0.25 * 5, [5], [9, 1000]) == 2 * 3 + 0.25 * 1009
    spent += 3 + 0.25 * 9
    assert frontier.seconds_left(spent, 0.25 * 14, [5, 9], [1000]) == 3 + 0.25 * 1000
    assert frontier.seconds_left(spent, 0.25 * 14, [5, 9], []) == 0


def test_defaults_take_five_minutes_on_the_demo():
    """Two CPU cores evaluate the demo's network for 4,000 images a second or more."""
    config = config_of("digits")
    samplers = frontier.compile_samplers(Run("frontier", config, None, None), build(config))
    evaluations = sum(sampler.evaluations for sampler in samplers.values())
    images = config.frontier.num * len(config.frontier.seeds)
    assert len(samplers) == 16 and evaluations * images <= 800_000


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
    scores = [f"{k}_random" for k in ("fd", "precision", "recall", "density", "coverage")]
    scores.append("fd_pixels")
    assert list(first[0]["scores"]) == scores
    assert all(len(values) == 2 for values in first[0]["scores"].values())
    for name in ("6 real images of test", "recommended --config.sampler.name="):
        assert name in out
    steps = "--config.frontier.steps=(4,6)"
    out, both, _ = draw(workdir, "heun", steps, run=run_two_processes)
    assert "3 samplers, 1 of them to do" in out and both[:2] == first
    assert both[2]["evaluations"] == 11
    with open(folder / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["sampler"] for row in rows] == ["real images", "heun", "ancestral", "heun"]
    mean = np.exp(np.mean(np.log(both[2]["scores"]["fd_random"])))
    np.testing.assert_allclose(float(rows[3]["fd_random"]), mean, 1e-4)
    assert float(rows[3]["fd_random_error"]) > 0
    assert (folder / "frontier.png").stat().st_size > 10_000


def test_sampler_times_hold_for_the_config_s_own_sampler_alone(workdir):
    """They say nothing of the other samplers' steps."""
    times = "--config.sampler.times=(20,10)", "--config.frontier.steps=(5,)"
    _, entries, _ = draw(workdir, "ddim", *times, "--config.frontier.num=6")
    assert {e["sampler"]: e["evaluations"] for e in entries} == {"ddim": 5, "ancestral": 2}
