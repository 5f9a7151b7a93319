"""watchdog.py: a run that makes no progress ends, and says where it stood."""

import subprocess
import sys

from tests.conftest import ROOT

HANG = """
import pathlib, sys, threading
from diffusion.runtime.watchdog import Watchdog
watchdog = Watchdog(pathlib.Path(sys.argv[1]), 0.5)
threading.Event().wait(1)
watchdog.beat(7)
with watchdog.paused():
    threading.Event().wait(1)
print("awake", flush=True)
threading.Event().wait()
"""


def test_a_hang_ends_the_process_with_the_stacks_on_disk(tmp_path):
    """But neither the time before the first step nor a pause is a hang."""
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "awake\n")
    assert done.stderr.startswith("ddpm: error[7]: no step for 0.5 s after step 7 (train.hang_s);")
    assert done.stderr.count("\n") == 1
    assert "in wait" in (tmp_path / "crash/hang_process0.txt").read_text()
