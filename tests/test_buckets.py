"""Runs in a bucket: the real client libraries before an emulator of Google Cloud Storage.

Two processes share a work directory there in modes/test_train.py.
"""

import re
import shutil
import signal

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion import checkpoint, data
from diffusion.checkpoint import Checkpoints
from diffusion.data.loader import iterate_shuffled, load_dataset
from diffusion.modes._feature_networks import load_dinov2, load_inception
from diffusion.utils import io, object_store
from diffusion.utils.checkpoint_files import COMMIT
from diffusion.utils.errors import WorkdirError
from tests.runs import TINY, assert_same, latest_state, logged, run, start
from tests.test_checkpoint import abstract, make_state, names, opened, saved, warned  # noqa: F401
from tests.test_checkpoint import assert_same as assert_same_state

NO_PREVIEW = "--config.train.sample_every=0"
FIXTURES = ("opened", "warned")


# Checkpoints


def flip(folder):
    """Flips a bit in the middle of every file of data below a folder."""
    for name in io.files_in(folder):
        if "/d/" in f"/{name}":
            content = bytearray(io.read_bytes(folder / name))
            content[len(content) // 2] ^= 1
            io.save_bytes(folder / name, bytes(content))


def test_checkpoints_in_a_bucket_are_kept_and_restored_as_on_a_disk(opened, warned, bucket):  # noqa: F811
    folder = bucket / "checkpoints"
    saved(opened(folder, keep=2, keep_every=8), 4, 8, 12, 16)
    assert names(folder) == ["12", "16", "8"]
    assert_same_state(opened(folder).restore(abstract()), make_state(16))
    step, ema = opened(folder, read_only=True).restore_ema(abstract().ema)
    assert step == 16 and warned == []
    assert_same_state(ema, make_state(16).ema)


@pytest.mark.parametrize(
    "damage, what",
    [
        (lambda step: flip(step / "state"), "is damaged|cannot be restored"),
        (lambda step: (step / "manifest").rmtree(), "is not complete: manifest"),
        (lambda step: (step / "ema").rmtree(), "is not complete: ema is missing"),
    ],
)
def test_a_bad_step_in_a_bucket_is_set_aside(opened, warned, bucket, tmp_path, damage, what):  # noqa: F811
    folder = bucket / tmp_path.name
    checkpoints = saved(opened(folder), 4, 8)
    damage(folder / "8")
    assert_same_state(checkpoints.restore(abstract()), make_state(4))
    assert re.search(rf"step 8 ({what}).*step 4 is used instead; set aside as 8.bad1", warned[0])
    assert names(folder) == ["4", "8.bad1"]
    saved(checkpoints, 8)
    assert_same_state(opened(folder).restore(abstract()), make_state(8))


def test_a_step_that_a_kill_left_uncommitted_is_never_restored(opened, bucket):  # noqa: F811
    folder = bucket / "uncommitted"
    saved(opened(folder), 4, 8)
    (folder / "8" / COMMIT).unlink()
    (folder / "8" / "state" / "_METADATA").unlink()
    io.save_text(folder / "8.begun", "")  # as while it is written
    assert opened(folder, read_only=True).latest() == 4 and "8" in names(folder)
    checkpoints = opened(folder)
    assert names(folder) == ["4"]  # it is removed where this run may write
    assert_same_state(checkpoints.restore(abstract()), make_state(4))
    saved(checkpoints, 8)
    assert checkpoints.latest() == 8


def test_checkpoints_copied_from_a_local_disk_are_verified_and_taken(opened, bucket, tmp_path):  # noqa: F811
    saved(opened(tmp_path / "run"), 4, 8)
    for path in list((tmp_path / "run").rglob(COMMIT)):
        path.unlink()  # of orbax's: earlier versions have none on a disk
    shutil.copytree(tmp_path / "run", tmp_path / "torn")
    flip(tmp_path / "torn" / "8")
    (tmp_path / "torn" / "2024").mkdir()
    (tmp_path / "torn" / "2024" / "notes.txt").write_text("of the user")
    for name in ("run", "torn"):
        io.upload_folder(tmp_path / name, bucket / "copied" / name)
    for name, step in (("run", 8), ("torn", 4)):
        checkpoints = opened(bucket / "copied" / name)
        assert_same_state(checkpoints.restore(abstract()), make_state(step))
        saved(checkpoints, 12)
    assert (bucket / "copied" / "torn" / "2024.bad1" / "notes.txt").read_text() == "of the user"
    assert not (bucket / "copied" / "torn" / "8.bad1" / COMMIT).exists()


def test_a_store_that_does_not_answer_is_no_damage(opened, bucket, monkeypatch):  # noqa: F811
    """Neither is training begun anew, nor is a good step set aside."""
    folder = bucket / "no-answer"
    checkpoints = saved(opened(folder), 4, 8)
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "_down_until_s", float("inf"))
        patch.setattr(object_store, "_down_text", "no answer")
        for look in (checkpoints.latest, lambda: checkpoints.restore(abstract())):
            with pytest.raises(OSError, match="no answer"):
                look()

    def no_answer(step):
        raise OSError(5, "no answer")

    with monkeypatch.context() as patch:  # after the listing
        patch.setattr(checkpoint.files, "read_manifest", no_answer)
        with pytest.raises(OSError, match="no answer"):
            checkpoints.restore(abstract())
    assert checkpoints.latest() == 8 and names(folder) == ["4", "8"]


def test_where_process_0_cannot_write_the_others_do_not_wait_for_it_in_orbax(
    opened,  # noqa: F811
    bucket,
    monkeypatch,
):
    """Seen from another process, which learns of the failure before it enters orbax's barriers."""
    checkpoints = saved(opened(bucket / "unmarked"), 4)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "is_primary", lambda: False)
        patch.setattr(checkpoint, "all_processes", lambda flag: False)
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", lambda *a, **k: pytest.fail("save"))
        with pytest.raises(WorkdirError, match="step 8 was not saved: another process failed"):
            checkpoints.save(8, make_state(8))
    assert checkpoints.latest() == 4


def test_a_bucket_that_is_not_there_is_an_error_at_the_start():
    with pytest.raises(WorkdirError, match=r"gs://there-is-none/run: cannot be written: no such"):
        Checkpoints("gs://there-is-none/run")


# Whole runs


def events(workdir, tag="train/loss"):
    return [(e.step, e.value) for e in EventAccumulator(str(workdir)).Reload().Scalars(tag)]


# The loop's sixth step is its last: the save of step 4 may or may not be complete by then.
DIES = """
import os, signal
from diffusion.modes._session import Session
record = Session.record
def dies(self, steps, *args, **kwargs):
    record(self, steps, *args, **kwargs)
    if 6 in steps:
        os.kill(os.getpid(), signal.SIGKILL)
Session.record = dies
"""


def test_a_run_in_a_bucket_is_a_local_run(bucket, trained, tmp_path):
    """Trained, killed, resumed, sampled and scored; against the run without bucket and kill."""
    remote, local = bucket / "run", tmp_path / "run"
    shutil.copytree(trained[0], local)
    args = (TINY, "--config.train.eval_every=4", f"--workdir={remote}")
    with start(*args, before=DIES, JAX_NUM_CPU_DEVICES=jax.device_count()) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    out, _ = run(*args)
    assert re.search(r"from step [04]$", out, re.MULTILINE)
    assert_same(latest_state(remote), latest_state(local))
    for tag in ("train/loss", "eval/bpd"):
        assert logged(remote, tag) == logged(local, tag)
        assert events(remote, tag) == events(local, tag) and events(remote, tag)
    assert io.read_bytes(remote / "metrics.jsonl").count(b"train/loss") == 4  # no step twice
    for workdir in (remote, local):
        for mode in ("sample", "eval"):
            run(f"--mode={mode}", f"--workdir={workdir}", "--config.eval.references=('test',)")
    ours, theirs = ([f for f in io.files_in(w) if f.endswith(("samples.npz", ".png"))]
                    for w in (remote, local))  # fmt: skip
    assert {*ours} <= {*theirs} and len(ours) == 7  # other tests sample from the local one too
    for name in ours:
        assert io.read_bytes(remote / name) == io.read_bytes(local / name), name


def test_images_are_prepared_into_a_bucket_and_streamed_from_there(bucket, tmp_path):
    """From an archive in the bucket; the records are those of a local data set."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(24):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    archive = shutil.make_archive(str(tmp_path / "images"), "zip", tmp_path / "images")
    io.save_bytes(bucket / "images.zip", io.read_bytes(archive))
    common = ("--mode=prepare", "--config=configs/folder.py:tiny", "--config.data.image_size=8")
    common = (*common, f"--workdir={bucket / 'prepared'}", "--config.data.workers=1")
    for place, source in ((bucket, bucket / "images.zip"), (tmp_path, archive)):
        run(*common, f"--config.data.archive={source}", f"--config.data.data_dir={place / 'data'}")
    assert io.files_in(bucket / "data") == io.files_in(tmp_path / "data")
    remote, local = (
        data.open_dataset("tfds", "train", "images", str(place / "data"))
        for place in (bucket, tmp_path)
    )
    assert data.fingerprint(remote) == data.fingerprint(local)
    for ours, theirs in zip(load_dataset(remote), load_dataset(local), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    both = (iterate_shuffled(images, 0, range(6), 16) for images in (remote, local))
    for ours, theirs in zip(*both, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
    _, err = run(*common, f"--config.data.data_dir={bucket / 'data'}", "--dry_run", code=3)
    assert "data.archive" in err
    archived = (f"--config.data.archive={archive}", f"--config.data.data_dir={bucket / 'data'}")
    _, err = run(*common, *archived, code=3)
    assert "expected no such data set yet" in err


def test_weights_of_feature_networks_are_read_from_a_bucket(bucket):
    """What is said of them is about their content: the file was found."""
    path = bucket / "weights.safetensors"
    io.save_bytes(path, b"no weights")
    for problem in (load_inception(str(path))[1], load_dinov2(str(path))[-1]):
        assert "weights.safetensors: expected" in problem and "found one that begins" in problem
