"""The sections of a report, each from the files that one mode has left in a work directory.

A section is a function from a Subject to its parts; what it lacks it notes there.
"""

import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from configs import default
from diffusion.metrics import CLASSIFIER_SCORES
from diffusion.modes._report_files import StoredFile, Subject, file_name
from diffusion.plotting import curves
from diffusion.plotting.report_page import Number, Picture, ReportPart, Table, TableCell
from diffusion.runtime.config import flatten

FIGURES = {  # of modes.figures: {name: title}
    "samples": "Samples (Figures 1, 3 and 11 to 20 of the paper)",
    "progressive": "Progressive generation (Figures 6 and 14)",
    "denoising": "The reverse process (Figure 2)",
    "shared": "Samples that share xₜ (Figure 7)",
    "interpolation": "Interpolation (Figure 8)",
    "coarse_to_fine": "Interpolation, coarse to fine (Figure 9)",
    "quality": "Quality of the predicted x₀ over t (Figure 10)",
    "compression": "Rate and distortion of real files (Figure 5)",
    "nearest": "Nearest training images (Figures 12 and 15)",
    "memorisation": "Distances to the nearest training image",
    "inpainting": "Inpainting",
    "animation": "The reverse process, animated",
}
PICTURES = (".png", ".webp", ".gif")
MAX_ROWS = 50  # of a curve's table
TENTHS = 10  # rows of Table 4


def step_text(step: Any) -> str:
    """Returns the step of a folder or of a record as text, "3,000"."""
    return f"{int(step):,}" if str(step).isdecimal() else str(step)


def step_of(folder: str) -> str:
    """Returns the step that a folder is named by, "3,000"."""
    return step_text(int(folder.rpartition("/")[2]))


def drawn(name: str, title: str, source: str, plot: Callable, *args: Any) -> Picture:
    """Returns the picture that plot(path, *args) writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        plot(path, *args)
        return Picture(name, path.read_bytes(), title, source)


def thinned(rows: Sequence[Any]) -> list[Any]:
    """Returns at most MAX_ROWS evenly spaced rows, the first and the last among them."""
    if len(rows) <= MAX_ROWS:
        return [*rows]
    return [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]


def main_numbers(s: Subject) -> list[ReportPart]:
    """Shows the numbers that are looked for first."""
    rows: list[list[TableCell]] = []
    folder = s.newest("eval", "bpd.json")
    if file := folder and s.files.read(f"{folder}/bpd.json"):
        for what in file.at("bits_per_dim"):
            path = "bits_per_dim", what
            number = file.number(*path, "mean", error=(*path, "error"))
            rows.append([f"bits/dim: {what}", step_of(folder), number])
    folder = s.newest("eval", "metrics.json")
    if file := folder and s.files.read(f"{folder}/metrics.json"):
        for weights, reference, name in main_scores(file):
            words = f"{name} {against(reference)}" if reference else name
            number = score_number(file, weights, reference, name)
            rows.append([f"{words}, {weights} weights", step_of(folder), number])
    return [Table("", ("", "step", "number"), rows)] if rows else []


def sample_pictures(s: Subject) -> list[ReportPart]:
    """Shows the newest pictures of the training, and those of --mode=eval."""
    folder, words = s.files.workdir / "samples", {"ema": "averaged", "raw": "raw"}
    names = sorted(p.name for p in folder.glob("*.png")) if folder.is_dir() else []
    parts = []
    for name in names[-2:]:
        step, _, weights = name.removesuffix(".png").partition("_")
        title = f"Samples of {words.get(weights, weights)} weights, step {step_text(step)}"
        parts.append(s.files.picture(f"samples/{name}", title, "Drawn during the training"))
    if scored := s.newest("eval", "metrics.json"):
        for path in sorted((s.files.workdir / scored).glob("*/grid.png")):
            name = f"{scored}/{path.parent.name}/grid.png"
            parts.append(s.files.picture(name, "The first of the samples that were scored"))
    return [part for part in parts if part]


def training_curves(s: Subject) -> list[ReportPart]:
    """Shows what metrics.jsonl has: the loss, the readings and the last value of everything."""
    log = s.files.read("metrics.jsonl")
    if not log or not log.at():
        s.lacks("The log of a training", "train")
        return []
    steps: dict[str, list[str]] = {}  # in which a name was logged
    for step, record in log.at().items():
        for name in record:
            steps.setdefault(name, []).append(step)
    steps.pop("time", None)
    read = [name for name in steps if name.startswith("eval/") and not name.endswith("_error")]
    parts: list[ReportPart] = []
    if "train/loss" in steps:
        path = s.files.workdir / log.name
        args = functools.partial(curves.plot_loss, path), "train/loss"
        picture = drawn("loss.png", "The training loss", log.name, *args)
        parts.append(picture._replace(half=True))
    for name in read:
        found = [(step, logged_number(log, step, name)) for step in steps[name]]
        points = [(float(step), x.value, x.error or 0.0) for step, x in found]
        short = name.removeprefix("eval/")
        args = log.name, curves.plot_readings, short, {short: points}
        picture = drawn(file_name(f"reading_{short}.png"), f"{short} during the training", *args)
        parts.append(picture._replace(half=True))
    if not read and (s.step or 0) < s.config.train.steps:
        s.lacks("Readings during the training", "train", "--config.train.eval_every=1000")
    last = [(name, at[-1]) for name, at in steps.items() if not name.endswith("_error")]
    rows = [(name, step_text(step), logged_number(log, step, name)) for name, step in last]
    parts.append(Table("The last of each value", ("", "step", "number"), rows))
    own = [name for name in ("train/loss", "train/grad_norm", "train/lr") if name in steps]
    for title, names in (("readings", read), ("loss", own)):
        rows = [
            [step_text(step), *(logged_number(log, step, n) if n in record else "" for n in names)]
            for step, record in log.at().items()
            if set(names) & set(record)
        ]
        if rows:
            columns = "step", *names
            parts.append(Table(f"Numbers of the {title}", columns, thinned(rows), folded=True))
    return parts


def logged_number(log: StoredFile, step: str, name: str) -> Number:
    """Returns a value of metrics.jsonl, with the error that was logged beside it."""
    error = (step, f"{name}_error") if f"{name}_error" in log.at(step) else ()
    return log.number(step, name, error=error)


def scores(s: Subject) -> list[ReportPart]:
    """Shows the scores of the newest checkpoint that has some, of others, and of given images."""
    newest, parts = s.newest("eval", "metrics.json"), []
    if file := newest and s.files.read(f"{newest}/metrics.json"):
        parts += [score_table(file, weights) for weights in file.at("scores")]
        parts += [f"Note: {note}." for note in file.at("notes", kind=list)]
    s.lacks_newest(newest, "Scores", "eval")
    rows = []
    for folder in s.files.folders("eval"):
        file = s.files.read(f"{folder}/metrics.json")
        if not file or folder == newest:
            continue
        what = str(file.at().get("input") or f"step {step_text(file.at('step', kind=int))}")
        for weights, reference, name in main_scores(file):
            about = what if weights == "input" else f"{what}, {weights}"
            number = score_number(file, weights, reference, name)
            rows.append((about, file.number("samples"), name, against(reference), number))
    if rows:
        columns = "images", "how many", "score", "", "number"
        parts.append(Table("Other checkpoints and images", columns, rows))
    return parts


def main_scores(file: StoredFile) -> Iterator[tuple[str, str, str]]:
    """Yields (weights, reference, score) of Frechet distances, Inception Score and classifier."""
    for weights in file.at("scores"):
        for reference in file.at("scores", weights):
            for name in file.at("scores", weights, reference):
                distance = name.startswith(("fd_", "fid")) and "infinity" not in name
                if distance or name in ("is", *CLASSIFIER_SCORES):
                    yield weights, reference, name


def against(reference: str) -> str:
    """Returns a column's name for a reference of metrics.json."""
    return f"against {reference}" if reference else "without a reference"


def score_table(file: StoredFile, weights: str) -> Table:
    """Returns all scores of some weights in a metrics.json, a reference a column."""
    order = sorted(file.at("scores", weights), key=lambda reference: not reference)  # "" is last
    by = {reference: file.at("scores", weights, reference) for reference in order}
    rows: list[list[TableCell]] = [["samples", file.number("samples"), *[""] * (len(by) - 1)]]
    for name in dict.fromkeys(name for named in by.values() for name in named):
        cells = (score_number(file, weights, r, name) if name in by[r] else "" for r in by)
        rows.append([name, *cells])
    step = step_text(file.at("step", kind=int))
    title = f"Samples of step {step}, {weights} weights, {sampler_text(file)}"
    return Table(title, ("score", *map(against, by)), rows)


def sampler_text(file: StoredFile) -> str:
    """Returns the sampler of a metrics.json in words."""
    sampler, seeds = file.at("sampler"), file.at("seeds", kind=list)
    steps = len(sampler.get("times", ())) or sampler.get("steps")
    words = f"{steps} steps of {sampler.get('name')}"
    return f"{words}, {len(seeds)} seeds" if len(seeds) > 1 else words


def score_number(file: StoredFile, *keys: str) -> Number:
    """Returns a score of metrics.json with its error."""
    path = "scores", *keys
    return file.number(*path, "value", error=(*path, "error"))


def likelihood(s: Subject) -> list[ReportPart]:
    """Shows bits/dim beside the baselines, their terms, and rate and distortion over t."""
    folder, parts = s.newest("eval", "bpd.json"), []
    s.lacks_newest(folder, "Bits/dim", "bpd")
    if file := folder and s.files.read(f"{folder}/bpd.json"):
        rows = [
            (what, file.number(key, what, "mean", error=(key, what, "error")))
            for key in ("bits_per_dim", "baselines")
            for what in file.at(key)
        ]
        title = f"Bits/dim of step {step_of(folder)}, and of simpler programs"
        parts.append(Table(title, ("", "bits/dim"), rows))
        terms = {
            "L_T": "L_T, of x_T (bits/dim)",
            "rate": "rate: L_T and the terms of t > 1 (bits/dim)",
            "L_0": "L_0, of x₀ given x₁ (bits/dim)",
            "rmse": "RMSE of x₀ predicted from x₁ (0-255)",
        }
        rows = [(what, file.number(k, "mean", error=(k, "error"))) for k, what in terms.items()]
        rows.append((f"images of {file.at('split', kind=str)}", file.number("images")))
        rows.append(("levels of a pixel", file.number("levels")))
        parts.append(Table("The terms of the bound, and what it was read on", ("", "number"), rows))
        parts.append(s.files.picture(f"{folder}/bpd.png", "Code lengths"))
        title = "Rate and distortion over t (Figure 5)"
        parts.append(s.files.picture(f"{folder}/rate_distortion.png", title))
    if curve := folder and s.files.read(f"{folder}/rate_distortion.csv"):
        title = "Numbers of Figure 5, at the steps of Table 4"
        rows = [
            [step_text(round(curve.at(i, "steps", kind=float))), *rate_and_rmse(curve, i)]
            for i in tenths(curve)
        ]
        columns = "reverse steps", "rate (bits/dim)", "RMSE (0-255)"
        parts.append(Table(title, columns, rows))
    return [part for part in parts if part]


def tenths(curve: StoredFile) -> list[int]:
    """Returns the rows of rate_distortion.csv after T, 9T/10, ... steps, or some of a few."""
    n = len(curve.at(kind=list))
    return [n * k // TENTHS - 1 for k in range(TENTHS, 0, -1) if n * k // TENTHS]


def rate_and_rmse(curve: StoredFile, i: int) -> tuple[Number, Number]:
    """Returns both of a row of rate_distortion.csv."""
    rate, rmse = (curve.number(i, k, error=(i, f"{k}_error")) for k in ("rate", "rmse"))
    return rate, rmse


def figures(s: Subject) -> list[ReportPart]:
    """Shows the figures of the newest checkpoint that has some, and the numbers behind them."""
    folder, parts = s.newest("figures", "how.json"), []
    s.lacks_newest(folder, "The figures", "figures")
    if not folder or not (file := s.files.read(f"{folder}/how.json")):
        return []
    done = file.at("figures")
    names = [*(n for n in FIGURES if n in done), *(n for n in done if n not in FIGURES)]
    for name in names:
        for each in file.at("figures", name, "files", kind=list):
            each = pathlib.PurePath(str(each)).name
            title, path = FIGURES.get(name, name), f"{folder}/{each}"
            if each.endswith(PICTURES):
                kind = each.rpartition(".")[0].removeprefix(name).strip("_")
                title += f", by {kind}" if kind else ""
                parts.append(s.files.picture(path, title))
    quality, distances = (s.files.read(f"{folder}/{n}.json") for n in ("quality", "memorisation"))
    if quality:
        columns = [n for n, values in quality.at().items() if isinstance(values, list)]
        rows = zip_numbers(quality, [(n,) for n in columns])
        parts.append(Table(FIGURES["quality"], columns, rows, folded=True))
    if distances:
        columns = [(space, name) for space in distances.at() for name in distances.at(space)]
        rows = zip_numbers(distances, columns)
        titles = [f"{name}, by {space}" for space, name in columns]
        parts.append(Table(FIGURES["memorisation"], titles, rows, folded=True))
    rest = tuple(name for name in FIGURES if not done.get(name, {}).get("files"))
    if rest not in ((), ("compression",)):  # which needs a file first
        s.lacks(f"Figures: {', '.join(rest)}", "figures", f"--config.figures.names={rest}")
    return [part for part in parts if part]


def zip_numbers(file: StoredFile, lists: Sequence[tuple[str, ...]]) -> list[list[TableCell]]:
    """Returns a row for each index of the lists below the keys; shorter ones end earlier."""
    lengths = [len(file.at(*keys, kind=list)) for keys in lists]
    return thinned(
        [
            [file.number(*k, i) if i < n else "" for k, n in zip(lists, lengths, strict=True)]
            for i in range(max(lengths, default=0))
        ]
    )


def frontier(s: Subject) -> list[ReportPart]:
    """Shows the table and the picture of --mode=frontier."""
    folder = s.newest("frontier", "frontier.csv")
    s.lacks_newest(folder, "Quality against cost of samplers", "frontier")
    file = folder and s.files.read(f"{folder}/frontier.csv")
    if not file or not file.at(kind=list):
        return []
    columns = [name for name in file.at(0) if not name.endswith("_error")][3:]
    rows = []
    for i, entry in enumerate(file.at(kind=list)):
        name = f"{entry['sampler']}, {entry['grid']}, {int(file.at(i, 'steps', kind=float))}"
        row = [name]
        for column in columns:
            error = (i, f"{column}_error") if f"{column}_error" in entry else ()
            row.append(file.number(i, column, error=error))
        rows.append(row)
    title = f"Samplers of step {step_of(folder)}"
    picture = s.files.picture(f"{folder}/frontier.png", "Quality against cost")
    table = Table(title, ("sampler, grid, steps", *columns), rows)
    return [part for part in (picture, table) if part]


def codec_tables(s: Subject) -> list[ReportPart]:
    """Shows what --mode=compress has measured."""
    folder, parts = s.newest("eval", "codec.json"), []
    if file := folder and s.files.read(f"{folder}/codec.json"):
        columns = "t", "bits", "bound", "rmse", "bound_rmse"
        points = range(len(file.at("points", kind=list)))
        rows = [[file.number("points", i, name) for name in columns] for i in points]
        parts.append(s.files.picture(f"{folder}/codec.png", "Rate and distortion of a file"))
        parts.append(s.files.picture(f"{folder}/codec_images.png", "A file at some lengths"))
        parts.append(Table("A progressive file, by the time that it ends at", columns, rows))
        rows = [(name, file.number("lossless", name)) for name in file.at("lossless")]
        parts.append(Table("Other lossless formats", ("", "bits/dim"), rows))
    archive = s.newest("eval", "archive.json")
    if file := archive and s.files.read(f"{archive}/archive.json"):
        keys = [key for key in ("file", "initial", "plan", "bound", "ratio") if key in file.at()]
        rows = [(key, file.number(key)) for key in keys]
        parts.append(Table("An archive", ("", "bits/dim"), rows))
    if s.step is not None and not (folder or archive):
        output = f"--output={s.files.workdir}/test.ddpm"
        s.lacks("Real files of the test split", "compress", "--input=test", output)
    return [part for part in parts if part]


def settings(s: Subject) -> list[ReportPart]:
    """Shows the data, the versions and the configuration."""
    parts: list[ReportPart] = []
    if data := s.files.read("data.json"):
        rows = [(key, data.number(key)) for key in ("images", "classes") if data.at().get(key)]
        rows += [(k, str(data.at().get(k))) for k in ("shape", "mark") if k in data.at()]
        parts.append(Table("The data", ("", ""), rows))
    found = {}
    for folder in s.files.folders("eval"):
        for name in ("metrics.json", "bpd.json"):
            file = s.files.read(f"{folder}/{name}")
            if file and "versions" in file.at():
                found[file.name] = file.at("versions")
    packages = dict.fromkeys(package for each in found.values() for package in each)
    rows = [(name, *(str(v.get(package, "")) for package in packages)) for name, v in found.items()]
    if rows:
        parts.append(Table("Versions", ("made with", *packages), rows))
    own, defaults = flatten(s.config), flatten(default.get_config())
    rows = [
        (k, repr(v), repr(defaults[k]) if k in defaults and defaults[k] != v else "")
        for k, v in own.items()
    ]
    note = "from config.json; a default is of configs/default.py, where it differs"
    parts.append(Table("The configuration", ("key", "value", "default"), rows, True, note))
    return parts
