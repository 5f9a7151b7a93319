"""What bits/dim are compared with: the code lengths of histograms, PNG and WebP."""

import json
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from diffusion import data, experiment
from diffusion.data.loader import load_dataset
from diffusion.experiment import Experiment
from diffusion.metrics import extraction
from diffusion.metrics.baselines import Baseline, baselines
from diffusion.runtime.config import cache_dir
from diffusion.utils import logging
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_json
from diffusion.utils.multihost import is_primary

MAX_BYTES = 2**28  # of the pixels of either split; evenly spaced images of a larger training split


def load_baselines(config: ConfigDict, exp: Experiment, split: str, n: int) -> list[Baseline]:
    """Returns the baselines of the first n images of a split, and prints them; [] but on process 0.

    Their histograms are of the training split. They are kept in the cache.
    """
    if not is_primary():
        return []
    try:
        train = experiment.load_split(config, exp)
    except DataError as error:
        logging.info(f"warning    no baselines of bits/dim: {error}")
        return []
    most = max(2, MAX_BYTES // math.prod(exp.image_shape))
    train = extraction.evenly_spaced_subset(train, most)
    images = experiment.load_split(config, exp, split)._replace(n=min(n, most))
    key = f"{data.fingerprint(train)}_{data.fingerprint(images)}_{exp.levels}"
    path = cache_dir() / "baselines" / f"{key}.json"
    try:
        rows = [Baseline(*row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        (seen, _), (new, _) = map(load_dataset, (train, images))
        rows = baselines(seen, new, exp.levels)
        save_json(path, rows)
    listed = ", ".join(f"{row.name} {row.bits:.3f}" for row in rows)
    about = f"{images.n:,} images of {split}, {exp.levels} levels, by {train.n:,} of train"
    logging.info(f"baselines  {listed} bits/dim ({about})")
    return rows


def worse_than(bits: float, rows: Sequence[Baseline]) -> str:
    """Returns "; worse than ..." with the baselines below a reading in bits/dim, or ""."""
    better = sorted((row for row in rows if row.bits < bits), key=lambda row: row.bits)
    return "; worse than " * bool(better) + ", ".join(f"{x.name} {x.bits:.3f}" for x in better)
