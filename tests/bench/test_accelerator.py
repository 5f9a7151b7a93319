"""`make accelerator`: the whole plan on a CPU with tiny networks; parts that hang, fail or lack."""

import contextlib
import json
import os
import re
import select
import signal
import statistics
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import main
from diffusion.bench import accelerator, accelerator_report
from diffusion.bench.accelerator_plan import END, PLAN, TRAINED, Part, command, read_settings
from diffusion.convert import readers
from diffusion.runtime import cli, config, validation
from diffusion.utils.errors import STOPPED
from tests.runs import environment, latest_state, run

CPU = {"DEVICE": "cpu"}


def settings_for(tmp_path, **env):
    out, data = tmp_path / "out", tmp_path / "no_data"
    out.mkdir(exist_ok=True)
    return read_settings({"OUT": str(out), "DATA": str(data), **CPU, **env})


def in_this_process(settings, scratch):
    """Runs parts by main.main: processes of their own would each import for seconds."""

    def run_part(part, seconds, grace_s, log):
        out, err = run(*command(part, settings, scratch)[2:])
        log.write_text(out + err)
        return 0, False

    return run_part


# The same programs with another type or size, or of another work directory.
SIMILAR = ("training in float32", "training at 256x256", "scores of the 8 bits")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """(scratch folder, OUT, report.json, report.md) of all parts but those like others."""
    tmp_path = tmp_path_factory.mktemp("accelerator")
    s, scratch = settings_for(tmp_path, BUDGET_S="9999"), tmp_path / "scratch"
    scratch.mkdir()
    content = {"device": "1 x cpu", "config": s.config, "budget_s": s.budget_s, "extra": ""}
    content |= {"versions": accelerator_report.versions(), "parts": []}
    plan = [part for part in PLAN if part.name not in SIMILAR]
    run_part = in_this_process(s, scratch)
    accelerator.run_plan(plan, s, scratch, content, run_part, lambda: 0.0)
    report = json.loads((s.out / "report.json").read_text())
    return scratch, s.out, report, (s.out / "report.md").read_text()


@pytest.mark.slow
def test_every_part_is_done(rehearsed):
    *_, report, _ = rehearsed
    names = [part.name for part in PLAN if part.name not in SIMILAR]
    assert [(part["name"], part["outcome"]) for part in report["parts"]] == [
        (name, "done") for name in names
    ]
    for part in report["parts"]:
        values = [value for figure in part["figures"] for value in figure["values"]]
        assert np.isfinite(values).all() and part["log"]
        assert bool(values) == (part["name"] not in ("pictures", "import of the 8 bits"))


@pytest.mark.slow
def test_what_comes_out_is_small(rehearsed):
    _, out, _, text = rehearsed
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    pictures = {"samples.png", "progressive.png", "frontier.png"}
    assert names == {"report.md", "report.json", "weights-1-of-1.safetensors"} | pictures
    assert all((out / name).stat().st_size <= 15e6 for name in names)
    assert set(re.findall(r"\]\((.*?)\)", text)) == pictures
    for name in pictures:
        with Image.open(out / name) as image:
            assert min(image.size) > 8 and len(image.convert("L").getcolors(2**16)) > 2


@pytest.mark.slow
def test_the_weights_in_out_are_those_of_the_training(rehearsed):
    """From OUT itself, beside the report: within half a step of each channel."""
    scratch, out, *_ = rehearsed
    state, weights = latest_state(scratch / "run"), readers.read(out)
    assert weights.step == 8 and weights.config["data"]["source"] == "digits"
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights.ema)
    found = {f".ema{jax.tree_util.keystr(path)}": x for path, x in leaves}
    assert found.keys() == {name for name in state if name.startswith(".ema")}
    for name in found:
        w = state[name]
        step = np.abs(w).max(axis=tuple(range(w.ndim - 1))) / 127 if w.ndim > 1 else 0 * w
        assert (np.abs(found[name] - w) <= 0.5001 * step).all(), name


@pytest.mark.slow
def test_the_tables_are_the_figures_of_the_parts(rehearsed):
    """Every figure in report.json is in its file and, as a median, in a row of report.md."""
    scratch, _, report, text = rehearsed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    by_name = {part["name"]: part for part in report["parts"]}
    for part in report["parts"]:
        for figure in part["figures"]:
            middle = f"{statistics.median(figure['values']):.4g}"
            row = [figure["what"].strip(), middle, figure["unit"]]
            assert row in [[r[0], r[1].split(" ")[0], r[2]] for r in rows if len(r) == 3]
    (path,) = scratch.glob("run/eval/*/bpd.json")
    bits = json.loads(path.read_text())["bits_per_dim"]
    found = {x["what"]: x["values"] for x in by_name["bits/dim"]["figures"]}
    assert bits and all(found[what] == [each["mean"]] for what, each in bits.items())
    (path,) = scratch.glob("run/eval/*/metrics.json")
    scores = json.loads(path.read_text())["scores"]["ema"]["train"]
    found = {x["what"]: x["values"] for x in by_name["scores"]["figures"]}
    assert {name.split("_")[-1] for name in scores} >= {"classifier", "random"}
    assert all(found[f"{name} against train"] == [x["value"]] for name, x in scores.items())
    (path,) = scratch.glob("bench_training/bench/train.json")
    assert by_name["training"]["figures"] == json.loads(path.read_text())["measured"]
    pace = next(x for x in by_name["training"]["figures"] if x["unit"] == "steps/s")["values"]
    (row,) = (r for r in rows if len(r) > 3 and r[0] == "training")
    assert row[1].split()[0] == f"{statistics.median(pace):.4g}"


@pytest.mark.parametrize("device", ["gpu", "tpu", "cpu"])
def test_every_command_is_one_that_the_program_takes(device, tmp_path):
    settings = settings_for(tmp_path, DEVICE=device)
    for part in PLAN:
        _, file, *args = command(part, settings, tmp_path)
        assert file == "main.py" and not any("{" in arg for arg in args)
        flags = main.define_flags()
        taken = config.resolve(flags, [file, *args], lambda _: None)
        assert taken.mode == part.mode and taken.workdir == tmp_path / part.workdir
        cli.check_flags(taken)
        validation.validate(taken.config)
        if part.mode in ("train", "bench") and device != "cpu":
            wanted = "float32" if "float32" in part.name else "bfloat16"
            assert taken.config.model.dtype == wanted
            assert taken.config.data.image_size == (256 if "256" in part.name else 32)
        if part.mode == "train":
            assert taken.config.data.data_dir == str(settings.data)


def test_extra_flags_have_the_last_word(tmp_path):
    extra = "--config.bpd.num=7 '--config.eval.features=(\"pixels\",)'"
    part = next(part for part in PLAN if part.mode == "eval")
    args = command(part, settings_for(tmp_path, EXTRA=extra), tmp_path)[1:]
    taken = config.resolve(main.define_flags(), args, lambda _: None).config
    assert taken.bpd.num == 7 and taken.eval.features == ("pixels",)


@pytest.mark.parametrize(
    "env, words",
    [
        ({"DEVICE": "npu"}, "gpu, tpu or cpu, found npu"),
        ({"BUDGET_S": "9m"}, "BUDGET_S: expected seconds, found 9m"),
    ],
)
def test_wrong_settings_are_one_line(env, words, capsys):
    assert accelerator.measure_device(CPU | env) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_without_the_device_nothing_runs(tmp_path, capsys):
    env = environment(DEVICE="tpu", OUT=tmp_path / "out")
    assert accelerator.measure_device(env) == 2
    err = capsys.readouterr().err
    assert "DEVICE=tpu: expected one that JAX sees" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# The clock and the budget, without processes


def run_on_a_clock(plan, tmp_path, took, budget_s=100):
    """Runs a plan on a clock that is not real; took: (part, seconds, grace_s) -> (code, late, s).

    Returns (results, the clock, [(name, seconds, when it ended)]).
    """
    now, calls = [0.0], []

    def run_part(part, seconds, grace_s, log):
        code, late, spent = took(part, seconds, grace_s)
        now[0] += spent
        calls.append((part.name, seconds, now[0]))
        return code, late

    settings, content = settings_for(tmp_path, BUDGET_S=str(budget_s)), {"parts": []}
    content |= {"device": "none", "config": "", "extra": "", "budget_s": budget_s, "versions": {}}
    accelerator.run_plan(plan, settings, tmp_path, content, run_part, lambda: now[0])
    return content["parts"], now[0], calls


def without_needs(plan=PLAN):
    return [part._replace(needs="", files=(), results="") for part in plan]


@pytest.mark.parametrize("budget_s", [1, 100, 540, 3600])
def test_parts_that_all_hang_keep_to_the_budget(tmp_path, budget_s):
    def hang(part, seconds, grace_s):
        return -signal.SIGKILL, True, seconds + grace_s

    results, end, calls = run_on_a_clock(without_needs(), tmp_path, hang, budget_s)
    assert end <= END * budget_s * (1 + 1e-9) and len(results) == len(PLAN)
    ended = {name: when for name, _, when in calls}
    assert all(seconds >= accelerator.LEAST * budget_s for _, seconds, _ in calls)
    assert ended["a short training"] <= TRAINED * budget_s * (1 + 1e-9)
    assert {"training", "weights in 8 bits"} <= ended.keys()
    for result in results:
        ran = result["name"] in ended
        assert result["outcome"].startswith("stopped after" if ran else "skipped: too little time")


def test_a_training_has_all_the_time_that_is_left_but_two_minutes_of_nine(tmp_path):
    """Where the parts before take no time, and where they take all of theirs."""
    for share, least in ((0.0, 0.6), (1.0, 0.1)):
        _, _, calls = run_on_a_clock(
            without_needs(), tmp_path, lambda part, s, grace_s, share=share: (0, False, share * s)
        )
        given = {name: seconds for name, seconds, _ in calls}["a short training"]
        assert given >= least * 100
    assert (1 - TRAINED) * 540 >= 120


def test_parts_that_fail_do_not_stop_the_others(tmp_path):
    def fail(part, seconds, grace_s):
        (tmp_path / f"{len(seen)}.log").write_text("Traceback\nddpm: error[3]: data: none\n")
        seen.append(part.name)
        return 3, False, 1.0

    seen = []
    results, _, _ = run_on_a_clock(without_needs(), tmp_path, fail)
    assert seen == [part.name for part in PLAN]
    failed = {"failed with code 3: ddpm: error[3]: data: none"}
    assert {result["outcome"] for result in results} == failed
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count("ddpm: error[3]: data: none") == len(PLAN)


def test_parts_whose_input_is_missing_are_skipped_in_one_line(tmp_path):
    """Without trained weights the plan ends with the training."""
    results, *_ = run_on_a_clock(PLAN, tmp_path, lambda *args: (3, False, 1.0))
    skipped = [r["outcome"] for r in results if r["outcome"].startswith("skipped")]
    assert len(skipped) == sum(bool(part.needs) for part in PLAN) == len(PLAN) - 5
    assert all("no part before it has left" in text and "\n" not in text for text in skipped)


def test_data_that_are_missing_are_one_line(tmp_path):
    """The training's own error is what the report says of it."""
    settings = settings_for(tmp_path, CONFIG="configs/cifar10.py:tiny")
    (part,) = (part for part in PLAN if part.mode == "train")
    out, err = run(*command(part, settings, tmp_path)[2:], code=3)
    text = accelerator.outcome(3, False, 9.0, (out + err).splitlines())
    assert text.startswith("failed with code 3: ddpm: error[3]: ") and str(settings.data) in text


@pytest.mark.parametrize(
    "code, late, log, words",
    [
        (0, False, ["done"], "done"),
        (STOPPED, True, ["x", "stopped    at step 9, saved; the same"], "stopped after 9 s, saved"),
        (STOPPED, True, ["ddpm: stopped"], "stopped after 9 s"),
        (-9, True, ["step 5, saved"], "stopped after 9 s"),
        (1, False, ["RuntimeError: x", "and more"], "failed with code 1: RuntimeError: x"),
        (-11, False, [], "failed with code -11: no output"),
    ],
)
def test_outcomes(code, late, log, words):
    assert accelerator.outcome(code, late, 9.0, log) == words


@pytest.mark.parametrize(
    "sizes, words", [((10, 10, 10), ""), ((10,) * 4, "found 4 of"), ((10, 101), "of 0 MB, found 2")]
)
def test_more_files_than_there_is_room_for_are_left_out(tmp_path, monkeypatch, sizes, words):
    monkeypatch.setattr(accelerator, "MAX_BYTES", 100)
    for i, size in enumerate(sizes):
        (tmp_path / f"weights-{i}").write_bytes(bytes(size))
    (tmp_path / "out").mkdir()
    part = PLAN[0]._replace(files=("weights-*",))
    said = accelerator.collect(part, tmp_path, tmp_path / "out")
    assert len([*(tmp_path / "out").iterdir()]) == (0 if words else len(sizes))
    assert words in said and bool(words) == bool(said)


def test_figures_that_cannot_be_read_are_none(tmp_path):
    part = PLAN[0]._replace(results="*.json")
    assert accelerator.read_figures(part, tmp_path) == {}
    for text in ("", "{", "[]", "{}"):
        (tmp_path / "x.json").write_text(text)
        assert accelerator.read_figures(part, tmp_path) == {}


# Processes


def start(program, seconds, tmp_path):
    log = tmp_path / "log"
    args = [sys.executable, "-c", program], seconds, 0.1, log, os.environ
    return *accelerator.run_process(*args), log.read_text()


def test_a_process_that_ends_is_waited_for(tmp_path):
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    code, late, text = start(program, 60, tmp_path)
    assert (code, late) == (3, False) and {"out", "err"} == set(text.split())


@pytest.mark.parametrize("deaf", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN);"])
def test_a_process_that_hangs_is_stopped(tmp_path, deaf):
    code, late, _ = start(f"import signal, time; {deaf} time.sleep(999)", 0.2, tmp_path)
    assert late and code in (-signal.SIGTERM, -signal.SIGKILL)


def test_nothing_that_a_process_has_started_outlives_it(tmp_path):
    program = "import subprocess; print(subprocess.Popen(['sleep', '999']).pid, flush=True)"
    code, _, text = start(program, 60, tmp_path)
    assert code == 0
    with contextlib.suppress(ProcessLookupError):  # gone already
        ended, *_ = select.select([os.pidfd_open(int(text))], [], [], 60)
        assert ended


@pytest.mark.slow
def test_the_script_itself(tmp_path, monkeypatch, capfd):
    """A part that works and one that fails, in processes of their own, into a used folder."""
    (tmp_path / "out").mkdir()
    for name in ("weights-7-of-9.safetensors", "report.md", "mine.txt"):
        (tmp_path / "out" / name).write_text("old")
    good = PLAN[0]._replace(name="good")
    bad = Part("bad", "sample", "nowhere", "", 1.0, accelerator_report.read_nothing, "")
    monkeypatch.setattr(accelerator, "PLAN", (bad, good))
    env = environment(OUT=tmp_path / "out", BUDGET_S=5000, **CPU)
    assert accelerator.measure_device(env) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    first, second = (part["outcome"] for part in report["parts"])
    assert first.startswith("failed with code 4: ddpm: error[4]: ") and second == "done"
    assert report["device"].endswith("x cpu") and report["versions"]["jax"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "report.json", "mine.txt"}
    assert "good" in capfd.readouterr().out
