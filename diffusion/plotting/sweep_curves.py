"""Plots of sweeps: readings over the values of a setting, and how scores agree."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.plotting.curves import (
    BLACK,
    BLUE,
    COLOURS,
    GREY,
    NOTE,
    RED,
    TITLE,
    figure_panels,
    set_scale,
)
from diffusion.utils.io import PathLike

MAX_COLUMNS = 4  # of panels


class SweepPanel(NamedTuple):
    """A reading over the values of a setting.

    lines: {what else was set: [(value, reading, error)]}; the readings of failed trainings are NaN.
    """

    reading: str
    lines: Mapping[str, Sequence[tuple[Any, float, float]]]
    lower: bool  # whether lower is better


def plot_sweep(png_path: PathLike, key: str, panels: Sequence[SweepPanel]) -> None:
    """Plots readings with error bars: over numbers, which may span decades, or over names."""
    values = list(
        dict.fromkeys(p[0] for panel in panels for line in panel.lines.values() for p in line)
    )
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    log = numbers and min(values) > 0 and max(values) >= 10 * min(values)
    rows = -(-len(panels) // MAX_COLUMNS)
    columns = -(-len(panels) // rows)
    size = 4.4 * columns, 4.0 * rows
    with figure_panels(png_path, len(panels), size, rows) as grid:
        for panel, axes in zip(panels, grid, strict=True):
            for i, (label, line) in enumerate(panel.lines.items()):
                x, y, error = zip(*line, strict=True)
                x = x if numbers else [values.index(value) for value in x]
                style = {"color": COLOURS[i % len(COLOURS)], "markersize": 4, "capsize": 2}
                axes.errorbar(x, y, error, fmt="o-" if numbers else "o", label=label, **style)
            if numbers:
                set_scale(axes.xaxis, log=log, ticks=(1, 2, 5))
            else:
                axes.set_xticks(range(len(values)), [str(value) for value in values])
                axes.margins(x=0.2)
            axes.tick_params(labelsize=8)
            axes.set_xlabel(key, color=GREY)
            axes.set_title(panel.reading, loc="left", **TITLE)
            axes.set_title(f"{'lower' if panel.lower else 'higher'} is better", loc="right", **NOTE)
        if any(label for panel in panels for label in panel.lines):
            grid[-1].legend(frameon=False, fontsize=8, labelcolor=BLACK)


class EffectPanel(NamedTuple):
    """What settings change of a reading, {setting: (difference, margin)}.

    lower: whether lower is better.
    """

    reading: str
    effects: Mapping[str, tuple[float, float]]
    lower: bool


def plot_effects(png_path: PathLike, panels: Sequence[EffectPanel]) -> None:
    """Plots differences with their margins, a panel a reading and a row a setting.

    Coloured where they are beyond the margin; an infinite one, of one seed, is not drawn.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in panel.effects))
    rows = -(-len(panels) // MAX_COLUMNS)
    columns = -(-len(panels) // rows)
    size = 2.2 + 3.4 * columns, rows * (1.2 + 0.3 * len(labels))
    with figure_panels(png_path, len(panels), size, rows) as grid:
        for i, (panel, axes) in enumerate(zip(panels, grid, strict=True)):
            for label, (difference, margin) in panel.effects.items():
                better = (difference < 0) == panel.lower
                colour = (BLUE if better else RED) if abs(difference) > margin else GREY
                width = margin if np.isfinite(margin) else 0.0
                style = {"color": colour, "markersize": 4, "capsize": 2}
                axes.errorbar(difference, labels.index(label), xerr=width, fmt="o", **style)
            axes.axvline(0, color=BLACK, linewidth=0.8)
            axes.set_yticks(range(len(labels)), [] if i % columns else labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.locator_params(axis="x", nbins=5)
            axes.tick_params(labelsize=8)
            axes.set_title(panel.reading, loc="left", **TITLE)
            axes.set_title(f"{'lower' if panel.lower else 'higher'} is better", loc="right", **NOTE)


def plot_agreement(
    png_path: PathLike,
    names: Sequence[str],
    settings: int,
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Plots rank correlations [k, k] of scores as coloured cells, with their intervals if any.

    settings: so many were ranked.
    """
    with figure_panels(png_path, 1, (2.6 + 1.1 * len(names), 1.6 + 0.8 * len(names))) as (axes,):
        axes.grid(False)
        axes.imshow(value, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        for i, j in np.ndindex(value.shape):
            if i != j:
                interval = f"\n[{low[i, j]:.2f}, {high[i, j]:.2f}]"
                text = f"{value[i, j]:.2f}" + (interval if np.isfinite(low[i, j]) else "")
                colour = "white" if abs(value[i, j]) > 0.6 else BLACK
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{settings} settings, ranked by each score", loc="left", **TITLE)
        axes.set_title("Spearman's rank correlation; 1: the same order", loc="right", **NOTE)
