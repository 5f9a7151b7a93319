"""Reports as Markdown: the same value as report_page's, with its pictures in files beside it."""

import html
import re

from diffusion.plotting.report_page import (
    Command,
    Grade,
    Number,
    Picture,
    ReportPage,
    ReportPart,
    Slider,
    Table,
    TableCell,
    shown,
    sources_of,
)


def report_markdown(report: ReportPage) -> str:
    """Returns the report as GitHub's Markdown; its pictures are the files of `pictures_of`."""
    blocks = [f"# {as_text(report.title)}", _paragraph(report.about)]
    for section in report.sections:
        blocks += [f"## {as_text(section.title)}", *map(_part, section.parts)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def as_text(text: str) -> str:
    """Escapes what Markdown or HTML would take for more than text."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|#!~])", r"\\\1", text)
    return re.sub(r"(?i)\b(https?|ftp|www)([:.])", r"\1&#8203;\2", text)  # no links by themselves


def _paragraph(text: str) -> str:
    return re.sub(r"^(?=[-+=]|\d+[.)])", "&#8203;", as_text(text))  # no list


def _part(part: ReportPart) -> str:
    if isinstance(part, str):
        return _paragraph(part)
    if isinstance(part, Picture):
        note = f" {as_text(part.note)}." if part.note else ""
        return f"{_image(part)}\n\n{_paragraph(part.title)}.{note} ({as_text(part.source)})"
    if isinstance(part, Slider):
        labels = f"From above to below: {', '.join(part.labels)}"
        words = f"{part.sprite.title}. {part.sprite.note}. {labels}."
        return f"{_image(part.sprite)}\n\n{_paragraph(words)}"
    return _table(part)


def _image(picture: Picture) -> str:
    return f"![{as_text(picture.title)}]({picture.name})"


def _table(table: Table) -> str:
    rows = [[as_text(column) for column in table.columns]]
    rows += [["---"] * len(rows[0]), *([_cell(cell) for cell in row] for row in table.rows)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    sources = ", ".join(sources_of(table))
    origin = "; ".join(filter(None, (table.note, sources and f"from {sources}")))
    title, end = f"**{as_text(table.title)}**" if table.title else "", ""
    if table.folded:
        title = f"<details><summary>{html.escape(table.title)}</summary>"
        end = "</details>"
    return "\n\n".join(filter(None, (title, lines, _paragraph(origin), end)))


def _cell(cell: TableCell) -> str:
    if isinstance(cell, Number):
        return as_text(shown(cell))
    if isinstance(cell, Grade):
        return as_text(f"{cell.name}: {cell.about}" if cell.about else cell.name)
    if isinstance(cell, Command):
        fence = "`" * (1 + max(map(len, re.findall("`+", cell.text)), default=0))
        return f"{fence} {' '.join(cell.text.split())} {fence}".replace("|", r"\|")
    return as_text(cell)
