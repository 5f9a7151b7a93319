"""--mode=figures: the figures of the paper, and a few that came after it, from one checkpoint.

A figure is a function from a FigureContext to the files to write; FIGURES lists them.
"""

import functools
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import random
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.data import ImageDataset, augment, loader
from diffusion.experiment import Experiment
from diffusion.metrics.nearest import Neighbours, no_neighbours, update_neighbours
from diffusion.modes import _codec, _sampling
from diffusion.modes._common import Trained
from diffusion.modes._trajectories import (
    FigureContext,
    Trajectories,
    first_samples,
    make_context,
    read_real,
    rollout,
)
from diffusion.plotting import curves, image_grid, labelled_grid
from diffusion.plotting.animation import save_animation
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, call_for_key, lookup
from diffusion.samplers import editing
from diffusion.utils import io, logging
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import Progress

Files = dict[str, Callable[[epath.Path], None]]  # {file name: function that writes it}

INPAINTING_STEPS = 250  # of the chain that is resampled, as in RePaint
MEASURED = ("quality", "nearest", "memorisation")  # figures that use context.score or features
REAL = (
    "interpolation",
    "coarse_to_fine",
    "memorisation",
    "inpainting",
)  # figures of images of figures.split


def run(run: Run) -> None:
    """Draws figures.names into workdir/figures/STEP/, except those that are there already."""
    exp = experiment.build(run.config)
    check(run.config, exp)
    draw_figures(_sampling.load_for_sampling(run, exp))


def check(config: ConfigDict, exp: Experiment) -> None:
    """Raises ConfigError or DataError where a figure cannot be drawn, before any is."""
    names, rows = config.figures.names, config.figures.rows
    for name in names:
        lookup(FIGURES, "figures.names", name)
    known_mask(config, *exp.image_shape[:2])
    if set(REAL) & set(names):
        read_real(config, exp, 2 * rows if "interpolation" in names else rows)


def draw_figures(trained: Trained) -> None:
    """Writes the figures; how.json notes the setting of each once it is complete."""
    config, step = trained.config, trained.step
    folder = trained.folder("figures")
    try:
        complete = json.loads((folder / "how.json").read_text())["figures"]
    except (OSError, ValueError, KeyError, TypeError):
        complete = {}
    pending = {name: figure_setting(trained, name) for name in config.figures.names}
    for name, setting in list(pending.items()):
        note = complete.get(name, {"setting": "", "files": []})
        there = note["setting"] == setting and all((folder / f).exists() for f in note["files"])
        if broadcast_from_primary(there):
            logging.info(f"keeping    {name}, drawn with this setting before")
            del pending[name]
    measures = ()
    if set(MEASURED) & set(pending):
        from diffusion.modes import _scores  # imports scipy and the networks of metrics

        measures = _scores.make_measures(trained)
    context = make_context(trained, *measures)
    for name, setting in pending.items():
        logging.info(f"drawing    {name}")
        files = FIGURES[name](context)
        complete[name] = {"setting": setting, "files": list(files)}
        if is_primary():
            for file, write in files.items():
                write(folder / file)
            how = {"step": step, "weights": trained.weights, "config": config}
            io.save_json(folder / "how.json", how | {"figures": complete})
        preemption.raise_if_requested()
    logging.info(f"done       {folder}")


def figure_setting(trained: Trained, name: str) -> str:
    """Returns a digest of all that a figure depends on."""
    c = trained.config
    setting = _sampling.sample_setting(c, trained.step, trained.weights, c.figures.seed)
    setting["figures"] = {key: value for key, value in c.figures.items() if key != "names"}
    setting["mask"] = known_mask(c, *trained.exp.image_shape[:2]).tolist()  # a picture may change
    if name == "compression":
        setting["measured"] = _codec.measured_curves(trained.folder("eval"))
    setting["eval"] = c.eval.to_dict() if name in MEASURED else {}
    return _sampling.setting_digest(setting)


def grid_file(name: str, images: np.ndarray, columns: Sequence[str], **options) -> Files:
    """Returns the file of a labelled grid of uint8[rows, columns, h, w, c]."""
    page = labelled_grid.labelled_grid(images, columns, **options)
    return {name: functools.partial(image_grid.save_png, image=page)}


def times(context: FigureContext, positions: Sequence[int], prefix: str = "") -> list[str]:
    """Returns the times of positions as labels, ["1,000", "500", ...]."""
    return [f"{prefix}{context.sampler.ts[i]:,}" for i in positions]


def samples(context: FigureContext) -> Files:
    """Draws Figs. 1, 3, 11-20: a grid of samples."""
    x, _ = first_samples(context, context.config.figures.num, (0, context.sampler.steps))
    page = image_grid.image_grid(x[-1])
    return {"samples.png": functools.partial(image_grid.save_png, image=page)}


def progressive(context: FigureContext, columns: int = 12) -> Files:
    """Draws Figs. 6, 14: the predicted x_0 at evenly spaced t."""
    positions = editing.evenly_spaced(context.sampler.steps, columns, first=1)
    _, x_0 = first_samples(context, context.config.figures.rows, (0, *positions))
    labels, note = times(context, positions - 1), "the image predicted from xₜ, at t ="
    words = {"title": "Progressive generation", "note": note}
    return grid_file("progressive.png", x_0[1:].swapaxes(0, 1), labels, **words)


def denoising(context: FigureContext, columns: int = 12) -> Files:
    """Draws Fig. 2: x_t at evenly spaced t."""
    positions = editing.evenly_spaced(context.sampler.steps, columns)
    x, _ = first_samples(context, context.config.figures.rows, positions)
    words = {"title": "The reverse process", "note": "xₜ, at t ="}
    return grid_file("denoising.png", x.swapaxes(0, 1), times(context, positions), **words)


def shared(
    context: FigureContext, depths: Sequence[float] = (1, 0.75, 0.5, 0.25), draws: int = 8
) -> Files:
    """Draws Fig. 7: samples from p(x_0 | x_t) that share x_t, a row for each t = depth * T."""
    ts, steps = context.sampler.ts, context.sampler.steps
    number = np.arange(draws, dtype=np.uint32)
    positions = sorted({editing.nearest_index(ts, depth) for depth in depths})
    [x] = rollout(context, [Trajectories((0, *positions), [0])], lambda state: state.x)
    latents = x[1:]  # [positions, 1, h, w, c]
    starts = [
        Trajectories((i, steps), 0 * number, 1 + row * draws + number, x=latent.repeat(draws, 0))
        for row, (i, latent) in enumerate(zip(positions, latents, strict=True))
    ]
    drawn = [x[-1] for x, _ in rollout(context, starts)]
    if all((images[:1] == images).all() for images in drawn):
        name = context.config.sampler.name
        logging.info(f"note       {name} draws no noise: samples that share x_t are equal")
    noisy = augment.unscale(jnp.asarray(latents), context.trained.exp.levels)
    images = np.concatenate([noisy, drawn], 1)
    columns, rows = ("xₜ", *map(str, 1 + number)), times(context, positions, "t = ")
    words = {"title": "Samples that share xₜ", "note": "drawn from p(x₀ | xₜ)"}
    return grid_file("shared.png", images, columns, rows=rows, breaks=[1], **words)


def interpolation(context: FigureContext, depth: float = 0.5) -> Files:
    """Draws Fig. 8: interpolations of pairs of real images in x_t, t = depth * T."""
    n, position = context.config.figures.rows, editing.nearest_index(context.sampler.ts, depth)
    image, label = read_real(context.config, context.trained.exp, 2 * n)
    pairs = [(i, image[[i, i + n]], label[[i, i + n]], position) for i in range(n)]
    note = f"the latents of two images at t = {times(context, [position])[0]}, mixed by λ"
    return _interpolate(context, "interpolation.png", pairs, title="Interpolation", note=note)


def coarse_to_fine(context: FigureContext, n: int = 9) -> Files:
    """Draws Fig. 9: interpolations of two real images in x_t for t = T, 7/8 T, ..., 0."""
    image, label = read_real(context.config, context.trained.exp, 2)
    positions = [editing.nearest_index(context.sampler.ts, depth) for depth in np.linspace(1, 0, n)]
    positions = list(dict.fromkeys(positions))  # a short chain has fewer than n
    pairs = [(row, image, label, position) for row, position in enumerate(positions)]
    note = "the latents of two images after t steps of noise, mixed by λ"
    words = {"rows": times(context, positions, "t = "), "title": "Coarse to fine", "note": note}
    return _interpolate(context, "coarse_to_fine.png", pairs, **words)


def _interpolate(context: FigureContext, name: str, pairs: Sequence[tuple], **words) -> Files:
    """Draws a row for each (number, two images, two labels, position).

    The noise of a pair is the same for every lambda. The network gets the nearer image's label.
    """
    share, seed = np.linspace(0, 1, 11).astype(np.float32), np.uint32(context.config.figures.seed)
    process, levels = context.trained.exp.process, context.trained.exp.levels

    @jax.jit
    def mix(number, image, t):
        keys = jnp.broadcast_to(random.fold_in(random.key(seed), number), share.shape)
        images = augment.scale(image, levels)
        x_0, y_0 = (jnp.broadcast_to(a, (len(share), *a.shape)) for a in images)
        return editing.interpolate_latents(process, keys, x_0, y_0, t, share)

    starts = []
    for number, image, label, i in pairs:
        x = np.asarray(mix(np.uint32(number), image, context.sampler.ts[i]))
        nearer = np.where(share < 0.5, *label).astype(np.int32)
        starts.append(
            Trajectories((i, context.sampler.steps), np.full(11, number), label=nearer, x=x)
        )
    rows = [
        np.concatenate([image[:1], x[-1], image[1:]])
        for (_, image, _, _), (x, _) in zip(pairs, rollout(context, starts), strict=True)
    ]
    columns = ("source", "λ = 0", *(f"{s:.1f}" for s in share[1:-1]), "λ = 1", "source")
    return grid_file(name, np.stack(rows), columns, breaks=(1, 12), **words)


def quality(context: FigureContext, points: int = 11) -> Files:
    """Draws Fig. 10: the distance of the predicted x_0 to the data and to the sample, over t."""
    positions = editing.evenly_spaced(context.sampler.steps, points, first=1)
    x, x_0 = first_samples(context, context.config.figures.scored, (0, *positions))
    final = x[-1].astype(np.float32)
    rmse = [np.sqrt(np.mean((images - final) ** 2, dtype=np.float64)) for images in x_0[1:]]
    series = {"RMSE to the sample (0-255)": np.array(rmse)}
    if context.score:
        scores = [context.score(images) for images in x_0[1:]]
        series |= {name: np.array([score[name] for score in scores]) for name in scores[0]}
    steps = context.sampler.ts[0] - context.sampler.ts[positions - 1]
    numbers = {"images": len(final), "reverse steps": steps.tolist()}
    numbers |= {name: values.tolist() for name, values in series.items()}
    return {
        "quality.png": functools.partial(curves.plot_quality, steps=steps, series=series),
        "quality.json": functools.partial(io.save_json, content=numbers),
    }


def compression(context: FigureContext) -> Files:
    """Draws Fig. 5 with real bits: of the file that --mode=compress has written last."""
    lines = _codec.measured_curves(context.trained.folder("eval"))
    if not lines:
        logging.info("note       --mode=compress --input=test --output=FILE measures compression")
        return {}
    return {"compression.png": functools.partial(curves.plot_codecs, curves=lines)}


def nearest(context: FigureContext, k: int = 8) -> Files:
    """Draws Figs. 12, 15: the training images nearest to samples, in pixels and in features."""
    x, _ = first_samples(context, context.config.figures.rows, (0, context.sampler.steps))
    drawn, files = x[-1], {}
    images = experiment.load_split(context.config, context.trained.exp, "train")
    for name, found in _search(context, images, drawn, k).items():
        neighbours = images.read(found.indices.ravel())[0]
        neighbours = neighbours.reshape(len(drawn), -1, *drawn.shape[1:])
        rows = np.concatenate([drawn[:, None], neighbours], 1)
        words = {"title": f"Nearest training images, by {name}", "note": "nearest first"}
        columns = ("sample", *map(str, range(1, rows.shape[1])))
        files |= grid_file(f"nearest_{name}.png", rows, columns, breaks=[1], **words)
    return files


def memorisation(context: FigureContext) -> Files:
    """Plots how near samples and held-out images are to their nearest training image.

    A model that repeats what it was trained on draws samples that are nearer than new images are.
    """
    c, exp = context.config.figures, context.trained.exp
    if c.split == "train":
        logging.info("note       memorisation compares with held-out images: figures.split=test")
        return {}
    held_out = experiment.load_split(context.config, exp, c.split).n
    real, _ = read_real(context.config, exp, min(c.num, held_out))
    x, _ = first_samples(context, c.num, (0, context.sampler.steps))
    images = experiment.load_split(context.config, exp, "train")
    series = {}
    for name, found in _search(context, images, np.concatenate([x[-1], real]), 1).items():
        away = np.sqrt(found.squared_distances[:, 0])
        if name == "pixels":
            name, away = "pixels (RMSE, 0-255)", away / np.sqrt(real[0].size)
        own, others = away[: c.num], away[c.num :]
        series[name] = {"samples": own, f"images of {c.split}": others}
        about = f"{np.median(own):.3g} of samples, {np.median(others):.3g} of images of {c.split}"
        near = f"{nearer_share(own, others):.0%} of samples are nearer than 95% of these"
        logging.info(f"nearest    by {name}, median: {about}; {near}")
    numbers = {name: {k: v.tolist() for k, v in both.items()} for name, both in series.items()}
    return {
        "memorisation.png": functools.partial(curves.plot_distances, panels=series),
        "memorisation.json": functools.partial(io.save_json, content=numbers),
    }


def nearer_share(samples: np.ndarray, real: np.ndarray) -> float:
    """Returns the share of distances float[n] below the 5% quantile of others float[m]."""
    return float(np.mean(samples < np.quantile(real, 0.05)))


def _search(
    context: FigureContext, images: ImageDataset, queries: np.ndarray, k: int
) -> dict[str, Neighbours]:
    """Returns the nearest of `images` to queries uint8[q, h, w, c], by pixels and each feature."""
    config = context.config
    k, size = min(k, images.n), min(config.sample.batch_size, images.n)
    spaces = {"pixels": lambda pixels: pixels, **context.features}
    wanted = {name: np.asarray(features(queries)) for name, features in spaces.items()}
    best = dict.fromkeys(spaces, no_neighbours(len(queries)))
    with Progress(images.n, unit="image") as progress:
        for pixels, _, valid in loader.iterate_split(images, size, workers=config.data.workers):
            for name, features in spaces.items():
                block = np.asarray(features(pixels))[valid]
                best[name] = update_neighbours(best[name], wanted[name], block, k)
            progress(best["pixels"].n)
            preemption.raise_if_requested()
    return best


def inpainting(context: FigureContext, draws: int = 6) -> Files:
    """Completes real images by replacement with resampling (RePaint, arXiv:2201.09865)."""
    config, exp, c = context.config, context.trained.exp, context.config.figures
    known = known_mask(config, *exp.image_shape[:2])
    ts = context.sampler.ts[editing.evenly_spaced(context.sampler.steps, INPAINTING_STEPS + 1)]
    path = editing.resampling_path(ts, c.jump, c.repeats)
    sampler, _ = experiment.make_sampler(config, exp)
    predictor = experiment.make_predictor(config, exp)

    def start(seed, label, indices, fork, x_0):
        keys, labels, state = context.sampler.start(seed, label, indices)
        return keys, labels, (state.x, x_0)

    def advance(params, keys, labels, state, i, j):
        x, x_0 = state
        args = exp.process, sampler, predictor(params, labels), keys, x, x_0
        return editing.inpaint(*args, known[..., None], path, i, j), x_0

    start, advance = _sampling.compile_chain(exp, start, advance)
    resampler = context.sampler._replace(start=start, advance=advance, ts=np.append(path.t, 0))
    image, label = read_real(config, exp, c.rows)
    x_0, label = (np.repeat(a, draws, 0) for a in (augment.scale(image, exp.levels), label))
    images = Trajectories((0, len(path.t)), np.arange(len(x_0)), label=label, x=x_0)
    resampling = context._replace(sampler=resampler)
    [x] = rollout(resampling, [images], lambda state: augment.unscale(state[0], exp.levels))
    drawn = x[-1].reshape(c.rows, draws, *exp.image_shape)
    images = np.concatenate([image[:, None], image[:, None], drawn], 1)
    images = np.broadcast_to(images, (*images.shape[:-1], 3)).copy()
    images[:, 1, ~known] = labelled_grid.HIDDEN
    columns = ("original", "known", *map(str, range(1, draws + 1)))
    note = f"{c.repeats} times through every {c.jump} steps"
    words = {"title": "Inpainting", "note": note, "breaks": [2]}
    return grid_file("inpainting.png", images, columns, **words)


def known_mask(config: ConfigDict, h: int, w: int) -> np.ndarray:
    """Returns which pixels inpainting keeps, bool[h, w]: of editing.MASKS or from a picture.

    Raises ConfigError.
    """
    mask = config.figures.mask
    if io.to_path(mask).is_file():
        return call_for_key(labelled_grid.load_mask, "figures.mask", io.local_copy(mask), h, w)
    return lookup(editing.MASKS, "figures.mask", mask)(h, w)


def animation(context: FigureContext, n: int = 16, frames: int = 32) -> Files:
    """Animates the reverse process: x_t beside the predicted x_0."""
    c = context.config.figures
    positions = editing.evenly_spaced(context.sampler.steps, frames, first=1)
    x, x_0 = first_samples(context, min(n, c.num), (0, *positions))
    pages = []
    for t, *images in zip(times(context, positions, "t = "), x[1:], x_0[1:], strict=True):
        page = labelled_grid.side_by_side([image_grid.image_grid(image) for image in images])
        pages.append(labelled_grid.add_title(page, t, "xₜ, and the image predicted"))
    return {f"animation.{c.animation}": functools.partial(save_animation, frames=np.stack(pages))}


FIGURES: dict[str, Callable[[FigureContext], Files]] = {
    "samples": samples,
    "progressive": progressive,
    "denoising": denoising,
    "shared": shared,
    "interpolation": interpolation,
    "coarse_to_fine": coarse_to_fine,
    "quality": quality,
    "compression": compression,
    "nearest": nearest,
    "memorisation": memorisation,
    "inpainting": inpainting,
    "animation": animation,
}
