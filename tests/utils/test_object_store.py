"""io.py and object_store.py: whole objects, with the errors of files, in a real client's hands."""

import errno
import json
import sys

import fsspec
import google.auth
import numpy as np
import pytest

from diffusion.utils import io, object_store, partial_results
from diffusion.utils.errors import ConfigError, DataError


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_both_kinds_of_storage_keep_what_is_written(place, tmp_path, bucket):
    folder = io.to_path(tmp_path if place == "local" else bucket / "kinds")
    io.save_text(folder / "a" / "text.txt", "one\n")
    io.save_text(folder / "a" / "text.txt", "two\n")  # replaces it
    io.save_json(folder / "number.json", {"x": np.float32(0.5)})
    partial_results.save(folder / "part.npz", "setting", x=np.arange(3))
    assert io.read_bytes(folder / "a" / "text.txt") == b"two\n"
    assert json.loads((folder / "number.json").read_text()) == {"x": 0.5}
    np.testing.assert_array_equal(
        partial_results.load(folder / "part.npz", "setting")["x"], [0, 1, 2]
    )
    assert partial_results.load(folder / "part.npz", "another") is None
    assert io.files_in(folder) == ["a/text.txt", "number.json", "part.npz"]
    with io.open_binary(folder / "a" / "text.txt") as file:
        assert file.read() == b"two\n"
    copy = io.local_copy(folder)
    assert (copy / "a" / "text.txt").read_text() == "two\n"
    assert (copy == tmp_path) == (place == "local")


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_an_error_leaves_what_was_there(place, tmp_path, bucket):
    path = io.to_path(tmp_path if place == "local" else bucket) / "kept.txt"
    io.save_text(path, "old")
    with pytest.raises(KeyError), io.atomic_write(path) as file:
        file.write(b"half of the n")
        raise KeyError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.glob("*kept*")] == ["kept.txt"]


def test_of_two_creations_one_succeeds(bucket):
    assert io.create(bucket / "claim", b"first")
    assert not io.create(bucket / "claim", b"second")
    assert io.create(bucket / "claim", b"first")  # repeated, because the answer was lost
    assert io.read_bytes(bucket / "claim") == b"first"


def test_what_another_process_wrote_is_seen(bucket):
    """Listings are not cached: another process may have added to them."""
    folder = bucket / "shared"
    assert list(folder.glob("*")) == []
    from gcsfs.core import GCSFileSystem

    other = GCSFileSystem(token="anon", skip_instance_cache=True)
    other.pipe_file(f"{folder}/new", b"1")
    assert [p.name for p in folder.glob("*")] == ["new"]


@pytest.mark.parametrize("action", [io.read_bytes, lambda path: io.save_text(path, "")])
def test_a_bucket_that_is_not_there_is_an_oserror_with_a_text(bucket, action):
    with pytest.raises(FileNotFoundError) as caught:
        action(io.to_path("gs://there-is-none/file"))
    assert caught.value.strerror == "no such object or bucket"


def test_without_a_server_there_is_an_oserror_after_the_deadline(bucket, monkeypatch):
    alone = object_store._gcs_class()(
        token="anon", endpoint_url="http://127.0.0.1:9", skip_instance_cache=True
    )
    monkeypatch.setattr(object_store, "_deadline_s", 0.05)
    monkeypatch.setattr(object_store, "_down_until_s", 0.0)  # and as it was, afterwards
    with pytest.raises(OSError) as caught:
        alone.cat_file("bucket/file")
    assert caught.value.errno == errno.EIO and caught.value.strerror == "no answer"
    with pytest.raises(OSError, match="no answer"):
        io.read_bytes(bucket / "file")  # at once: another request has just had no answer


def test_a_missing_copy_is_a_data_error(bucket):
    with pytest.raises(DataError, match=r"gs://ddpm-test/tests/none: cannot be read: "):
        io.local_copy(bucket / "none")


def test_paths_that_are_mistyped_or_lack_their_package(monkeypatch):
    with pytest.raises(ConfigError, match=r"gs:/b/run: expected two slashes"):
        io.to_path("gs:/b/run")
    with pytest.raises(ConfigError, match=r"ftp://: expected a folder, or one of gs://"):
        io.to_path("ftp://b/run")
    object_store.connect.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://: .* pip install gcsfs google-cloud-storage"):
        io.to_path("gs://b/run")


@pytest.mark.parametrize("known, token", [(True, "google_default"), (False, "anon")])
def test_credentials_are_google_s_defaults_or_none(known, token, monkeypatch):
    """Which is found out without a search for a server that other machines do not have."""

    def default():
        if not known:
            raise google.auth.exceptions.DefaultCredentialsError("none")

    made = []
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setattr(google.auth, "default", default)
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme: made.append(fsspec.config.conf))
    object_store.connect.__wrapped__("gs")
    assert made[0]["gs"]["token"] == token and "token" not in made[0]["gcs"]
    fsspec.config.conf["gcs"]["token"] = "cloud"  # as FSSPEC_GCS_TOKEN does
    del fsspec.config.conf["gs"]["token"]
    object_store.connect.__wrapped__("gs")
    assert "token" not in fsspec.config.conf["gs"]


def test_credentials_that_cannot_be_read_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "key.json").write_text("no JSON")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    with pytest.raises(ConfigError, match=r"expected a file of credentials, found .*key\.json: "):
        object_store._gcs_token()


def test_names_with_characters_of_patterns_are_refused_in_a_bucket(bucket):
    """fsspec would take them for patterns: a removal would remove others."""
    for name in ("run[1]", "run?", "run*"):
        with pytest.raises(ConfigError, match=r"expected a name in a bucket, without"):
            io.to_path(f"{bucket}/{name}")
    with pytest.raises(ConfigError, match=r"as in gs://bucket/name"):
        io.to_path("gs://")


def test_removing_a_folder_removes_what_is_below_it_and_nothing_else(bucket, tmp_path):
    for folder in (bucket / "removal", tmp_path):
        for name in ("a/1", "a/b/2", "ab/3", "a1"):
            io.save_text(folder / name, "")
        io.remove_folder(folder / "a")
        io.remove_folder(folder / "a")
        assert io.files_in(folder) == ["a1", "ab/3"]


def test_a_store_that_does_not_answer_is_not_an_empty_one(bucket, monkeypatch):
    io.save_text(bucket / "kept" / "file", "")
    monkeypatch.setattr(object_store, "_down_until_s", float("inf"))
    monkeypatch.setattr(object_store, "_down_text", "no answer")
    for look in (bucket.is_dir, bucket.exists, lambda: list(bucket.iterdir())):
        with pytest.raises(OSError, match="no answer"):
            look()


def test_local_paths_that_look_like_other_programs_names_are_local(tmp_path):
    assert str(io.to_path("/gs/data")) == "/gs/data"
    io.save_text(tmp_path / "run[1]" / "part_1", "")
    io.save_text(tmp_path / "run1" / "part_2", "")
    assert [p.name for p in io.to_path(tmp_path / "run[1]").glob("part_*")] == ["part_1"]


def test_a_local_path_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(io.to_path("~/x")) == f"{tmp_path}/x" and str(io.to_path("runs/x")) == "runs/x"
    assert not io.is_object_store("runs/x") and io.is_object_store("gs://b/x")
