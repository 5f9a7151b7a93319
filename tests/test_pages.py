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


def start(*command, **more):
    """What a program prints, GLIBC_TUNABLES being as `more` says, or not set."""
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | more.pop("env", {})
    options = {"capture_output": True, "text": True, "check": True, "timeout": 60}
    return subprocess.run([sys.executable, *command], env=env, **options, **more).stdout


@pytest.fixture
def script(tmp_path):
    """Where the system gives large pages on request."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT), enabled=str(tmp_path / "enabled")))
    return path


def run(script, *options, **more):
    """(the process ids of its beginnings, what it then has) of a script with two arguments."""
    *begun, has = start(*options, str(script), "--a=b c", "d", **more).splitlines()
    return [line.split()[1] for line in begun], has


def test_it_begins_once_more_as_the_same_process(script):
    begun, has = run(script)
    assert len(begun) == 2 and begun[0] == begun[1]
    assert has == f"has {ASKED} --a=b c d"


@pytest.mark.parametrize("says", ["[always] madvise never", "always madvise [never]", None])
def test_where_asking_changes_nothing_nothing_happens(script, says):
    enabled = script.parent / "enabled"
    enabled.write_text(says) if says else enabled.unlink()
    begun, has = run(script)
    assert len(begun) == 1 and has == "has None --a=b c d"


def test_what_the_user_says_goes_before(script):
    begun, has = run(script, env={"GLIBC_TUNABLES": "glibc.malloc.check=0"})
    assert len(begun) == 1 and has == "has glibc.malloc.check=0 --a=b c d"


def test_an_option_of_batch_systems_is_kept(script):
    begun, _ = run(script, "-u")
    assert len(begun) == 2 and begun[0] == begun[1]


def test_what_starts_scripts_otherwise_is_left_alone(script):
    """Debuggers, notebooks and such: they would begin anew themselves."""
    begun, _ = run(script, "-X", "dev")
    assert len(begun) == 1


def test_a_script_from_a_pipe_runs(script):
    """It cannot be read twice."""
    assert start("-", input=script.read_text()).endswith("has None\n")


def test_a_script_that_another_one_runs_is_left_alone(script):
    outer = script.parent / "outer.py"
    outer.write_text(
        "import runpy; print('outer', flush=True)\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    out = start(str(outer))
    assert out.count("outer") == 1 and out.endswith("has None\n")
