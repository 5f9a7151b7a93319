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
    layers = origins(compiled.as_text())
    took = collections.Counter({name: took[name] for name in took if name in layers})
    for name, microseconds in took.most_common(SHOWN):
        layer = "/".join(layers[name].split("/")[-3:])  # of jit(update)/.../block_1/conv1/...
        what = f"{microseconds / took.total():4.0%}  {name:30} {layer}"
        yield Measured(what, "ms", [microseconds / STEPS / 1e3])


def durations(events: list[dict[str, Any]]) -> collections.Counter[str]:
    """Returns {operation: microseconds} of a Chrome trace: of the devices, or of XLA's CPU threads.

    Of a device's several timelines its streams (GPU) or "XLA Ops" (TPU) count.
    """
    processes, threads = {}, {}
    for e in events:
        if e.get("name") == "process_name":
            processes[e["pid"]] = e["args"]["name"]
        elif e.get("name") == "thread_name":
            threads[e["pid"], e["tid"]] = e["args"]["name"]
    on_device = {key for key in threads if "/device:" in processes.get(key[0], "")}
    streams = {key for key in on_device if threads[key].startswith("Stream")}
    operations = {key for key in on_device if threads[key] == "XLA Ops"}
    workers = {key for key in threads if threads[key].startswith("tf_XLA")}
    counted, took = streams or operations or workers, collections.Counter()
    for e in events:
        if e.get("ph") == "X" and (e["pid"], e["tid"]) in counted:
            took[e.get("args", {}).get("hlo_op", e["name"])] += e["dur"]
    return took


def origins(text: str) -> dict[str, str]:
    """Returns {operation: the layer that it comes from, or ""} of a program's text."""
    return {
        name: origin[1] if (origin := ORIGIN.search(rest)) else ""
        for name, (_, kind, rest) in hlo.operations(text).items()
        if kind not in CONTAINERS
    }
