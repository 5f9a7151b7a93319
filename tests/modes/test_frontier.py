"""--mode=frontier: the best sampler at each cost; later runs add to earlier ones."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
from scipy import stats

from diffusion.experiment import build
from diffusion.modes import frontier
from diffusion.modes.frontier import FrontierEntry
from diffusion.runtime.config import Run
from tests.runs import run, run_two_processes
from tests.test_configs import config_of


def entry(sampler, steps, evaluations, fd, grid="uniform"):
    """An entry of three seeds, which agree."""
    scores = {"fd": [fd] * 3, "precision": [1.0] * 3, "coverage": [1.0] * 3}
    scores["fd_pixels"] = [1 / fd] * 3
    return FrontierEntry(sampler, grid, steps, evaluations, 0.1, scores)


def real_images(fd, precision=1.0):
    scores = entry("", 1, 1, fd).scores | {"precision": [precision] * 3}
    return FrontierEntry("real images", "test", 9, 0, 0.0, scores)


def test_error_of_a_mean_is_that_of_its_seeds():
    entries = [entry("a", 5, 5, 2.0), entry("b", 5, 5, 10.0)]
    entries[0].scores["fd"] = [1.0, 2.0, 3.0]
    found = frontier.summaries(entries)
    np.testing.assert_allclose(found["fd"].mean, [2, 10])
    np.testing.assert_allclose(found["fd"].error, [1 / np.sqrt(3), 0])
    one = [entry._replace(scores={"fd": [3.0]}) for entry in entries]
    found = frontier.summaries(one)["fd"]
    assert found.error.tolist() == [0, 0] and found.margin == 0


def test_margin_is_the_paired_t_test_s():
    """Of two samplers; what a seed does to both alike is no error of their difference."""
    rng = np.random.default_rng(0)
    roots = 5 + rng.normal(0, 1, 8) + rng.normal(0, 0.1, (2, 8))
    entries = [entry(name, 5, 5, 1.0) for name in "ab"]
    for each, root in zip(entries, roots, strict=True):
        each.scores.clear()
        each.scores["fd"] = list(root**2)
    real = FrontierEntry("real images", "test", 9, 0, 0.0, {"fd": [0.1] * 8})
    interval = stats.ttest_rel(*roots).confidence_interval(0.95)
    margin = frontier.summaries([real, *entries])["fd"].margin
    np.testing.assert_allclose(margin, (interval.high - interval.low) / 2, rtol=1e-9)


def test_margins_hold_as_often_as_they_say():
    """Four samplers that are equal: 95 % of the differences of two of them are within."""
    rng, within = np.random.default_rng(0), []
    for _ in range(500):
        entries = [entry(name, 5, 5, 1.0) for name in "abcd"]
        alike = rng.normal(0, 0.3, 3)
        for each in entries:
            each.scores["fd"] = list((3 + alike + rng.normal(0, 0.1, 3)) ** 2)
        found = frontier.summaries(entries)["fd"]
        within.append(abs(found.cost[0] - found.cost[1]) <= found.margin)
    assert abs(np.mean(within) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 500)


def test_larger_budget_is_named_only_where_it_scores_better():
    entries = [
        entry("slow", 40, 40, 3.0),
        entry("ddim", 10, 10, 5.0),
        entry("heun", 5, 9, 7.0),
        entry("ddim", 20, 20, 6.0),
        entry("unipc", 10, 10, 4.0),
    ]
    lines = frontier.advice(entries)
    assert [line.split("=")[1].split()[0] for line in lines[:-4]] == ["heun", "unipc", "slow"]
    assert "sampler.steps=40" in lines[2] and "from    40" in lines[2]
    assert lines[3].startswith("recommended --config.sampler.name=slow")
    noises = itertools.cycle(itertools.permutations((-1, 0, 1)))
    for each, noise in zip(entries, noises, strict=False):
        each.scores["fd"] = list(np.exp(np.log(each.scores["fd"]) + 2 * np.array(noise)))
    named = [line.split("=")[1].split()[0] for line in frontier.advice(entries)[:-4]]
    assert named == ["heun"]  # deviations by a factor of e make all of them equal


def test_cheapest_of_equals_is_recommended():
    """Pairs of three seeds differ by 10 %, so 6 % are no difference and 150 % are one."""

    def noisy(sampler, evaluations, fd, *noise):
        each = entry(sampler, evaluations, evaluations, fd)
        each.scores["fd"] = [fd * np.exp(z) for z in noise]
        return each

    real = real_images(0.1)
    best, near = noisy("a", 1000, 1.0, -0.1, 0, 0.1), noisy("b", 20, 1.06, 0.1, 0, -0.1)
    far, nearer = noisy("c", 5, 2.5, 0, 0.1, -0.1), noisy("d", 20, 1.05, 0, -0.1, 0.1)
    entries = [real, best, near, far, nearer]
    assert entries[frontier.recommended(entries)] == nearer
    assert [real, best, far][frontier.recommended([real, best, far])] == best
    # Equal in distance, but not in precision: of two judgements one is lost.
    for each, values in ((best, [0.8, 0.81, 0.82]), (nearer, [0.6, 0.62, 0.61])):
        each.scores["precision"] = values
    three = [real, best, nearer]
    assert three[frontier.recommended(three)] == best
    # More than real images have is not better.
    three[0] = real_images(0.1, precision=0.6)
    assert three[frontier.recommended(three)] == nearer
    # Coverage does not see noise, and does not judge.
    best.scores["coverage"], nearer.scores["coverage"] = [0.1] * 3, [0.9] * 3
    three[0] = real_images(0.1)
    assert three[frontier.recommended(three)] == best


def test_panels_rise_in_cost_and_name_the_grid_only_where_there_are_several():
    entries = [
        real_images(0.5),
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


def test_defaults_are_sixteen_samplers_and_few_evaluations():
    """Two CPU cores took two minutes for them on the demo."""
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
    mean = np.mean(both[2]["scores"]["fd_random"])
    np.testing.assert_allclose(float(rows[3]["fd_random"]), mean, 1e-4)
    assert float(rows[3]["fd_random_error"]) > 0
    assert (folder / "frontier.png").stat().st_size > 10_000


def test_sampler_times_hold_for_the_config_s_own_sampler_alone(workdir):
    """They say nothing of the other samplers' steps."""
    times = "--config.sampler.times=(20,10)", "--config.frontier.steps=(5,)"
    _, entries, _ = draw(workdir, "ddim", *times, "--config.frontier.num=6")
    assert {e["sampler"]: e["evaluations"] for e in entries} == {"ddim": 5, "ancestral": 2}
