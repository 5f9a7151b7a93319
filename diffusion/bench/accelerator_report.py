"""The report of `make accelerator`: figures that the parts have left in JSON, as tables.

Imports the standard library alone. A figure is {"what", "unit", "values"}, as in bench/PART.json,
and "error" where there is one.
"""

import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "diffusers")
COLUMNS = {  # of the table of training: (what, unit) of --mode=bench
    "steps/s": ("training", "steps/s"),
    "images/s": ("training", "images/s"),
    "share of the bfloat16 peak": ("share of the bfloat16 peak (MFU)", ""),
    "GB a device": ("memory of the program, a device", "GB"),
    "PyTorch's time over ours": ("  PyTorch's time over ours", ""),
    "compiled": ("  PyTorch, compiled's time over ours", ""),
}
PAPER = {  # its steps/s on a TPU v3-8 (appendix B)
    "the paper, CIFAR-10, TPU v3-8": 21.0,
    "the paper, 256x256, TPU v3-8": 2.2,
}
_PICTURES = ("samples.png", "progressive.png", "frontier.png")


class Figures(NamedTuple):
    """What a part found: what it was computed from, and the figures."""

    source: str
    figures: list[dict[str, Any]]


def _figure(what: str, value: float, unit: str = "", error: float | None = None) -> dict[str, Any]:
    return {"what": what, "unit": unit, "values": [value], "error": error}


# What the parts leave; readers raise what a missing or unfinished file makes them raise.


def read_nothing(path: pathlib.Path) -> Figures:
    """Returns no figures."""
    return Figures("", [])


def read_bench(path: pathlib.Path) -> Figures:
    """Reads bench/PART.json of --mode=bench."""
    found = json.loads(path.read_text())
    return Figures("medians of repetitions, random weights and images", found["measured"])


def read_training(path: pathlib.Path) -> Figures:
    """Reads metrics.jsonl of a training: the last loss, and the pace at each reading."""
    lines = [x for x in map(json.loads, path.read_text().splitlines()) if "train/loss" in x]
    last, pace = lines[-1], [x["train/steps_per_s"] for x in lines if "train/steps_per_s" in x]
    figures = [_figure("steps", last["step"]), _figure("loss at the end", last["train/loss"])]
    figures += [{"what": "pace", "unit": "steps/s", "values": pace}] if pace else []
    return Figures(f"the training set, {last['step']:,} steps", figures)


def read_weights(path: pathlib.Path) -> Figures:
    """Reads the header of a file of --mode=export --int8."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    loss = json.loads(header["__metadata__"]["loss"])
    size = sum(p.stat().st_size for p in path.parent.glob("weights-*")) / 1e6
    figures = [_figure("size", size, "MB"), _figure("relative error", loss["relative_error"])]
    for name, what in (("rms", "root mean square"), ("max", "largest")):
        figures.append(_figure(f"{what} difference of samples", loss[name], "of 255 grey levels"))
    source = f"{loss['samples']} samples of the same noise ({loss['sampler']}), 32 and 8 bits"
    return Figures(source, figures)


def read_scores(path: pathlib.Path) -> Figures:
    """Reads metrics.json of --mode=eval."""
    found, figures = json.loads(path.read_text()), []
    for reference, scores in found["scores"]["ema"].items():
        against = f" against {reference}" if reference else ""
        for name, score in scores.items():
            figures.append(_figure(f"{name}{against}", score["value"], error=score["error"]))
    sampler, images = found["sampler"], f"{found['samples']:,} samples of the averaged weights"
    return Figures(f"{images}, {sampler['name']}, {sampler['steps']} steps", figures)


def read_bits(path: pathlib.Path) -> Figures:
    """Reads bpd.json of --mode=bpd."""
    found = json.loads(path.read_text())
    rows = [*found["bits_per_dim"].items(), *found["baselines"].items()]
    figures = [_figure(what, x["mean"], "bits/dim", x["error"]) for what, x in rows]
    return Figures(f"{found['images']:,} images of {found['split']}", figures)


def read_frontier(path: pathlib.Path) -> Figures:
    """Reads frontier.json of --mode=frontier: the first score of each sampler."""
    entries, figures = json.loads(path.read_text())["entries"], []
    for entry in sorted(entries, key=lambda entry: entry["evaluations"]):
        sampler = f"{entry['sampler']}, {entry['steps']} steps"
        score, values = next(iter(entry["scores"].items()))
        figures.append({"what": f"{score}, {sampler}", "unit": "", "values": values})
        figures.append(_figure(f"time of an image, {sampler}", entry["seconds"], "s"))
    return Figures("samples of the averaged weights against the training set", figures)


def versions() -> dict[str, str]:
    """Returns the versions of Python and the packages, and NVIDIA's words on its devices."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        found["nvidia-smi"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # no NVIDIA
    return found


# Tables


def write(out: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes report.json and report.md."""
    (out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    pictures = [name for name in _PICTURES if (out / name).exists()]
    (out / "report.md").write_text(to_markdown(content, pictures))


def to_markdown(content: Mapping[str, Any], pictures: list[str]) -> str:
    """Returns the Markdown of a report."""
    parts = content["parts"]
    lines = [f"# {content['device']}", ""]
    lines += [f"`{content['config']} {content['extra']}`, {content['budget_s']:.0f} s.", ""]
    lines += [", ".join(f"{name} {text}" for name, text in content["versions"].items()), ""]
    rows = [(part["name"], part["outcome"], f"{part['seconds']:.0f} s") for part in parts]
    lines += ["## Parts", "", *_table(("part", "outcome", "time"), *rows)]
    lines += ["## Training", "", *speed_table(parts)]
    for part in parts:
        if part["figures"]:
            rows = [(x["what"].strip(), _cell(x), x["unit"]) for x in part["figures"]]
            heading = (f"## {part['name'].capitalize()}", "", f"From: {part['source']}.", "")
            lines += [*heading, *_table(("what", "value", "unit"), *rows)]
    lines += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    return "\n".join(lines)


def speed_table(parts: list[Mapping[str, Any]]) -> list[str]:
    """Returns a row for each training that was measured, and the paper's."""
    rows = []
    for part in parts:
        found = {(x["what"], x["unit"]): x for x in part["figures"]}
        cells = [_cell(found[key]) if key in found else "" for key in COLUMNS.values()]
        if cells[0]:
            rows.append((part["name"], *cells))
    rows += [(name, f"{pace:g}", *("" for _ in [*COLUMNS][1:])) for name, pace in PAPER.items()]
    return _table(("", *COLUMNS), *rows)


def _cell(figure: Mapping[str, Any]) -> str:
    """Returns the value, with its error or, of several, the median with the range."""
    values, error = figure["values"], figure.get("error")
    if len(values) > 1:
        return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"
    return f"{values[0]:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _table(*rows: tuple[str, ...]) -> list[str]:
    """Returns the lines of a Markdown table, the first row its heading."""
    cells = [[text.replace("|", "/") for text in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:], ""]
