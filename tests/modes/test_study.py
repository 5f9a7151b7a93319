"""--mode=study: the page's pictures are those of the key, and known answers give known rates."""

import base64
import io
import itertools
import json
import re
import shutil
import struct

import numpy as np
import pytest
from PIL import Image

from diffusion.data import ImageDataset, digits
from diffusion.metrics.forced_choice import ErrorRate
from diffusion.modes import _study_results, study
from diffusion.plotting.image_grid import enlarge
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_npz
from tests.runs import TINY, run

CONDITIONS = ("ddim, uniform, 4 steps", "ancestral, uniform, 20 steps")
OPTIONS = (
    *("--config.study.num=40", "--config.study.checks=5", "--config.study.practice=3"),
    "--config.study.samplers=('ddim:uniform:4','ancestral')",
)


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """A work directory with a study of two samplers."""
    workdir = shutil.copytree(trained[0], tmp_path_factory.mktemp("study") / "run")
    run("--mode=study", f"--workdir={workdir}", *OPTIONS)
    return workdir


@pytest.fixture
def workdir(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def folder_of(workdir):
    return workdir / "study" / "00000008"


def key_of(workdir):
    return json.loads((folder_of(workdir) / "study.json").read_text())


def shown_by(workdir):
    page = (folder_of(workdir) / "study.html").read_text()
    return json.loads(re.search(r"^const STUDY = (.*);$", page, re.M)[1])


def png_of(uri):
    return base64.b64decode(uri.removeprefix("data:image/png;base64,"))


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(png_of(uri))))


def picture(image):
    """What a digit uint8[8, 8, 1] should look like."""
    return enlarge(np.repeat(image, 3, -1), 16)[..., 0]


def answers(key, wrong, person):
    """The file of a person who errs in the given pairs; every second time the left one is real."""
    rows = []
    for i, pair in enumerate(key["pairs"]):
        choice = 1 - pair["real"] if i in wrong else pair["real"]
        rows.append({"pair": i, "left": i % 2, "choice": choice, "seconds": 1 + i % 3})
    return {"study": key["study"], "person": person, "answers": rows[::-1]}


def pairs_of(key, condition):
    return [i for i, pair in enumerate(key["pairs"]) if pair["condition"] == condition]


def test_every_pair_is_the_real_and_the_generated_picture_of_the_key(made):
    key, shown, real = key_of(made), shown_by(made), digits("test")
    sets = {name: np.load(name)["arr_0"] for name in (made / "samples").glob("*/samples.npz")}
    of_sampler = {"ddim": 0, "ancestral": 1}
    sets = {i: x for name, x in sets.items() for s, i in of_sampler.items() if s in str(name)}
    assert key["names"] == [*CONDITIONS]
    # Each has a noise of its own, without which two samplers give nearly the same picture.
    seeds = {
        tuple(path.parent.name.split("_")[2:4]) for path in (made / "samples").glob("*/samples.npz")
    }
    assert seeds == {("seed0", "ddim4"), ("seed1", "ancestral20")}
    used = []
    both = key["pairs"] + key["practice"], shown["pairs"] + shown["practice"]
    for pair, uris in zip(*both, strict=True):
        side = pair["real"]
        np.testing.assert_array_equal(pixels(uris[side]), picture(real.read([pair["image"]])[0][0]))
        used.append(pair["image"])
        if pair["condition"] == -1:
            hidden = real.read([pair["scrambled"]])[0][0]
            assert (pixels(uris[1 - side]) != picture(hidden)).any()
            used.append(pair["scrambled"])
        else:
            made_by = sets[pair["condition"]][pair["sample"]]
            np.testing.assert_array_equal(pixels(uris[1 - side]), picture(made_by))
            used.append((pair["condition"], pair["sample"]))
    assert len({*used}) == len(used) == 2 * 48  # no picture is shown twice
    counts = [len(pairs_of(key, condition)) for condition in (-1, 0, 1)]
    assert counts == [5, 20, 20] and len(key["practice"]) == 3
    sides = [pair["real"] for pair in key["pairs"]]
    assert 8 < sum(sides) < 37  # beyond four deviations of coins


def test_page_tells_real_from_generated_only_in_practice(made):
    """Its data have no key but that; all files of pictures have the same header and no notes."""
    key, shown = key_of(made), shown_by(made)
    assert shown.keys() == {"pairs", "practice", "practice_real", "seconds", "id"}
    assert shown["id"] == key["study"] and {*map(len, shown["pairs"])} == {2}
    practice = json.loads(base64.b64decode(shown["practice_real"]))
    assert practice == [pair["real"] for pair in key["practice"]]
    headers = set()
    for uri in itertools.chain(*shown["pairs"]):
        png, at, kinds = png_of(uri), 8, []
        headers.add(png[:33])
        while at < len(png):
            size, kind = struct.unpack(">I4s", png[at : at + 8])
            kinds.append(kind)
            at += size + 12
        assert {*kinds} == {b"IHDR", b"IDAT", b"IEND"}
    assert len(headers) == 1


def test_known_answers_give_known_rates_and_intervals_around_them(workdir, tmp_path):
    """Of 12 people everyone takes 3 + i % 4 of 20 for real in one condition, and 10 in the other.

    Two more err everywhere, and in the checks too, where one error of five is allowed.
    """
    key, rng = key_of(workdir), np.random.default_rng(0)
    checks = pairs_of(key, -1)
    for i in range(12):
        wrong = [*rng.permutation(pairs_of(key, 0))[: 3 + i % 4]]
        wrong += [*rng.permutation(pairs_of(key, 1))[:10], checks[i % 5]]
        (tmp_path / f"{i}.json").write_text(json.dumps(answers(key, wrong, f"p{i}")))
    for i in range(2):
        wrong = {*range(45)} - {*checks[2:]}
        (tmp_path / f"bad{i}.json").write_text(json.dumps(answers(key, wrong, f"b{i}")))
    out, err = run("--mode=study", f"--workdir={workdir}", f"--input={tmp_path}")
    found = json.loads((folder_of(workdir) / "results.json").read_text())
    first, second = found["conditions"]
    assert err == "" and "12, and 2 left out" in out
    assert found["left_out"] == ["b0", "b1"] and len(found["people"]) == 12
    assert [first["errors"], first["answers"]] == [54, 240] and first["rate"] == 54 / 240
    assert first["of_people"] == [(3 + int(p[1:]) % 4) / 20 for p in found["people"]]
    assert second["rate"] == 0.5 and second["name"] == CONDITIONS[1]
    assert first["over_people"][0] < 54 / 240 < first["over_people"][1] < 0.3
    assert second["over_people"] is None  # all have the same rate
    assert second["over_both"][0] < 0.5 < second["over_both"][1]
    times = [1 + i % 3 for i in pairs_of(key, 0)]
    assert first["median_seconds"] == np.median(times)
    (difference,) = found["differences"]
    assert difference["difference"] == pytest.approx(0.5 - 54 / 240)
    assert "22.5 % of the generated pictures were called real" in out
    assert "other people would tell other such pictures from real ones" in out
    assert "do not show that people can tell such pictures" in out
    assert (folder_of(workdir) / "results.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "over_both, text",
    [
        ((0.2, 0.49), "other people would tell"),
        ((0.51, 0.7), "other people would take"),
        ((0.2, 0.51), "do not show"),
        (None, "too few"),
    ],
)
def test_conclusion_is_that_of_the_interval_over_people_and_pictures(over_both, text):
    others = ((0.0, 0.4), (0.6, 1.0), (0.6, 1.0))
    assert text in _study_results.conclusion(ErrorRate(5, 10, *others, over_both))


def test_bad_files_are_one_line_each_and_the_others_count(workdir, tmp_path):
    key = key_of(workdir)
    good = json.dumps(answers(key, pairs_of(key, 0)[:5], "good"))
    bad = {
        "cut.json": good[:1000],
        "other.json": good.replace(key["study"], "0" * 16),
        "again.json": good,
        "markup\n<b>.json": good.replace('"good"', '"<script>alert(1)</script>"'),
        "nan.json": good.replace('"seconds": 1', '"seconds": NaN', 1),
    }
    paths = [tmp_path / name for name in ("a good one.json", *bad)]
    for path, text in zip(paths, (good, *bad.values()), strict=True):
        path.write_text(text)
    inputs = [f"--input={path}" for path in (*paths, tmp_path / "none.json")]
    _, err = run("--mode=study", f"--workdir={workdir}", *inputs)
    lines = err.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("ddpm: warning: ") and line.endswith("; left out") for line in lines)
    assert all("expected " in line and ", found " in line for line in lines[:5])
    found = json.loads((folder_of(workdir) / "results.json").read_text())
    assert found["people"] == ["good"] and len(found["refused"]) == 6
    assert [each["errors"] for each in found["conditions"]] == [5, 0]
    _, err = run("--mode=study", f"--workdir={workdir}", *inputs[1:3], code=3)
    last = err.splitlines()[-1]
    assert last.startswith("ddpm: error[3]: --input=") and "found 2 that cannot be used" in last


def test_nobody_who_passes_the_checks_is_an_error(workdir, tmp_path):
    key = key_of(workdir)
    (tmp_path / "a.json").write_text(json.dumps(answers(key, pairs_of(key, -1), "a")))
    _, err = run("--mode=study", f"--workdir={workdir}", f"--input={tmp_path}", code=3)
    assert err == (
        "ddpm: error[3]: --input: expected people who passed the checks, found 1 who did not; "
        "ask more people\n"
    )


def test_another_study_does_not_replace_one_that_may_have_answers(workdir):
    before = (folder_of(workdir) / "study.html").read_bytes()
    run("--mode=study", f"--workdir={workdir}", *OPTIONS)  # the same one
    assert (folder_of(workdir) / "study.html").read_bytes() == before
    _, err = run("--mode=study", f"--workdir={workdir}", *OPTIONS, "--config.study.seed=1", code=4)
    assert err.count("\n") == 1 and "move the folder away" in err
    assert (folder_of(workdir) / "study.html").read_bytes() == before


def test_pictures_of_files_are_a_condition(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
    save_npz(tmp_path / "some.npz", images)
    files = f"--config.study.samples=('{tmp_path}/some.npz',)"
    run("--mode=study", f"--workdir={workdir}", files)
    key, shown = key_of(workdir), shown_by(workdir)
    assert key["names"] == [f"{tmp_path}/some.npz"] and len(key["pairs"]) == 8
    for pair, uris in zip(key["pairs"], shown["pairs"], strict=True):
        if pair["condition"] == 0:
            found = pixels(uris[1 - pair["real"]])
            np.testing.assert_array_equal(found, picture(images[pair["sample"]]))


REFUSED = {
    "--config.study.samplers=('ddim:uniform:4:5',)": (2, 'such as "ddim:uniform:20"'),
    "--config.study.samplers=('dim',)": (2, "sampler.name: 'dim' is not known"),
    "--config.study.samplers=('ddim:uniform:21',)": (2, "sampler.steps: "),
    "--config.study.samplers=(1,)": (2, "study.samplers: expected a tuple of names"),
    "--config.study.weights=('best',)": (2, "study.weights: expected a tuple of ema"),
    "--config.study.max_failed=1.5": (2, "study.max_failed: expected a fraction"),
    "--config.study.num=292": (2, "study.num: expected 297 images of test for it, found 296"),
    "--config.study.samples=('nowhere',)": (3, "nowhere: expected images, found no file"),
    "--config.study.split=valid": (3, "expected a split 'valid'"),
    "--input=nowhere.json": (4, "expected a study, found none"),
}


@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_be_studied_is_refused_in_one_line(trained, option):
    code, text = REFUSED[option]
    _, err = run("--mode=study", f"--workdir={trained[0]}", option, code=code)
    assert err.count("\n") == 1 and text in err


def test_real_pictures_are_of_the_class_of_the_generated_ones():
    """So that a pair is not told by what it shows; 10 is the class that is none."""
    split, rng = digits("test"), np.random.default_rng(0)
    classes = [*range(10)] * 4 + [-1, 10] * 3
    index, images = study.choose_real(split, classes, rng)
    np.testing.assert_array_equal(split.read(index)[1][:40], classes[:40])
    np.testing.assert_array_equal(split.read(index)[0], images)
    assert len({*index}) == 46
    few = ImageDataset(4, (8, 8, 1), 10, lambda i: (images[: len(i)], np.array([0, 1, 1, 2])))
    with pytest.raises(DataError, match="more real images of class 1, found 2 among 4"):
        study.choose_real(few, [1, 1, 1], rng)


def test_real_pictures_are_of_the_classes_that_a_model_is_told_to_draw(tmp_path):
    workdir = tmp_path / "run"
    options = "--config.train.steps=4", "--config.train.sample_every=0"
    run(f"{TINY},conditional", f"--workdir={workdir}", *options)
    for label in (-1, 7):
        options = f"--config.sample.label={label}", "--config.study.num=20"
        run("--mode=study", f"--workdir={workdir}", *options)
        (folder,) = (workdir / "study").iterdir()
        key = json.loads((folder / "study.json").read_text())
        pairs = [pair for pair in key["pairs"] if pair["condition"] == 0]
        found = digits("test").read([pair["image"] for pair in pairs])[1]
        wanted = [pair["sample"] % 10 if label < 0 else label for pair in pairs]
        np.testing.assert_array_equal(found, wanted)
        shutil.rmtree(folder)
