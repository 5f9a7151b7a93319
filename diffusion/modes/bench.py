"""--mode=bench: how fast the parts are on this machine, each with its median and range."""

from collections.abc import Iterator

import jax

from diffusion import experiment
from diffusion.bench import codec, profile, speed, tpu
from diffusion.bench.timing import Measured
from diffusion.modes._common import describe_devices
from diffusion.runtime.config import Run
from diffusion.utils import logging
from diffusion.utils.io import save_json
from diffusion.utils.multihost import is_primary

PARTS = {  # in the order of --part=all; "tpu", which needs a compiler of its own, is not among them
    "train": speed.train_part,
    "sample": speed.sample_part,
    "likelihood": speed.likelihood_part,
    "codec": codec.codec_part,
    "features": speed.features_part,
    "data": speed.data_part,
    "profile": profile.profile_part,
}


def run(run: Run) -> None:
    """Measures --part, prints each line as it comes, and writes workdir/bench/PART.json."""
    part, topology = run.flags.part, run.flags.topology
    if part == "tpu":
        report(run, part, topology, tpu.tpu_part(run.config, topology))
        return
    exp = experiment.build(run.config)
    for name in PARTS if part == "all" else [part]:
        report(run, name, describe_devices(), PARTS[name](run.config, exp))


def report(run: Run, part: str, device: str, measurements: Iterator[Measured]) -> None:
    """Prints and saves the measurements of a part as they come."""
    logging.info(f"{part}: median (lowest to highest)")
    lines, path = [], run.workdir / "bench" / f"{part}.json"
    for measured in measurements:
        logging.info(measured.line())
        lines.append(measured._asdict())
        if is_primary():  # so that what is known survives a stop
            save_json(path, {"device": device, "jax": jax.__version__, "measured": lines})
    logging.info(f"done       {path}")
