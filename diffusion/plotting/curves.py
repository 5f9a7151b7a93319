"""Line plots as PNG files: losses, rate and distortion, sample quality, quality against cost."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion.utils.io import PathLike, atomic_write, read_bytes

Point = tuple[float, float, float]  # (cost, score, its standard error)

BLUE, RED, BLACK, GREY, GRID = "#1f5fa8", "#c0392b", "#20242b", "#5a6270", "#e3e6ea"
TITLE = {"color": BLACK, "fontsize": 12, "fontweight": "bold"}
NOTE = {"color": GREY, "fontsize": 8}
REVERSE_STEPS = "reverse steps (T - t)"
COLOURS = (BLUE, RED, "#2e8b57", "#b8860b", "#7d3c98", "#17818e", "#8d5524", GREY)


def read_curve(path: PathLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads one metric of a metrics.jsonl as (steps int[n], rising; values float64[n]).

    The last value of a step counts; lines that are not valid (torn by a kill) are skipped; NaN and
    infinities are values. Raises ValueError if no line has the metric.
    """
    values, names = {}, set()
    for line in read_bytes(path).splitlines():
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
    """Returns the local linear regression of y [n] on x [n, rising] at each x, float[n].

    A running mean would be biased at both ends, where its points lie on one side; a fitted line is
    not. A window spans `width` of the range of x, and at least two points on each side (fewer near
    an end).
    """
    x = (x - x[0]) / max(x[-1] - x[0], 1e-9)
    i = np.arange(len(x))
    neighbours = np.minimum(2, np.minimum(i, i[::-1]))
    centre = np.clip(x, width / 2, 1 - width / 2)
    low = np.minimum(np.searchsorted(x, centre - width / 2, "left"), i - neighbours)
    high = np.maximum(np.searchsorted(x, centre + width / 2, "right"), i + neighbours + 1)

    bounds = np.stack([low, high], axis=1).ravel()

    def window_mean(values):
        return np.add.reduceat(np.append(values, 0), bounds)[::2] / (high - low)

    mean_x, mean_y = window_mean(x), window_mean(y)
    variance = window_mean(x * x) - mean_x**2
    covariance = window_mean(x * y) - mean_x * mean_y
    slope = covariance / np.where(variance > 1e-9, variance, np.inf)
    return mean_y + slope * (x - mean_x)


def plot_loss(jsonl_path: PathLike, png_path: PathLike, name: str = "loss") -> None:
    """Plots a metric of a metrics.jsonl against the step: as logged, faint, and smoothed.

    An axis is logarithmic where its values are positive and span a factor of 100 (steps) or 5
    (metric). The curve is smoothed as it is shown, in logarithms on a logarithmic axis, where means
    of the values would lie above a steep curve. Steps whose value is not finite are counted and
    marked in red at the step axis. Raises ValueError if the metric has no finite value.
    """
    steps, values = read_curve(jsonl_path, name)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"{jsonl_path}: expected finite values of {name!r}, found {values[-1]}")
    log_x, log_y = _spans(steps[finite & (steps > 0)], 100), _spans(values[finite], 5)
    if log_x:
        values, finite, steps = values[steps > 0], finite[steps > 0], steps[steps > 0]
    x, y = steps[finite], values[finite]
    curve = smooth(np.log(x) if log_x else x, np.log(y) if log_y else y)
    curve = np.exp(curve) if log_y else curve

    with figure_panels(png_path, 1, (8, 4.5)) as (axes,):
        axes.plot(steps, np.where(finite, values, np.nan), color=BLUE, alpha=0.3, linewidth=0.8)
        axes.plot(x, curve, "o-", color=BLUE, linewidth=2.2, markersize=5, markevery=[-1])
        _label_end(axes, x[-1], curve[-1])
        bad = steps[~finite]
        at_the_axis = axes.get_xaxis_transform()
        axes.plot(bad, np.zeros(len(bad)), "|", color=RED, markersize=12, transform=at_the_axis)
        set_scale(axes.xaxis, log_x, ticks=(1,), integer=True)
        set_scale(axes.yaxis, log_y, ticks=(1,) if _spans(y, 1000) else (1, 2, 5))
        axes.set_title(name, loc="left", **TITLE)
        note = f"{len(bad):,} not finite" if len(bad) else "as logged, and smoothed"
        axes.set_title(note, loc="right", color=RED if len(bad) else GREY, fontsize=9)
        axes.set_xlabel("step", color=GREY)


def plot_readings(png_path: PathLike, name: str, lines: Mapping[str, Sequence[Point]]) -> None:
    """Plots a score against the training step, a line a series, with error bars.

    lines: {series: (step, score, its standard error)}, by step; what is not finite is left out. An
    axis is logarithmic where its values are positive and span a factor of 100 (steps) or 5 (score).
    """
    with figure_panels(png_path, 1, (6, 3.6)) as (axes,):
        drawn = []
        for (label, points), colour in zip(lines.items(), COLOURS, strict=False):
            finite = [point for point in points if np.isfinite(point).all()]
            x, y, error = np.reshape(finite, (-1, 3)).T
            style = {"color": colour, "markersize": 4, "linewidth": 1.8, "capsize": 2}
            axes.errorbar(x, y, error, fmt="o-", label=label, elinewidth=1, **style)
            drawn += finite
        steps, scores, _ = np.reshape(drawn, (-1, 3)).T
        set_scale(axes.xaxis, _spans(steps, 100), ticks=(1,), integer=True)
        set_scale(axes.yaxis, _spans(scores, 5), ticks=(1, 2, 5))
        axes.set_title(name, loc="left", **TITLE)
        axes.set_xlabel("step", color=GREY)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=BLACK)


def plot_rate_distortion(
    png_path: PathLike,
    rate: np.ndarray,
    rmse: np.ndarray,
    codecs: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Plots the three panels of the paper's Figure 5.

    rate: float[T], bits/dim to transmit x_t; rmse: float[T], distortion of the x_0 that is
    predicted from x_t, on 0..255; both at index t - 1. codecs: of plot_codecs, for the third panel.
    """
    rate, rmse = rate[::-1], rmse[::-1]
    steps = np.arange(1, len(rate) + 1)
    rmse_over_steps = (REVERSE_STEPS, steps, "distortion (RMSE)", rmse)
    rate_over_steps = (REVERSE_STEPS, steps, "rate (bits/dim)", rate)
    rmse_over_rate = ("rate (bits/dim)", rate, "distortion (RMSE)", rmse)
    with figure_panels(png_path, 3, (12, 3.6)) as grid:
        for axes, panel in zip(
            grid, (rmse_over_steps, rate_over_steps, rmse_over_rate), strict=True
        ):
            _plot_panel(axes, *panel)
        limits = axes.get_xlim(), axes.get_ylim()
        for (name, points), colour in zip(codecs.items(), COLOURS[1:], strict=False):
            axes.plot(*zip(*points, strict=True), "o:", color=colour, label=name, markersize=3)
        axes.set(xlim=limits[0], ylim=limits[1])
        if codecs:
            axes.legend(frameon=False, fontsize=8, labelcolor=BLACK)


def plot_codecs(png_path: PathLike, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Plots the distortion of codecs against their rate, a line each (Figure 5 with real bits).

    curves: name -> (bits/dim, root mean squared error on 0..255) of its files, by rate. A file
    without errors is a vertical line.
    """
    with figure_panels(png_path, 1, (7, 4.6)) as (axes,):
        for i, (name, points) in enumerate(curves.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 2 if i < 2 else 1.2}
            lossy = [point for point in points if min(point) > 0]
            shape = "o-" if i < 2 else "o--"
            axes.plot(*zip(*lossy, strict=True), shape, label=name, markersize=3, **style)
            for rate in (rate for rate, error in points if error == 0):
                axes.axvline(rate, linestyle=":", **style)
        for axis in (axes.xaxis, axes.yaxis):
            set_scale(axis, log=True, ticks=(1, 2, 5))
        axes.set_title("distortion (RMSE)", loc="left", **TITLE)
        axes.set_title("dotted: lossless", loc="right", **NOTE)
        axes.set_xlabel("rate (bits/dim)", color=GREY)
        axes.legend(frameon=False, fontsize=8, labelcolor=BLACK)


def plot_quality(png_path: PathLike, steps: np.ndarray, series: Mapping[str, np.ndarray]) -> None:
    """Plots metrics of the predicted x_0 over the reverse process, a panel each (Figure 10).

    steps: int[n], reverse steps done; series: name of a metric -> float[n].
    """
    _plot_panels(png_path, [(REVERSE_STEPS, steps, name, y) for name, y in series.items()])


def plot_distances(png_path: PathLike, panels: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Plots cumulative distributions of distances, a panel a space, a line a set.

    panels: name of the space -> name of the set -> float[n] >= 0.
    """
    with figure_panels(png_path, len(panels), (max(6, 4 * len(panels)), 3.6)) as grid:
        for axes, (space, sets) in zip(grid, panels.items(), strict=True):
            for colour, (name, away) in zip(COLOURS, sets.items(), strict=False):
                axes.ecdf(away, label=f"{name} ({len(away):,})", color=colour, linewidth=2)
            axes.set_xlim(0, None)
            axes.set_title(f"by {space}", loc="left", **TITLE)
            axes.set_xlabel("distance to the nearest training image", color=GREY)
        grid[0].set_ylabel("share of the images", color=GREY)
        grid[0].legend(frameon=False, fontsize=8, labelcolor=BLACK)


def plot_code_lengths(
    png_path: PathLike,
    models: Sequence[tuple[str, float, float]],
    others: Sequence[tuple[str, float, float]],
) -> None:
    """Plots (name, bits/dim, error) of models and of what they are compared with as bars."""
    rows = [*((BLUE, *row) for row in models), *((GREY, *row) for row in others)]
    rows = sorted((row for row in rows if np.isfinite(row[2])), key=lambda row: row[2])
    with figure_panels(png_path, 1, (8, 0.6 + 0.4 * len(rows))) as (axes,):
        for i, (colour, name, bits, error) in enumerate(rows):
            axes.barh(i, bits, xerr=error or None, color=colour, height=0.7, alpha=0.85)
            style = {"color": colour, "verticalalignment": "center", "fontsize": 9}
            axes.text(bits + error, i, f"  {bits:.3f}  {name}", **style)
        axes.set_xlim(0, 1.8 * max(bits for _, _, bits, _ in rows))  # room for the names
        axes.set_yticks([])
        axes.invert_yaxis()
        axes.set_title("bits/dim, lower is better", loc="left", **TITLE)


class FrontierPanel(NamedTuple):
    """A score against a cost.

    lines: name of a sampler -> its points, by cost. floor: (score, error) of real images.
    """

    score: str
    cost: str
    lines: Mapping[str, Sequence[Point]]
    floor: tuple[float, float] | None
    lower: bool  # whether lower is better


def plot_frontier(png_path: PathLike, panels: Sequence[FrontierPanel]) -> None:
    """Plots scores against costs, with error bars; the points of each Pareto front are ringed."""
    with figure_panels(png_path, len(panels), (4.6 * len(panels), 4.6)) as grid:
        for panel, axes in zip(panels, grid, strict=True):
            _plot_frontier_panel(axes, panel)
        rings = "ringed: no better score at its cost; dotted: real images"
        grid[-1].set_title(rings, loc="right", color=GREY, fontsize=8)
        grid[-1].legend(frameon=False, fontsize=8, labelcolor=BLACK)


def _plot_frontier_panel(axes, panel: FrontierPanel) -> None:
    for i, (label, points) in enumerate(panel.lines.items()):
        x, y, error = zip(*points, strict=True)
        style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.8, "markersize": 4}
        shape = "o-" if i < len(COLOURS) else "o--"
        axes.errorbar(x, y, error, fmt=shape, label=label, elinewidth=1, capsize=2, **style)
    sign = 1 if panel.lower else -1
    points = sorted((x, sign * y) for line in panel.lines.values() for x, y, _ in line)
    front = [p for i, p in enumerate(points) if all(p[1] < q[1] for q in points[:i])]
    x, y = zip(*front, strict=True)
    axes.plot(x, [sign * value for value in y], "o", markersize=9, fillstyle="none", color=BLACK)
    if panel.floor:
        mean, error = panel.floor
        axes.axhline(mean, color=BLACK, linewidth=1.2, linestyle=":")
        axes.axhspan(mean - error, mean + error, color=BLACK, alpha=0.08, linewidth=0)
    set_scale(axes.xaxis, log=True, ticks=(1, 2, 5))
    set_scale(axes.yaxis, log=panel.lower, ticks=(1, 2, 5))
    axes.tick_params(labelsize=8)
    axes.set_xlabel(panel.cost, color=GREY)
    axes.set_title(panel.score, loc="left", **TITLE)


class AveragePanel(NamedTuple):
    """A score of averaged weights.

    readings: {weights: (value, error)}; lengths: {weights: relative length} of some of them, the
    shortest first; the others are drawn as lines.
    """

    score: str
    lower: bool  # whether lower is better
    readings: Mapping[str, tuple[float, float]]
    lengths: Mapping[str, float]


def plot_averages(png_path: PathLike, panels: Sequence[AveragePanel]) -> None:
    """Plots scores against the relative length of an average, with error bars; the best ringed."""
    with figure_panels(png_path, len(panels), (4.6 * len(panels), 4.2)) as grid:
        for panel, axes in zip(panels, grid, strict=True):
            x = list(panel.lengths.values())
            y, error = np.transpose([panel.readings[name] for name in panel.lengths])
            axes.errorbar(x, y, error, fmt="o-", color=BLUE, markersize=4, elinewidth=1, capsize=2)
            best = np.argmin(y if panel.lower else -y)
            axes.plot(x[best], y[best], "o", markersize=10, fillstyle="none", color=BLACK)
            others = [name for name in panel.readings if name not in panel.lengths]
            for name, colour in zip(others, (RED, GREY), strict=False):
                mean, width = panel.readings[name]
                axes.axhline(mean, color=colour, linewidth=1.2, linestyle="--", label=name)
                axes.axhspan(mean - width, mean + width, color=colour, alpha=0.1, linewidth=0)
            set_scale(axes.xaxis, log=True, ticks=(1, 2, 5))
            axes.tick_params(labelsize=8)
            axes.set_xlabel("relative length of the average", color=GREY)
            axes.set_title(panel.score, loc="left", **TITLE)
            axes.set_title(f"{'lower' if panel.lower else 'higher'} is better", loc="right", **NOTE)
            if others:
                axes.legend(frameon=False, fontsize=8, labelcolor=BLACK)


@contextlib.contextmanager
def figure_panels(png_path: PathLike, n: int, size: tuple, rows: int = 1) -> Iterator[list]:
    """Yields n axes, in rows, in the common style; writes the figure, of size inches, after."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(rows, -(-n // rows), squeeze=False).ravel()
    for axes in grid[n:]:
        axes.remove()
    grid = grid[:n]
    for axes in grid:
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=GREY)
    yield grid
    with atomic_write(png_path) as file:
        figure.savefig(file, format="png")


def _plot_panels(png_path: PathLike, panels: Sequence[tuple]) -> None:
    """Plots (name of x, x, name of y, y) of each panel."""
    with figure_panels(png_path, len(panels), (max(6, 4 * len(panels)), 3.6)) as grid:
        for axes, panel in zip(grid, panels, strict=True):
            _plot_panel(axes, *panel)


def _plot_panel(axes, x_name: str, x: np.ndarray, y_name: str, y: np.ndarray) -> None:
    marker = "o" if len(x) < 50 else None
    axes.plot(x, y, color=BLUE, linewidth=2, marker=marker, markersize=3, clip_on=False)
    _label_end(axes, x[-1], y[-1])
    axes.set_ylim(min(0, np.min(y)), None)
    axes.set_title(y_name, loc="left", **TITLE)
    axes.set_xlabel(x_name, color=GREY)


def _label_end(axes, x: float, y: float) -> None:
    style = {"verticalalignment": "center", "color": BLUE, "fontweight": "bold"}
    axes.annotate(f"{y:.4g}", (x, y), (8, 0), textcoords="offset points", **style)


def set_scale(axis, log: bool, ticks: tuple[int, ...], integer: bool = False) -> None:
    """Sets a linear axis, or a logarithmic one with `ticks` in every decade, without 10^n."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=ticks))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator("auto", integer=integer, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def _spans(values: np.ndarray, factor: float) -> bool:
    return values.size > 1 and values.min() > 0 and values.max() >= factor * values.min()
