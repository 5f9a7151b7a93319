"""A plot of the error rates of a forced-choice study and of their intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion.plotting.curves import BLACK, BLUE, COLOURS, GREY, GRID, NOTE, RED, TITLE
from diffusion.utils.io import PathLike, atomic_write

INTERVAL_COLOURS = (GREY, BLUE, COLOURS[2], BLACK)


class ErrorRateRow(NamedTuple):
    """One condition of a study; rates are fractions.

    intervals: {name: (low, high), or None for none}, of the same names in every row.
    people: the rate of each person.
    """

    name: str
    rate: float
    intervals: Mapping[str, tuple[float, float] | None]
    people: Sequence[float]


def plot_error_rates(png_path: PathLike, rows: Sequence[ErrorRateRow]) -> None:
    """Plots each condition's rate, its intervals below one another and the people as dots."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(8, 1.6 + 1.1 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=GREY)
    axes.axvline(50, color=RED, linestyle="--", linewidth=1.2)
    for y, row in enumerate(rows):
        jitter = np.linspace(-0.05, 0.05, len(row.people))  # people of one rate stay visible
        dots = {"color": GREY, "alpha": 0.5, "markersize": 4}
        axes.plot(100 * np.asarray(row.people), y - 0.25 + jitter, "o", **dots)
        for i, (name, interval) in enumerate(row.intervals.items()):
            at, colour = y - 0.05 + 0.12 * i, INTERVAL_COLOURS[i]
            label = name if y == 0 else None
            ends = 100 * np.asarray(interval or (np.nan, np.nan))
            axes.plot(ends, [at, at], color=colour, linewidth=2.5, label=label)
            axes.plot(100 * row.rate, at, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), [row.name.replace("$", r"\$") for row in rows])
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(rows) - 0.4, -0.5)
    axes.set_xlabel("pairs in which the generated picture was called real, %", color=GREY)
    axes.set_title("error rate", loc="left", **TITLE)
    axes.set_title("dashed: chance; small dots: people", loc="right", **NOTE)
    style = {"frameon": False, "fontsize": 8, "labelcolor": BLACK, "ncols": 4}
    figure.legend(loc="outside lower center", **style)
    with atomic_write(png_path) as file:
        figure.savefig(file, format="png")
