"""--mode=report: a work directory, or a sweep, as one HTML page and as Markdown.

Both are made of what other modes have left there. What they have not is listed with the command
that makes it, and nothing is measured here; a slider alone is drawn by the model.
"""

from collections.abc import Callable

from diffusion.modes import _report_sections as sections
from diffusion.modes._paper_tables import paper_tables
from diffusion.modes._report_files import StoredFile, Subject, WorkFiles, mode_command
from diffusion.modes._report_slider import make_slider
from diffusion.modes._sweep_results import main_readings
from diffusion.plotting.report_markdown import report_markdown
from diffusion.plotting.report_page import (
    NOT_MEASURED,
    Grade,
    ReportPage,
    ReportPart,
    Section,
    Slider,
    Table,
    TableCell,
    pictures_of,
    report_html,
)
from diffusion.runtime.config import Run
from diffusion.runtime.workdir import load_config
from diffusion.utils import checkpoint_files, logging
from diffusion.utils.errors import DataError, WorkdirError, one_line
from diffusion.utils.io import absolute, save_bytes, save_text
from diffusion.utils.multihost import is_primary

SWEEP = "sweep.json"
SECTIONS: dict[str, Callable[[Subject], list[ReportPart]]] = {
    "Summary": sections.main_numbers,
    "The paper's tables": paper_tables,
    "Samples": sections.sample_pictures,
    "Training": sections.training_curves,
    "Scores": sections.scores,
    "Bits per dimension": sections.likelihood,
    "Figures": sections.figures,
    "Samplers": sections.frontier,
    "Compression": sections.codec_tables,
    "Data, versions and configuration": sections.settings,
}


def run(run: Run) -> None:
    """Writes workdir/report/{report.html, report.md} and the pictures of the latter.

    Raises WorkdirError for a folder that is neither a work directory nor a complete sweep, or whose
    config.json or sweep.json is damaged. Other files that cannot be read are named in the report.
    """
    files = WorkFiles(run.workdir)
    if not files.has(SWEEP) and (run.workdir / "cells").is_dir():
        how = mode_command(run.workdir, "sweep").text
        raise WorkdirError(f"{run.workdir}: expected a complete sweep; run {how}")
    if files.has(SWEEP):
        report = sweep_report(files)
    elif load_config(run.workdir) is None:
        wanted = "expected a work directory (config.json) or a sweep (sweep.json)"
        raise WorkdirError(f"{run.workdir}: {wanted}, found neither; name one with --workdir")
    else:
        slider = make_slider(run)
        if not is_primary():
            return
        report = workdir_report(run, files, slider)
    if is_primary():
        write_report(report, files)


def write_report(report: ReportPage, files: WorkFiles) -> None:
    """Writes the page, the Markdown and its pictures."""
    folder = files.workdir / "report"
    for name, content in pictures_of(report).items():
        save_bytes(folder / name, content)
    save_text(folder / "report.md", report_markdown(report))
    save_text(folder / "report.html", report_html(report))
    for problem in dict.fromkeys(files.problems):
        logging.info(f"warning    {problem}")
    logging.info(f"done       {folder}/report.html, report.md")


def workdir_report(run: Run, files: WorkFiles, slider: Slider | str) -> ReportPage:
    """Gathers what a work directory has; reports what it lacks."""
    steps = checkpoint_files.step_folders(run.workdir / "checkpoints")
    step = next(iter(steps), None)
    s = Subject(files, run.config, step, [])
    if step is None or step < run.config.train.steps:
        s.lacks(
            f"Steps of the training: {step or 0:,} of {run.config.train.steps:,} are done", "train"
        )
    found = {title: parts_of(title, make, s) for title, make in SECTIONS.items()}
    found["Samples"].insert(0, slider)
    made = [Section(title, parts) for title, parts in found.items() if parts]
    made[1:1] = missing(s)
    c = run.config
    about = f"Data {c.data.name or c.data.source}; {c.process.T:,} steps, schedule "
    about += f"{c.process.schedule}; target {c.target}; loss {c.loss.name}; variance {c.variance}. "
    about += "Every table names the files of its numbers, and each number its place there."
    return ReportPage(f"Report of {absolute(run.workdir).name}", about, made)


def parts_of(
    title: str, make: Callable[[Subject], list[ReportPart]], s: Subject
) -> list[ReportPart]:
    """Returns the parts of a section; files of another form than expected are a problem."""
    try:
        return make(s)
    except DataError as error:
        s.files.problems.append(str(error))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Of files that were edited, or come from another version.
        found = f"{type(error).__name__}: {one_line(error, 80)}"
        s.files.problems.append(f"{title}: expected files as the modes write them, found {found}")
    return []


def missing(s: Subject) -> list[Section]:
    """Returns what is missing, with the commands that make it, and the files that are damaged."""
    parts: list[ReportPart] = []
    if s.missing:
        parts.append(Table("", ("not there", "the command that makes it"), s.missing))
    if s.files.problems:
        rows = [(problem,) for problem in dict.fromkeys(s.files.problems)]
        parts.append(Table("", ("cannot be read",), rows))
    return [Section("What is missing", parts)] if parts else []


# Sweeps


def sweep_report(files: WorkFiles) -> ReportPage:
    """Returns the report of a sweep's folder. Raises WorkdirError if sweep.json is damaged."""
    file = files.read(SWEEP)
    if not file:
        raise WorkdirError(f"{files.workdir}/{files.problems[0]}")
    try:
        return ReportPage(*sweep_content(file, files))
    except DataError as error:
        raise WorkdirError(f"{files.workdir}/{error}") from error


def sweep_content(file: StoredFile, files: WorkFiles) -> tuple[str, str, list[Section]]:
    """Returns the title, the line below it and the sections. Raises DataError."""
    cells = range(len(file.at("cells", kind=list)))
    names = list(dict.fromkeys(name for i in cells for name in file.at("cells", i, "readings")))
    rows: list[list[TableCell]] = []
    labels = [file.at("cells", i, "cell", kind=str) for i in cells]
    shown = main_readings(names)
    for i in cells:
        seeds = ", ".join(map(str, file.at("cells", i, "seeds", kind=list)))
        rows.append([labels[i], seeds, *(sweep_reading(file, i, name) for name in shown)])
    others = [[n, *(sweep_reading(file, i, n) for i in cells)] for n in names if n not in shown]
    parts: list[ReportPart] = [str(sentence) for sentence in file.at("sentences", kind=list)]
    parts.append(Table("The settings", ("setting", "seeds", *shown), rows))
    if others:
        parts.append(Table("All other readings", ("", *labels), others, folded=True))
    titles = {path.name: f"Over {path.stem}" for path in sorted(files.workdir.glob("*.png"))}
    known = {
        "effects.png": "What each value changes, with 95 % margins over the seeds",
        "agreement.png": "How far scores put the settings in one order",
    }
    titles |= {name: title for name, title in known.items() if titles.pop(name, "")}
    plots = [files.picture(name, title) for name, title in titles.items()]
    made = [Section("Results", parts), Section("Plots", [plot for plot in plots if plot])]
    if any(NOT_MEASURED in map(grade_name, row) for row in rows + others):
        how = mode_command(files.workdir, "sweep")
        table = Table("", ("not there", "the command that makes it"), [("readings", how)])
        made.append(Section("What is missing", [table]))
    keys = ", ".join(map(str, file.at("keys", kind=list)))
    title = f"Sweep {file.at('name', kind=str)}"
    return title, f"{len(rows)} settings of {keys}.", [each for each in made if each.parts]


def sweep_reading(file: StoredFile, i: int, name: str) -> TableCell:
    """Returns a reading of a setting, or that it is not there or that its trainings failed."""
    path = "cells", i, "readings", name
    if name not in file.at(*path[:-1]):
        return Grade(NOT_MEASURED)
    if file.at(*path).get("mean", 0) is None:
        return "failed"
    return file.number(*path, "mean", error=(*path, "error"))


def grade_name(cell: TableCell) -> str:
    """Returns the name of a grade, "" for another cell."""
    return cell.name if isinstance(cell, Grade) else ""
