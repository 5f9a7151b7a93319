"""`make accelerator`: what a GPU or TPU does in BUDGET_S seconds: figures, pictures and weights.

    [DEVICE=gpu] [OUT=FOLDER] [DATA=FOLDER] [BUDGET_S=540] [CONFIG=configs/NAME.py:VARIANT]
    [EXTRA="--config.key=value ..."] python -m diffusion.bench.accelerator

Each part of the plan is a process with a deadline: one that is slow or fails costs its share of the
time and nothing else. This process imports the standard library alone: the device is for the parts.
DEVICE=cpu rehearses everything with tiny networks. Exit code 1: a part failed; 2: nothing ran.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion.bench import accelerator_report as report
from diffusion.bench.accelerator_plan import PLAN, Part, Settings, command, read_settings
from diffusion.utils.errors import STOPPED, one_line

_ROOT = pathlib.Path(__file__).resolve().parents[2]
FIND_DEVICE = "import jax, sys; d = jax.devices(sys.argv[1]); print(len(d), 'x', d[0].device_kind)"
FIND_S = 90.0
LEAST = 0.03  # share of the budget: in less no part gets anywhere
LOG_LINES = 40  # of each part, in report.json
# OUT gets at most eight files: the report's two, three pictures, and three of the weights.
OURS = ("report.*", "samples.png", "progressive.png", "frontier.png", "weights-*-of-*.safetensors")
MAX_FILES, MAX_BYTES = 3, 15_000_000  # that a part may bring, and of each
Runner = Callable[[Part, float, float, pathlib.Path], tuple[int, bool]]


def measure_device(env: Mapping[str, str]) -> int:
    """Runs the plan; returns the exit code."""
    began = time.monotonic()
    try:
        settings = read_settings(env)
        device = find_device(settings.device, env)
    except ValueError as error:
        print(f"accelerator: {error}", file=sys.stderr)
        return 2
    s = settings
    s.out.mkdir(parents=True, exist_ok=True)
    for path in [path for pattern in OURS for path in s.out.glob(pattern)]:
        path.unlink()
    content = {"device": device, "config": s.config, "budget_s": s.budget_s, "extra": s.extra}
    content |= {"versions": report.versions(), "parts": []}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is known is reported
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        scratch = pathlib.Path(folder)

        def run(part: Part, seconds: float, grace_s: float, log: pathlib.Path) -> tuple[int, bool]:
            # PyTorch, in a process beside JAX, needs memory of its own.
            share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"} if part.mode == "bench" else {}
            run_env = {**environment(s.device, env), **share}
            return run_process(command(part, s, scratch), seconds, grace_s, log, run_env)

        with contextlib.suppress(KeyboardInterrupt):
            run_plan(PLAN, s, scratch, content, run, lambda: time.monotonic() - began)
    print(f"done       {s.out}/report.md, and {len([*s.out.iterdir()]) - 1} other files")
    return int(any(part["outcome"].startswith("failed") for part in content["parts"]))


def environment(device: str, env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a part: with DEVICE=cpu it is to see nothing else."""
    return {**env, "PYTHONUNBUFFERED": "1"} | ({"JAX_PLATFORMS": "cpu"} if device == "cpu" else {})


def find_device(device: str, env: Mapping[str, str]) -> str:
    """Returns what JAX sees, "1 x NVIDIA H200". Raises ValueError for none."""
    find = [sys.executable, "-c", FIND_DEVICE, device]
    options = {"env": environment(device, env), "timeout": FIND_S, "text": True}
    try:
        return subprocess.run(find, check=True, capture_output=True, **options).stdout.strip()
    except subprocess.SubprocessError as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        wanted = f"expected one that JAX sees, found none: {one_line(last, 200)}"
        raise ValueError(f"DEVICE={device}: {wanted}; DEVICE=cpu rehearses") from error


def run_plan(
    plan: Sequence[Part],
    settings: Settings,
    scratch: pathlib.Path,
    content: dict[str, Any],
    run: Runner,
    elapsed: Callable[[], float],
) -> None:
    """Runs the parts for which there is time; after each, OUT has all that is known.

    Args:
      content: of report.json; the results are added to its "parts".
      run: (part, seconds, grace_s, log) -> (exit code, whether it was stopped).
      elapsed: seconds since the beginning.
    """
    for i, part in enumerate(plan):
        began, log = elapsed(), scratch / f"{i}.log"
        grace_s = part.grace * settings.budget_s
        seconds = allowed_seconds(part, settings.budget_s, began)
        result = {"name": part.name, "outcome": "", "seconds": 0.0, "source": "", "figures": []}
        if part.needs and not any(scratch.glob(part.needs)):
            result["outcome"] = f"skipped: no part before it has left {part.needs}"
        elif seconds < LEAST * settings.budget_s:
            result["outcome"] = f"skipped: too little time is left after {began:.0f} s"
        else:
            print(f"{began:6.0f} s   {part.name}, at most {seconds:.0f} s", flush=True)
            code, late = run(part, seconds, grace_s, log)
            text = log.read_text(errors="replace").splitlines() if log.exists() else []
            result["log"] = text[-LOG_LINES:]
            result["outcome"] = outcome(code, late, seconds, text)
            result["seconds"] = round(elapsed() - began, 1)
            result |= read_figures(part, scratch)
            if left_out := collect(part, scratch, settings.out):
                result["outcome"] += f"; {left_out}"
        print(f"{elapsed():6.0f} s   {part.name}: {result['outcome']}", flush=True)
        content["parts"].append(result)
        report.write(settings.out, content)


def allowed_seconds(part: Part, budget_s: float, elapsed_s: float) -> float:
    """Returns after how long a part gets SIGTERM, so that its grace ends in time."""
    return min(part.most * budget_s, part.until * budget_s - elapsed_s) - part.grace * budget_s


def outcome(code: int, late: bool, seconds: float, log: Sequence[str]) -> str:
    """Returns in words how a part ended."""
    if late:
        saved = ", saved" if code == STOPPED and any("saved" in line for line in log[-3:]) else ""
        return f"stopped after {seconds:.0f} s{saved}"
    if code == 0:
        return "done"
    errors = [line for line in log if "error" in line.lower()] or log or ["no output"]
    return f"failed with code {code}: {one_line(errors[-1], 200)}"


def read_figures(part: Part, scratch: pathlib.Path) -> dict[str, Any]:
    """Returns {"source": ..., "figures": [...]} of what a part has left, even if it was stopped."""
    try:
        (path,) = scratch.glob(part.results) if part.results else [scratch]
        return part.read(path)._asdict()
    except (OSError, ValueError, LookupError, TypeError):  # nothing, or half of it
        return {}


def collect(part: Part, scratch: pathlib.Path, out: pathlib.Path) -> str:
    """Copies a part's files to OUT; returns why they were left out, or ""."""
    paths = sorted(path for pattern in part.files for path in scratch.glob(pattern))
    sizes = [path.stat().st_size for path in paths]
    if len(paths) > MAX_FILES or max(sizes, default=0) > MAX_BYTES:
        found = f"found {len(paths)} of at most {max(sizes) / 1e6:.1f} MB"
        wanted = f"expected at most {MAX_FILES} of {MAX_BYTES / 1e6:.0f} MB"
        return f"its files are left out: {wanted}, {found}"
    for path in paths:
        shutil.copy(path, out)
    return ""


def run_process(
    command: Sequence[str], seconds: float, grace_s: float, log: pathlib.Path, env: Mapping
) -> tuple[int, bool]:
    """Runs a command in a session of its own, whose other processes end with it.

    Returns (exit code, whether it had to be stopped: by SIGTERM, and SIGKILL `grace_s` later).
    """
    with open(log, "wb") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=_ROOT, env=env, start_new_session=True, **streams)
    late = False
    try:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()  # it alone: its workers are needed to save
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, late


if __name__ == "__main__":
    sys.exit(measure_device(os.environ))
