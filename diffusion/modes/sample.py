"""--mode=sample: images from the averaged weights, as samples.npz and as a picture."""

import numpy as np

from diffusion import experiment
from diffusion.modes import _sampling
from diffusion.modes._common import Trained
from diffusion.plotting import image_grid
from diffusion.runtime.config import Run, with_overrides
from diffusion.utils import digests, io, logging
from diffusion.utils.errors import ConfigError, DataError, one_line
from diffusion.utils.multihost import is_primary

GRID_IMAGES, CLASS_ROWS = 100, 10  # in the picture; where a column is a class, at most these rows


def run(run: Run) -> None:
    """Draws sample.num images into workdir/samples/STEP_WEIGHTS_SEED_SAMPLER_DIGEST/.

    Those that start from --input are as many as it holds, unless sample.num is typed.
    """
    config, inputs, x_T = run.config, run.flags.input, None
    exp = experiment.build(config)
    if len(inputs) > 1:
        raise ConfigError(f"--input: expected one npy file, found {len(inputs)} of them")
    if inputs:
        x_T = load_noise(inputs[0], exp.image_shape)
        n = config.sample.num if "sample.num" in run.overrides else len(x_T)
        if n > len(x_T):
            wanted = f"expected at most the {len(x_T):,} of --input"
            raise ConfigError(f"sample.num: {wanted}, found {n:,}; leave it out to draw all")
        run = run._replace(config=with_overrides(config, {"sample.num": n}))
    save_samples(_sampling.load_for_sampling(run, exp), x_T)


def load_noise(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Opens x_T float32[n, h, w, c] for images of shape (h, w, c). Raises DataError."""
    try:
        x_T = np.asarray(np.lib.format.open_memmap(io.local_copy(path), "r"))
    except (OSError, ValueError) as error:
        raise DataError(f"--input={path}: expected an npy file: {one_line(error, 200)}") from error
    wanted, found = f"float32[n, {', '.join(map(str, shape))}]", f"{x_T.dtype}{list(x_T.shape)}"
    if x_T.dtype != np.float32 or x_T.ndim != 4 or x_T.shape[1:] != shape or not x_T.size:
        raise DataError(f"--input={path}: expected {wanted}, found {found}")
    if not np.isfinite(x_T).all():
        raise DataError(f"--input={path}: expected finite numbers, found NaN or infinity")
    return x_T


def save_samples(trained: Trained, x_T: np.ndarray | None = None) -> None:
    """Writes samples.npz, grid.png and how.json.

    A set of the same setting is resumed or extended; a larger one is kept. Raises WorkdirError.

    x_T: float32[n, h, w, c] that the images start from; None: noise of sample.seed.
    """
    config, c, exp = trained.config, trained.config.sample, trained.exp
    setting = _sampling.sample_setting(config, trained.step, trained.weights, c.seed)
    setting |= {} if x_T is None else digests.sha256({"x_T": x_T})
    folder = trained.workdir / "samples" / f"{trained.step:08d}_{_sampling.sample_name(setting)}"
    store = _sampling.SampleStore(folder, setting, exp.image_shape)
    sampler = _sampling.compile_sampler(config, exp, min(c.num, c.batch_size))
    what = f"{c.num:,} images of step {trained.step:,}, {_sampling.describe_sampler(config)}"
    logging.info(f"sampling   {what}{'' if x_T is None else ', from the noise of --input'}")
    _sampling.fill(store, sampler._replace(x_T=x_T), trained.params, c.num)
    if not is_primary():
        return
    images = store.read()
    classes = 0 if c.label >= 0 else config.model.num_classes
    image_grid.save_png(folder / "grid.png", sample_grid(images, classes))
    how = {"step": trained.step, "weights": trained.weights, "images": len(images)}
    how |= {"config": config, "x_T": setting.get("x_T")}
    io.save_json(folder / "how.json", how)
    shape = f"uint8 {list(images.shape)} in arr_0"
    logging.info(f"done       {folder}/samples.npz ({shape}), grid.png, how.json")


def sample_grid(images: np.ndarray, classes: int) -> np.ndarray:
    """Returns the first images uint8[n, h, w, c] as a picture, uint8[H, W, 3].

    Where they are of all classes in turn, a column is a class. classes: 0: of one, or of none.
    """
    if not 0 < classes <= min(len(images), GRID_IMAGES):
        return image_grid.image_grid(images[:GRID_IMAGES])
    rows = min(CLASS_ROWS, GRID_IMAGES // classes)
    return image_grid.image_grid(images[: rows * classes], classes)
