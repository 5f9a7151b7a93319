"""--mode=report: every number is its file's, both forms say the same, and bad input is named."""

import base64
import csv
import html.parser
import io
import itertools
import json
import math
import re
import shlex
import shutil
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

import main
from configs import cifar10, default, lsun_bedroom
from diffusion import experiment, process
from diffusion.data import augment
from diffusion.modes import _paper, _report_slider, _sampling
from diffusion.modes._common import load_trained
from diffusion.plotting.report_page import Number
from diffusion.runtime import cli, config, validation
from diffusion.runtime.config import Run
from diffusion.runtime.workdir import load_config
from tests.browser import browser, needs_browser, severe
from tests.runs import run

NO_LINK = "\u200b"  # keeps Markdown's readers from making links of text
VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """What a page shows: its numbers, links, images, code, and the texts of all table cells."""

    def __init__(self, path):
        super().__init__()
        self.numbers, self.links, self.images, self.codes = [], [], [], []
        self.cells, self.rows = [], []
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
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
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
            self.rows[-1][-1] += data
        if "code" in tags:
            self.codes[-1] += data
        if tags and "data-source" in self._open[-1][1]:
            self.numbers[-1]["text"] += data


def value_at(workdir, source):
    """Reads the number of FILE#POINTER, by RFC 6901."""
    name, _, pointer = source.partition("#")
    name = urllib.parse.unquote(name)
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
    own = [n for n in page.numbers if not n["data-source"].startswith(("arXiv:", "indep"))]
    for number in own:
        value = value_at(workdir, number["data-source"])
        texts = number["text"].split(" ± ")
        assert repr(value) == repr(float(number["data-value"])) and len(texts) <= 2
        assert_shows(texts[0], value)
        if "data-error" in number:
            source, its = number["data-source"], number["data-error-source"]
            assert its in (f"{source}_error", re.sub("/(mean|value)$", "/error", source))
            error = value_at(workdir, its)
            assert repr(error) == repr(float(number["data-error"]))
            assert len(texts) == 2 or error == 0 or not math.isfinite(error)
            assert len(texts) == 1 or assert_shows(texts[1], error) is None
        else:
            assert len(texts) == 1
    return len(own)


def check_links(page):
    """Nothing is outside of the file, and all that is pointed to is there."""
    assert page.links and all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    for image in page.images:
        kind, _, content = image.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            picture.load()
            assert kind == f"data:image/{picture.format.lower()}"
    assert page.tags.isdisjoint({"iframe", "object", "embed", "link", "base", "form"})
    assert not [a for a in page.attributes if a[1].startswith("on") or "://" in str(a[2])]


def check_markdown(page, folder):
    """Markdown, rendered by another program, has the same cells in the same order."""
    text = (folder / "report.md").read_text()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells, images = [], []
    for before, token in itertools.pairwise(tokens):
        children = token.children or []
        if before.type in ("td_open", "th_open"):
            text = "".join(child.content for child in children)
            cells.append(text.strip().replace(NO_LINK, ""))
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
    run_ = config.resolve(main.define_flags(), words[1:], load_config)
    cli.check_flags(run_)
    validation.validate(run_.config)
    return words[2:]


# A trained work directory


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """A trained work directory, with all that the commands of its first report make."""
    others = shutil.ignore_patterns("eval", "figures", "frontier", "study", "report")  # of tests
    workdir = tmp_path_factory.mktemp("report") / "a run"
    shutil.copytree(trained[0], workdir, ignore=others)
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
    page = made[1]
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
    stored = config.flatten(load_config(workdir)), config.flatten(default.get_config())
    settings = {repr(value) for each in stored for value in each.values()}
    for cell in page.cells:
        if re.fullmatch(r"[-\d,]*\.\d+(e-?\d+)?( ± \S+)?", cell):
            assert cell in shown | settings, cell


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


def test_second_report_is_the_same_and_keeps_the_slider(made, tmp_path):
    workdir = shutil.copytree(made[0], tmp_path / made[0].name)
    report(workdir)  # paths are in its commands
    before = [(workdir / "report" / name).read_bytes() for name in ("report.html", "report.md")]
    _, out = report(workdir)
    assert "drawing" not in out
    after = [(workdir / "report" / name).read_bytes() for name in ("report.html", "report.md")]
    assert before == after
    (workdir / "report" / "slider.png").write_bytes(b"torn")
    assert "drawing" in report(workdir)[1]
    page, out = report(workdir, "--config.report.samples=0")
    assert "report.samples is 0" in " ".join(page.texts) and "input" not in page.tags


def test_slider_shows_the_chain_of_the_samples(trained):
    """Its first frame is what the network predicts from x_T; its last are the drawn samples."""
    run_ = Run("report", config.fill_defaults(load_config(trained[0])), trained[0], None)
    exp = experiment.build(run_.config)
    model = load_trained(run_, exp)
    frames = _report_slider.draw_frames(model, 3, 5)
    assert frames.t.tolist() == [20, 15, 10, 5, 0] and frames.x.shape == (5, 3, 8, 8, 1)
    sampler = _sampling.compile_sampler(run_.config, exp, 4)
    [drawn] = _sampling.draw(sampler, model.params, 0, 4)
    np.testing.assert_array_equal(frames.x[-1], drawn[:3])
    np.testing.assert_array_equal(frames.x_0[-1], drawn[:3])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(3))
    x_T = jax.vmap(lambda key: process.sample_noise(key[None], 0, jnp.zeros((1, 8, 8, 1)))[0])(keys)
    np.testing.assert_array_equal(frames.x[0], augment.unscale(x_T, exp.levels))
    predict = experiment.make_predictor(run_.config, exp)(model.params, jnp.zeros(3, jnp.int32))
    x_0 = jnp.clip(predict(x_T, jnp.int32(20)).x_0, -1, 1)
    levels = np.abs(frames.x_0[0].astype(int) - np.asarray(augment.unscale(x_0, exp.levels)))
    assert levels.max() <= 16 and levels.mean() < 0.2  # one level, where rounding is near a half


def test_sprite_is_the_frames_one_below_the_other():
    """Each image is where the page looks for it; a large one is the mean of its blocks."""
    rng = np.random.default_rng(0)
    x, x_0 = rng.integers(0, 256, (2, 4, 3, 64, 64, 3), np.uint8)
    frames = _report_slider.Frames(np.arange(4), x, x_0)
    with Image.open(io.BytesIO(_report_slider.sprite_png(frames))) as image:
        pixels = np.asarray(image)
    pages = np.split(pixels, 4)
    for page, above, below in zip(pages, x, x_0, strict=True):
        for row, images in ((2, above), (68, below)):
            for i, each in enumerate(images):
                left = 2 + i * 66
                np.testing.assert_array_equal(page[row : row + 64, left : left + 64], each)
    quarter = x[0].repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(_report_slider.reduced(quarter, 4), x[0])
    assert _report_slider.reduced(np.uint8([[[[0], [1]], [[254], [255]]]]), 2).tolist() == [
        [[[128]]]
    ]


# The paper's experiments, from files with known numbers


def paper_workdir(folder, changes=(), scores=(), samples=50_000, step=800_000, **more):
    """Writes what evaluations of a CIFAR-10 training leave, without the training."""
    stored = default.get_config()
    stored.update_from_flattened_dict(dict(changes))
    stored = json.loads(stored.to_json_best_effort())
    at = folder / "eval" / f"{step:08d}"
    at.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stored))
    found = {"": {}, "train": {}, "test": {}}
    for (reference, name), value in dict(scores).items():
        found[reference][name] = {"value": value, "error": 0.02, "error_over": "one set"}
    content = {"step": step, "samples": samples, "seeds": [0], "sampler": stored["sampler"]}
    content |= {"scores": {"ema": found}, "notes": [], "versions": {"jax": "1"}, "config": stored}
    (at / "metrics.json").write_text(json.dumps(content | more))
    return folder


IS, TRAIN = ("", "is"), ("train", "fid")


def graded(page):
    """Returns {(model, score): (ours, the paper's, grade, command)} of Tables 1 to 3."""
    return {
        (row[0], row[1]): row[2:]
        for row in page.rows
        if len(row) == 6 and not row[0][:1].isdigit() and "grade" not in row
    }


def test_grades_by_the_paper_s_error(tmp_path):
    """The paper's Inception Score is 9.46 ± 0.11; it has no error of the FID 3.17."""
    published = _paper.printed("9.46 ± 0.11", "")
    for value, grade in ((9.56, True), (9.36, True), (9.58, False), (9.34, False)):
        found = _paper.compare_with_paper(Number(value, ""), published)
        assert found.name == ("within the paper's error" if grade else "outside")
    for value, grade in ((9.56, "within"), (9.58, "outside")):
        folder = paper_workdir(tmp_path, scores={IS: value, TRAIN: 3.21, ("test", "fid"): 5.2})
        page, _ = report(folder)
        rows = graded(page)
        ours, paper, found, _ = rows["L_simple", "Inception Score"]
        assert (ours, paper) == (f"{value:.3f} ± 0.020", "9.46 ± 0.11")
        assert found.startswith(grade) and f"{value - 9.46:+.2g}" in found
    ours, paper, found, _ = rows["L_simple", "FID against train"]
    assert (ours, paper) == ("3.210 ± 0.020", "3.17")
    assert found == "the paper gives no error: +0.04, 2.0 of our errors"
    assert rows["ε, L_simple", "FID against train"][0] == ours
    assert rows["L_simple", "FID against test"][:2] == ["5.200 ± 0.020", "5.24"]
    ours, paper, found, command = rows["L_simple", "bits/dim on test"]
    assert (ours, paper, found) == ("", "≤ 3.75", "not measured") and "--mode=bpd" in command
    # Another row of the paper is another training.
    ours, paper, found, command = rows["ε, L, fixed Σ", "Inception Score"]
    assert (ours, paper, found) == ("", "7.67 ± 0.13", "not measured")
    assert command.startswith("python main.py --config=configs/cifar10.py:eps_vlb")
    assert rows["μ, squared error", "FID against train"][1] == "unstable"
    assert "no checkpoint" in " ".join(page.texts) and "slider" not in str(page.attributes)


@pytest.mark.parametrize(
    "changes, samples, why",
    [
        ({"process.T": 4000}, 50_000, "process.T 4000 for 1000"),
        ({"train.batch_size": 64}, 50_000, "train.batch_size 64 for 128"),
        ({"sampler.name": "ddim"}, 50_000, "sampler.name ddim for ancestral"),
        ({}, 10_000, "10,000 samples"),
    ],
)
def test_another_setting_is_not_comparable(tmp_path, changes, samples, why):
    folder = paper_workdir(tmp_path, changes, {IS: 9.46, TRAIN: 3.17}, samples)
    found = [row for row in graded(report(folder)[0]).values() if row[0]]
    assert found and all(row[2].startswith(f"not comparable: {why}") for row in found)


def test_other_objective_is_the_paper_s_other_row(tmp_path):
    changes = {"target": "mu", "loss.name": "vlb", "seed": 7, "optim.clip_groups": 8}
    page, _ = report(paper_workdir(tmp_path, changes, {IS: 8.1}))
    rows = graded(page)
    measured = {key: row for key, row in rows.items() if row[0]}
    assert [*measured] == [("μ, L, fixed Σ", "Inception Score")]
    assert measured["μ, L, fixed Σ", "Inception Score"][2].startswith("within")


def test_least_fid_is_taken_and_the_curve_has_all(tmp_path):
    for step, fid in ((400_000, 3.4), (600_000, 3.2), (800_000, 3.3)):
        paper_workdir(tmp_path, scores={IS: fid, TRAIN: fid}, step=step)
    page, _ = report(tmp_path)
    rows = graded(page)
    assert rows["L_simple", "FID against train"][0] == "3.200 ± 0.020"
    assert rows["L_simple", "Inception Score"][0] == "3.200 ± 0.020"
    curve = [(row[1], row[3]) for row in page.rows if row[0] == "here"]
    numbers = (f"{fid}00 ± 0.020" for fid in (3.4, 3.2, 3.3))
    assert curve == [*zip(("400,000", "600,000", "800,000"), numbers, strict=True)]
    published = [n["text"] for n in page.numbers if n["data-source"].startswith("indep")]
    assert published == ["9.160", "5.780", "4.080", "3.310", "3.190"]


@pytest.mark.parametrize("name", ["", "emoji", "no such"])
def test_scores_of_other_data_are_not_compared(tmp_path, name):
    page, _ = report(paper_workdir(tmp_path, {"data.name": name}, {IS: 9.46, TRAIN: 3.17}))
    assert not graded(page) and "3.170 ± 0.020" in page.cells
    assert "Tables 1 to 4: not comparable" in " ".join(page.texts)


def test_lsun_has_table_3(tmp_path):
    changes = {k: v for k, v in config.flatten(lsun_bedroom.get_config()).items()}
    page, _ = report(paper_workdir(tmp_path, changes, {TRAIN: 6.5}))
    rows = graded(page)
    assert rows["LSUN Bedroom", "FID against train"][:2] == ["6.500 ± 0.020", "6.36"]
    assert "lsun_bedroom.py:large" in rows["LSUN Bedroom, large", "FID against train"][3]
    assert "Tables 1, 2 and 4: not comparable, as these data are lsun_bedroom" in " ".join(
        page.texts
    )


def test_paper_s_numbers_agree_with_each_other_and_with_the_configs():
    """The docstrings of configs/ say them too, as do the sums of Section 4.3."""
    for line in cifar10.__doc__.splitlines():
        if match := re.match(
            r"    (\(none\)|:\w+) .* ([\d.]{4})\s+([\d.]{4,5})(?:\s+<= (\S+))?$", line
        ):
            name = "cifar10" + match[1].replace("(none)", "")
            rows = [r for t in ("Table 1", "Table 2") for r in _paper.TABLES[t] if r.config == name]
            assert rows
            for row in rows:
                assert row.scores[_paper.IS].partition(" ")[0] == match[2]
                assert row.scores[_paper.FID] == match[3]
                assert row.scores.get(_paper.BPD, f"≤ {match[4]}") == f"≤ {match[4]}"
    small, large = re.search(r"FID (\S+) there \(large: (\S+)\)", lsun_bedroom.__doc__).groups()
    table = {row.config: row.scores[_paper.FID] for row in _paper.TABLES["Table 3"]}
    assert (table["lsun_bedroom"], table["lsun_bedroom:large"]) == (small, large)
    rate, distortion, rmse = (float(text) for _, text in _paper.SECTION_4_3.values())
    assert round(rate + distortion, 2) == 3.75
    assert (rate, rmse) == tuple(round(x, 2) for x in _paper.TABLE_4[0][1:])


def test_table_4_and_files_stand_beside_ours(tmp_path):
    """After r of T steps x_k is known, k = T - r + 1; the csv has a row for each r."""
    folder = paper_workdir(tmp_path)
    at = folder / "eval" / "00800000"
    stored = json.loads((folder / "config.json").read_text())
    each = {"mean": 1.5, "error": 0.01}
    content = {"split": "test", "images": 10_000, "levels": 256, "baselines": {}}
    content |= {"bits_per_dim": {"bound on test, fixed_large, 1000 steps": each | {"mean": 3.75}}}
    content |= dict.fromkeys(("L_T", "rate", "L_0", "rmse"), each) | {"config": stored}
    (at / "bpd.json").write_text(json.dumps(content))
    lines = ["steps,t,rate,rate_error,rmse,rmse_error,L_t-1,L_error"]
    lines += [f"{r},{1001 - r},{r / 1000},0.001,{1000 - r},0.1,0,0" for r in range(1, 1001)]
    (at / "rate_distortion.csv").write_text("\n".join(lines))
    point = {"t": 500, "bits": 2.5, "coded": 2.4, "bound": 2.1, "rmse": 7.25, "bound_rmse": 7.0}
    codec = {"points": [point], "lossless": {"PNG": 5.875}, "lossy": {}}
    (at / "codec.json").write_text(json.dumps(codec))
    archive = {"file": 3.875, "initial": 0.0625, "plan": 0.001, "bound": 3.75, "ratio": 1.0025}
    (at / "archive.json").write_text(json.dumps(archive))
    page, _ = report(folder)
    assert ["500", "2.500", "2.100", "7.250", "7"] in page.rows and ["PNG", "5.875"] in page.rows
    assert ["file", "3.875"] in page.rows and ["initial", "0.06250"] in page.rows
    [row] = [row for row in page.rows if row[0] == "900" and len(row) == 6]
    assert row[:5] == ["900", "0.9000 ± 0.0010", "0.11994", "100.00 ± 0.10", "12.02277"]
    assert row[5].startswith("the paper gives no error: +0.78")
    [row] = [row for row in page.rows if row[0] == "distortion (bits/dim)"]
    assert row[1:3] == ["1.500 ± 0.010", "1.97"]


# Bad input


def test_strings_of_files_are_text(tmp_path):
    """In a config, in scores and in notes; also as the name of the folder."""
    evil = "<script>alert(1)</script>|`x`<img src=x onerror=alert(1)>[a](http://a.b) https://a.b"
    folder = tmp_path / "a<b>&'\"|`run`"
    paper_workdir(folder, {"data.name": evil}, {("train", f"fd_{evil}"): 1.5}, notes=[evil])
    given = folder / "eval" / "a#b%41 c"
    shutil.copytree(folder / "eval" / "00800000", given)
    content = json.loads((given / "metrics.json").read_text()) | {"input": evil, "samples": 7}
    (given / "metrics.json").write_text(json.dumps(content))
    page, _ = report(folder)
    text = " ".join(page.texts)
    assert text.count(evil) >= 6 and folder.name in text
    markdown = (folder / "report" / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown


def test_files_that_cannot_be_read_are_named(made, tmp_path):
    """All of them at once, in several ways; alone, a file costs its own section."""
    step, whole = "00000008", shutil.copytree(made[0], tmp_path / "run")
    names = [f"eval/{step}/{n}" for n in ("metrics.json", "bpd.json", "rate_distortion.csv")]
    names += [f"figures/{step}/{n}" for n in ("how.json", "quality.json", "memorisation.png")]
    names += [f"frontier/{step}/frontier.csv", "data.json"]
    contents = {name: (whole / name).read_bytes() for name in names}
    ways = {  # and which kinds of files are none after it
        "halves": (lambda content: content[: len(content) // 2], (".json", ".png")),
        "no text": (lambda _: b"\xff\xfe", (".json", ".png", ".csv")),
        "list": (lambda _: b"[1]", (".json", ".png")),
        "strings": (lambda content: re.sub(rb"\d+", b'"x"', content), (".json", ".png")),
    }
    for damage, kinds in ways.values():
        for name, content in contents.items():
            (whole / name).write_bytes(damage(content))
        page, out = report(whole, "--config.report.samples=0")
        problems = [line[11:] for line in out.splitlines() if line.startswith("warning")]
        assert all(problem in page.cells and len(problem) < 400 for problem in problems)
        # how.json says which other files there are.
        for name in (n for n in names if n.endswith(kinds) and not n.startswith("figures")):
            assert any(problem.startswith(name) for problem in problems), (name, problems)
        assert any("figures" in problem for problem in problems)
    for name, content in contents.items():
        (whole / name).write_bytes(content)
    (whole / names[1]).write_text("{")
    page, out = report(whole, "--config.report.samples=0")
    assert out.count("warning") == 1 and len(page.numbers) > 100
    files = {number["data-source"].partition("#")[0] for number in page.numbers}
    assert names[0] in files and names[1] not in files


def refused(code, *args):
    """Returns the one line on stderr of a report that is refused."""
    out, err = run("--mode=report", *args, code=code)
    assert err.count("\n") == 1 and "done" not in out
    return err


def test_what_is_no_work_directory_is_one_line(tmp_path):
    line = refused(4, f"--workdir={tmp_path / 'none'}")
    assert "expected a work directory (config.json) or a sweep (sweep.json), found neither" in line
    (tmp_path / "file").write_text("")
    assert "found neither" in refused(4, f"--workdir={tmp_path / 'file'}")
    paper_workdir(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"data"')
    assert "config.json: cannot be read" in refused(4, f"--workdir={tmp_path / 'run'}")
    paper_workdir(tmp_path / "run")
    workdir = f"--workdir={tmp_path / 'run'}"
    assert "report.frames: expected an int of 2" in refused(2, workdir, "--config.report.frames=1")
    assert "report.samples: expected" in refused(2, workdir, "--config.report.samples=-1")


# Sweeps


def sweep_folder(folder, **changes):
    folder.mkdir(exist_ok=True)
    readings = {"bits/dim": {"mean": 2.8374, "error": 0.0181, "each": [2.8, 2.9]}}
    readings |= {"fd_random": {"mean": 0.05, "error": None, "each": [0.05]}}
    readings |= {"parameters": {"mean": 176849, "error": 0.0, "each": [176849] * 2}}
    failed = {"bits/dim": {"mean": None, "error": None, "each": [None, None]}}
    cells = [
        {"cell": f"process.T={T}", "values": {"process.T": T}, "seeds": [0, 1], "readings": r}
        for T, r in ((50, readings), (1000, failed))
    ]
    content = {"name": "steps", "keys": ["process.T"], "cells": cells}
    content |= {"sentences": ["More steps are <b>better</b>."]} | changes
    (folder / "sweep.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(default.get_config().to_json_best_effort())
    Image.new("RGB", (40, 30)).save(folder / "bits.png")
    return folder


def test_sweep_s_report_has_its_table_plots_and_sentences(tmp_path):
    folder = sweep_folder(tmp_path / "sweep")
    page, _ = report(folder)
    assert "2.837 ± 0.018" in page.cells and "0.05000" in page.cells
    assert "More steps are <b>better</b>." in page.texts and len(page.images) == 1
    sources = {number["data-source"] for number in page.numbers}
    assert "sweep.json#/cells/0/readings/bits~1dim/mean" in sources
    assert ["process.T=1000", "0, 1", "failed", "not measured"] in page.rows
    assert ["parameters", "176,849", "not measured"] in page.rows
    assert [shlex.split(code)[2] for code in page.codes] == ["--mode=sweep"]
    for damaged in ("{", "[]", '{"name": "x", "keys": ["a"], "cells": [3], "sentences": []}'):
        (folder / "sweep.json").write_text(damaged)
        assert "sweep.json" in refused(4, f"--workdir={folder}")
    (folder / "sweep.json").unlink()
    (folder / "cells").mkdir()
    assert "expected a complete sweep; run python main.py" in refused(4, f"--workdir={folder}")


# In a browser


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("dark, width", [(False, 1200), (True, 1200), (False, 390)])
def test_page_in_a_browser(made, dark, width):
    """No error, no picture that is missing, nothing wider than a phone; the slider moves."""
    page = made[0] / "report" / "report.html"
    with browser(dark=dark, width=width) as driver:
        if width < 500:  # a window cannot be as narrow
            phone = {"width": width, "height": 844, "deviceScaleFactor": 2, "mobile": True}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        driver.get(page.as_uri())
        ask = driver.execute_script
        assert severe(driver) == []
        scheme = "return matchMedia('(prefers-color-scheme: dark)').matches"
        assert ask(scheme) == dark
        assert ask("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert ask("return document.scrollingElement.scrollWidth <= innerWidth")
        assert width > 500 or ask("return innerWidth") == width
        colours = "return [getComputedStyle(document.body).backgroundColor, "
        paper, ink = ask(colours + "getComputedStyle(document.body).color]")
        assert (brightness(paper) < brightness(ink)) == dark
        where = "return document.querySelector('.window img').getBoundingClientRect().top - "
        where += "document.querySelector('.window').getBoundingClientRect().top"
        height = ask("return document.querySelector('.window').getBoundingClientRect().height")
        label = "return document.querySelector('.slider output').textContent"
        moves = "const r = document.querySelector('input[type=range]'); r.value = arguments[0]; "
        moves += "r.dispatchEvent(new Event('input'))"
        times = json.loads(ask("return document.querySelector('.slider').dataset.labels"))
        for i in (0, 7, len(times) - 1):
            ask(moves, i)
            assert ask(label) == times[i] and abs(ask(where) + i * height) < 1.5
        assert not ask("return document.querySelector('.still').offsetParent")
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert ask("return document.querySelector('.still').offsetParent !== null")
        assert abs(ask(where)) < 1.5  # the first frame is above the last
        assert not ask("return document.querySelector('input[type=range]').offsetParent")
        assert brightness(ask(colours + "0]")[0]) == 3 * 255
        assert severe(driver) == []


def brightness(colour):
    """Returns the sum of a CSS colour's parts."""
    return sum(map(int, re.findall(r"\d+", colour)[:3]))
