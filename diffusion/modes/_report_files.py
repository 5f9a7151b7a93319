"""The files of a work directory that a report is made of, and the numbers in them."""

import csv
import functools
import io
import json
import re
import shlex
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from diffusion.plotting.report_page import Command, Number, Picture
from diffusion.utils.errors import DataError, error_text, one_line
from diffusion.utils.io import read_bytes

NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # as metrics.jsonl has them
JSON_KINDS = {dict: "an object", list: "a list", str: "a text"}


class StoredFile(NamedTuple):
    """A file's content as JSON has it; name: its path in the work directory."""

    name: str
    content: Any

    def at(self, *keys: Any, kind: type = dict) -> Any:
        """Returns the value below the keys. Raises DataError unless it is there and of its kind."""
        value = self.content
        for key in keys:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                raise self._unexpected(keys, "a value", "none") from None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._unexpected(keys, JSON_KINDS.get(kind, "a number"), value)
        return value

    def number(self, *keys: Any, error: tuple = ()) -> Number:
        """Returns the number below the keys, with the error below others where there is one.

        Raises DataError.
        """
        value = self.at(*keys, kind=int | float)
        spread = self.at(*error, kind=int | float | None) if error else None
        return Number(value, self.source(*keys), spread, self.source(*error) if error else "")

    def source(self, *keys: Any) -> str:
        """Returns FILE#POINTER, the pointer by RFC 6901."""
        steps = (str(key).replace("~", "~0").replace("/", "~1") for key in keys)
        name = self.name.replace("%", "%25").replace("#", "%23")  # as in the path of an URI
        return "#".join((name, "".join(f"/{step}" for step in steps)))

    def _unexpected(self, keys: tuple, wanted: str, found: Any) -> DataError:
        found = one_line(found if isinstance(found, str) else json.dumps(found), 60)
        what = f"expected {wanted}, found {found}"
        return DataError(f"{self.source(*keys)}: {what}; delete the file and make it again")


def file_name(text: str) -> str:
    """Returns a name for a file of a report: letters, digits, dots and dashes."""
    return re.sub(r"[^\w.-]", "_", text)


def mode_command(workdir: epath.Path, mode: str, *options: str) -> Command:
    """Returns the command line of a mode on a work directory."""
    words = [f"--mode={mode}"] * (mode != "train") + [f"--workdir={workdir}", *options]
    return Command(f"python main.py {shlex.join(words)}")


class Subject(NamedTuple):
    """What a report is about.

    Attributes:
      files, config: of the work directory.
      step: of its newest checkpoint, None if there is none.
      missing: (what, the command that makes it), which the sections add to.
    """

    files: "WorkFiles"
    config: ConfigDict
    step: int | None
    missing: list[tuple[str, Command]]

    def lacks(self, what: str, mode: str, *options: str) -> None:
        """Notes what is missing, and how it is made."""
        self.missing.append((what, mode_command(self.files.workdir, mode, *options)))

    def lacks_newest(self, folder: str, what: str, mode: str) -> None:
        """Notes results that are missing, "" as folder, or not of the newest checkpoint."""
        if self.step is not None and folder.rpartition("/")[2] != f"{self.step:08d}":
            self.lacks(f"{what} of step {self.step:,}", mode)

    def newest(self, kind: str, name: str) -> str:
        """Returns the last of `files.having`, or ""."""
        return next(reversed(self.files.having(kind, name)), "")


class WorkFiles:
    """Reads files of a work directory. What cannot be read counts as missing.

    Attributes:
      problems: a line for each file that could not be read.
    """

    def __init__(self, workdir: epath.Path):
        self.workdir, self.problems = workdir, []
        self.read = functools.cache(self._read)

    def has(self, name: str) -> bool:
        """Returns whether there is such a file, readable or not."""
        return (self.workdir / name).is_file()

    def folders(self, kind: str) -> list[str]:
        """Returns the folders of a kind of results, "eval/00003000", by name."""
        folder = self.workdir / kind
        found = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        return [f"{kind}/{name}" for name in sorted(found)]

    def having(self, kind: str, name: str) -> list[str]:
        """Returns the folders named by a step, of averaged weights, that have the file, by step."""
        folders = (f for f in self.folders(kind) if f.rpartition("/")[2].isdecimal())
        return [f for f in folders if self.has(f"{f}/{name}")]

    def _read(self, name: str) -> StoredFile | None:
        """Returns a .json, .jsonl or .csv, or None. Also as the attribute `read`, which caches.

        The lines of a .jsonl are {step: {name: value}}, with the last value of a step, those of a
        .csv a list of {column: value}.
        """
        if not self.has(name):
            return None
        parse = {".jsonl": _parse_lines, ".csv": _parse_csv}.get(name[name.rfind(".") :])
        try:
            text = read_bytes(self.workdir / name).decode()
            return StoredFile(name, (parse or json.loads)(text))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            why = error_text(error)
            self.problems.append(f"{name}: cannot be read: {why}; delete it and make it again")
        return None

    def picture(self, name: str, title: str, note: str = "") -> Picture | None:
        """Returns a picture of the work directory, or None."""
        if not self.has(name):
            return None
        try:
            content = read_bytes(self.workdir / name)
            with Image.open(io.BytesIO(content)) as image:
                image.load()
        except Exception as error:  # Pillow raises anything for a damaged file
            why = error_text(error)
            self.problems.append(f"{name}: cannot be read: {why}; delete it and make it again")
            return None
        return Picture(file_name(name), content, title, name, note)


def _parse_lines(text: str) -> dict[str, dict[str, float]]:
    """Reads metrics.jsonl; lines that are not valid (torn by a kill) are skipped."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        try:
            record = json.loads(line)
            step = str(int(record.pop("step")))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        values = {k: float(v) if v in NOT_FINITE else v for k, v in record.items()}
        found.setdefault(step, {}).update(values)
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _parse_csv(text: str) -> list[dict[str, float | str]]:
    def value(cell):
        try:
            return float(cell)
        except ValueError:
            return cell

    return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]
