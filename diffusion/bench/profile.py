"""--mode=bench --part=profile: the ten operations in which a training step spends most time.

Each is shown with the layer that it came from; a fusion with that of its result.
"""

import collections
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from diffusion.bench import hlo
from diffusion.bench.speed import training_step
from diffusion.bench.timing import Measured
from diffusion.experiment import Experiment

STEPS, SHOWN = 3, 10
ORIGIN = re.compile(r'op_name="([^"]*)"')
CONTAINERS = {"while", "conditional", "call"}  # their time is that of their operations


def profile_part(config: ConfigDict, exp: Experiment) -> Iterator[Measured]:
    """Yields milliseconds per step, of all devices, and their share of the recorded time."""
    compiled, run, _ = training_step(config, exp)
    run(1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            run(STEPS)
        (path,) = pathlib.Path(folder).rglob("perfetto_trace.json.gz")
        took = durations(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])
    known = operations(compiled.as_text())
    took = collections.Counter({name: took[name] for name in took if name in known})
    for name, microseconds in took.most_common(SHOWN):
        share, layer = microseconds / took.total(), short(known[name])
        yield Measured(f"{share:4.0%}  {name:30} {layer}", "ms", [microseconds / STEPS / 1e3])


def durations(events: list[dict[str, Any]]) -> collections.Counter[str]:
    """Returns {operation: microseconds} of a Chrome trace: of the devices, or of XLA's CPU threads.

    Of a device's several timelines its streams (GPU) or "XLA Ops" (TPU) count.
    """
    about = {"process_name": {}, "thread_name": {}}
    for e in events:
        if e.get("name") in about:
            about[e["name"]][e["pid"], e.get("tid", 0)] = e["args"]["name"]
    processes = {pid: name for (pid, _), name in about["process_name"].items()}
    threads = about["thread_name"]
    on_device = {key for key in threads if "/device:" in processes.get(key[0], "")}
    streams = {key for key in on_device if threads[key].startswith("Stream")}
    named = {key for key in on_device if threads[key] == "XLA Ops"}
    workers = {key for key in threads if threads[key].startswith("tf_XLA")}
    chosen, took = streams or named or workers, collections.Counter()
    for e in events:
        if e.get("ph") == "X" and (e["pid"], e["tid"]) in chosen:
            took[e.get("args", {}).get("hlo_op", e["name"])] += e["dur"]
    return took


def operations(text: str) -> dict[str, str]:
    """Returns {operation: the layer that it comes from, or ""} of a program's text."""
    lines = map(re.Match.groups, filter(None, map(hlo.LINE.match, text.splitlines())))
    origins = {name: ORIGIN.search(rest) for name, _, kind, rest in lines if kind not in CONTAINERS}
    return {name: origin[1] if origin else "" for name, origin in origins.items()}


def short(origin: str) -> str:
    """Returns the last three parts of "jit(update)/…/down_0/block_1/conv1/conv_general_dilated"."""
    return "/".join(origin.split("/")[-3:])
