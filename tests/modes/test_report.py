"""--mode=report: every number is its file's, both forms say the same, and bad input is named."""

import csv
import html.parser
import io
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

import main
from configs import cifar10, lsun_bedroom
from diffusion.modes import _paper
from diffusion.runtime import cli, config, validation
from tests.browser import browser, needs_browser, severe
from tests.runs import run

VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """What a page shows: its numbers, links, images, code, and the texts of all table cells."""

    def __init__(self, path):
        super().__init__()
        self.numbers, self.links, self.images, self.codes, self.cells = [], [], [], [], []
        self.tags, self.ids, self.attributes, self.texts, self._open = set(), set(), [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids.add(attrs.get("id"))
        self.attributes += [(tag, *item) for item in attrs.items()]
        self.links += [attrs["href"]] if "href" in attrs else []
        self.images += [attrs["src"]] if tag == "img" else []
        if "data-source" in attrs:
            self.numbers.append(attrs | {"text": ""})
        if tag == "code":
            self.codes.append("")
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self._open.append((tag, attrs))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        tags = [tag for tag, _ in self._open]
        if not {"style", "script"} & set(tags):
            self.texts.append(data)
        if {"td", "th"} & set(tags):
            self.cells[-1] += data
        if "code" in tags:
            self.codes[-1] += data
        if tags and "data-source" in self._open[-1][1]:
            self.numbers[-1]["text"] += data


def value_at(workdir, source):
    """Reads the number of FILE#POINTER, by RFC 6901."""
    name, _, pointer = source.partition("#")
    text = (workdir / name).read_text()
    if name.endswith(".jsonl"):
        value = {}
        for record in map(json.loads, text.splitlines()):
            value.setdefault(str(record["step"]), {}).update(record)
    else:
        value = list(csv.DictReader(io.StringIO(text))) if ".csv" in name else json.loads(text)
    for key in pointer.split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        value = value[int(key) if isinstance(value, list) else key]
    return float(value)


def assert_shows(text, value):
    """The text is the value to within half a unit of its last digit."""
    number = text.replace(",", "").removeprefix("≤ ")
    if not math.isfinite(value):
        assert number == str(value)
        return
    mantissa, _, exponent = number.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    assert abs(float(number) - value) <= unit / 2 * (1 + 1e-9), (text, value)


def check_numbers(page, workdir):
    """Every number of a page, and its error, is the one in its file. Returns how many."""
    own = [n for n in page.numbers if (workdir / n["data-source"].partition("#")[0]).is_file()]
    for number in own:
        value = value_at(workdir, number["data-source"])
        texts = number["text"].split(" ± ")
        assert repr(value) == repr(float(number["data-value"])) and len(texts) <= 2
        assert_shows(texts[0], value)
        if "data-error" in number:
            error = value_at(workdir, number["data-error-source"])
            assert repr(error) == repr(float(number["data-error"]))
            assert len(texts) == 2 or error == 0 or not math.isfinite(error)
            assert len(texts) == 1 or assert_shows(texts[1], error) is None
        else:
            assert len(texts) == 1
    for number in page.numbers:
        assert number in own or number["data-source"].startswith(("arXiv:2006.11239#", "indep"))
    return len(own)


def check_links(page):
    """Nothing is outside of the file, and all that is pointed to is there."""
    assert page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    for image in page.images:
        kind, _, content = image.partition(";base64,")
        with Image.open(io.BytesIO(__import__("base64").b64decode(content))) as picture:
            picture.load()
            assert kind == f"data:image/{picture.format.lower()}"
    assert page.tags.isdisjoint({"iframe", "object", "embed", "link", "base", "form"})
    assert not [a for a in page.attributes if a[1].startswith("on") or "://" in str(a[2])]


def check_markdown(page, folder):
    """Markdown, rendered by another program, has the same cells in the same order."""
    text = (folder / "report.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells, images = [], []
    for before, token in zip(tokens, tokens[1:], strict=False):
        children = token.children or []
        if before.type in ("td_open", "th_open"):
            cells.append("".join(child.content for child in children).strip())
        images += [child.attrs["src"] for child in children if child.type == "image"]
        assert not [child for child in children if child.type in ("html_inline", "link_open")]
    blocks = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert all(re.fullmatch(r"</?details>(<summary>[^<]*</summary>)?", block) for block in blocks)
    assert cells == [" ".join(cell.split()) for cell in page.cells]
    for name in images:
        with Image.open(folder / name) as picture:
            picture.load()
    return images


def report(workdir, *args, **options):
    """Makes the report; checks it as far as any can be; returns (page, console)."""
    out, err = run("--mode=report", f"--workdir={workdir}", *args, **options)
    assert err == "" and out.endswith(f"done       {workdir}/report/report.html, report.md\n")
    page = Page(workdir / "report" / "report.html")
    check_numbers(page, workdir)
    check_links(page)
    check_markdown(page, workdir / "report")
    for command in page.codes:
        check_command(command)
    return page, out


def check_command(command):
    """The program takes the command line."""
    words = shlex.split(command)
    assert words[:2] == ["python", "main.py"]
    load = lambda workdir: json.loads((workdir / "config.json").read_text())  # noqa: E731
    load = load if "--config=" not in command else lambda _: None
    run_ = config.resolve(main.define_flags(), words[1:], load)
    cli.check_flags(run_)
    validation.validate(run_.config)
    return words[2:]


# A trained work directory


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """A trained work directory, with all that the commands of its first report make."""
    workdir = shutil.copytree(trained[0], tmp_path_factory.mktemp("report") / "a run")
    first, _ = report(workdir)
    faster = {
        "frontier": ["--config.frontier.samplers=('ddim',)", "--config.frontier.steps=(4,)"],
        "figures": ["--config.figures.names=('samples','quality','nearest','memorisation')"],
    }
    modes = []
    for command in first.codes:
        args = check_command(command)
        modes.append(args[0].removeprefix("--mode="))
        if modes[-1] != "compress":
            run(*args, *faster.get(modes[-1], []))
    assert modes == ["eval", "bpd", "figures", "frontier", "compress"]
    return workdir, *report(workdir)


def test_commands_of_a_report_make_what_is_missing(made):
    """What is left are the figures that were not asked for, and the file."""
    workdir, page, _ = made
    assert [shlex.split(c)[2] for c in page.codes] == ["--mode=figures", "--mode=compress"]
    assert "'progressive'" in page.codes[0] and "'quality'" not in page.codes[0]


def test_every_number_is_the_one_in_its_file(made):
    workdir, page, out = made
    assert check_numbers(page, workdir) > 150 and "warning" not in out
    files = {number["data-source"].partition("#")[0] for number in page.numbers}
    step = "00000008"
    wanted = {f"eval/{step}/{n}" for n in ("metrics.json", "bpd.json", "rate_distortion.csv")}
    wanted |= {f"figures/{step}/{n}.json" for n in ("quality", "memorisation")}
    wanted |= {f"frontier/{step}/frontier.csv", "metrics.jsonl", "data.json"}
    assert files == wanted
    # A number that is not marked as one is a value of the configuration.
    shown = {number["text"] for number in page.numbers}
    settings = {repr(v) for v in config.flatten(json.loads((workdir / "config.json").read_text())).values()}
    defaults = {repr(v) for v in config.flatten(config.default.get_config()).values()}
    for cell in page.cells:
        if re.fullmatch(r"[-\d,]*\.\d+(e-?\d+)?( ± \S+)?", cell):
            assert cell in shown | settings | defaults, cell


def test_report_has_the_pictures_and_the_slider(made):
    workdir, page, _ = made
    names = check_markdown(page, workdir / "report")
    for name in ("slider.png", "loss.png", "reading_bpd.png", "samples_00000008_ema.png"):
        assert name in names
    figures = [name.removeprefix("figures_00000008_") for name in names if "figures_" in name]
    assert figures == ["samples.png", "quality.png", "nearest_pixels.png", "memorisation.png"]
    # Beside these the page has the slider's last frame, for paper.
    assert len(page.images) == len(names) + 1


def test_digits_are_not_graded_against_the_paper(made):
    _, page, _ = made
    text = " ".join(page.texts)
    assert "not comparable, as these data are digits" in text
    for grade in ("within the paper", "outside", "not measured", "arXiv"):
        assert grade not in text


def test_second_report_is_the_same_and_keeps_the_slider(made):
    workdir, _, _ = made
    before = [(workdir / "report" / name).read_bytes() for name in ("report.html", "report.md")]
    _, out = report(workdir)
    assert "drawing" not in out
    after = [(workdir / "report" / name).read_bytes() for name in ("report.html", "report.md")]
    assert before == after
    (workdir / "report" / "slider.png").write_bytes(b"torn")
    assert "drawing" in report(workdir)[1]
    assert "drawing" in report(workdir, "--config.report.frames=3")[1]
    page, out = report(workdir, "--config.report.samples=0")
    assert "report.samples is 0" in " ".join(page.texts) and "input" not in page.tags
