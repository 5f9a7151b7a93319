"""--mode=prepare: makes a TFDS data set of images of any kind, or surveys what it would hold.

JAX is not started: no accelerator is taken for this.
"""

import time

from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.data import mismatch
from diffusion.data.prepare import pipeline, sources, tfds_writer
from diffusion.data.prepare.image_decoding import ImageSpec
from diffusion.plotting import image_grid
from diffusion.runtime.config import Run, cache_dir
from diffusion.utils import logging
from diffusion.utils.errors import WorkdirError, error_text
from diffusion.utils.io import is_object_store, read_bytes, save_text, to_path
from diffusion.utils.progress import Progress, human_bytes


def run(run: Run) -> None:
    """Writes the data set data.name in data.data_dir, made of data.source.

    With --dry_run nothing is written but a picture of some of the images, and the list of those
    that were skipped, in the work directory; their names are those of the data set.
    """
    c, dry_run = run.config.data, run.flags.dry_run
    spec = ImageSpec(*experiment.image_shape(run.config), tuple(c.background), c.fit)
    selection = sources.Selection(tuple(c.include), tuple(c.exclude))
    downloads = cache_dir() if is_object_store(c.data_dir) else to_path(c.data_dir)
    downloads = str(downloads / "downloads")
    figures = run.workdir / "figures"
    stem = f"{'dry_run' if dry_run else 'data'}-{c.name}"  # each set's own: none is overwritten
    picture, skipped = figures / f"{stem}.png", figures / f"{stem}-skipped.txt"
    tfds_writer.new_set_path(c.data_dir, c.name, may_exist=dry_run)  # before an hour of reading
    holdout = _holdout(c)
    source = sources.open_source(
        c.source, c.archive, downloads, c.accept_incomplete, _TransferProgress(), selection
    )
    logging.info(f"reading    {source.about}")
    logging.info(f"           each image {pipeline.describe_spec(spec)}")
    try:  # better an error now than after an hour
        figures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{figures}: cannot write there: {error_text(error)}") from error
    with Progress(source.count, unit="image") as progress:
        options = {
            "holdout": holdout,
            "on_error": c.on_error,
            "workers": c.workers,
            "report": progress,
        }
        if dry_run:
            summary = pipeline.survey(source, spec, **options)
        else:
            summary = pipeline.prepare(source, spec, c.data_dir, c.name, **options)
    for line in pipeline.describe(summary):
        logging.info(f"           {line}")
    skipped.unlink(missing_ok=True)  # of an earlier run
    if summary.skipped:
        save_text(skipped, "".join(f"{name}: {why}\n" for name, why in summary.skipped))
        logging.info(f"           skipped images: {skipped}")
    image_grid.save_png(picture, image_grid.image_grid(summary.sample))
    what = "nothing was prepared" if dry_run else f"{c.data_dir}/{c.name}"
    logging.info(f"done       {what}; some of the images: {picture}")


def _holdout(c: ConfigDict) -> float | list[str]:
    """Returns the fraction of the images that goes to the split test, or their names."""
    if not c.holdout_names:
        return c.holdout
    try:
        lines = read_bytes(to_path(c.holdout_names)).decode().splitlines()
    except (OSError, ValueError) as error:
        found = f"{c.holdout_names}, which cannot be read: {error_text(error)}"
        raise mismatch("data.holdout_names", "a file of names, one a line", found) from error
    return list(filter(None, lines))


class _TransferProgress:
    """Shows the progress of downloads and the like, if they take more than a moment."""

    def __init__(self):
        self._began: dict[str, float] = {}
        self._bars: dict[str, Progress] = {}

    def __call__(self, what: str, done: int, total: int | None) -> None:
        waited = time.monotonic() - self._began.setdefault(what, time.monotonic())
        if what not in self._bars and waited > 1 and total and done < total:
            logging.info(f"{what}, {human_bytes(total)}")
            self._bars[what] = Progress(-(-total // 10**6), done // 10**6, unit="megabyte")
        if what in self._bars:
            self._bars[what](-(-total // 10**6) if done >= total else done // 10**6)
