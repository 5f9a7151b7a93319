"""Metrics of a run: TensorBoard event files and `metrics.jsonl`, without TensorFlow.

A log must neither end a run nor lose what it has: every record is appended whole and at once, and
where that fails (disk full) it is undone and said, and the run goes on.
"""

import contextlib
import io
import itertools
import json
import os
import pathlib
import socket
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from diffusion.utils.logging import info

# tensorboard takes an installed TensorFlow (25 s of import, 800 MB) unless it finds a module of the
# first name; clu takes it through the second. Both must stand before the imports below.
_stand_in = types.ModuleType("clu.metric_writers.summary_writer")
_stand_in.SummaryWriter = lambda logdir: SummaryWriter(logdir)
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
sys.modules.setdefault(_stand_in.__name__, _stand_in)

from clu import metric_writers, parameter_overview  # noqa: E402
from clu.internal.utils import flatten_dict  # noqa: E402
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # noqa: E402
from tensorboard.plugins.image import metadata as image_metadata  # noqa: E402
from tensorboard.plugins.scalar.summary_v2 import scalar_pb  # noqa: E402
from tensorboard.plugins.text.summary_v2 import text_pb  # noqa: E402
from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: E402
from tensorboard.util.tensor_util import make_tensor_proto  # noqa: E402


class _Appender:
    """A file that grows by whole records and is never held open, so that a kill loses nothing."""

    def __init__(self, path: pathlib.Path):
        self.path, self.lost = path, 0
        open(path, "ab").close()  # what can never be written is an error now, not a warning later

    def append(self, record: bytes) -> None:
        size = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write(record)
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # half a record would hide all that follow
            if not self.lost:
                problem = f"{error.strerror or error}; not logged until this is mended"
                info(f"warning: {self.path}: {problem}", sys.stderr)
            self.lost += 1
        else:
            if self.lost:
                info(f"warning: {self.path}: logged again, {self.lost} records lost", sys.stderr)
            self.lost = 0


class _Sink(metric_writers.MetricWriter):
    """A writer that ignores everything; each kind of file overrides what it can hold."""

    def _ignore(self, *args, **kwargs) -> None:
        pass

    write_summaries = write_scalars = write_images = write_videos = write_audios = _ignore
    write_texts = write_histograms = write_hparams = flush = close = _ignore


class SummaryWriter(_Sink):
    """One event file with the tags, plugins and types that TensorFlow's own writer gives.

    step: the last step that the run keeps: TensorBoard hides what older files have of later ones.
    """

    _numbers = itertools.count()  # a process may open a directory twice in one second

    def __init__(self, logdir: str | os.PathLike, step: int | None = None):
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = _Appender(pathlib.Path(logdir) / f"{name}.{next(self._numbers):04d}")
        self._add(file_version="brain.Event:2")
        for _ in range(0 if step is None else 2):  # the first of a directory counts as no restart
            self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **fields) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.append(record.getvalue())

    def write_scalars(self, step, scalars):
        with np.errstate(over="ignore"):  # they are float32 here: what diverged becomes inf
            values = [v for name, x in scalars.items() for v in scalar_pb(name, float(x)).value]
        self._add(step=step, summary=Summary(value=values))

    def write_images(self, step, images):
        kind = image_metadata.create_summary_metadata(display_name=None, description=None)
        for name, batch in images.items():
            h, w = batch.shape[1:3]
            strings = [b"%d" % w, b"%d" % h, *map(_png, batch)]
            tensor = make_tensor_proto(strings, dtype=np.object_)
            value = Summary.Value(tag=name, metadata=kind, tensor=tensor)
            self._add(step=step, summary=Summary(value=[value]))

    def write_texts(self, step, texts):
        for name, text in texts.items():
            self._add(step=step, summary=text_pb(name, text))

    def write_hparams(self, hparams):
        known = str | int | float
        plain = {name: x if isinstance(x, known) else str(x) for name, x in hparams.items()}
        self._add(summary=hparams_pb(plain))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
    return file.getvalue()


class _JsonLines(_Sink):
    """One object per write_scalars call; see `open_writer`."""

    def __init__(self, path: pathlib.Path, step: int | None):
        if path.exists():
            _cut(path, step)
        self._file = _Appender(path)

    def write_scalars(self, step, scalars):
        line = {"step": step, "time": round(time.time(), 3)}
        for name, x in scalars.items():
            line[name] = float(x) if np.isfinite(float(x)) else json.dumps(float(x))
        self._file.append(json.dumps(line).encode() + b"\n")


def _cut(path: pathlib.Path, step: int | None) -> None:
    """Drops the lines of steps after `step`, and those (the last, if torn by a kill) unreadable."""
    data = path.read_bytes()
    kept = b"".join(line + b"\n" for line in data.split(b"\n") if _keeps(line, step))
    if kept != data:
        new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(new, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)


def _keeps(line: bytes, step: int | None) -> bool:
    try:
        at = json.loads(line)["step"]
        return at == int(at) and (step is None or at <= step)
    except (ValueError, TypeError, KeyError, OverflowError):
        return False


class Writer(metric_writers.AsyncMultiWriter):
    """clu's asynchronous writer, with the mistakes of a call raised by that call.

    Values are read in the writing thread, so that a scalar still on its device costs the caller no
    wait. Do not change an array after giving it.
    """

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Raises ValueError for the names 'step' and 'time', which every line has."""
        if taken := {"step", "time"} & set(scalars):
            raise ValueError(f"scalars: {taken.pop()!r} is taken by the line; use another name")
        super().write_scalars(int(step), dict(scalars))

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: {name: uint8[n, h, w, 1 or 3]}. Raises ValueError for anything else."""
        images = {name: np.asarray(x) for name, x in images.items()}
        for name, x in images.items():
            if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3):
                found = f"{x.dtype}{list(x.shape)}"
                raise ValueError(f"{name}: expected uint8[n, h, w, 1 or 3], found {found}")
        super().write_images(int(step), images)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """hparams: may be nested; the names are joined by dots."""
        super().write_hparams(dict(flatten_dict(hparams)))

    def _unsupported(self, *args, **kwargs) -> None:
        raise NotImplementedError("the log holds scalars, images, texts and hyper-parameters")

    write_summaries = write_videos = write_audios = write_histograms = _unsupported


def open_writer(workdir: str | os.PathLike | None, step: int | None = None) -> Writer:
    """A writer to TensorBoard event files in workdir and to workdir/metrics.jsonl, appending.

    workdir: made if missing; None (a process that does not log): calls are checked, not written.
    step: where the run resumes: what was logged of later steps is dropped, as if never
    interrupted; -1 keeps nothing (a fresh start), None all (a run that adds, like an evaluation).

    A line is {"step": int, "time": Unix seconds, name: number, ...}. JSON has no NaN and infinity:
    they are the strings "NaN", "Infinity", "-Infinity", which float() reads like any number.
    Raises OSError if workdir cannot be written; later failures of the disk are warnings on stderr.
    """
    if workdir is None:
        return Writer([])
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    return Writer([_JsonLines(workdir / "metrics.jsonl", step), SummaryWriter(workdir, step)])


def parameter_table(params: Mapping[str, Any]) -> str:
    """Name, shape, type and size of each leaf, and totals. params: a nested dict of arrays."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)


def write_config(writer: Writer, config: Mapping, params: Mapping | None = None, step: int = 0):
    """The configuration as text and hyper-parameters; the table of params as text, if given.

    config: plain nested dict; a value that JSON lacks is written as str(value).
    """
    texts = {"config": f"```json\n{json.dumps(config, indent=2, default=str)}\n```"}
    if params is not None:
        texts["parameters"] = f"```\n{parameter_table(params)}\n```"
    writer.write_texts(step, texts)
    writer.write_hparams(config)

