"""log.py: files are read back by TensorBoard and by JSON, the console by a fake terminal."""

import io
import itertools
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from tensorboard.util.tensor_util import make_ndarray

from diffusion.utils import logging, metric_writer
from diffusion.utils.progress import Progress, human_bytes, human_time

ROOT = pathlib.Path(__file__).parent.parent


def lines(workdir):
    """Strict JSON: a bare NaN, which Python alone would read, is an error."""

    def refuse(word):
        raise AssertionError(f"not JSON: {word}")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(workdir):
    return [line["step"] for line in lines(workdir)]


def events(workdir):
    return EventAccumulator(str(workdir), tensor_size_guidance={"images": 0, "scalars": 0}).Reload()


def scalars(workdir, tag):
    return [(e.step, make_ndarray(e.tensor_proto).item()) for e in events(workdir).Tensors(tag)]


def write(workdir, at, step=None):
    writer = metric_writer.open_writer(workdir, step)
    for s in at:
        writer.write_scalars(s, {"loss": s / 8})
    writer.close()




def test_event_file_scalars_read_back_in_order(tmp_path):
    writer = metric_writer.open_writer(tmp_path)
    writer.write_scalars(1, {"loss": 0.5, "lr": jnp.float32(0.25)})
    writer.write_scalars(np.int64(2), {"loss": np.float32(0.125)})
    writer.write_scalars(3, {"loss": float("nan"), "lr": 1e300})
    writer.flush()
    (_, first), (_, second), (_, third) = scalars(tmp_path, "loss")
    assert (first, second) == (0.5, 0.125) and np.isnan(third)
    assert scalars(tmp_path, "lr") == [(1, 0.25), (3, np.inf)]  # float32 holds no 1e300
    assert events(tmp_path).SummaryMetadata("loss").plugin_data.plugin_name == "scalars"
    writer.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_event_file_images_have_the_same_pixels(tmp_path, channels):
    images = np.arange(2 * 4 * 5 * channels, dtype=np.uint8).reshape(2, 4, 5, channels)
    writer = metric_writer.open_writer(tmp_path)
    writer.write_images(7, {"samples": images})
    writer.close()
    (event,) = events(tmp_path).Tensors("samples")
    width, height, *pngs = make_ndarray(event.tensor_proto)
    assert (event.step, width, height) == (7, b"5", b"4")
    back = [np.asarray(Image.open(io.BytesIO(png))).reshape(4, 5, channels) for png in pngs]
    np.testing.assert_array_equal(back, images)
    assert events(tmp_path).SummaryMetadata("samples").plugin_data.plugin_name == "images"
    assert lines(tmp_path) == []


def test_event_file_texts_and_hyper_parameters(tmp_path):
    writer = metric_writer.open_writer(tmp_path)
    config = {
        "seed": 1,
        "model": {"ch": 32, "ch_mult": (1, 2)},
        "optim": {"ema": True, "clip": None},
    }
    params = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 1, 8), jnp.float32)}}
    metric_writer.write_config(writer, config, params)
    writer.close()
    read = events(tmp_path)
    text = {tag: make_ndarray(read.Tensors(tag)[0].tensor_proto).item().decode() for tag in
            ("config", "parameters")}  # fmt: skip
    code = re.fullmatch(r"```json\n(.*)\n```", text["config"], re.DOTALL).group(1)
    assert json.loads(code) == json.loads(json.dumps(config))
    assert "conv/kernel" in text["parameters"] and "(3, 3, 1, 8)" in text["parameters"]
    assert read.SummaryMetadata("config").plugin_data.plugin_name == "text"
    (content,) = read.PluginTagToContent("hparams").values()
    hparams = parse_session_start_info_plugin_data(content).hparams
    assert hparams["model.ch"].number_value == 32 and hparams["model.ch_mult.1"].number_value == 2
    assert hparams["optim.ema"].bool_value is True and hparams["optim.clip"].string_value == ""


def test_event_files_of_a_resumed_run_show_no_abandoned_step(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3], step=2)
    assert scalars(tmp_path, "loss") == [(1, 1 / 8), (2, 2 / 8), (3, 3 / 8)]


def test_event_file_of_a_killed_run_has_all_that_was_written(tmp_path):
    code = (
        "import os, sys, signal; from diffusion import log\n"
        "w = log.open_writer(sys.argv[1]); w.write_scalars(5, {'loss': 1.5}); w.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT).returncode == -9
    assert scalars(tmp_path, "loss") == [(5, 1.5)]
    assert steps(tmp_path) == [5]


def test_two_writers_of_one_second_do_not_share_a_file(tmp_path):
    write(tmp_path, [1])
    write(tmp_path, [2])
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert scalars(tmp_path, "loss") == [(1, 1 / 8), (2, 2 / 8)]




def test_metrics_have_one_object_per_call(tmp_path):
    writer = metric_writer.open_writer(tmp_path / "a" / "run")
    writer.write_scalars(1, {"loss": 0.1, "lr": jnp.float32(0.5)})
    writer.write_scalars(2, {"a": float("nan"), "b": np.inf, "c": -np.inf})
    writer.close()
    one, two = lines(tmp_path / "a" / "run")
    assert list(one) == ["step", "time", "loss", "lr"]
    assert (one["step"], one["loss"], one["lr"]) == (1, 0.1, 0.5)
    assert 1.6e9 < one["time"] <= two["time"]
    assert [two[k] for k in "abc"] == ["NaN", "Infinity", "-Infinity"]
    np.testing.assert_array_equal([float(two[k]) for k in "abc"], [np.nan, np.inf, -np.inf])


def test_metrics_as_the_caller_had_them_at_the_call(tmp_path):
    writer, row = metric_writer.open_writer(tmp_path), {}
    for row["loss"] in range(20):
        writer.write_scalars(row["loss"], row)
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(i, i) for i in range(20)]


@pytest.mark.parametrize(
    "step, kept", [(None, [0, 2, 4, 6]), (6, [0, 2, 4, 6]), (4, [0, 2, 4]), (3, [0, 2]), (-1, [])]
)
def test_metrics_after_the_resumed_step_are_dropped(tmp_path, step, kept):
    write(tmp_path, [0, 2, 4, 6])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write(tmp_path, [9], step=step)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1] == before[: len(kept)]
    assert steps(tmp_path) == [*kept, 9]
    assert not list(tmp_path.glob(".*"))


def test_metrics_of_an_interrupted_run_are_those_of_one_never_interrupted(tmp_path):
    write(tmp_path / "a", range(1, 9))
    write(tmp_path / "b", range(1, 7))
    write(tmp_path / "b", range(5, 9), step=4)
    strip = [
        [{k: v for k, v in x.items() if k != "time"} for x in lines(tmp_path / d)] for d in "ab"
    ]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("step", [None, 5])
@pytest.mark.parametrize("torn", [b'{"step": 3, "ti', b"{", b"\xff\xfe", b"[1]", b'{"step": null}'])
def test_metrics_torn_by_a_kill_are_mended(tmp_path, torn, step):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    write(tmp_path, [3], step=step)
    assert steps(tmp_path) == [1, 2, 3]


def test_metrics_whose_last_line_lacks_only_its_end_keep_it(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, [3])
    assert steps(tmp_path) == [1, 2, 3]




def test_writer_of_no_directory_checks_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = metric_writer.open_writer(None, step=3)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"x": np.zeros([1, 2, 2, 3], np.uint8)})
    metric_writer.write_config(writer, {"seed": 0})
    with pytest.raises(ValueError, match="step"):
        writer.write_scalars(1, {"step": 1.0})
    writer.flush()
    writer.close()
    assert os.listdir(tmp_path) == []


def test_writer_refuses_wrong_calls_where_they_are_made(tmp_path):
    writer = metric_writer.open_writer(tmp_path)
    with pytest.raises(
        ValueError, match=r"x: expected uint8\[n, h, w, 1 or 3\], found float32\[1, 2"
    ):
        writer.write_images(1, {"x": np.zeros([1, 2, 2, 3], np.float32)})
    for shape in [(2, 2, 3), (1, 2, 2, 4)]:
        with pytest.raises(ValueError, match="expected uint8"):
            writer.write_images(1, {"x": np.zeros(shape, np.uint8)})
    with pytest.raises(ValueError, match="'time' is taken"):
        writer.write_scalars(1, {"time": 1.0})
    with pytest.raises(NotImplementedError):
        writer.write_histograms(1, {"w": np.zeros(3)})
    writer.close()
    assert lines(tmp_path) == []


def test_writer_without_a_writable_directory_fails_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        metric_writer.open_writer(tmp_path / "file")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(OSError):
        metric_writer.open_writer(tmp_path / "run")


def test_writer_on_a_read_only_disk_fails_at_once(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(logging, "open", refused, raising=False)
    with pytest.raises(PermissionError):
        metric_writer.open_writer(tmp_path)


def test_a_full_disk_is_one_warning_and_no_half_record(tmp_path, monkeypatch, capsys):
    class Full(io.FileIO):
        def __init__(self, path, mode):
            super().__init__(path, "ab")
            self.seek(0, 2)

        def write(self, data):
            super().write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    writer = metric_writer.open_writer(tmp_path)
    writer.write_scalars(1, {"loss": 1.0})
    writer.flush()
    monkeypatch.setattr(logging, "open", Full, raising=False)
    for step in (2, 3):
        writer.write_scalars(step, {"loss": 1.0})
        writer.flush()
    monkeypatch.undo()
    for step in (4, 5):
        writer.write_scalars(step, {"loss": 1.0})
    writer.close()
    assert steps(tmp_path) == [1, 4, 5]
    assert scalars(tmp_path, "loss") == [(1, 1.0), (4, 1.0), (5, 1.0)]
    said = capsys.readouterr().err.splitlines()
    assert len([x for x in said if "No space left" in x]) == 2  # one per file
    assert len([x for x in said if "2 records lost" in x]) == 2
    assert len(said) == 4


def test_writer_leaves_no_thread(tmp_path):
    before = threading.active_count()
    for step in range(3):
        write(tmp_path, [step])
    assert threading.active_count() == before


def test_parameter_table_sums_arrays_and_shapes():
    params = {"a": {"w": np.zeros([10, 200], np.float32)}, "b": jnp.zeros([5])}
    table = metric_writer.parameter_table(params)
    assert "a/w" in table and "(10, 200)" in table
    assert "2,005 -- 8,020 bytes" in table  # 10 * 200 + 5 numbers of 4 bytes
    assert metric_writer.parameter_table(jax.eval_shape(lambda: params)) == table




def test_import_is_quiet_and_never_takes_an_installed_tensorflow(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise AssertionError('TensorFlow!')")
    code = (
        "import sys; import numpy as np; from diffusion import log\n"
        "w = log.open_writer(sys.argv[1], 0); w.write_scalars(1, {'loss': 1.0})\n"
        "w.write_images(1, {'x': np.zeros([1, 2, 2, 3], np.uint8)})\n"
        "log.write_config(w, {'seed': 1}, {'a': np.zeros(3)}); w.close()\n"
        "from clu import metric_writers, periodic_actions\n"
        "assert type(metric_writers.SummaryWriter(sys.argv[1])) is log.SummaryWriter\n"
        "from tensorboard.backend.event_processing import event_accumulator\n"
        "event_accumulator.EventAccumulator(sys.argv[1]).Reload()\n"
        "assert 'tensorflow' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "from absl import app, logging\n"
        "def main(_):\n  log.quiet(); logging.info('info'); logging.warning('careful')\n"
        "app.run(main, sys.argv[:1])"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and re.fullmatch(r"W\d+ .*\] careful\n", done.stderr), done.stderr


def test_quiet_leaves_a_verbosity_that_was_asked_for():
    code = (
        "from absl import app, logging; from diffusion import log\n"
        "def main(_):\n  log.quiet(); logging.info('info')\n"
        "app.run(main, ['x', '--verbosity=0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "] info" in done.stderr




class Clock:
    """Time passes when told to."""

    now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The rows a person sees. tqdm moves the cursor by \\r, \\n and one row up."""
        rows, y, x = [[]], 0, 0
        for piece in re.findall(r"\x1b\[A|[\r\n]|[^\r\n\x1b]+", self.getvalue()):
            if piece == "\x1b[A":
                y -= 1
            elif piece == "\n":
                y, x = y + 1, 0
                rows += [[]] * (y == len(rows))
            elif piece == "\r":
                x = 0
            else:
                rows[y] = rows[y] + [" "] * (x - len(rows[y]))
                rows[y][x : x + len(piece)] = piece
                x += len(piece)
        return "\n".join("".join(row).rstrip() for row in rows).rstrip().split("\n")


def run(clock, progress, first, last, seconds, values=None):
    """Steps first..last, each taking `seconds`."""
    for step in range(first, last + 1):
        clock.now += seconds
        progress(step, values)


def test_progress_line_in_closed_form():
    clock, out = Clock(), io.StringIO()
    progress = Progress(5000, 0, 128, stream=out, clock=clock)
    run(clock, progress, 1, 1, 90.0, {"loss": 0.5, "lr": 2e-4})  # compiles
    run(clock, progress, 2, 1200, 1 / 32, {"loss": 0.03125, "lr": None})
    first, *_, last = out.getvalue().splitlines()
    assert first == "step 1/5,000  0%  first step took 1m30s  loss 0.5  lr 0.0002"
    # Lines at steps 1, 65 (2 s later), 385, 705, 1025 (10 s each). (5000 - 1025) / 32 = 124.2 s.
    assert last == (
        "step 1,025/5,000  20%  ETA 2m04s  loss 0.03125  lr 0.0002  32 steps/s  4,096 images/s"
    )
    assert re.findall(r"^step ([\d,]+)/", out.getvalue(), re.M) == [
        "1",
        "65",
        "385",
        "705",
        "1,025",
    ]


def test_progress_rate_is_of_the_last_lines_and_not_of_the_start():
    clock, out = Clock(), io.StringIO()
    progress = Progress(10000, 0, stream=out, clock=clock, every_s=8.0)
    run(clock, progress, 1, 1, 500.0)
    run(clock, progress, 2, 9, 0.25)  # 2 s: the early line
    run(clock, progress, 10, 41, 0.25)  # 8 s at 4 a second
    run(clock, progress, 42, 49, 1.0)  # 8 s at 1 a second
    rates = re.findall(r"([\d.]+) steps/s", out.getvalue())
    assert rates == ["4", "4", "1"]


def test_progress_slow_steps_resumed_runs_and_names():
    clock, out = Clock(), io.StringIO()
    progress = Progress(12, 4, 5, stream=out, clock=clock, unit="batch", items="faces")
    run(clock, progress, 5, 7, 20.0)
    assert out.getvalue().splitlines() == [
        "batch 5/12  41%  first batch took 20s",
        "batch 6/12  50%  ETA 2m00s  20s/batch  0.25 faces/s",
        "batch 7/12  58%  ETA 1m40s  20s/batch  0.25 faces/s",
    ]


def test_progress_ends_with_the_total_time_and_the_mean_rate():
    clock, out = Clock(), io.StringIO()
    with Progress(9, 0, 3, stream=out, clock=clock, unit="chunk") as progress:
        run(clock, progress, 1, 1, 100.0)
        run(clock, progress, 2, 9, 0.5, {"loss": 2.0})
        progress(9)
    assert out.getvalue().splitlines()[-1] == (
        "chunk 9/9  100%  done in 1m44s  loss 2  2 chunks/s  6 images/s"
    )
    assert out.getvalue().count("done") == 1


def test_progress_stopped_early_says_so():
    clock, out = Clock(), io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        with Progress(9, stream=out, clock=clock) as progress:
            run(clock, progress, 1, 3, 1.0)
            raise KeyboardInterrupt
    assert out.getvalue().splitlines()[-1] == "step 3/9  33%  stopped after 3.0s  1 steps/s"


def test_progress_pauses_count_in_the_total_and_not_in_the_rate():
    clock, out = Clock(), io.StringIO()
    progress = Progress(100, stream=out, clock=clock)
    with progress.paused():  # before the first step, too
        clock.now += 7
    run(clock, progress, 1, 5, 1.0)
    with progress.paused():
        clock.now += 50
    run(clock, progress, 6, 100, 1.0)
    assert re.findall(r"step (\d+)/", out.getvalue())[:4] == ["1", "3", "13", "23"]
    assert set(re.findall(r"\S+ steps/s|\S+/step", out.getvalue())) == {"1 steps/s"}
    assert "100%  done in 2m37s  1 steps/s" in out.getvalue()


def test_progress_rate_between_two_questions():
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock)
    run(clock, progress, 1, 4, 9.0)
    assert progress.rate() is None  # nothing to count from
    run(clock, progress, 5, 24, 0.5)
    with progress.paused():
        clock.now += 50
    assert progress.rate() == 2.0
    run(clock, progress, 25, 28, 0.25)
    assert progress.rate() == 4.0


def test_progress_of_nothing_says_nothing():
    out = io.StringIO()
    with Progress(5, 5, stream=out):
        pass
    with Progress(5, stream=out, silent=True) as progress:
        progress(1, {"loss": 1.0})
        progress(5)
    assert out.getvalue() == ""
    with pytest.raises(ValueError, match="expected 0 <= start <= total, found 6 and 5"):
        Progress(5, 6)


def test_progress_that_prints_nothing_reads_the_clock_and_no_value():
    """A value is formatted when a line is due; before that, nothing is done with it."""

    class Lazy:
        def __format__(self, spec):
            raise AssertionError("formatted")

    clock, out = Clock(), io.StringIO()
    progress = Progress(100, stream=out, clock=clock)
    progress(1)
    progress(2, {"loss": Lazy()})
    assert out.getvalue().count("\n") == 1


def test_progress_on_a_terminal_is_a_bar_that_goes_away():
    clock, out = Clock(), Terminal()
    progress = Progress(40, 0, 8, stream=out, clock=clock)
    assert out.screen()[-1].endswith("step 0/40  0%")
    run(clock, progress, 1, 1, 60.0)
    assert out.screen()[-1].endswith("step 1/40  2%  first step took 1m00s")
    run(clock, progress, 2, 20, 0.5, {"loss": 0.25})
    bar = out.screen()[-1]
    assert bar.endswith("step 20/40  50%  ETA 10s  loss 0.25  2 steps/s  16 images/s")
    assert bar.startswith("#####")  # half of ten: a StringIO's encoding is not known to have blocks
    assert out.getvalue().count("\n") == 0
    run(clock, progress, 21, 40, 0.5)
    assert out.screen() == ["step 40/40  100%  done in 1m20s  loss 0.25  2 steps/s  16 images/s"]


def test_progress_on_a_terminal_uses_the_recent_window():
    clock, out, threads = Clock(), Terminal(), set(threading.enumerate())
    with Progress(1000, 0, stream=out, clock=clock, every_s=4.0) as progress:
        run(clock, progress, 1, 21, 0.25)
        run(clock, progress, 22, 23, 1.0)  # in the last 4 s: 8 steps of 0.25 s and 2 of 1 s
        assert "2.5 steps/s" in out.screen()[-1] and "ETA 6m31s" in out.screen()[-1]  # 977 / 2.5
        assert set(threading.enumerate()) <= threads  # tqdm's monitor would be one more


def test_progress_on_a_terminal_of_no_width_is_lines():
    """A container's terminal, whose size nobody has set: the bar would have no place there."""
    ours, theirs = pty.openpty()
    clock = Clock()
    with open(theirs, "w") as stream, Progress(9, 0, stream=stream, clock=clock) as progress:
        run(clock, progress, 1, 9, 1.0)
        assert b"step 1/9" in os.read(ours, 10_000)
    os.close(ours)


def test_say_stands_above_the_bar():
    clock, out = Clock(), Terminal()
    with Progress(40, stream=out, clock=clock) as progress:
        run(clock, progress, 1, 3, 1.0)
        logging.info("saved step 3", out)
        above, bar = out.screen()
        assert above == "saved step 3" and "step 3/40" in bar
        with progress.paused(), Progress(2, stream=out, clock=clock, unit="image") as inner:
            inner(1)
            _, outer_bar, inner_bar = out.screen()
            assert "step 3/40" in outer_bar and "image 1/2" in inner_bar
            inner(2)
        _, said, bar = out.screen()
        assert said == "image 2/2  100%  done in 0.00s" and "step 3/40" in bar
    assert len(out.screen()) == 3 and "stopped after 3.0s" in out.screen()[2]


def test_say_goes_to_stdout_at_once(capsys, monkeypatch):
    logging.info("hello")
    assert capsys.readouterr() == ("hello\n", "")
    flushed = itertools.count()
    out = io.StringIO()
    out.flush = lambda: next(flushed)
    logging.info("hello", out)
    assert next(flushed) == 1


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0.00s"), (0.123, "0.12s"), (0.996, "1.0s"), (8.1, "8.1s"), (9.96, "10s"), (59.4, "59s"),
     (59.6, "1m00s"), (200, "3m20s"), (3599.4, "59m59s"), (3599.6, "1h00m"), (3720, "1h02m"),
     (7199, "2h00m"), (183600, "51h00m"), (363600, "4d05h"), (float("inf"), "?"),
     (float("nan"), "?"), (-1, "?")],
)  # fmt: skip
def test_human_time(seconds, text):
    assert human_time(seconds) == text


@pytest.mark.parametrize(
    "n, text",
    [(0, "0 B"), (512, "512 B"), (999, "999 B"), (1000, "1.0 kB"), (1536, "1.5 kB"),
     (999_960, "1.0 MB"), (142.8e6, "142.8 MB"), (3.2e9, "3.2 GB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_human_bytes(n, text):
    assert human_bytes(n) == text
