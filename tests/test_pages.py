"""pages.py: a program asks for large pages once, and only where that can help."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = """
import os, pathlib, sys
print("begins", os.getpid(), flush=True)
sys.path.insert(0, {root!r})
import pages
pages.ask(pathlib.Path({enabled!r}))
print("has", os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""
ASKED = "glibc.malloc.hugetlb=1"


def run(tmp_path, says, *options, **more):
    """(the process ids of its beginnings, what it then has) of a script with two arguments."""
    enabled, script = tmp_path / "enabled", tmp_path / "script.py"
    if says:
        enabled.write_text(says)
    script.write_text(SCRIPT.format(root=str(ROOT), enabled=str(enabled)))
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | more
    command = [sys.executable, *options, str(script), "--a=b c", "d"]
    out = subprocess.run(
        command, env=env, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    *begun, has = out.splitlines()
    return [line.split()[1] for line in begun], has


def test_it_begins_once_more_as_the_same_process(tmp_path):
    begun, has = run(tmp_path, "always [madvise] never\n")
    assert len(begun) == 2 and begun[0] == begun[1]
    assert has == f"has {ASKED} --a=b c d"


@pytest.mark.parametrize("says", ["[always] madvise never", "always madvise [never]", None])
def test_where_asking_changes_nothing_nothing_happens(tmp_path, says):
    begun, has = run(tmp_path, says)
    assert len(begun) == 1 and has == "has None --a=b c d"


def test_what_the_user_says_goes_before(tmp_path):
    begun, has = run(tmp_path, "[madvise]", GLIBC_TUNABLES="glibc.malloc.check=0")
    assert len(begun) == 1 and has == "has glibc.malloc.check=0 --a=b c d"


def test_an_option_of_batch_systems_is_kept(tmp_path):
    begun, _ = run(tmp_path, "[madvise]", "-u")
    assert len(begun) == 2 and begun[0] == begun[1]


def test_what_starts_scripts_otherwise_is_left_alone(tmp_path):
    """Debuggers, notebooks and such: they would begin anew themselves."""
    begun, _ = run(tmp_path, "[madvise]", "-X", "dev")
    assert len(begun) == 1


def test_a_script_from_a_pipe_runs(tmp_path):
    """It cannot be read twice."""
    run(tmp_path, "[madvise]")
    text = (tmp_path / "script.py").read_text()
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-"]
    found = subprocess.run(command, input=text, env=env, capture_output=True, text=True, timeout=60)
    assert found.stdout.endswith("has None\n")


def test_a_script_that_another_one_runs_is_left_alone(tmp_path):
    run(tmp_path, "[madvise]")
    outer = tmp_path / "outer.py"
    outer.write_text(
        "import runpy, sys; print('outer', flush=True)\n"
        f"runpy.run_path({str(tmp_path / 'script.py')!r}, run_name='__main__')\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    command = [sys.executable, str(outer)]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
    assert out.count("outer") == 1 and out.endswith("has None\n")
