"""diffusion.utils.metric_writer: files are read back by TensorBoard's readers and as JSON."""

import io
import json
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from tensorboard.util.tensor_util import make_ndarray

from diffusion.utils import metric_writer
from tests.conftest import ROOT


def read_lines(workdir):
    """Reads metrics.jsonl as strict JSON: a bare NaN, which only Python reads, is an error."""

    def refuse(word):
        raise AssertionError(f"not JSON: {word}")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_steps(workdir):
    return [line["step"] for line in read_lines(workdir)]


def read_events(workdir):
    return EventAccumulator(str(workdir)).Reload()


def read_scalars(workdir, tag):
    """Reads (step, value) pairs as a user's script does."""
    return [(e.step, e.value) for e in read_events(workdir).Scalars(tag)]


def read_tensors(workdir):
    """Reads the events as TensorBoard's server does, which turns all summaries into tensors."""
    return PluginEventAccumulator(str(workdir)).Reload()


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
    (_, first), (_, second), (_, third) = read_scalars(tmp_path, "loss")
    assert (first, second) == (0.5, 0.125) and np.isnan(third)
    assert read_scalars(tmp_path, "lr") == [(1, 0.25), (3, np.inf)]  # float32 holds no 1e300
    assert read_tensors(tmp_path).SummaryMetadata("loss").plugin_data.plugin_name == "scalars"
    values = [make_ndarray(e.tensor_proto) for e in read_tensors(tmp_path).Tensors("lr")]
    np.testing.assert_array_equal(values, [0.25, np.inf])
    writer.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_event_file_images_have_the_same_pixels(tmp_path, channels):
    images = np.arange(2 * 4 * 5 * channels, dtype=np.uint8).reshape(2, 4, 5, channels)
    writer = metric_writer.open_writer(tmp_path)
    writer.write_images(7, {"samples": images})
    writer.close()
    (event,) = read_tensors(tmp_path).Tensors("samples")
    width, height, *pngs = make_ndarray(event.tensor_proto)
    assert (event.step, width, height) == (7, b"5", b"4")
    back = [np.asarray(Image.open(io.BytesIO(png))).reshape(4, 5, channels) for png in pngs]
    np.testing.assert_array_equal(back, images)
    assert read_tensors(tmp_path).SummaryMetadata("samples").plugin_data.plugin_name == "images"
    assert read_lines(tmp_path) == []


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
    read = read_tensors(tmp_path)
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
    assert read_scalars(tmp_path, "loss") == [(1, 1 / 8), (2, 2 / 8), (3, 3 / 8)]
    assert [e.step for e in read_tensors(tmp_path).Tensors("loss")] == [1, 2, 3]


def test_event_file_of_a_killed_run_has_all_that_was_written(tmp_path):
    code = (
        "import os, sys, signal; from diffusion.utils.metric_writer import open_writer\n"
        "w = open_writer(sys.argv[1]); w.write_scalars(5, {'loss': 1.5}); w.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT).returncode == -9
    assert read_scalars(tmp_path, "loss") == [(5, 1.5)]
    assert read_steps(tmp_path) == [5]


def test_two_writers_of_one_second_do_not_share_a_file(tmp_path):
    write(tmp_path, [1])
    write(tmp_path, [2])
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert read_scalars(tmp_path, "loss") == [(1, 1 / 8), (2, 2 / 8)]


def test_metrics_have_one_object_per_call(tmp_path):
    writer = metric_writer.open_writer(tmp_path / "a" / "run")
    writer.write_scalars(1, {"loss": 0.1, "lr": jnp.float32(0.5)})
    writer.write_scalars(2, {"a": float("nan"), "b": np.inf, "c": -np.inf})
    writer.close()
    one, two = read_lines(tmp_path / "a" / "run")
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
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [
        (i, i) for i in range(20)
    ]


@pytest.mark.parametrize(
    "step, kept", [(None, [0, 2, 4, 6]), (6, [0, 2, 4, 6]), (4, [0, 2, 4]), (3, [0, 2]), (-1, [])]
)
def test_metrics_after_the_resumed_step_are_dropped(tmp_path, step, kept):
    write(tmp_path, [0, 2, 4, 6])
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write(tmp_path, [9], step=step)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1] == before[: len(kept)]
    assert read_steps(tmp_path) == [*kept, 9]
    assert not list(tmp_path.glob(".*"))


def test_metrics_of_an_interrupted_run_are_those_of_one_never_interrupted(tmp_path):
    write(tmp_path / "a", range(1, 9))
    write(tmp_path / "b", range(1, 7))
    write(tmp_path / "b", range(5, 9), step=4)
    strip = [
        [{k: v for k, v in x.items() if k != "time"} for x in read_lines(tmp_path / d)]
        for d in "ab"
    ]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("step", [None, 5])
@pytest.mark.parametrize("torn", [b'{"step": 3, "ti', b"{", b"\xff\xfe", b"[1]", b'{"step": null}'])
def test_metrics_torn_by_a_kill_are_mended(tmp_path, torn, step):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    write(tmp_path, [3], step=step)
    assert read_steps(tmp_path) == [1, 2, 3]


def test_metrics_whose_last_line_lacks_only_its_end_keep_it(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, [3])
    assert read_steps(tmp_path) == [1, 2, 3]


def test_writer_of_no_directory_checks_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = metric_writer.open_writer(None, step=3)
    writer.write_scalars(1, {"loss": 1.0})
    writer.write_images(1, {"x": np.zeros([1, 2, 2, 3], np.uint8)})
    metric_writer.write_config(writer, {"seed": 0}, {"w": np.zeros(3)})
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
    with pytest.raises(ValueError, match="'time' is reserved"):
        writer.write_scalars(1, {"time": 1.0})
    with pytest.raises(AttributeError):
        writer.write_histograms(1, {"w": np.zeros(3)})
    writer.close()
    assert read_lines(tmp_path) == []


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

    monkeypatch.setattr(metric_writer, "open", refused, raising=False)
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
    monkeypatch.setattr(metric_writer, "open", Full, raising=False)
    for step in (2, 3):
        writer.write_scalars(step, {"loss": 1.0})
        writer.flush()
    monkeypatch.undo()
    for step in (4, 5):
        writer.write_scalars(step, {"loss": 1.0})
    writer.close()
    assert read_steps(tmp_path) == [1, 4, 5]
    assert read_scalars(tmp_path, "loss") == [(1, 1.0), (4, 1.0), (5, 1.0)]
    warnings = capsys.readouterr().err.splitlines()
    assert len([x for x in warnings if "No space left" in x]) == 2  # one per file
    assert len([x for x in warnings if "2 records lost" in x]) == 2
    assert len(warnings) == 4


def test_writer_leaves_no_thread(tmp_path):
    before = threading.active_count()
    for step in range(3):
        write(tmp_path, [step])
    assert threading.active_count() == before


def test_config_has_a_table_of_the_parameters(tmp_path):
    params = {"a": {"w": np.zeros([10, 200], np.float32)}, "b": jnp.zeros([5])}
    writer = metric_writer.open_writer(tmp_path)
    metric_writer.write_config(writer, {}, params)
    writer.close()
    (event,) = read_tensors(tmp_path).Tensors("parameters")
    table = make_ndarray(event.tensor_proto).item().decode()
    assert "a/w" in table and "(10, 200)" in table
    assert "2,005 -- 8,020 bytes" in table  # 10 * 200 + 5 numbers of 4 bytes


def test_import_never_takes_an_installed_tensorflow(tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise AssertionError('TensorFlow!')")
    code = (
        "import sys; import numpy as np; from diffusion.utils import metric_writer\n"
        "w = metric_writer.open_writer(sys.argv[1], 0); w.write_scalars(1, {'loss': 1.0})\n"
        "w.write_images(1, {'x': np.zeros([1, 2, 2, 3], np.uint8)})\n"
        "metric_writer.write_config(w, {'seed': 1}, {'a': np.zeros(3)}); w.close()\n"
        "from clu import metric_writers, periodic_actions\n"
        "from tensorboard.backend.event_processing import event_accumulator\n"
        "event_accumulator.EventAccumulator(sys.argv[1]).Reload()\n"
        "assert 'tensorflow' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# In a bucket, read by TensorBoard's own reader from there


def write_and_resume(workdir):
    """Writes steps 1 to 6, and goes on from step 4 with other losses."""
    write(workdir, range(1, 7), step=-1)
    writer = metric_writer.open_writer(workdir, 4)
    for s in (5, 6, 7):
        writer.write_scalars(s, {"loss": -s / 8})
    writer.write_images(7, {"samples": np.full((1, 4, 4, 1), 7, np.uint8)})
    writer.close()


def test_a_bucket_has_the_same_events_and_lines_as_a_local_folder(tmp_path, bucket):
    folder = bucket / "events"
    write_and_resume(tmp_path)
    write_and_resume(folder)
    losses = [(s, s / 8) for s in range(1, 5)] + [(s, -s / 8) for s in (5, 6, 7)]
    for workdir in (tmp_path, folder):
        assert read_scalars(workdir, "loss") == losses
        assert [(line["step"], line["loss"]) for line in read_lines(workdir)] == losses
    local, remote = (read_tensors(w).Tensors("samples") for w in (tmp_path, folder))
    assert local[0].tensor_proto == remote[0].tensor_proto


def test_a_flush_writes_all_records_to_the_bucket(bucket):
    writer = metric_writer.open_writer(bucket / "flushed")
    for s in range(1, 4):
        writer.write_scalars(s, {"loss": s / 8})
        writer.flush()  # a SIGKILL right now would lose none
        assert read_steps(bucket / "flushed") == list(range(1, s + 1))
        assert len(read_scalars(bucket / "flushed", "loss")) == s
    writer.close()


def test_large_event_files_of_a_bucket_are_followed_by_others(bucket, monkeypatch):
    monkeypatch.setattr(metric_writer, "MAX_OBJECT_BYTES", 400)
    monkeypatch.setattr(metric_writer, "UPLOAD_S", 0.0)
    write(bucket / "large", range(1, 31))
    assert len(list((bucket / "large").glob("events.out.tfevents.*"))) > 2
    assert read_scalars(bucket / "large", "loss") == [(s, s / 8) for s in range(1, 31)]


def test_an_absent_server_costs_a_warning_and_no_record(bucket, monkeypatch, capsys):
    writer = metric_writer.open_writer(bucket / "absent")
    save = metric_writer.save_bytes

    def refuse(path, content):
        raise OSError(5, "no answer")

    monkeypatch.setattr(metric_writer, "save_bytes", refuse)
    for s in (1, 2):
        writer.write_scalars(s, {"loss": s / 8})
        writer.flush()
    assert capsys.readouterr().err.count("metrics.jsonl: not written yet: no answer") == 1
    monkeypatch.setattr(metric_writer, "save_bytes", save)
    writer.write_scalars(3, {"loss": 3 / 8})
    writer.close()
    assert read_steps(bucket / "absent") == [1, 2, 3]
    assert read_scalars(bucket / "absent", "loss") == [(s, s / 8) for s in (1, 2, 3)]
