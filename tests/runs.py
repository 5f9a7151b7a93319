"""Runs of main.py for tests: in this process where that shows the same, else in their own."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import main
from diffusion import checkpoint, experiment
from diffusion.runtime import cli
from diffusion.utils import logging
from tests.conftest import ROOT

TINY = f"--config={ROOT}/configs/digits.py:tiny"


def environment(**extra):
    """The tests' own settings of JAX, and nothing of the user's."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    cache = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), "JAX_PLATFORMS": "cpu"}
    cache["XDG_CACHE_HOME"] = str(ROOT / ".cache" / "home")
    return keep | cache | {k: str(v) for k, v in extra.items()}


def run(*args, code=0, cwd=None):
    """Runs a command line in this process, on its four devices; returns (stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd or ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        jax.numpy_dtype_promotion("standard"),  # optax multiplies its step counter with floats
    ):
        patch.setattr(cli, "start_jax", _validate)
        patch.setenv("XDG_CACHE_HOME", str(ROOT / ".cache" / "home"))
        patch.setattr(cli.preemption, "_requested", False)
        found = main.main(["main.py", *map(str, args)])
        logging.silence(False)
    assert found == code, f"exit {found}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def _validate(config):
    """cli.start_jax where JAX runs already."""
    cli.validation.validate(config, jax.device_count())


# main.py with a defect in it, which `before` makes.
SCRIPT = """
import sys
import main
{}
main.preemption.install()
main.cli.exit_with(main.main(["main.py", *sys.argv[1:]]))
"""


def start(*args, cwd=ROOT, before="", **extra):
    """Starts main.py in a process of its own, in which the program `before` is executed first.

    extra: environment variables.
    """
    program = ["-c", SCRIPT.format(before)] if before else [str(ROOT / "main.py")]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, args)],
        cwd=cwd,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_process(*args, code=0, **extra):
    """Runs main.py in a process of its own; returns (stdout, stderr)."""
    with start(*args, **extra) as process:
        out, err = process.communicate()
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def run_two_processes(*args):
    """Runs main.py in two processes of two devices each; returns process 0's stdout."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cluster = {"JAX_NUM_CPU_DEVICES": 2, "JAX_NUM_PROCESSES": 2, "JAX_COORDINATOR_ADDRESS": address}
    both = [start(*args, JAX_PROCESS_ID=i, **cluster) for i in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    # Only process 0 prints, besides Gloo, whose threads can tear each other's lines.
    silent = outputs[1][0]
    assert silent.count("\n") == silent.count("[Gloo]"), silent
    return outputs[0][0]


def stop_after(process, line, with_signal):
    """Sends the signal once a line of the console matches; returns all of the console."""
    seen = []
    for text in process.stdout:
        seen.append(text)
        if re.match(line, text):
            process.send_signal(with_signal)
            break
    out, err = process.communicate()
    return "".join(seen) + out, err


def latest_state(workdir, variant="tiny"):
    """Returns the newest checkpoint as a dict of arrays."""
    from tests.test_configs import config_of

    exp = experiment.build(config_of("digits", variant))
    with contextlib.closing(checkpoint.Checkpoints(workdir / "checkpoints")) as checkpoints:
        state = checkpoints.restore(exp.abstract_state)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def logged(workdir, name="train/loss"):
    """Returns {step: value} of a metric."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def assert_same(a, b):
    """Asserts that two dicts of arrays are equal bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
