"""--mode=prepare: images of any kind -> a TFDS data set, or only a look at what it would be.

Without JAX: no accelerator is taken for this.
"""

import os
import pathlib
import time

from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.data.prepare import archives, image_decoding, pipeline, sources
from diffusion.plotting import image_grid
from diffusion.runtime.config import data_key_message
from diffusion.utils import logging
from diffusion.utils.errors import DataError, WorkdirError
from diffusion.utils.io import save_text
from diffusion.utils.progress import Progress, human_bytes


def run(config: ConfigDict, workdir: pathlib.Path, dry_run: bool) -> None:
    """data.source -> the data set data.name in data.data_dir. Raises Fatal.

    dry_run: nothing is written but a picture of some of the images, in the work directory.
    """
    c = config.data
    rule = image_decoding.ImageSpec(*experiment.image_shape(config), tuple(c.background))
    downloads = os.path.join(c.data_dir, "downloads")
    picture = workdir / "figures" / "data.png"
    try:
        source = sources.open_source(
            c.source, c.archive, downloads, c.accept_incomplete, Transfers()
        )
        logging.info(f"reading    {source.about}")
        make_folder(picture.parent)  # better an error now than after an hour
        with Progress(source.count, unit="image") as progress:
            options = {"holdout": holdout(c), "on_error": c.on_error, "workers": c.workers or None}
            if dry_run:
                summary = pipeline.survey(source, rule, report=progress, **options)
            else:
                args = source, rule, c.data_dir, c.name
                summary = pipeline.prepare(*args, report=progress, **options)
    except (archives.SourceError, pipeline.PrepareError) as error:
        raise DataError(data_key_message(error, c)) from error
    for line in pipeline.describe(summary):
        logging.info(f"           {line}")
    if summary.skipped:
        path = workdir / "figures" / "skipped.txt"
        save_text(path, "".join(f"{name}: {why}\n" for name, why in summary.skipped))
        logging.info(f"           all that were skipped: {path}")
    image_grid.save_png(picture, image_grid.image_grid(summary.sample))
    what = "nothing was prepared" if dry_run else f"{c.data_dir}/{c.name}"
    logging.info(f"done       {what}; a look at some of the images: {picture}")


def make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{folder}: cannot write there: {error.strerror}") from error


def holdout(c: ConfigDict) -> float | list[str]:
    """The fraction of the images that goes to the split test, or their names, one a line."""
    if not c.holdout_names:
        return c.holdout
    try:
        lines = pathlib.Path(c.holdout_names).expanduser().read_text().splitlines()
    except (OSError, ValueError) as error:
        message = f"data.holdout_names: {c.holdout_names}: cannot be read: {error}"
        raise DataError(message) from error
    return list(filter(None, lines))


class Transfers:
    """Progress of what is counted in bytes, such as downloads, if it takes more than a moment."""

    def __init__(self):
        self.began: dict[str, float] = {}
        self.shown: dict[str, Progress] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        waited = time.monotonic() - self.began.setdefault(what, time.monotonic())
        if what not in self.shown and waited > 1 and total and done < total:
            logging.info(f"{what}, {human_bytes(total)}")
            megabytes = -(-total // 10**6)
            self.shown[what] = Progress(megabytes, done // 10**6, unit="megabyte")
        if what in self.shown:
            self.shown[what](-(-total // 10**6) if done >= total else done // 10**6)
