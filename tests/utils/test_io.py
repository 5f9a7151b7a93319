"""diffusion.utils.io: a file is its old content or its new content, and nothing else is left."""

import json
import os

import numpy as np
import pytest

from diffusion.utils import io


class Config:
    def to_dict(self):
        return {"a": 1}


@pytest.mark.parametrize(
    "save, content, expected",
    [
        (io.save_bytes, b"\x00\xff", b"\x00\xff"),
        (io.save_text, "\u03b5, \udcff", "\u03b5, \\udcff".encode()),  # a name that is no UTF-8
        (io.save_json, {"b": [1.5], "c": Config()}, None),
    ],
)
def test_files_read_back_the_same_and_folders_are_made(tmp_path, save, content, expected):
    path = tmp_path / "new" / "folder" / "file"
    save(path, content)
    save(path, content)  # replaces
    if expected is None:
        assert json.loads(path.read_text()) == {"b": [1.5], "c": {"a": 1}}
    else:
        assert path.read_bytes() == expected
    assert os.listdir(path.parent) == ["file"]


def test_save_npz_reads_back_the_same(tmp_path):
    images, labels = np.arange(60, dtype=np.uint8).reshape(5, 2, 2, 3), np.arange(5)
    io.save_npz(tmp_path / "a.npz", images)
    io.save_npz(tmp_path / "b.npz", images, labels, mean=np.float32(0.5))
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert a.files == ["arr_0"] and sorted(b.files) == ["arr_0", "arr_1", "mean"]
        assert a["arr_0"].dtype == np.uint8 and b["mean"] == 0.5
        np.testing.assert_array_equal(a["arr_0"], images)
        np.testing.assert_array_equal(b["arr_1"], labels)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)):
        with io.atomic_write(path) as file:
            file.write(b"half")
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with io.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_content_is_on_disk_before_its_name(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", os.fstat(fd).st_size)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    io.save_bytes(tmp_path / "a", b"12345")
    assert calls[:2] == [("fsync", 5), "replace"]


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        io.save_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(OSError):
        io.save_bytes(tmp_path, b"")
    assert os.listdir(tmp_path) == ["file"]
