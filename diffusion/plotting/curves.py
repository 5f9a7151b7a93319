"""Curves of numbers, as pictures: losses, rate and distortion, quality against time and cost."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from diffusion.utils.io import atomic_write

INK = ("#1f5fa8", "#c0392b", "#2e8b57", "#b8860b", "#7d3c98", "#17818e", "#8d5524", "#5a6270")


def read_curve(path: str | os.PathLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps int[n], values float64[n]) of one metric in a metrics.jsonl, by rising step.

    The last value of a step counts; a line that cannot be read (torn by a kill) is passed over; NaN
    and infinities are kept. Raises ValueError if no line has the metric, naming those that are.
    """
    values, names = {}, set()
    for line in pathlib.Path(path).read_bytes().splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue
        names |= record.keys() - {"step", "time"}
        if name in record:
            values[step] = float(record[name])
    if not values:
        known = ", ".join(sorted(names)) or "no metric"
        raise ValueError(f"{path}: expected lines with {name!r}, found {known}")
    steps = np.array(sorted(values))
    return steps, np.array([values[step] for step in steps])


def smooth(x: np.ndarray, y: np.ndarray, width: float = 0.04) -> np.ndarray:
    """The mean of the finite y [n] whose x [n, rising] is within `width` / 2 of the range of x.

    At least two neighbours on each side count, at the ends as many as both sides have; NaN where
    none is finite. In the coordinates of its axis, a curve is so smoothed alike everywhere.
    """
    half = width / 2 * (x[-1] - x[0])
    i = np.arange(len(x))
    near = np.minimum(2, np.minimum(i, i[::-1]))
    low = np.minimum(np.searchsorted(x, x - half, "left"), i - near)
    high = np.maximum(np.searchsorted(x, x + half, "right"), i + near + 1)
    finite = np.isfinite(y)
    total = np.append(0, np.cumsum(np.where(finite, y, 0)))
    count = np.append(0, np.cumsum(finite))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def loss_curve(
    jsonl_path: str | os.PathLike, png_path: str | os.PathLike, name: str = "loss"
) -> None:
    """Draws a metric of metrics.jsonl against the step: as logged, faint, and smoothed.

    An axis is logarithmic where its numbers are positive and span a factor of 100 (steps) or 5
    (values). Values that are not finite are counted, and marked in red at the step axis. Raises
    ValueError if there is no finite value of that name, OSError if the file cannot be read.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    steps, values = read_curve(jsonl_path, name)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"{jsonl_path}: expected finite values of {name!r}, found {values[-1]}")
    log_x, log_y = _spans(steps[finite & (steps > 0)], 100), _spans(values[finite], 5)
    if log_x:
        values, finite, steps = values[steps > 0], finite[steps > 0], steps[steps > 0]
    curve = smooth(np.log(steps) if log_x else steps, values)

    ink, grey, red = "#1f5fa8", "#5a6270", "#c0392b"
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, np.where(finite, values, np.nan), color=ink, alpha=0.3, linewidth=0.8)
    axes.plot(steps, curve, color=ink, linewidth=2.2, solid_capstyle="round")
    end = np.flatnonzero(np.isfinite(curve))[-1]
    axes.plot(steps[end], curve[end], "o", color=ink, markersize=5)
    axes.annotate(
        f"{curve[end]:.4g}",
        (steps[end], curve[end]),
        (8, 0),
        textcoords="offset points",
        verticalalignment="center",
        color=ink,
        fontweight="bold",
    )
    lost = steps[~finite]
    at_the_axis = axes.get_xaxis_transform()
    axes.plot(lost, np.zeros(len(lost)), "|", color=red, markersize=12, transform=at_the_axis)

    for axis, log in [(axes.xaxis, log_x), (axes.yaxis, log_y)]:
        if log:
            axis.axes.set(**{f"{axis.axis_name}scale": "log"})
            wide = axis is axes.xaxis or _spans(values[finite], 1000)
            axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        else:
            axis.set_major_locator(MaxNLocator("auto", integer=axis is axes.xaxis, min_n_ticks=1))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    axes.set_title(name, loc="left", color="#20242b", fontsize=13, fontweight="bold")
    note = f"{len(lost):,} not finite" if len(lost) else "as logged, and smoothed"
    axes.set_title(note, loc="right", color=red if len(lost) else grey, fontsize=9)
    axes.set_xlabel("step", color=grey)
    axes.grid(True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=grey)
    with atomic_write(png_path) as file:
        figure.savefig(file, format="png")


def _spans(values: np.ndarray, factor: float) -> bool:
    return values.size > 1 and values.min() > 0 and values.max() >= factor * values.min()


def rate_distortion(png_path: str | os.PathLike, rate: np.ndarray, rmse: np.ndarray) -> None:
    """Draws the three panels of the paper's Figure 5.

    rate: float[T], bits/dim sent until x_k is known, at k - 1; rmse: float[T], distortion there, on
    0-255. Steps are counted as there, from x_T on. Raises OSError.
    """
    from matplotlib.figure import Figure

    rate, rmse = rate[::-1], rmse[::-1]
    steps = np.arange(1, len(rate) + 1)
    panels = [
        ("reverse steps (T - t)", steps, "distortion (RMSE)", rmse),
        ("reverse steps (T - t)", steps, "rate (bits/dim)", rate),
        ("rate (bits/dim)", rate, "distortion (RMSE)", rmse),
    ]
    figure = Figure(figsize=(12, 3.6), dpi=120, layout="constrained")
    for axes, (x_name, x, y_name, y) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y, color="#1f5fa8", linewidth=2)
        axes.set(xlabel=x_name, ylabel=y_name, ylim=(0, None))
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors="#5a6270")
    with atomic_write(png_path) as file:
        figure.savefig(file, format="png")


def quality(
    png_path: str | os.PathLike, steps: np.ndarray, series: Mapping[str, np.ndarray]
) -> None:
    """Draws a panel for each measure of the predicted images over the reverse process (Fig. 10).

    steps: int[n], reverse steps done; series: {name: float[n]}. Raises OSError.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    n = len(series)
    figure = Figure(figsize=(max(6, 4 * n), 3.6), dpi=120, layout="constrained")
    for axes, (name, y) in zip(np.atleast_1d(figure.subplots(1, n)), series.items(), strict=True):
        axes.plot(steps, y, clip_on=False, color="#1f5fa8", linewidth=2, marker="o", markersize=3)
        axes.annotate(
            f"{y[-1]:.4g}",
            (steps[-1], y[-1]),
            (8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color="#1f5fa8",
            fontweight="bold",
        )
        axes.set(xlabel="reverse steps (T - t)", ylim=(min(0, np.min(y)), None))
        axes.set_title(name, loc="left", color="#20242b", fontsize=11, fontweight="bold")
        axes.xaxis.label.set_color("#5a6270")
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors="#5a6270")
    with atomic_write(png_path) as file:
        figure.savefig(file, format="png")


def frontier(
    png_path: str | os.PathLike,
    score: str,
    curves: Mapping[str, Sequence[tuple[int, float, float]]],
) -> None:
    """Draws a score (less is better) against network evaluations, and against seconds an image.

    curves: {way of drawing: (evaluations, seconds, score) of each, by rising evaluations}. What
    nothing beats at its cost is ringed. All axes are logarithmic. Raises OSError.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = ("evaluations of the network for an image", "seconds for an image")
    for axes, place, name in ((left, 0, names[0]), (right, 1, names[1])):
        for i, (label, points) in enumerate(curves.items()):
            x, y = [p[place] for p in points], [p[2] for p in points]
            style = "-" if i < len(INK) else "--"
            ink = INK[i % len(INK)]
            axes.plot(x, y, style, color=ink, marker="o", markersize=4, linewidth=1.8, label=label)
        points = sorted((p[place], p[2]) for line in curves.values() for p in line)
        best = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
        axes.plot(*zip(*best, strict=True), "o", markersize=9, fillstyle="none", color="#20242b")
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel(name, color="#5a6270")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        axes.grid(True, color="#e3e6ea", linewidth=0.8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors="#5a6270", labelsize=8)
    left.set_title(score, loc="left", color="#20242b", fontsize=12, fontweight="bold")
    right.set_title("ringed: nothing is better at its cost", loc="right", color="#5a6270", size=9)
    right.legend(frameon=False, fontsize=8, labelcolor="#20242b")
    with atomic_write(png_path) as file:
        figure.savefig(file, format="png")
