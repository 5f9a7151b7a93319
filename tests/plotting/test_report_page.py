"""diffusion.plotting.report_page and report_markdown: numbers, and text that stays text."""

import decimal
import html
import html.parser
import itertools

import numpy as np
import pytest
from markdown_it import MarkdownIt

from diffusion.plotting import curves
from diffusion.plotting.report_markdown import report_markdown
from diffusion.plotting.report_page import (
    GRADES,
    Command,
    Grade,
    Number,
    ReportPage,
    Section,
    Table,
    number_text,
    report_html,
    shown,
)

EVIL = "<script>alert(1)</script> | `a` ``b`` [c](d) ![e](f) *g* _h_ \\ & &lt; https://i.j ~k~"


def test_an_error_has_two_digits_and_the_number_as_many_decimals():
    """Compared with decimal arithmetic, over 12 orders of magnitude."""
    rng = np.random.default_rng(0)
    for value, size in zip(rng.normal(0, 100, 500), rng.uniform(-7, 4, 500), strict=True):
        error = float(10**size)
        texts = number_text(float(value), error).replace(",", "").split(" ± ")
        number, spread = map(decimal.Decimal, texts)
        assert len(spread.normalize().as_tuple().digits) <= 2 or error >= 99.5
        assert abs(spread - decimal.Decimal(error)) <= decimal.Decimal(error) / 19
        assert abs(number - decimal.Decimal(float(value))) <= decimal.Decimal(error) / 19
        decimals = [len(text.partition(".")[2]) for text in texts]
        assert decimals[0] == decimals[1] == max(0, decimals[1])


@pytest.mark.parametrize(
    "value, error, text",
    [
        (2.8374194, 0.01807, "2.837 ± 0.018"),
        (0.0129, 0.000996, "0.0129 ± 0.0010"),  # 0.00100: an error rounded up is of two digits
        (12345.6, 123.4, "12,346 ± 123"),
        (0.5, 0.0, "0.5000"),
        (0.5, float("nan"), "0.5000"),
        (float("nan"), 0.1, "nan"),
        (float("inf"), None, "inf"),
        (50_000, None, "50,000"),
        (19.0, None, "19"),
        (18.998, None, "19.00"),
        (1e300, None, "1.000e+300"),
        (1.25e-9, None, "1.250e-09"),
    ],
)
def test_numbers_as_text(value, error, text):
    assert number_text(value, error) == text


def test_a_number_keeps_the_text_of_its_source():
    assert shown(Number(9.46, "a#", 0.11, "a#", "9.46 ± 0.110")) == "9.46 ± 0.110"


def report_of(text):
    rows = [
        [text, Number(1.5, f"{text}#/{text}", 0.25, text), Command(text), Grade(name, text)]
        for name in GRADES
    ]
    parts = [text, Table(text, [text] * 4, rows, note=text), Table(text, [text] * 4, rows, True)]
    return ReportPage(text, text, [Section(text, parts)])


class Collector(html.parser.HTMLParser):
    """The tags, and the text outside of style and script."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.last, self.sources = [], "", "", set()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.last = tag
        self.sources |= {dict(attrs).get("data-source", "")}

    def handle_data(self, data):
        if self.last not in ("style", "script"):
            self.text += data


def test_text_stays_text_in_html():
    page = Collector()
    page.feed(report_html(report_of(EVIL)))
    plain = Collector()
    plain.feed(report_html(report_of("plain")))
    tags = [[tag for tag in each.tags if tag != "span"] for each in (page, plain)]  # a word each
    assert tags[0] == tags[1] and page.tags.count("script") == 1
    assert page.text.count(EVIL) == plain.text.count("plain")
    assert page.sources == {"", f"{EVIL}#/{EVIL}"}


def test_text_stays_text_in_markdown():
    """Read by another program, with its extensions for tables and strikethrough."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = reader.parse(report_markdown(report_of(EVIL)))
    inline = [child for token in tokens for child in token.children or []]
    kinds = {child.type for child in inline}
    assert kinds <= {"text", "text_special", "code_inline", "strong_open", "strong_close"}
    cells = [
        "".join(child.content for child in token.children).replace("\u200b", "").strip()
        for before, token in itertools.pairwise(tokens)
        if before.type == "td_open"
    ]
    row = lambda name: [EVIL, "1.50 ± 0.25", EVIL, f"{name}: {EVIL}"]  # noqa: E731
    assert cells == 2 * [cell for name in GRADES for cell in row(name)]
    blocks = "".join(token.content for token in tokens if token.type == "html_block")
    assert blocks == f"<details><summary>{html.escape(EVIL)}</summary>\n</details>\n"


def test_readings_are_drawn_with_their_errors(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    axes = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    lines = {"here": [(1000.0, 20.0, 0.5), (2000.0, float("nan"), 0.0), (3000.0, 4.0, 0.1)]}
    curves.plot_readings(tmp_path / "a.png", "FID", lines)
    curves.plot_readings(tmp_path / "b.png", "FID", lines | {"there": [(100_000.0, 3.0, 0.0)]})
    curves.plot_readings(tmp_path / "c.png", "FID", {"none": [(1.0, float("inf"), 0.0)]})
    [first] = axes[0].containers
    np.testing.assert_array_equal(first.lines[0].get_xydata(), [[1000, 20], [3000, 4]])
    segments = first.lines[2][0].get_segments()
    np.testing.assert_allclose([s[:, 1] for s in segments], [[19.5, 20.5], [3.9, 4.1]])
    scales = [(each.get_xscale(), each.get_yscale()) for each in axes]
    assert scales == [("linear", "log"), ("log", "log"), ("linear", "linear")]
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["here", "there"]
