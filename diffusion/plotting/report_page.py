"""Reports: one value, rendered as an HTML page and as Markdown, so that both say the same.

A number carries the file that it was read from and its place there, as a JSON pointer (RFC 6901):
`eval/00003000/bpd.json#/rate/mean`. The page has it in `data-source` and in the tooltip.
"""

import base64
import html
import io
import itertools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from diffusion.plotting.html_page import html_page

WITHIN, OUTSIDE, NOT_MEASURED = "within the paper's error", "outside", "not measured"
NO_ERROR, OTHER = "the paper gives no error", "not comparable"
PANORAMA = 2.5  # pictures that are wider, by their height, have several panels
GRADES = {WITHIN: "good", OUTSIDE: "bad", NOT_MEASURED: "open", NO_ERROR: "", OTHER: ""}


class Number(NamedTuple):
    """A number and where it stands.

    Attributes:
      source: FILE#POINTER.
      error: its standard error, None if unknown; error_source: where that stands.
      text: the number as its source prints it; "": `number_text`.
    """

    value: float
    source: str
    error: float | None = None
    error_source: str = ""
    text: str = ""


class Grade(NamedTuple):
    """How a number compares with a published one. name: a key of GRADES; about: why, in words."""

    name: str
    about: str = ""


class Command(NamedTuple):
    """A command line to copy."""

    text: str


TableCell = str | Number | Grade | Command


class Table(NamedTuple):
    """Rows of cells. folded: whether the page shows it only when it is asked for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    folded: bool = False
    note: str = ""


class Picture(NamedTuple):
    """A picture.

    name: of its file beside the report; source: what it is, or is drawn from; half: whether two of
    them fit side by side.
    """

    name: str
    content: bytes
    title: str
    source: str
    note: str = ""
    half: bool = False


class Slider(NamedTuple):
    """Frames to move through.

    Attributes:
      sprite: a picture of all frames, one below the other, of one size.
      last: a picture of the last frame.
      size: (height, width) of a frame.
      labels: of the frames, such as "t = 500".
    """

    sprite: Picture
    last: Picture
    size: tuple[int, int]
    labels: Sequence[str]


ReportPart = str | Table | Picture | Slider  # a str is a paragraph


class Section(NamedTuple):
    """A part of a report under a heading."""

    title: str
    parts: Sequence[ReportPart]


class ReportPage(NamedTuple):
    """What a report says. about: a paragraph below its title."""

    title: str
    about: str
    sections: Sequence[Section]


def pictures_of(report: ReportPage) -> dict[str, bytes]:
    """Returns {file name: content} of the pictures that Markdown shows."""
    parts = itertools.chain.from_iterable(section.parts for section in report.sections)
    found = (part.sprite if isinstance(part, Slider) else part for part in parts)
    return {p.name: p.content for p in found if isinstance(p, Picture)}


def sources_of(table: Table) -> list[str]:
    """Returns the files that the numbers of a table were read from."""
    numbers = (cell for row in table.rows for cell in row if isinstance(cell, Number))
    return list(dict.fromkeys(number.source.partition("#")[0] for number in numbers))


def number_text(value: float, error: float | None = None) -> str:
    """Returns a number with its error, the error of two digits: `2.837 ± 0.018`.

    Without an error it has four digits, a whole number all of them.
    """
    if error and math.isfinite(error) and math.isfinite(value):
        decimals = 1 - int(f"{error:.1e}".partition("e")[2])  # its exponent, once rounded
        if decimals > 8:
            return f"{value:.4g} ± {error:.2g}"
        return " ± ".join(f"{x:,.{max(0, decimals)}f}" for x in (value, error))
    if abs(value) < 1e15 and (abs(value) >= 1000 or value == round(value)):
        return f"{value:,.0f}"
    return f"{value:#.4g}"


def shown(number: Number) -> str:
    """Returns the text of a number on the page and in Markdown."""
    return number.text or number_text(number.value, number.error)


# HTML


REPORT_STYLE = """
h1 { line-height: 1.2; overflow-wrap: anywhere; } h2 { margin: 2.2rem 0 .6rem; }
:root { --good: #17703a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #6fd195; --bad: #ff9a91; } }
nav { columns: 14rem; margin: 1rem 0; }
nav a { display: block; padding: .15rem 0; }
figure { margin: 0 0 1rem; } figcaption { font-size: .9rem; overflow-wrap: anywhere; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; }
.pictures figure { flex: 0 1 auto; max-width: 100%; }
.pictures .half { flex: 1 1 24rem; max-width: 29rem; }
.panorama img { min-width: 44rem; }
img { border-radius: 4px; vertical-align: top; }
table { font-variant-numeric: tabular-nums; margin: .4rem 0; }
thead th { white-space: nowrap; }
caption, summary { text-align: left; font-weight: 600; padding: .3rem 0; }
summary { cursor: pointer; }
code { overflow-wrap: anywhere; font-size: .9em; }
td code { display: inline-block; min-width: 14rem; }
code span { display: inline-block; max-width: 100%; } /* no break after the dashes of a flag */
td { vertical-align: top; } td:first-child { min-width: 8rem; } td:has(.grade) { min-width: 11rem; }
.n { white-space: nowrap; }
.source { margin: 0 0 1rem; font-size: .8rem; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.open { font-style: italic; }
.window { overflow: hidden; width: 100%; border-radius: 4px; }
.window img { width: 100%; border-radius: 0; }
.slider input { width: 100%; max-width: 40rem; margin: .6rem 0; accent-color: var(--mark); }
.slider .controls, .live .still { display: none; } .live .controls { display: block; }
@media print {
  body { max-width: none; font-size: 10pt; } nav, .slider .controls { display: none !important; }
  .live .still { display: block; } h2, caption { break-after: avoid; }
  img { max-height: 24cm; width: auto; }
  .window img { max-height: none; width: 100%; transform: none !important; }
  .wide { overflow: visible; } .panorama img { min-width: 0; } :root { --good: #0a5; --bad: #a00; }
}
"""
SLIDER_SCRIPT = """
for (const slider of document.querySelectorAll(".slider")) {
  const range = slider.querySelector("input"), sprite = slider.querySelector(".window img");
  const labels = JSON.parse(slider.dataset.labels), output = slider.querySelector("output");
  const show = () => {
    sprite.style.transform = `translateY(${-100 * range.value / labels.length}%)`;
    output.textContent = labels[range.value];
    range.setAttribute("aria-valuetext", labels[range.value]);
  };
  range.addEventListener("input", show);
  slider.classList.add("live");
  show();
}
"""


def report_html(report: ReportPage) -> str:
    """Returns the report as one HTML document."""
    titles = [html.escape(section.title) for section in report.sections]
    links = "".join(f'<a href="#section-{i}">{title}</a>' for i, title in enumerate(titles))
    blocks = [f"<h1>{html.escape(report.title)}</h1>", f"<p>{html.escape(report.about)}</p>"]
    blocks.append(f'<nav class="screen" aria-label="Sections">{links}</nav>')
    for i, (title, section) in enumerate(zip(titles, report.sections, strict=True)):
        blocks.append(f'<section id="section-{i}">\n<h2>{title}</h2>')
        for pictures, parts in itertools.groupby(section.parts, lambda p: isinstance(p, Picture)):
            inner = "\n".join(map(_part_html, parts))
            blocks.append(f'<div class="pictures">\n{inner}\n</div>' if pictures else inner)
        blocks.append("</section>")
    return html_page(report.title, "\n".join(blocks), REPORT_STYLE, SLIDER_SCRIPT)


def _part_html(part: ReportPart) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    return {Table: _table_html, Picture: _picture_html, Slider: _slider_html}[type(part)](part)


def _table_html(table: Table) -> str:
    title = html.escape(table.title)
    columns = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_cell_html(cell)}</td>' for cell in row)}</tr>\n"
        for row in table.rows
    )
    caption = f"<caption>{title}</caption>" if title and not table.folded else ""
    body = f"<table>{caption}<thead><tr>{columns}</tr></thead>\n<tbody>\n{rows}</tbody></table>"
    body = f'<div class="wide">{body}</div>'
    if text := _origin(sources_of(table), table.note):
        body += f'\n<p class="source faint">{html.escape(text)}</p>'
    return f"<details><summary>{title}</summary>{body}</details>" if table.folded else body


def _origin(sources: Sequence[str], note: str) -> str:
    return "; ".join(filter(None, (note, sources and f"from {', '.join(sources)}")))


def _cell_html(cell: TableCell) -> str:
    if isinstance(cell, Number):
        data = {"source": cell.source, "value": repr(cell.value)}
        if cell.error is not None:
            data |= {"error-source": cell.error_source, "error": repr(cell.error)}
        listed = " ".join(f'data-{k}="{html.escape(v)}"' for k, v in data.items())
        where = html.escape(cell.source)
        return f'<span class="n" {listed} title="{where}">{html.escape(shown(cell))}</span>'
    if isinstance(cell, Grade):
        name, about = html.escape(cell.name), html.escape(cell.about)
        mark = f'<span class="grade {GRADES[cell.name]}">{name}</span>'
        return f"{mark}: {about}" if about else mark
    if isinstance(cell, Command):
        words = (f"<span>{html.escape(word)}</span>" for word in cell.text.split(" "))
        return f"<code>{' '.join(words)}</code>"
    return html.escape(cell)


def _image_uri(content: bytes) -> str:
    """Returns the data URI of the bytes of a PNG, WebP or GIF file."""
    kind = {b"GIF8": "gif", b"RIFF": "webp"}.get(content[:4], "png")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _picture_html(picture: Picture) -> str:
    title = html.escape(picture.title)
    note = f" {html.escape(picture.note)}." if picture.note else ""
    source = f'<br><span class="faint">{html.escape(picture.source)}</span>'
    image = f'<img alt="{title}" src="{_image_uri(picture.content)}">'
    kind = ' class="half"' if picture.half else ""
    with Image.open(io.BytesIO(picture.content)) as opened:
        if opened.width > PANORAMA * opened.height:  # a phone scrolls it
            kind, image = ' class="panorama"', f'<div class="wide">{image}</div>'
    return f"<figure{kind}>{image}<figcaption>{title}.{note}{source}</figcaption></figure>"


def _slider_html(slider: Slider) -> str:
    sprite, (h, w) = slider.sprite, slider.size
    labels = html.escape(json.dumps([*slider.labels]))
    title, n = html.escape(sprite.title), len(slider.labels)
    window = f'<div class="window" style="aspect-ratio: {w} / {h}; max-width: {w}px">'
    window += f'<img alt="{title}" src="{_image_uri(sprite.content)}"></div>'
    control = f'<input type="range" min="0" max="{n - 1}" value="0" aria-label="{title}">'
    control = f'<div class="controls">{control}<br><output></output></div>'
    still = f'<div class="still"><p>{html.escape(slider.labels[0])} above, '
    still += f"{html.escape(slider.labels[-1])} below</p>"
    still += f'<img alt="{title}, the last" src="{_image_uri(slider.last.content)}"></div>'
    caption = f"<figcaption>{title}. {html.escape(sprite.note)}.</figcaption>"
    return (
        f'<figure class="slider" data-labels="{labels}">{window}{control}{still}{caption}</figure>'
    )
