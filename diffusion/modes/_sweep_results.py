"""What comes out of a sweep: readings over seeds, and differences beyond their noise, in words."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from diffusion.metrics.agreement import MIN_CELLS, Agreement, rank_agreement
from diffusion.modes._sweep_cells import Cell
from diffusion.plotting.report_page import number_text

MARGIN_LEVEL = 0.95  # of a difference that counts
PEOPLE = "people's errors"  # of a study of a cell's samples
HIGHER = ("precision", "recall", PEOPLE)  # is better
BY = " by "  # between a score and the sampler of its samples, if it is not the previews'
MAX_WIDTH = 110  # of a table


def base_reading(name: str) -> str:
    """Returns the name of a reading without the sampler, "fd_pixels" of "fd_pixels by ddim"."""
    return name.partition(BY)[0]


def main_readings(names: Sequence[str]) -> list[str]:
    """Returns the readings that tables and pictures show: bits/dim, loss, distances, fidelity.

    Of precision, recall and the share that a classifier is unsure of those by the features of the
    first distance; all others are in sweep.json and sweep.csv.
    """
    distances = [n for n in names if n.startswith(("fd_", "fid")) and "infinity" not in n]
    kind = base_reading(distances[0]).partition("_")[2] if distances else ""
    beside = [n for n in names if n.startswith(("precision", "recall")) and kind in n]
    beside += [n for n in names if n.startswith("unsure")]
    return [*(n for n in ("bits/dim", "loss") if n in names), *distances, *beside]


class CellReadings(NamedTuple):
    """A setting with the readings of its seeds, {name: values, NaN where a training failed}."""

    label: str
    values: dict[str, Any]
    seeds: list[int]
    readings: dict[str, np.ndarray]
    failures: list[str]

    def by_seed(self, name: str) -> dict[int, float]:
        """Returns {seed: reading} of the seeds that have it."""
        values = self.readings.get(name, np.full(len(self.seeds), np.nan))
        return {s: float(v) for s, v in zip(self.seeds, values, strict=True) if np.isfinite(v)}


class Effect(NamedTuple):
    """What one value of a key does to a reading, against the reference value of that key.

    difference: the mean over the cells that differ in nothing else; margin: what it has to exceed
    at MARGIN_LEVEL, by Student's t of its scatter over the seeds.
    """

    key: str
    value: Any
    reference: Any
    reading: str
    difference: float
    margin: float

    @property
    def counts(self) -> bool:
        """Returns whether the difference is beyond the seeds' noise."""
        return abs(self.difference) > self.margin


def by_setting(cells: Sequence[Cell], read: Mapping[str, Mapping[str, Any]]) -> list[CellReadings]:
    """Joins the seeds of each setting; read: {name of a cell: its readings, or {"failed": why}}."""
    joined: dict[str, list[Cell]] = {}
    for cell in cells:
        joined.setdefault(cell.label, []).append(cell)
    out = []
    for label, group in joined.items():
        found = [read[cell.name] for cell in group]
        names = dict.fromkeys(k for each in found if "failed" not in each for k in each)
        values = {k: np.array([each.get(k, np.nan) for each in found], float) for k in names}
        failures = [each["failed"] for each in found if "failed" in each]
        seeds = [cell.seed for cell in group]
        out.append(CellReadings(label, group[0].values, seeds, values, failures))
    return out


def score_agreement(settings: Sequence[CellReadings]) -> Agreement | None:
    """Returns how the main readings and people's errors rank the settings, 1: in the same order.

    Ranks are of quality, the best one first, whether a reading rises or falls with it. Of the
    settings that have all readings; None where these are fewer than MIN_CELLS. People count where
    they were asked about as many settings.
    """
    names = list(dict.fromkeys(name for each in settings for name in each.readings))
    asked = sum(PEOPLE in each.readings for each in settings)
    shown = main_readings(names) + [PEOPLE] * (asked >= MIN_CELLS)
    means = {
        n: [mean_and_error(s.readings.get(n, np.array([])))[0] for s in settings] for n in shown
    }
    complete = np.isfinite(np.array([*means.values()])).all(0) if means else np.zeros(0, bool)
    if complete.sum() < MIN_CELLS:
        return None
    scores = {
        name: np.array(values)[complete] * (1 if is_better(name, 1.0) else -1)
        for name, values in means.items()
    }
    scores = {name: values for name, values in scores.items() if np.ptp(values) > 0}
    return rank_agreement(scores) if len(scores) > 1 else None


def agreement_to_json(agreement: Agreement) -> dict[str, Any]:
    """Returns an agreement for sweep.json; intervals that it lacks are null."""
    out: dict[str, Any] = {"names": [*agreement.names], "cells": agreement.cells}
    for kind in ("spearman", "kendall"):
        each = getattr(agreement, kind)._asdict()
        out[kind] = {
            name: None if np.isnan(matrix).any() else matrix.tolist()
            for name, matrix in each.items()
        }
    return out


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Returns the mean over the seeds that were read, and its standard error; None of one seed."""
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return (float(values[0]) if len(values) else float("nan")), None
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def effects(settings: Sequence[CellReadings], configured: Mapping[str, Any]) -> list[Effect]:
    """Returns the effect of each value of each key on each of the `main_readings`.

    The reference of a key is its configured value, or else its first one. A value whose trainings
    failed has none.
    """
    keys = dict.fromkeys(key for each in settings for key in each.values)
    full = [{key: configured[key] for key in keys} | each.values for each in settings]
    out = []
    for key in keys:
        values = list({repr(v[key]): v[key] for v in full}.values())
        same = [v for v in values if v == configured[key]]
        reference = same[0] if same else values[0]
        for value in (v for v in values if v != reference):
            pairs = [
                (settings[i], settings[j])
                for i, a in enumerate(full)
                for j, b in enumerate(full)
                if a[key] == value and b == a | {key: reference}
            ]
            names = dict.fromkeys(n for a, b in pairs for n in a.readings if n in b.readings)
            for name in main_readings(list(names)):
                if effect := _compare(pairs, name):
                    out.append(Effect(key, value, reference, name, *effect))
    return out


def effects_to_json(found: Sequence[Effect]) -> list[dict[str, Any]]:
    """Returns the effects for sweep.json; the margin of one seed is null."""
    return [e._asdict() | {"margin": e.margin if np.isfinite(e.margin) else None} for e in found]


def _compare(
    pairs: Sequence[tuple[CellReadings, CellReadings]], name: str
) -> tuple[float, float] | None:
    """Returns (mean difference, margin), the margin infinite of one seed.

    Paired by the seeds: trainings of one seed begin with the same weights where they can, and see
    the same batches and noise. Of several pairs of settings the mean of each seed counts once.
    """
    of_seed: dict[int, list[float]] = {}
    for a, b in pairs:
        ours, theirs = a.by_seed(name), b.by_seed(name)
        for seed in sorted(ours.keys() & theirs):
            of_seed.setdefault(seed, []).append(ours[seed] - theirs[seed])
    if not of_seed:
        return None
    mean, error = mean_and_error(np.array([np.mean(each) for each in of_seed.values()]))
    quantile = stats.t.ppf((1 + MARGIN_LEVEL) / 2, max(1, len(of_seed) - 1))
    return mean, np.inf if error is None else float(quantile * error)


def sentences(found: Sequence[Effect], settings: Sequence[CellReadings]) -> list[str]:
    """Returns what matters, by how much, whether beyond the seeds' noise: a line for each value."""
    lines = [
        f"differences with the margin of {MARGIN_LEVEL:.0%} (Student's t over seeds, in pairs); of "
        "twenty comparisons one exceeds it by chance"
    ]
    for key in dict.fromkeys(effect.key for effect in found):
        of_key = [effect for effect in found if effect.key == key]
        for value in list({repr(e.value): e.value for e in of_key}.values()):
            each = [e for e in of_key if repr(e.value) == repr(value)]
            counted = [_describe(e) for e in each if e.counts]
            what = f"{key}={value} against {each[0].reference}"
            rest = [e.reading for e in each if not e.counts]
            within = f"within the seeds' noise: {', '.join(rest)}" if rest else ""
            lines.append(f"{what}: {'; '.join(filter(None, [*counted, within]))}")
    for each in settings:
        if each.failures:
            n, total = len(each.failures), len(each.seeds)
            lines.append(f"{each.label}: {n} of {total} trainings failed: {each.failures[0]}")
    return lines


def is_better(reading: str, difference: float) -> bool:
    """Returns whether a reading that has changed by the difference is better."""
    return (difference > 0) == reading.startswith(HIGHER)


def _describe(e: Effect) -> str:
    word = "better" if is_better(e.reading, e.difference) else "worse"
    number = number_text(e.difference, e.margin).replace("±", "+-")
    return f"{e.reading} {'+' * (e.difference > 0)}{number} ({word})"


def summary(settings: Sequence[CellReadings]) -> list[dict[str, Any]]:
    """Returns the settings for sweep.json; numbers that are missing are null."""
    out = []
    for each in settings:
        readings = {}
        for name, values in each.readings.items():
            mean, error = mean_and_error(values)
            numbers = [float(v) if np.isfinite(v) else None for v in values]
            mean_ = mean if np.isfinite(mean) else None
            readings[name] = {"mean": mean_, "error": error, "each": numbers}
        cell = {"cell": each.label, "values": each.values, "seeds": each.seeds}
        out.append(cell | {"readings": readings, "failures": each.failures})
    return out


def to_csv(settings: Sequence[CellReadings]) -> str:
    """Returns a row for each cell: setting, seed and its readings."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = list(dict.fromkeys(name for each in settings for name in each.readings))
    table.writerow(["setting", "seed", *names])
    for each in settings:
        for i, seed in enumerate(each.seeds):
            numbers = [each.readings[n][i] if n in each.readings else np.nan for n in names]
            cells = [f"{x:.8g}" if np.isfinite(x) else "" for x in numbers]
            table.writerow([each.label, seed, *cells])
    return text.getvalue()


def readings_table(settings: Sequence[CellReadings], names: Sequence[str]) -> list[str]:
    """Returns the lines of a table, a setting a row and a reading a column.

    A table that is wider than MAX_WIDTH goes on below, after an empty line.
    """
    labels = ["", *(each.label for each in settings)]
    blocks: list[list[list[str]]] = []
    for name in names:
        column = [name, *(_describe_mean(each, name) for each in settings)]
        if not blocks or sum(map(_width, [*blocks[-1], column])) > MAX_WIDTH:
            blocks.append([labels])
        blocks[-1].append(column)
    lines: list[str] = []
    for block in blocks:
        widths = [_width(column) for column in block]
        lines += [""] if lines else []
        for label, *cells in zip(*block, strict=True):
            rest = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
            lines.append(f"{label:{widths[0]}}" + "".join(rest))
    return lines


def _describe_mean(each: CellReadings, name: str) -> str:
    mean, error = mean_and_error(each.readings.get(name, np.array([])))
    if np.isnan(mean):
        return "failed" if each.failures else "-"
    return number_text(mean, error).replace("±", "+-")


def _width(column: Sequence[str]) -> int:
    return max(map(len, column)) + 2
