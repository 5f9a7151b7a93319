"""What bits/dim are compared with: the code lengths of histograms, PNG and WebP."""

import json
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from diffusion import data, experiment
from diffusion.data.loader import load_dataset
from diffusion.experiment import Experiment
from diffusion.metrics import extraction
from diffusion.metrics.baselines import BASELINES_VERSION, Baseline, baselines
from diffusion.runtime.config import cache_dir
from diffusion.utils import logging
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_json
from diffusion.utils.multihost import is_primary

MAX_BYTES = 2**28  # of the pixels of either split; evenly spaced images of a larger training split


def load_baselines(config: ConfigDict, exp: Experiment, split: str, n: int) -> list[Baseline]:
    """Returns the baselines of the first n images of a split, and prints them; [] but on process 0.

    Their histograms are of the training split; for its own images there are none. They are kept in
    the cache.
    """
    if not is_primary():
        return []
    most = max(2, MAX_BYTES // math.prod(exp.image_shape))
    images, train = experiment.load_split(config, exp, split), None
    images = images._replace(n=min(n, most, images.n))
    about = f"{images.n:,} images of {split}, {exp.levels} levels"
    if split != "train":
        try:
            train = extraction.evenly_spaced_subset(experiment.load_split(config, exp), most)
            about += f", histograms of {train.n:,} of train"
        except DataError as error:
            about += f", no histograms: {error}"
    stem = "_".join(data.fingerprint(each) for each in (train, images) if each)
    name = f"{stem}_{exp.levels}_{BASELINES_VERSION}.json"
    path = cache_dir() / "baselines" / name
    try:
        rows = [Baseline(*row) for row in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        seen = None if train is None else load_dataset(train)[0]
        rows = baselines(seen, load_dataset(images)[0], exp.levels)
        save_json(path, rows)
    listed = ", ".join(f"{row.name} {row.bits:.3f}" for row in rows)
    logging.info(f"baselines  {listed} bits/dim ({about})")
    return rows


def worse_than(bits: float, error: float, rows: Sequence[Baseline]) -> str:
    """Returns "; worse than ..." with the baselines that a reading is above by its error, or ""."""
    better = [row for row in rows if row.bits + math.hypot(error, row.error or 0) < bits]
    better.sort(key=lambda row: row.bits)
    return "; worse than " * bool(better) + ", ".join(f"{x.name} {x.bits:.3f}" for x in better)
