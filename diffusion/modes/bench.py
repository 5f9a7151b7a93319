"""--mode=bench: how fast the parts are on this machine, each with its median and range."""

from collections.abc import Iterator

import jax

from diffusion import experiment
from diffusion.bench.suite import PARTS
from diffusion.bench.timing import Measured
from diffusion.modes._common import describe_devices
from diffusion.runtime.config import Run
from diffusion.utils import logging
from diffusion.utils.io import save_json


def run(run: Run) -> None:
    """Measures --part, prints each line as it comes, and writes workdir/bench/PART.json."""
    if run.flags.part == "tpu":
        from diffusion.bench.tpu import tpu_part

        report(run, "tpu", run.flags.topology, tpu_part(run.config, run.flags.topology))
        return
    exp = experiment.build(run.config)
    for part in PARTS if run.flags.part == "all" else [run.flags.part]:
        report(run, part, describe_devices(), PARTS[part](run.config, exp))


def report(run: Run, part: str, device: str, measurements: Iterator[Measured]) -> None:
    """Prints and saves the measurements of a part."""
    logging.info(f"{part}: median (lowest to highest)")
    lines = []
    for measured in measurements:
        logging.info(measured.line())
        lines.append(measured._asdict())
    path = run.workdir / "bench" / f"{part}.json"
    save_json(path, {"device": device, "jax": jax.__version__, "measured": lines})
    logging.info(f"done       {path}")
