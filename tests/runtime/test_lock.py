"""lock.py: one run at a time in a work directory."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from diffusion.runtime import lock
from diffusion.utils.errors import WorkdirError
from diffusion.utils.io import save_bytes
from tests.conftest import ROOT

HOLD = """
import sys
from diffusion.runtime import workdir
from diffusion.utils import io
from diffusion.utils.errors import WorkdirError
try:
    workdir.acquire_lock(io.to_path(sys.argv[1]), beat_s=0.1)
except WorkdirError as error:
    print(error)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(directory):
    command = [sys.executable, "-c", HOLD, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **pipes)


def test_a_work_directory_has_one_trainer_at_a_time(tmp_path):
    """Held; refused; taken over after SIGKILL; left empty at the end."""
    with holder(tmp_path) as first:
        assert first.stdout.readline() == "held\n"
        with holder(tmp_path) as second:
            said, _ = second.communicate()
        assert said.startswith(f"{tmp_path}: is trained in by process {first.pid} on ")
        first.kill()
        first.wait()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid
    with holder(tmp_path) as third:
        assert third.stdout.readline() == "held\n"
        third.communicate("")
    assert (tmp_path / "lock").read_text() == ""


def take(path, **holder):
    """Takes a lock that `holder` was written into; returns "" or who has it."""
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": 1, "beat": 3} | holder))
    problem, release = lock.take_file_lock(path, 0.01)
    release()
    assert problem or path.read_text() == ""
    return problem


def keep_beating(monkeypatch, path, host):
    """Lets another process write to the lock during each wait."""
    beats = iter(range(10, 20))

    def beat(seconds):
        path.write_text(json.dumps({"host": host, "pid": 7, "run": "a", "beat": next(beats)}))

    monkeypatch.setattr(lock.time, "sleep", beat)


def test_on_one_machine_the_kernel_tells_that_the_holder_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("there is no wait"))
    assert take(tmp_path / "lock") == ""


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()])
def test_without_the_kernel_only_a_growing_count_is_a_sign_of_life(
    tmp_path, monkeypatch, capsys, host
):
    """The holder is on another machine, or the file system has no kernel locks."""

    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    if host == socket.gethostname():
        monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    path = tmp_path / "lock"
    assert take(path, host=host) == ""
    assert f"waiting    for a sign of life of {host}" in capsys.readouterr().out
    keep_beating(monkeypatch, path, host)
    assert f"is trained in by process 7 on {host}; wait for it" in take(path, host=host)


def test_without_kernel_locks_the_last_of_two_writers_has_it(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    keep_beating(monkeypatch, tmp_path / "lock", "elsewhere")
    problem, _ = lock.take_file_lock(tmp_path / "lock", 0.01)
    assert "is trained in by process 7 on elsewhere" in problem


# In a bucket


def test_a_work_directory_in_a_bucket_has_one_trainer_at_a_time(bucket, monkeypatch):
    """Held; refused; taken over after SIGKILL, without a wait on this machine; released."""
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("there is no wait"))
    folder = bucket / "one-trainer"
    with holder(folder) as first:
        assert first.stdout.readline() == "held\n"
        with holder(folder) as second:
            said, _ = second.communicate()
        assert f"{folder}: is trained in by process {first.pid} on " in said
        first.kill()
        first.wait()
    problem, release = lock.take_object_lock(folder / "lock")
    assert problem == ""
    assert [path.name for path in folder.glob("lock-*")] == ["lock-2"]
    release()
    problem, release = lock.take_object_lock(folder / "lock")
    assert problem == ""
    release()


def hold_elsewhere(path, number=1, **more):
    """Writes the lock of a process on another machine."""
    content = {"host": "elsewhere", "pid": 7, "run": "a", "kernel": "b", "started": "1"} | more
    save_bytes(path.with_name(f"lock-{number}"), json.dumps(content).encode())


def test_a_holder_on_another_machine_is_alive_while_its_count_grows(bucket, monkeypatch, capsys):
    path = bucket / "elsewhere" / "lock"
    hold_elsewhere(path, beat=0)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: hold_elsewhere(path, beat=1))
    problem, _ = lock.take_object_lock(path)
    assert "is trained in by process 7 on elsewhere; wait for it" in problem
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    problem, release = lock.take_object_lock(path)
    assert problem == "" and "a sign of life of elsewhere" in capsys.readouterr().out
    release()


def test_of_two_that_find_the_holder_dead_one_takes_over(bucket, monkeypatch):
    path = bucket / "takeover" / "lock"
    hold_elsewhere(path)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    make = lock.create

    def second_is_quicker(place, content):
        monkeypatch.setattr(lock, "create", make)
        problem, release = lock.take_object_lock(path)
        assert problem == ""
        monkeypatch.setattr(lock, "release", release, raising=False)
        return make(place, content)

    monkeypatch.setattr(lock, "create", second_is_quicker)
    problem, _ = lock.take_object_lock(path)
    assert f"is trained in by process {os.getpid()}" in problem
    lock.release()


def test_whoever_saw_an_old_state_does_not_get_it(bucket, monkeypatch):
    """It found nothing there, and meanwhile a run came and went and a third one holds the lock."""
    path = bucket / "late" / "lock"
    make = lock.create

    def late(place, content):
        hold_elsewhere(path, number=2, pid=8)
        return make(place, content)

    monkeypatch.setattr(lock, "create", late)
    problem, _ = lock.take_object_lock(path)
    assert "is trained in by process 8 on elsewhere" in problem


def test_a_frozen_holder_that_was_replaced_ends_itself(bucket):
    """Its next beat finds a higher number."""
    folder = bucket / "frozen"
    with holder(folder) as first:
        assert first.stdout.readline() == "held\n"
        first.send_signal(signal.SIGSTOP)
        hold_elsewhere(folder / "lock", number=2)
        first.send_signal(signal.SIGCONT)
        assert first.wait() == WorkdirError.code


def test_an_unreadable_lock_is_not_a_free_one(bucket, monkeypatch):
    path = bucket / "unreadable" / "lock"
    hold_elsewhere(path)

    def gone(path):
        raise OSError(5, "no answer")

    monkeypatch.setattr(lock, "read_bytes", gone)
    with pytest.raises(OSError, match="no answer"):
        lock.take_object_lock(path)
