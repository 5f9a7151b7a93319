"""The paper's tables with what a work directory has measured beside them."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from diffusion.modes._paper import (
    BPD,
    BPD_TRAIN,
    FID,
    FID_CURVE,
    PLACES,
    SAMPLES,
    SAMPLING,
    SECTION_4_3,
    TABLE_4,
    TABLES,
    TITLES,
    PaperRow,
    compare_with_paper,
    experiment_of,
    other_setting,
    printed,
)
from diffusion.modes._report_files import StoredFile, Subject, mode_command
from diffusion.modes._report_sections import drawn, rate_and_rmse, step_text
from diffusion.plotting import curves
from diffusion.plotting.report_page import (
    NOT_MEASURED,
    OTHER,
    Command,
    Grade,
    Number,
    ReportPart,
    Table,
    TableCell,
)
from diffusion.runtime.config import TRAINING_KEYS

MAX_REASONS = 4  # that a grade gives
FILES = "bpd.json", "rate_distortion.csv"
PAPER_COLUMNS = "model", "score", "here", "the paper's", "grade", "what measures it"
INCEPTION_FLAG = "--config.eval.features=('inception',)"


class OwnNumber(NamedTuple):
    """A number of ours; other: how its setting differs from the paper's, [] if it does not."""

    number: Number
    other: Sequence[str]


def paper_tables(s: Subject) -> list[ReportPart]:
    """Shows the tables of the paper that are of these data, every row with its grade."""
    data, parts = s.config.data.name, []
    these = f"not comparable, as these data are {data or s.config.data.source or 'not known'}"
    if not any(map(functools.partial(is_of, data), TABLES.values())):
        return [f"Tables 1 to 4: {these}, and the paper's are CIFAR-10 and LSUN."]
    own, found = experiment_of(s.config), measured(s)
    for name, rows in TABLES.items():
        if not is_of(data, rows):
            continue
        cells = [line for row in rows for line in row_cells(s, name, row, own, found)]
        if not own:
            reasons = Grade(OTHER, some(other_setting(s.config, data, TRAINING_KEYS)))
            cells += [["here", score, m.number, "", reasons, ""] for score, m in found.items()]
        parts.append(Table(TITLES[name], PAPER_COLUMNS, cells))
    if data == "cifar10":
        return [*parts, *lossless(s, own, found), *fid_curve(s), f"Table 3: {these}."]
    return [*parts, f"Tables 1, 2 and 4: {these}."]


def is_of(data: str, rows: Sequence[PaperRow]) -> bool:
    """Returns whether a table has a row of a data set."""
    return any(row.config.partition(":")[0] == data for row in rows)


def some(reasons: Sequence[str]) -> str:
    """Returns the first few reasons on one line."""
    rest = len(reasons) - MAX_REASONS
    return "; ".join([*reasons[:MAX_REASONS], *([f"{rest} more"] if rest > 0 else [])])


def row_cells(
    s: Subject, table: str, row: PaperRow, own: str, found: dict[str, OwnNumber]
) -> list[list[TableCell]]:
    """Returns a line for each score of a row of the paper's, or one where it has none."""
    lines: list[list[TableCell]] = []
    for score in row.scores or (FID,):
        text = row.scores.get(score, "")
        paper = printed(text, f"{table}/{row.name}/{score}") if text else "unstable"
        ours = found.get(score) if row.config == own else None
        if not ours:
            how = making(s, score) if row.config == own else training_of(row.config)
            lines.append([row.name, score, "", paper, Grade(NOT_MEASURED), how])
        else:
            lines.append([row.name, score, ours.number, paper, grade(ours, paper), ""])
    if row.config != own:  # one command trains what all of its scores are of
        lines[1:] = [[*line[:-1], ""] for line in lines[1:]]
    return lines


def grade(ours: OwnNumber, paper: Number | str) -> Grade:
    """Returns how a number compares, or why it does not."""
    if ours.other:
        return Grade(OTHER, some(ours.other))
    if isinstance(paper, str):
        return Grade(OTHER, "the paper has no number")
    return compare_with_paper(ours.number, paper)


def making(s: Subject, score: str) -> Command:
    """Returns the command that measures a score of the work directory as the paper did."""
    if score in (BPD, BPD_TRAIN):
        split = ["--config.bpd.split=train"] if score == BPD_TRAIN else []
        return mode_command(s.files.workdir, "bpd", *split)
    num = [] if s.config.eval.num >= SAMPLES else [f"--config.eval.num={SAMPLES}"]
    return mode_command(s.files.workdir, "eval", INCEPTION_FLAG, *num)


def training_of(name: str) -> Command:
    """Returns the command that trains another experiment of the paper."""
    module, _, variant = name.partition(":")
    config = f"configs/{module}.py" + (f":{variant}" if variant else "")
    return Command(f"python main.py --config={config} --workdir=runs/{name.replace(':', '-')}")


def measured(s: Subject) -> dict[str, OwnNumber]:
    """Returns what a work directory has measured of the paper's scores.

    FID is the least of the steps that were evaluated, as the paper's; the others are of its step.
    """
    found: dict[str, OwnNumber] = {}
    files = [s.files.read(f"{f}/metrics.json") for f in s.files.having("eval", "metrics.json")]
    files = [file for file in files if file and "ema" in file.at("scores")]
    least = min(reversed(files), key=fid_of, default=None)
    for score, keys in PLACES.items() if least else ():
        path = "scores", "ema", *keys
        if keys[1] in least.at("scores", "ema").get(keys[0], {}):
            number = least.number(*path, "value", error=(*path, "error"))
            found[score] = OwnNumber(number, other_sampling(s, least))
    if (folder := s.newest("eval", "bpd.json")) and (file := s.files.read(f"{folder}/bpd.json")):
        bound = next(iter(file.at("bits_per_dim")))
        path = "bits_per_dim", bound
        score = BPD_TRAIN if file.at("split", kind=str) == "train" else BPD
        number = file.number(*path, "mean", error=(*path, "error"))
        part = file.at("config", "bpd", "num", kind=int)
        found[score] = OwnNumber(number, [f"of {part:,} images"] if part else [])
    return found


def fid_of(file: StoredFile) -> float:
    """Returns the FID against the training split in a metrics.json; infinity if there is none."""
    if "fid" not in file.at("scores", "ema").get("train", {}):
        return math.inf
    return file.number("scores", "ema", "train", "fid", "value").value


def other_sampling(s: Subject, file: StoredFile) -> list[str]:
    """Returns how the samples of a metrics.json differ from the paper's."""
    name = experiment_of(s.config) or s.config.data.name
    n, other = file.at("samples", kind=int), other_setting(file.at("config"), name, SAMPLING)
    return other if n >= SAMPLES else [f"{n:,} samples", *other]


# Section 4.3, Table 4 and the curve of FID


def lossless(s: Subject, own: str, found: dict[str, OwnNumber]) -> list[ReportPart]:
    """Shows Section 4.3's rate and distortion, and Table 4: both are of L_simple on test."""
    folder = s.newest("eval", "bpd.json") if BPD in found else ""
    file, curve = (s.files.read(f"{folder}/{name}") if folder else None for name in FILES)
    other = [*found[BPD].other] if file else []
    if own != "cifar10":
        other = other_setting(s.config, "cifar10", TRAINING_KEYS) + other
    how = making(s, BPD) if own == "cifar10" else training_of("cifar10")
    rows: list[list[TableCell]] = []
    for what, (key, text) in SECTION_4_3.items():
        paper, line = printed(text, f"Section 4.3/{key}"), [Grade(NOT_MEASURED), how]
        if file:
            ours = file.number(key, "mean", error=(key, "error"))
            line = [grade(OwnNumber(ours, other), paper), ""]
        rows.append([what, ours if file else "", paper, *line])
    title = "Section 4.3: lossless codelength of L_simple, CIFAR-10 test"
    parts: list[ReportPart] = [Table(title, ("", *PAPER_COLUMNS[2:]), rows)]
    T, rows = TABLE_4[0][0], []
    for step, *values in TABLE_4:
        papers = [
            printed(f"{value:.5f}", f"Table 4/{step}/{name}")
            for value, name in zip(values, ("rate", "rmse"), strict=True)
        ]
        cells = ["", ""]
        last = Grade(NOT_MEASURED)
        if curve and len(curve.at(kind=list)) == T:
            cells = [OwnNumber(number, other) for number in rate_and_rmse(curve, step - 1)]
            both = [grade(*pair) for pair in zip(cells, papers, strict=True)]
            last = Grade(both[0].name, "; ".join(dict.fromkeys(g.about for g in both)))
            cells = [cell.number for cell in cells]
        rows.append([step_text(step), cells[0], papers[0], cells[1], papers[1], last])
    columns = "reverse steps", "rate (bits/dim)", "the paper's", "RMSE (0-255)", "the paper's"
    title = "Table 4: progressive coding, CIFAR-10 test"
    return [*parts, Table(title, (*columns, "grade"), rows)]


def fid_curve(s: Subject) -> list[ReportPart]:
    """Shows FID against training steps, beside an independent training's."""
    lines: dict[str, list[curves.Point]] = {}
    rows: list[list[TableCell]] = []
    for folder in s.files.having("eval", "metrics.json"):
        file = s.files.read(f"{folder}/metrics.json")
        for name in file.at("scores").get("ema", {}).get("train", {}) if file else ():
            if name == "fid" or name.startswith("fid@"):
                path, step = ("scores", "ema", "train", name), file.at("step", kind=int)
                number = file.number(*path, "value", error=(*path, "error"))
                lines.setdefault(name, []).append((step, number.value, number.error or 0.0))
                rows.append(["here", step_text(step), name, number])
    published = [(float(step), fid, 0.0) for step, fid in FID_CURVE]
    lines["published, an independent training"] = published
    rows += [
        ["published", step_text(step), "fid", Number(fid, f"independent training#/{step}")]
        for step, fid in FID_CURVE
    ]
    args = curves.plot_readings, "FID against train", lines
    columns = "training", "step", "score", "FID"
    return [
        drawn("fid_curve.png", "FID against training steps", "eval/*/metrics.json", *args),
        Table("Numbers of this curve", columns, rows, folded=True),
    ]
