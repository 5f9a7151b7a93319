"""--mode=figures: every picture of the paper from one checkpoint, and a few that came after it.

Each is a function of a studio that gives files and what writes them: which images start where, at
which places they are looked at, and how they are laid out. The table at the end names them all.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from ml_collections import ConfigDict

from diffusion import experiment, process
from diffusion.data import augment, loader
from diffusion.experiment import Experiment
from diffusion.metrics.nearest import no_neighbours, update_neighbours
from diffusion.modes._trajectories import (
    Features,
    FigureContext,
    Score,
    from_noise,
    make_context,
    make_walk,
    numbered_samples,
    rollout,
)
from diffusion.plotting import image_grid, labelled_grid
from diffusion.plotting.animation import save_animation
from diffusion.plotting import curves
from diffusion.runtime.config import call_for_key, lookup
from diffusion.samplers import editing
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_text
from diffusion.utils.progress import Progress

Pages = dict[str, Callable[[pathlib.Path], None]]  # {file name: what writes it}

RESAMPLED = 250  # steps of the chain that inpainting goes up and down, as in RePaint


def real(s: FigureContext, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n images of figures.split and their labels, chosen by the seed. Raises DDPMError, DataError."""
    images = experiment.load_split(s.config, s.x, s.config.figures.split)
    if n > images.n:
        split = s.config.figures.split
        message = f"figures: expected {n} images in {split} to choose from, found {images.n}"
        raise DataError(f"{message}; lower figures.rows")
    key = random.key(s.config.figures.seed)
    return images.read(np.asarray(augment.shuffled(key, jnp.arange(n, dtype=jnp.uint32), images.n)))


def png(page: np.ndarray) -> Callable[[pathlib.Path], None]:
    """What writes a page."""
    return functools.partial(image_grid.save_png, image=page)


def times(s: FigureContext, places: Sequence[int]) -> list[str]:
    """The t of places, as words."""
    return [f"{s.ts[place]:,}" for place in places]




def samples(s: FigureContext) -> Pages:
    """Figs. 1, 3, 11-20: a grid of samples."""
    [(x, _)] = rollout(s, [from_noise(s, s.config.figures.num, (0, s.steps))])
    return {"samples.png": png(image_grid.image_grid(x[-1]))}


def progressive(s: FigureContext, columns: int = 12) -> Pages:
    """Figs. 6, 14: the image that is predicted from x_t, as t falls evenly."""
    places = editing.evenly_spaced(s.steps, columns, first=1)
    [(_, x_0)] = rollout(s, [from_noise(s, s.config.figures.rows, (0, *places))])
    note = "the image predicted from xₜ, at t ="
    page = labelled_grid.labelled_grid(
        x_0[1:].swapaxes(0, 1), times(s, places - 1), title="Progressive generation", note=note
    )
    return {"progressive.png": png(page)}


def denoising(s: FigureContext, columns: int = 12) -> Pages:
    """The reverse process itself: x_t, as t falls evenly (Fig. 2)."""
    places = editing.evenly_spaced(s.steps, columns)
    [(x, _)] = rollout(s, [from_noise(s, s.config.figures.rows, places)])
    title, note = "The reverse process", "xₜ, at t ="
    return {"denoising.png": png(labelled_grid.labelled_grid(x.swapaxes(0, 1), times(s, places), (), title, note))}


def shared(s: FigureContext, depths: Sequence[float] = (1, 0.75, 0.5, 0.25), draws: int = 8) -> Pages:
    """Fig. 7: samples from p(x_0 | x_t) that share x_t, at several t; depths: shares of T."""
    places = sorted({editing.nearest_index(s.ts, depth) for depth in depths})
    ancestor = from_noise(s, 1, (0, *places))
    [x] = rollout(s, [ancestor], look=lambda carry: carry.x)
    latents = x[1:]  # [depths, 1, h, w, c]
    branches = 1 + np.arange(len(places) * draws).reshape(-1, draws)
    starts = [
        numbered_samples(s, np.zeros(draws), own, (place, s.steps), latent.repeat(draws, 0))
        for own, place, latent in zip(branches, places, latents, strict=True)
    ]
    drawn = [x[-1] for x, _ in rollout(s, starts)]
    if all((images[:1] == images).all() for images in drawn):
        name = s.config.sampler.name
        s.say(f"note       {name} draws no noise: samples of one x_t are all the same")
    shown = np.asarray(augment.unscale(jnp.asarray(latents)))
    page = labelled_grid.labelled_grid(
        np.concatenate([shown, drawn], 1),
        ("xₜ", *map(str, range(1, draws + 1))),
        [f"t = {t}" for t in times(s, places)],
        "Samples that share xₜ",
        "drawn from p(x₀ | xₜ)",
        breaks=[1],
    )
    return {"shared.png": png(page)}


def interpolation(s: FigureContext, depth: float = 0.5) -> Pages:
    """Fig. 8: pairs of real images, mixed after half of the noise; a row for each pair."""
    n, place = s.config.figures.rows, editing.nearest_index(s.ts, depth)
    image, label = real(s, 2 * n)
    pairs = [(i, image[[i, i + n]], label[[i, i + n]], place) for i in range(n)]
    note = f"the latents of two images at t = {times(s, [place])[0]}, mixed by λ"
    return {"interpolation.png": png(_between(s, pairs, (), "Interpolation", note))}


def coarse_to_fine(s: FigureContext, n: int = 9) -> Pages:
    """Fig. 9: one pair of real images, mixed after T, 7/8 T, ..., 0 steps of noise."""
    image, label = real(s, 2)
    places = [editing.nearest_index(s.ts, depth) for depth in np.linspace(1, 0, n)]
    places = list(dict.fromkeys(places))  # a short chain has not as many
    pairs = [(i, image, label, place) for i, place in enumerate(places)]
    rows = [f"t = {t}" for t in times(s, places)]
    note = "the latents of two images after t steps of noise, mixed by λ"
    return {"coarse_to_fine.png": png(_between(s, pairs, rows, "Coarse to fine", note))}


def _between(s: FigureContext, pairs, rows: Sequence[str], title: str, note: str) -> np.ndarray:
    """A row for each (number, two images, two labels, place): both images, and what lies between.

    The noise of a pair is the same for every lambda, on the way up and down. Of two classes, that
    of the nearer image is told to the network.
    """
    share = np.linspace(0, 1, 11).astype(np.float32)

    @jax.jit
    def latents(seed, number, image, t):
        keys = jnp.broadcast_to(random.fold_in(random.key(seed), number), share.shape)
        x_0, y_0 = (jnp.broadcast_to(a, (len(share), *a.shape)) for a in augment.scale(image))
        return editing.interpolate_latents(s.x.p, keys, x_0, y_0, t, share)

    starts = []
    seed = np.uint32(s.config.figures.seed)
    for number, image, label, place in pairs:
        x = latents(seed, np.uint32(number), image, s.ts[place])
        start = numbered_samples(s, np.full(11, number), np.zeros(11), (place, s.steps), np.asarray(x))
        nearer = np.where(share < 0.5, *label).astype(np.int32)
        starts.append(start._replace(label=nearer))
    decoded = [x[-1] for x, _ in rollout(s, starts)]
    images = [
        np.concatenate([image[:1], drawn, image[1:]])
        for (_, image, _, _), drawn in zip(pairs, decoded, strict=True)
    ]
    words = [f"{value:.1f}" for value in share[1:-1]]
    columns = ("source", "λ = 0", *words, "λ = 1", "source")
    return labelled_grid.labelled_grid(np.stack(images), columns, rows, title, note, breaks=(1, 12))


def quality(s: FigureContext, points: int = 11) -> Pages:
    """Fig. 10: how good the predicted image is as t falls, by s.score, and how near the sample."""
    places = editing.evenly_spaced(s.steps, points, first=1)
    [(x, x_0)] = rollout(s, [from_noise(s, s.config.figures.scored, (0, *places))])
    final = x[-1].astype(np.float32)
    rmse = [np.sqrt(np.mean((images - final) ** 2, dtype=np.float64)) for images in x_0[1:]]
    series = {"RMSE to the sample (0-255)": np.array(rmse)}
    if s.score:
        scores = [s.score(images) for images in x_0[1:]]
        series |= {name: np.array([score[name] for score in scores]) for name in scores[0]}
    steps = s.ts[0] - s.ts[places - 1]
    numbers = {"images": len(final), "reverse steps": steps.tolist()}
    numbers |= {name: values.tolist() for name, values in series.items()}
    text = json.dumps(numbers, indent=2) + "\n"
    return {
        "quality.png": functools.partial(curves.quality, steps=steps, series=series),
        "quality.json": functools.partial(save_text, text=text),
    }


def nearest(s: FigureContext, k: int = 8) -> Pages:
    """Figs. 12, 15: the training images that are nearest to samples, in pixels and in features."""
    [(x, _)] = rollout(s, [from_noise(s, s.config.figures.rows, (0, s.steps))])
    drawn, images = x[-1], experiment.load_split(s.config, s.x, "train")
    k = min(k, images.n)
    spaces = {"pixels": lambda pixels: pixels, **s.features}
    queries = {name: np.asarray(features(drawn)) for name, features in spaces.items()}
    best = dict.fromkeys(spaces, no_neighbours(len(drawn)))
    size, first = min(s.config.sample.batch_size, images.n), jax.process_index() == 0
    with Progress(images.n, unit="image", silent=not first) as shown:
        for pixels, _, counts in loader.iterate_split(images, size, workers=s.config.data.workers):
            for name, features in spaces.items():
                block = np.asarray(features(pixels))[counts]
                best[name] = update_neighbours(best[name], queries[name], block, k)
            shown(best["pixels"].n)
    pages = {}
    for name, found in best.items():
        neighbours = images.read(found.number.ravel())[0].reshape(len(drawn), k, *drawn.shape[1:])
        page = labelled_grid.labelled_grid(
            np.concatenate([drawn[:, None], neighbours], 1),
            ("sample", *map(str, range(1, k + 1))),
            title=f"Nearest training images, by {name}",
            note="nearest first",
            breaks=[1],
        )
        pages[f"nearest_{name}.png"] = png(page)
    return pages


def inpainting(s: FigureContext, draws: int = 6) -> Pages:
    """What fits to a part of a real image: replacement with resampling (arXiv 2201.09865)."""
    c, (h, w, _) = s.config.figures, s.x.image_shape
    known = known_part(s.config, h, w)
    ts = s.ts[editing.evenly_spaced(s.steps, RESAMPLED + 1)]
    path = call_for_key(editing.resampling_path, "figures", ts, c.jump, c.repeats)
    predictor, steps = experiment.make_predictor(s.config, s.x), len(path.t)

    def go(params, keys, label, carry, i, j):
        x, x_0 = carry
        args = s.x.p, s.sampler, predictor(params, label), keys, x, x_0, known[..., None], path
        return editing.inpaint(*args, i, j), x_0

    def begin(keys, x_0):
        return process.sample_noise(keys, 0, x_0), x_0

    n = c.rows
    image, label = real(s, n)
    x_0 = np.asarray(augment.scale(image)).repeat(draws, 0)
    start = numbered_samples(s, np.arange(n * draws), np.zeros(n * draws), (0, steps), x_0)
    start = start._replace(label=label.repeat(draws).astype(np.int32))
    walk = make_walk(s.x, begin, go, steps)
    [x] = rollout(s, [start], lambda carry: augment.unscale(carry[0]), walk)
    three = np.broadcast_to(image, (*image.shape[:-1], 3))
    hidden = np.where(known[..., None], three, np.uint8(labelled_grid.HIDDEN))
    drawn = np.broadcast_to(x[-1], (*x[-1].shape[:-1], 3)).reshape(n, draws, h, w, 3)
    page = labelled_grid.labelled_grid(
        np.concatenate([three[:, None], hidden[:, None], drawn], 1),
        ("original", "known", *map(str, range(1, draws + 1))),
        title="Inpainting",
        note=f"{c.repeats} times through every {c.jump} steps",
        breaks=[2],
    )
    return {"inpainting.png": png(page)}


def known_part(config: ConfigDict, h: int, w: int) -> np.ndarray:
    """bool[h, w]: what inpainting keeps, by a name of edits.MASKS or as a picture. Raises Fatal."""
    mask = config.figures.mask
    if pathlib.Path(mask).is_file():
        return call_for_key(labelled_grid.load_mask, "figures.mask", mask, h, w)
    return lookup(editing.MASKS, "figures.mask", mask)(h, w)


def animation(s: FigureContext, n: int = 16, frames: int = 32) -> Pages:
    """The reverse process, moving: x_t, and the image predicted on the way."""
    places = editing.evenly_spaced(s.steps, frames, first=1)
    [(x, x_0)] = rollout(s, [from_noise(s, min(n, s.config.figures.num), (0, *places))])
    pages = [
        labelled_grid.add_title(
            labelled_grid.side_by_side([image_grid.image_grid(left), image_grid.image_grid(right)]),
            f"t = {t}",
            "xₜ, and the image predicted",
        )
        for t, left, right in zip(times(s, places), x[1:], x_0[1:], strict=True)
    ]
    name = f"animation.{s.config.figures.animation}"
    return {name: functools.partial(save_animation, frames=np.stack(pages))}




def run(
    config: ConfigDict,
    x: Experiment,
    workdir: pathlib.Path,
    step: int,
    params: Any,
    say: Callable[[str], None],
    score: Score | None = None,
    features: dict[str, Features] | None = None,
) -> None:
    """Draws figures.names from the averaged weights into workdir/figures/<step>/.

    score: of images, for `quality`. features: for `nearest`, beside the pixels. Raises DDPMError,
    DataError.
    """
    chosen = [lookup(FIGURES, "figures.names", name) for name in config.figures.names]
    known_part(config, *x.image_shape[:2])  # what cannot be done is said before hours are spent
    s = make_context(config, x, params, say, score, features)
    folder = workdir / "figures" / f"{step:08d}"
    for name, draw in zip(config.figures.names, chosen, strict=True):
        say(f"drawing    {name}")
        for file, write in draw(s).items():
            if jax.process_index() == 0:
                write(folder / file)
            say(f"           {folder / file}")
    if jax.process_index() == 0:
        how = {"step": step, "weights": "ema", "config": config.to_dict()}
        save_text(folder / "how.json", json.dumps(how, indent=2) + "\n")
    say(f"done       {folder}")


FIGURES: dict[str, Callable[[FigureContext], Pages]] = {
    "samples": samples,
    "progressive": progressive,
    "denoising": denoising,
    "shared": shared,
    "interpolation": interpolation,
    "coarse_to_fine": coarse_to_fine,
    "quality": quality,
    "nearest": nearest,
    "inpainting": inpainting,
    "animation": animation,
}
