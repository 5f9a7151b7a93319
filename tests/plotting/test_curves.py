"""diffusion.plotting.curves: the fit in closed form, and the pixels and data of the plots."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting.curves import (
    AveragePanel,
    FrontierPanel,
    plot_averages,
    plot_code_lengths,
    plot_codecs,
    plot_frontier,
    plot_loss,
    plot_quality,
    plot_rate_distortion,
    read_curve,
    smooth,
)
from tests.conftest import ROOT


def write_log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read_curve_sorts_keeps_the_last_value_and_skips_torn_lines(tmp_path):
    rows = [
        {"step": 4, "time": 0, "loss": 4.0},
        {"step": 2, "loss": 9.0},
        {"step": 3, "fid": 7.0},
        {"step": 2, "loss": 2.0},
        {"step": 6, "loss": "NaN"},
        {"step": 8, "loss": "-Infinity"},
    ]
    path = write_log(tmp_path / "m.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b'[1]\n\xff\n{"loss": 1}\n{"step": 9, "lo')
    steps, values = read_curve(path, "loss")
    np.testing.assert_array_equal(steps, [2, 4, 6, 8])
    np.testing.assert_array_equal(values, [2, 4, np.nan, -np.inf])
    with pytest.raises(ValueError, match=r"m\.jsonl: expected lines with 'los', found fid, loss$"):
        read_curve(path, "los")


def test_smooth_reproduces_a_straight_line_also_at_its_ends():
    rng = np.random.default_rng(0)
    for x in (np.arange(101.0), np.sort(rng.uniform(5, 9, 300)), np.log(np.arange(1, 2000))):
        for width in (0.0, 0.04, 0.3):
            np.testing.assert_allclose(smooth(x, 3 - 2 * x, width), 3 - 2 * x, rtol=0, atol=1e-9)
    assert smooth(np.array([7]), np.array([2.5])).tolist() == [2.5]


def test_smooth_of_a_square_in_closed_form():
    x, y = np.arange(101.0), np.arange(101.0) ** 2
    # The mean of i^2 over i-2..i+2 is i^2 + 2; at the ends the window shrinks to i-1..i+1, to i.
    expected = y + 2
    expected[[1, -2]], expected[[0, -1]] = y[[1, -2]] + 2 / 3, y[[0, -1]]
    np.testing.assert_allclose(smooth(x, y, width=0.0), expected, rtol=1e-12, atol=1e-9)


def test_smooth_of_a_falling_curve_does_not_lag():
    """The error of a fitted line is below max|f''| width^2 / 8; a running mean's is 10 times it."""
    x = np.linspace(0, 1, 1001)
    y = np.exp(-5 * x)
    assert np.abs(smooth(x, y, width=0.04) - y).max() < 25 * 0.04**2 / 8
    y[500] = 1e30  # a diverged step stays in its own windows
    far = np.abs(x - 0.5) > 0.05
    assert np.abs(smooth(x, y, width=0.04) - y)[far].max() < 25 * 0.04**2 / 8


def test_smooth_halves_noise():
    """The variance of a mean of n is 1 / n; of a fitted line's end, 4 / n."""
    noise = np.random.default_rng(0).standard_normal(2500)
    error = smooth(np.arange(2500), noise, width=0.04)  # 100 values each
    assert error.std() < 2 / 10 and abs(error[-1]) < 4 * 2 / 10


def find_colour(path, colour, tolerance=40):
    """Returns (lowest x, highest x, share of pixels) of a colour in a picture."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    hit = (np.abs(picture - colour) < tolerance).all(-1)
    where = np.flatnonzero(hit.any(0))
    return (where.min(), where.max(), hit.mean()) if where.size else (None, None, 0.0)


INK, RED = (31, 95, 168), (192, 57, 43)


def test_loss_curve_is_drawn_from_the_first_to_the_last_step(tmp_path):
    rows = [{"step": s, "loss": 1 / s} for s in range(1, 1001)]
    plot_loss(write_log(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1200, 675)
    low, high, share = find_colour(tmp_path / "loss.png", INK)
    assert low < 200 and high > 1000 and 0.001 < share < 0.1
    assert find_colour(tmp_path / "loss.png", RED)[2] == 0
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "m.jsonl"]


@pytest.mark.parametrize(
    "losses",
    [[0.3], [0.3, 0.3], [-1.0, 2.0, 0.5], [1e-9, 1e9], [0.0, 1.0], [1.0, "NaN", "Infinity", 2.0]],
)
def test_loss_curve_of_few_extreme_or_non_finite_values(tmp_path, losses):
    rows = [{"step": 200 * i, "loss": x} for i, x in enumerate(losses)]
    plot_loss(write_log(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    assert find_colour(tmp_path / "loss.png", INK)[2] > 0
    low, high, _ = find_colour(tmp_path / "loss.png", RED)
    if "NaN" in losses:
        assert low < 600 and high > 1000  # the marks at steps 200 and 400 of 600, and the count
    else:
        assert low is None


def test_loss_curve_whose_only_finite_value_is_at_step_0(tmp_path):
    rows = [{"step": s, "loss": "NaN" if s else 1.0} for s in range(0, 1001, 5)]
    plot_loss(write_log(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    assert find_colour(tmp_path / "loss.png", INK)[2] > 0


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every figure that is saved, in order; no file has content."""
    from matplotlib.figure import Figure

    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    return axes


def test_loss_curve_has_logarithmic_axes_for_a_wide_range(tmp_path, drawn):
    for steps, losses in [
        ([1, 10, 100], [5.0, 2.0, 1.0]),
        ([0, 10, 1000], [5.0, 2.0, 1.0]),
        ([0, 1, 1000], [4.0, 2.0, -1.0]),
        ([10, 500, 990], [5.0, 2.0, 1.01]),
    ]:
        rows = [{"step": s, "loss": x} for s, x in zip(steps, losses, strict=True)]
        plot_loss(write_log(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    scales = [(axes.get_xscale(), axes.get_yscale()) for axes in drawn]
    assert scales == [("log", "log"), ("log", "log"), ("log", "linear"), ("linear", "linear")]


@pytest.mark.parametrize(
    "steps, loss",
    [
        (np.arange(1, 1001), lambda s: 1 / s),  # straight on two logarithmic axes
        (np.arange(200, 1001, 5), lambda s: np.exp(-s / 100)),  # on one
        (np.arange(1, 1001), lambda s: 2 - np.log(s) / 7),
        (np.arange(200, 1001, 5), lambda s: 2 - s / 1000),
    ],
)
def test_smoothed_loss_is_the_loss_where_that_is_straight_on_the_axes(tmp_path, drawn, steps, loss):
    """Also at the steep start, where smoothed values of 1 / s lie up to 16 % above it."""
    rows = [{"step": int(s), "loss": loss(s)} for s in steps]
    plot_loss(write_log(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    x, smoothed = drawn[0].lines[1].get_xydata().T
    np.testing.assert_array_equal(x, steps)
    np.testing.assert_allclose(smoothed, loss(steps), rtol=1e-9)


def test_loss_curve_without_a_finite_value_is_an_error(tmp_path):
    path = write_log(tmp_path / "m.jsonl", [{"step": 1, "loss": "NaN"}])
    with pytest.raises(ValueError, match="expected finite values of 'loss', found nan"):
        plot_loss(path, tmp_path / "loss.png")
    path.write_text("")
    with pytest.raises(ValueError, match="expected lines with 'loss', found no metric"):
        plot_loss(path, tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError):
        plot_loss(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_import_takes_no_matplotlib():
    code = (
        "import sys; from diffusion.plotting import animation, curves, image_grid, labelled_grid\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("n", [1, 3])
def test_quality_has_a_panel_for_each_metric(tmp_path, drawn, n):
    steps = np.arange(0, 1001, 100)
    series = {f"metric {i}": np.linspace(9, i - 1.0, 11) for i in range(n)}
    plot_quality(tmp_path / "q.png", steps, series)
    assert [axes.get_title(loc="left") for axes in drawn] == list(series)
    for axes, y in zip(drawn, series.values(), strict=True):
        np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.stack([steps, y], 1))
    assert os.listdir(tmp_path) == ["q.png"]


def test_rate_distortion_counts_reverse_steps(tmp_path, drawn):
    rate, rmse = np.array([3.0, 2.0, 0.5]), np.array([1.0, 4.0, 9.0])  # of x_1, x_2, x_3
    plot_rate_distortion(tmp_path / "r.png", rate, rmse, {"file": [(0.7, 8.0), (2.2, 3.0)]})
    expected = [
        [(1, 9), (2, 4), (3, 1)],
        [(1, 0.5), (2, 2), (3, 3)],
        [(0.5, 9), (2, 4), (3, 1)],
    ]
    np.testing.assert_array_equal([axes.lines[0].get_xydata() for axes in drawn], expected)
    assert [len(axes.lines) for axes in drawn] == [1, 1, 2]
    np.testing.assert_array_equal(drawn[2].lines[1].get_xydata(), [(0.7, 8), (2.2, 3)])
    assert drawn[2].get_legend().get_texts()[0].get_text() == "file"


def test_codecs_have_a_line_each(tmp_path, drawn):
    curves = {"file": [(0.1, 9.0), (1.0, 2.0)], "its bound": [(0.1, 8.0), (1.0, 1.5)]}
    ends = {"file": [(0.0, 70.0), *curves["file"], (3.0, 0.0)], "its bound": curves["its bound"]}
    plot_codecs(tmp_path / "c.png", ends)
    [axes] = drawn
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert [[*point] for point in curves["file"]] == found["file"]
    assert [[*point] for point in curves["its bound"]] == found["its bound"]
    assert [[3.0, 0.0], [3.0, 1.0]] in found.values()  # all of the height


def test_panels_are_drawn_in_ink(tmp_path):
    plot_quality(tmp_path / "q.png", np.arange(3), {"a": np.arange(3.0), "b": np.ones(3)})
    with Image.open(tmp_path / "q.png") as picture:
        assert picture.size == (1200, 540)
    assert find_colour(tmp_path / "q.png", INK)[2] > 0


def test_frontier_rings_the_pareto_front(tmp_path, drawn):
    """Of (10, 5), (20, 4), (20, 6), (40, 4.5): the first two where lower is better."""
    lines = {"a": [(10, 5.0, 0.5), (20, 4.0, 0.1)], "b": [(20, 6.0, 0.1), (40, 4.5, 0.1)]}
    panels = [
        FrontierPanel("fd", "evaluations", lines, (1.5, 0.25), lower=True),
        FrontierPanel("density", "evaluations", lines, None, lower=False),
    ]
    plot_frontier(tmp_path / "f.png", panels)
    fronts = ([[10, 5], [20, 4]], [[10, 5], [20, 6]])
    for axes, front, panel in zip(drawn, fronts, panels, strict=True):
        curves = {tuple(map(tuple, line.get_xydata())) for line in axes.lines}
        assert {tuple(map(tuple, front)), ((10, 5), (20, 4)), ((20, 6), (40, 4.5))} <= curves
        assert axes.get_xscale() == "log"
        assert axes.get_yscale() == ("log" if panel.lower else "linear")
        bars = axes.containers[0].lines[2][0].get_segments()
        np.testing.assert_allclose(bars[0], [[10, 4.5], [10, 5.5]])
    [floor] = [line for line in drawn[0].lines if line.get_linestyle() == ":"]
    assert set(floor.get_ydata()) == {1.5}


def test_averages_are_drawn_over_their_lengths_and_the_best_is_ringed(tmp_path, drawn):
    readings = {"ema:0.1": (3.0, 0.2), "ema": (2.5, 0.1), "ema:0.05": (2.0, 0.25), "raw": (4.0, 0)}
    lengths = {"ema:0.05": 0.05, "ema:0.1": 0.1}
    panels = [AveragePanel(name, name == "fd", readings, lengths) for name in ("fd", "precision")]
    plot_averages(tmp_path / "a.png", panels)
    for axes, best in zip(drawn, ([0.05, 2.0], [0.1, 3.0]), strict=True):
        curves = [line.get_xydata().tolist() for line in axes.lines]
        assert [[0.05, 2.0], [0.1, 3.0]] in curves and [best] in curves
        bars = axes.containers[0].lines[2][0].get_segments()
        np.testing.assert_allclose(bars[0], [[0.05, 1.75], [0.05, 2.25]])
        levels = {line.get_label(): set(line.get_ydata()) for line in axes.lines}
        assert levels["ema"] == {2.5} and levels["raw"] == {4.0}


def test_code_lengths_are_bars_in_order_of_length(tmp_path, drawn):
    plot_code_lengths(tmp_path / "b.png", [("model", 2.0, 0.25)], [("PNG", 3.0, 0), ("x", 1.5, 0)])
    [axes] = drawn
    assert [bar.get_width() for bar in axes.patches] == [1.5, 2.0, 3.0]
    assert [text.get_text().split()[-1] for text in axes.texts] == ["x", "model", "PNG"]
    assert axes.yaxis_inverted()
