"""Metrics of a run, as TensorBoard event files and `metrics.jsonl`, without TensorFlow.

A record is appended complete or not at all, and no file is held open between two records, so that
a killed process loses none. A full disk costs records and a warning, not the run. Nothing can be
appended in an object store: there a file is kept in memory and written whole, after some seconds
and at `flush`, and a run that is killed goes on from a step whose records were flushed.
"""

import contextlib
import io
import json
import math
import os
import socket
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from diffusion.utils import logging
from diffusion.utils.errors import error_text
from diffusion.utils.io import is_object_store, read_bytes, save_bytes, to_path

# tensorboard imports an installed TensorFlow unless `tensorboard.compat.notf` exists, and clu does
# so for its own SummaryWriter: both must be in place before the imports below.
_no_summary_writer = types.ModuleType("clu.metric_writers.summary_writer")
_no_summary_writer.SummaryWriter = None
sys.modules.setdefault(_no_summary_writer.__name__, _no_summary_writer)
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))

from clu import metric_writers, parameter_overview  # noqa: E402
from clu.internal.utils import flatten_dict  # noqa: E402
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # noqa: E402
from tensorboard.plugins.image.metadata import create_summary_metadata  # noqa: E402
from tensorboard.plugins.text.summary_v2 import text_pb  # noqa: E402
from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: E402
from tensorboard.util.tensor_util import make_tensor_proto  # noqa: E402

UPLOAD_S = 10.0  # between two writings of an object
MAX_OBJECT_BYTES = 2**22  # of an event file there, before the next one is begun


def open_writer(workdir: str | os.PathLike | None, step: int | None = None) -> "MetricWriter":
    """Returns a writer that appends to event files and `metrics.jsonl` in workdir.

    A line of metrics.jsonl is {"step": int, "time": Unix seconds, name: number, ...}, where "NaN",
    "Infinity" and "-Infinity" are strings, as JSON has no such numbers.

    Args:
      workdir: made if missing; None checks the calls and writes nothing.
      step: resume after this step: later metrics are dropped from metrics.jsonl and hidden in
        TensorBoard; -1 drops all, None drops nothing.

    Raises:
      OSError: workdir cannot be written. Later failures are warnings.
    """
    if workdir is None:
        return MetricWriter([])
    workdir = to_path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return MetricWriter([_LogFiles(workdir, step)])


def write_config(writer: "MetricWriter", config: Mapping, params: Mapping) -> None:
    """Writes the config as text and hyper-parameters, and a table of the parameters as text.

    config is a nested dict; values that JSON lacks are written as str(value).
    """
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    text = json.dumps(config, indent=2, default=str)
    texts = {"config": f"```json\n{text}\n```", "parameters": f"```\n{table}\n```"}
    writer.write_texts(0, texts)
    writer.write_hparams(config)


class MetricWriter(metric_writers.AsyncMultiWriter):
    """clu's asynchronous writer; a wrong argument is an error of the call, not of the thread.

    Values are read in the writing thread, so that a scalar that is still being computed does not
    block the caller: do not change an array after passing it.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises ValueError for the names 'step' and 'time', which are keys of every line."""
        if reserved := {"step", "time"} & set(scalars):
            raise ValueError(f"scalars: {reserved.pop()!r} is reserved; use another name")
        super().write_scalars(int(step), dict(scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Raises ValueError unless images are {name: uint8[n, h, w, 1 or 3]}."""
        images = {name: np.asarray(x) for name, x in images.items()}
        for name, x in images.items():
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
                found = f"{x.dtype}{list(x.shape)}"
                raise ValueError(f"{name}: expected uint8[n, h, w, 1 or 3], found {found}")
        super().write_images(int(step), images)


class _LogFiles:
    """Encodes what clu's writing thread passes, for one event file and metrics.jsonl."""

    def __init__(self, workdir: epath.Path, step: int | None):
        _drop_lines(workdir / "metrics.jsonl", step)
        self._workdir, self._lines = workdir, _append_file(workdir / "metrics.jsonl")
        self._begin_events()
        # TensorBoard hides later steps of older files at a START; it ignores a directory's first.
        for _ in range(0 if step is None else 2):
            self._append_event(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _begin_events(self) -> None:
        suffix = f"{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._events = _append_file(self._workdir / f"events.out.tfevents.{suffix}")
        self._append_event(file_version="brain.Event:2")

    def _append_event(self, **fields) -> None:
        if self._events.is_complete:
            self._begin_events()  # TensorBoard reads the files of a folder one after the other
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.append(record.getvalue())

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        scalars = {name: float(x) for name, x in scalars.items()}
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {name: x if math.isfinite(x) else json.dumps(x) for name, x in scalars.items()}
        self._lines.append(json.dumps(record).encode() + b"\n")
        values = [Summary.Value(tag=name, simple_value=x) for name, x in scalars.items()]
        self._append_event(step=step, summary=Summary(value=values))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        metadata = create_summary_metadata(display_name=None, description=None)
        for name, batch in images.items():
            h, w = batch.shape[1:3]
            tensor = make_tensor_proto([b"%d" % w, b"%d" % h, *map(_png, batch)], dtype=np.object_)
            value = Summary.Value(tag=name, metadata=metadata, tensor=tensor)
            self._append_event(step=step, summary=Summary(value=[value]))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._append_event(step=step, summary=text_pb(name, text))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        flat = flatten_dict(hparams)
        values = {name: x if isinstance(x, str | int | float) else str(x) for name, x in flat}
        self._append_event(summary=hparams_pb(values))

    def flush(self) -> None:
        """Writes what is in memory."""
        self._lines.flush()
        self._events.flush()

    close = flush


def _append_file(path: epath.Path) -> "_LocalFile | _ObjectFile":
    """Opens a file to append records. Raises OSError where it can never be written."""
    return _ObjectFile(path) if is_object_store(path) else _LocalFile(path)


class _LocalFile:
    """A file that grows by complete records and is open only while one is written."""

    is_complete = False

    def __init__(self, path: epath.Path):
        self._path, self._lost = path, 0
        open(path, "ab").close()

    def flush(self) -> None:
        """Does nothing, as every record is in the file already."""

    def append(self, record: bytes) -> None:
        size = None
        try:
            with open(self._path, "ab") as file:
                size = file.tell()
                file.write(record)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, size)  # readers stop at half a record
            if not self._lost:
                reason = error_text(error)
                logging.warning(f"{self._path}: {reason}; metrics are lost until it can be written")
            self._lost += 1
        else:
            if self._lost:
                logging.warning(f"{self._path}: written again, {self._lost} records lost")
            self._lost = 0


class _ObjectFile:
    """An object of all records so far, written again with the new ones every UPLOAD_S seconds."""

    def __init__(self, path: epath.Path):
        self._path, self._late = path, False
        self._content = bytearray(read_bytes(path) if path.exists() else b"")
        self._saved = len(self._content)
        self._next_s = time.monotonic() + UPLOAD_S

    @property
    def is_complete(self) -> bool:
        """Returns whether it is written, and so large that what follows belongs into another."""
        return self._saved == len(self._content) > MAX_OBJECT_BYTES

    def append(self, record: bytes) -> None:
        self._content += record
        if time.monotonic() >= self._next_s:
            self.flush()

    def flush(self) -> None:
        if self._saved == len(self._content):
            return
        try:
            save_bytes(self._path, bytes(self._content))
            self._saved, self._late = len(self._content), False
        except OSError as error:  # nothing is lost: the next one writes all
            if not self._late:
                logging.warning(f"{self._path}: not written yet: {error_text(error)}")
            self._late = True
        self._next_s = time.monotonic() + UPLOAD_S


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    return file.getvalue()


def _drop_lines(path: epath.Path, last: int | None) -> None:
    """Drops the lines of steps after `last`, and invalid ones: a kill may tear the last."""

    def is_kept(line: bytes) -> bool:
        try:
            step = json.loads(line)["step"]
            return step == int(step) and (last is None or step <= last)
        except (ValueError, TypeError, KeyError, OverflowError):
            return False

    content = read_bytes(path) if path.exists() else b""
    kept = b"".join(line + b"\n" for line in content.split(b"\n") if is_kept(line))
    if kept != content:
        save_bytes(path, kept)
