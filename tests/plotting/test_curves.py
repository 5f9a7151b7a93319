"""Curves, as pictures that are read back."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion.plotting.curves import frontier, loss_curve, quality, read_curve, smooth

ROOT = pathlib.Path(__file__).parent.parent


def log_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_read_curve_sorts_keeps_the_last_and_passes_over_what_is_torn(tmp_path):
    rows = [
        {"step": 4, "time": 0, "loss": 4.0},
        {"step": 2, "loss": 9.0},
        {"step": 3, "fid": 7.0},
        {"step": 2, "loss": 2.0},
        {"step": 6, "loss": "NaN"},
        {"step": 8, "loss": "-Infinity"},
    ]
    path = log_file(tmp_path / "m.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b'[1]\n\xff\n{"loss": 1}\n{"step": 9, "lo')
    steps, values = read_curve(path, "loss")
    np.testing.assert_array_equal(steps, [2, 4, 6, 8])
    np.testing.assert_array_equal(values, [2, 4, np.nan, -np.inf])
    with pytest.raises(ValueError, match=r"m\.jsonl: expected lines with 'los', found fid, loss$"):
        read_curve(path, "los")


def test_smooth_in_closed_form():
    x, y = np.arange(101.0), np.arange(101.0) ** 2
    # The mean of i^2 over i-2..i+2 is i^2 + 2; at the ends the window shrinks to i-1..i+1, to i.
    expected = y + 2
    expected[[1, -2]], expected[[0, -1]] = y[[1, -2]] + 2 / 3, y[[0, -1]]
    # Sums of up to 3e5 in float64: rounding of 1e-10.
    np.testing.assert_allclose(smooth(x, y, width=0.0), expected, atol=1e-9)
    line = smooth(x, 3 * x, width=0.2)  # a window of 10 each side, cut off at the ends
    np.testing.assert_allclose(line[10:-10], 3 * x[10:-10], atol=1e-9)
    assert line[0] == pytest.approx(3 * 5) and line[-1] == pytest.approx(3 * 95)
    y[50] = np.nan
    assert smooth(x, y, width=0.0)[51] == pytest.approx((49**2 + 51**2 + 52**2 + 53**2) / 4)
    assert np.isnan(smooth(x[:1], y[50:51])).all()


def columns_of(path, colour, tolerance=40):
    """Where a colour stands in a picture: (lowest x, highest x, share of pixels)."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    hit = (np.abs(picture - colour) < tolerance).all(-1)
    where = np.flatnonzero(hit.any(0))
    return (where.min(), where.max(), hit.mean()) if where.size else (None, None, 0.0)


INK, RED = (31, 95, 168), (192, 57, 43)


def test_loss_curve_is_drawn_from_the_first_to_the_last_step(tmp_path):
    rows = [{"step": s, "loss": 1 / s} for s in range(1, 1001)]
    loss_curve(log_file(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1200, 675)
    low, high, share = columns_of(tmp_path / "loss.png", INK)
    assert low < 200 and high > 1000 and 0.001 < share < 0.1
    assert columns_of(tmp_path / "loss.png", RED)[2] == 0
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "m.jsonl"]


@pytest.mark.parametrize(
    "losses",
    [[0.3], [0.3, 0.3], [-1.0, 2.0, 0.5], [1e-9, 1e9], [0.0, 1.0], [1.0, "NaN", "Infinity", 2.0]],
)
def test_loss_curve_of_few_odd_or_missing_values(tmp_path, losses):
    rows = [{"step": 200 * i, "loss": x} for i, x in enumerate(losses)]
    loss_curve(log_file(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    assert columns_of(tmp_path / "loss.png", INK)[2] > 0
    low, high, _ = columns_of(tmp_path / "loss.png", RED)
    if "NaN" in losses:
        assert (
            low < 600 and high > 1000
        )  # marks at steps 200 and 400 of 600; the count at the right
    else:
        assert low is None


def test_loss_curve_whose_only_finite_value_is_at_step_0(tmp_path):
    rows = [{"step": s, "loss": "NaN" if s else 1.0} for s in range(0, 1001, 5)]
    loss_curve(log_file(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    assert columns_of(tmp_path / "loss.png", INK)[2] > 0


def test_loss_curve_axes_are_logarithmic_where_it_makes_sense(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    scales, save = [], Figure.savefig

    def watched(figure, *args, **kwargs):
        (axes,) = figure.axes
        assert isinstance(axes, Axes)
        scales.append((axes.get_xscale(), axes.get_yscale()))
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    for steps, losses in [
        ([1, 10, 100], [5.0, 2.0, 1.0]),
        ([0, 10, 1000], [5.0, 2.0, 1.0]),
        ([0, 1, 1000], [4.0, 2.0, -1.0]),
        ([10, 500, 990], [5.0, 2.0, 1.01]),
    ]:
        rows = [{"step": s, "loss": x} for s, x in zip(steps, losses, strict=True)]
        loss_curve(log_file(tmp_path / "m.jsonl", rows), tmp_path / "loss.png")
    assert scales == [("log", "log"), ("log", "log"), ("log", "linear"), ("linear", "linear")]


def test_loss_curve_without_a_finite_value_is_an_error(tmp_path):
    path = log_file(tmp_path / "m.jsonl", [{"step": 1, "loss": "NaN"}])
    with pytest.raises(ValueError, match="expected finite values of 'loss', found nan"):
        loss_curve(path, tmp_path / "loss.png")
    path.write_text("")
    with pytest.raises(ValueError, match="expected lines with 'loss', found no metric"):
        loss_curve(path, tmp_path / "loss.png")
    with pytest.raises(FileNotFoundError):
        loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_import_takes_no_matplotlib():
    code = "import sys; from diffusion import figures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("n", [1, 3])
def test_quality_has_a_panel_for_each_measure(tmp_path, monkeypatch, n):
    from matplotlib.figure import Figure

    save, drawn = Figure.savefig, []

    def watched(figure, *args, **kwargs):
        drawn.extend(
            (axes.get_title(loc="left"), axes.lines[0].get_xydata()) for axes in figure.axes
        )
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    steps = np.arange(0, 1001, 100)
    series = {f"measure {i}": np.linspace(9, i - 1.0, 11) for i in range(n)}
    quality(tmp_path / "q.png", steps, series)
    assert [title for title, _ in drawn] == list(series)
    for (_, points), y in zip(drawn, series.values(), strict=True):
        np.testing.assert_array_equal(points, np.stack([steps, y], 1))
    with Image.open(tmp_path / "q.png") as picture:
        assert picture.size == (max(720, 480 * n), 432)
        page = np.asarray(picture.convert("RGB")).astype(int)
    assert (np.abs(page - (31, 95, 168)) < 40).all(-1).any()
    assert os.listdir(tmp_path) == ["q.png"]


def test_what_nothing_beats_at_its_cost_is_ringed(tmp_path, monkeypatch):
    """Of (10, 5), (20, 4), (20, 6), (40, 4.5): the first two, in evaluations as in seconds."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    curves = {"a": [(10, 0.1, 5.0), (20, 0.2, 4.0)], "b": [(20, 0.2, 6.0), (40, 0.4, 4.5)]}
    frontier(tmp_path / "f.png", "fd", curves)
    for axes, scale in zip(drawn, (1, 0.01), strict=True):
        ringed = axes.lines[-1].get_xydata()
        np.testing.assert_allclose(ringed, [[10 * scale, 5], [20 * scale, 4]])
        assert axes.get_xscale() == axes.get_yscale() == "log"
        np.testing.assert_allclose(axes.lines[0].get_xydata()[:, 1], [5, 4])
