"""--mode=study: people say which of two pictures is real; error rates from their answers.

Without --input it writes a page for these people and its key; with --input it reads the files of
answers that they have downloaded from the page.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.data import ImageDataset
from diffusion.experiment import Experiment
from diffusion.metrics import extraction
from diffusion.modes import _sampling, _split_pass
from diffusion.modes._common import Trained, load_models
from diffusion.modes._scores import digest_of
from diffusion.modes._study_results import CHECK, evaluate_answers
from diffusion.plotting.study_page import StudyPairs, picture_uri, study_id, study_page
from diffusion.runtime.config import Run, flatten, with_overrides
from diffusion.runtime.workdir import raise_together
from diffusion.utils import io, logging
from diffusion.utils.errors import ConfigError, DataError
from diffusion.utils.multihost import is_primary
from diffusion.utils.progress import human_bytes

POOL = 1000  # real images, or more for more pairs, among which those of a class are looked for
ANY_CLASS = -1  # as sample.label has it
READ = 256  # images of a file at a time


class Generated(NamedTuple):
    """Generated pictures.

    images: uint8[n, h, w, c]; classes: int[n], or ANY_CLASS; index: int[n], their places in the set
    that they are from.
    """

    images: np.ndarray
    classes: np.ndarray
    index: np.ndarray


class Condition(NamedTuple):
    """What made some of the generated pictures.

    setting: what they are a function of; draw: called by all processes, of which the others than 0
    may get None.
    """

    name: str
    setting: dict[str, Any]
    draw: Callable[[], Generated | None]


def run(run: Run) -> None:
    """Writes workdir/study/STEP/study.{html,json}; with --input, results.{json,png} there.

    Raises ConfigError, DataError, WorkdirError.
    """
    if not run.flags.input:
        make_study(run)
    elif is_primary():
        evaluate_answers(run.workdir, run.flags.input)


def make_study(run: Run) -> None:
    """Draws samples, chooses real images and writes the page and its key.

    Raises WorkdirError where the folder holds another study, of which the key would be lost.
    """
    config, c, exp = run.config, run.config.study, experiment.build(run.config)
    configs, weights = sampler_configs(config), c.weights or (config.weights,)
    for each in configs.values():  # a wrong sampler is found before anything is read
        experiment.make_sampler(each, exp)
    total = len(configs) * len(weights) + len(c.samples)
    if total > c.num:
        wanted = f"expected at least one pair for each of {total} conditions"
        raise ConfigError(f"study.num: {wanted}, found {c.num}; give more")
    count = -(-c.num // total) + -(-c.practice // total)  # pictures of a condition
    split = open_split(config, exp)
    files = [file_condition(name, exp, count, c.seed) for name in c.samples]
    models = load_models(run, exp, weights)
    conditions = []
    for model, (name, each) in itertools.product(models, configs.items()):
        # Of one noise, two samplers would give nearly one picture.
        seed = (c.seed + len(conditions)) % 2**32
        name = f"{name}, {model.weights}" if len(models) > 1 else name
        conditions.append(sampler_condition(name, model._replace(config=each), count, seed))
    save_study(models[0], split, [*conditions, *files])


def save_study(trained: Trained, split: ImageDataset, conditions: Sequence[Condition]) -> None:
    """Draws all pictures and writes study.html and study.json into the model's folder."""
    config, c, folder = trained.config, trained.config.study, trained.folder("study")
    setting = {"conditions": [each.setting for each in conditions], "study": flatten(c)}
    setting |= {"data": [config.data.source, config.data.name]}
    setting = json.loads(json.dumps(setting))  # tuples become lists
    raise_together(other_study(folder, "setting", setting) if is_primary() else "")
    what = f"{c.num:,} pairs of {len(conditions)} condition{'s' * (len(conditions) > 1)}"
    logging.info(f"study      {what}, {c.checks} attention checks, {c.practice} for practice")
    drawn, problem = [], ""
    for condition in conditions:
        logging.info(f"           {condition.name}")
        drawn.append(condition.draw())
    if is_primary():
        shown, key = compose(config, split, drawn)
        key |= {"names": [each.name for each in conditions], "setting": setting}
        key |= {"step": trained.step, "config": config}
        problem = other_study(folder, "study", key["study"])
    raise_together(problem)
    if is_primary():
        page = study_page(shown)
        io.save_json(folder / "study.json", key)
        io.save_text(folder / "study.html", page)
        logging.info(f"done       {folder}/study.html ({human_bytes(len(page))}), study.json")
        logging.info("           give people the first; the second says which pictures are real")


def other_study(folder: epath.Path, name: str, value: Any) -> str:
    """Returns what is wrong where the folder's study.json has another value, "" if it has not."""
    try:
        same = json.loads((folder / "study.json").read_text())[name] == value
    except FileNotFoundError:
        same = True
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    advice = "its answers need it: move the folder away to make a new one"
    return "" if same else f"{folder}: expected this study or none, found another; {advice}"


# What is shown


def sampler_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns {name: config} of study.samplers, or of the config's own sampler. Raises ConfigError.

    Where study.samples names pictures, its own sampler is one of several only if it is named too.
    """
    own, found = config.sampler, {}
    if not config.study.samplers and not config.study.samples:
        steps = len(own.times) or own.steps
        return {f"{own.name}, {own.grid}, {steps} steps": config}
    for text in config.study.samplers:
        name, _, rest = text.partition(":")
        grid, _, steps = rest.partition(":")
        if steps and not steps.isdecimal():
            wanted = 'NAME, NAME:GRID or NAME:GRID:STEPS such as "ddim:uniform:20"'
            raise ConfigError(f"study.samplers: expected {wanted}, found {text!r}")
        grid, steps = grid or own.grid, int(steps or own.steps)
        keys = {"name": name, "grid": grid, "steps": steps, "times": ()}
        changes = {f"sampler.{key}": value for key, value in keys.items()}
        found[f"{name}, {grid}, {steps} steps"] = with_overrides(config, changes)
    return found


def sampler_condition(name: str, model: Trained, n: int, seed: int) -> Condition:
    """Returns the condition of a sampler; its n samples are kept as those of --mode=sample."""
    config = model.config
    setting = _sampling.sample_setting(config, model.step, model.weights, seed)

    def draw():
        trained = _split_pass.with_analytic(model)
        path = model.workdir / "samples" / f"{model.step:08d}_{_sampling.sample_name(setting)}"
        store = _sampling.SampleStore(path, setting, model.exp.image_shape)
        sampler = _sampling.compile_sampler(config, trained.exp, min(n, config.sample.batch_size))
        _sampling.fill(store, sampler, trained.params, n)
        classes, label = config.model.num_classes, config.sample.label  # -1, too, for any class
        labels = np.arange(n) % classes if classes and label < 0 else np.full(n, label)
        return Generated(store.read()[:n], labels, np.arange(n)) if is_primary() else None

    return Condition(name, setting, draw)


def file_condition(name: str, exp: Experiment, n: int, seed: int) -> Condition:
    """Returns the condition of n random images of a file or folder. Raises DataError."""
    path = io.local_copy(name)
    images = extraction.image_set_from_files(str(path), exp.image_shape[2], least=n)
    if images.shape != exp.image_shape:
        wanted, found = ("x".join(map(str, shape)) for shape in (exp.image_shape, images.shape))
        raise DataError(f"{name}: expected images of {wanted}, found {found}; resize them")

    def draw():
        rng = np.random.default_rng(seed)
        index, parts = np.sort(rng.permutation(images.n)[:n]), []
        for i, batch in enumerate(images.batches(READ, slice(None), 0)):
            parts.append(batch[index[index // READ == i] % READ])
        order = rng.permutation(n)  # sets may be sorted
        return Generated(np.concatenate(parts)[order], np.full(n, ANY_CLASS), index[order])

    return Condition(name, {"sha256": digest_of(path)}, draw)


def open_split(config: ConfigDict, exp: Experiment) -> ImageDataset:
    """Opens the split of the real images. Raises ConfigError where it has too few, DataError."""
    c = config.study
    images, needed = experiment.load_split(config, exp, c.split), c.num + c.practice + 2 * c.checks
    if images.n < needed:
        found = f"found {images.n:,}; give fewer or another --config.study.split"
        raise ConfigError(f"study.num: expected {needed:,} images of {c.split} for it, {found}")
    return images


def choose_real(
    split: ImageDataset, classes: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns indices int[n] of a split's images of the wanted classes, and the images.

    classes: of each image; ANY_CLASS, and the "no class" that a model may have, are any.
    Raises DataError.
    """
    matched = [0 <= wanted < split.num_classes for wanted in classes]
    pool = max(POOL, 20 * len(classes)) if any(matched) else len(classes)
    index = np.sort(rng.permutation(split.n)[:pool])
    images, labels = split.read(index)
    free, chosen = [*rng.permutation(len(index))], []
    for wanted, is_matched in zip(classes, matched, strict=True):
        fitting = (i for i in free if not is_matched or labels[i] == wanted)
        if (i := next(fitting, None)) is None:
            found = f"found {sum(labels == wanted):,} among {len(index):,}"
            what = f"expected more real images of class {wanted}, {found}"
            raise DataError(f"study.num: {what}; give fewer pairs")
        free.remove(i)
        chosen.append(i)
    return index[chosen], images[chosen]


def compose(
    config: ConfigDict, split: ImageDataset, drawn: Sequence[Generated]
) -> tuple[StudyPairs, dict[str, Any]]:
    """Puts real and generated pictures side by side; returns them and the key for study.json.

    Conditions take turns, in the pairs that count and in those for practice. A check is a real
    image beside another one with its pixels in random order.
    """
    c, rng, n = config.study, np.random.default_rng(config.study.seed), len(drawn)
    used = [(i % n, i // n) for i in range(c.num)]  # (condition, number of its picture)
    used += [(i % n, i // n + -(-c.num // n)) for i in range(c.practice)]
    classes = [int(drawn[i].classes[k]) for i, k in used] + [ANY_CLASS] * 2 * c.checks
    index, real = choose_real(split, classes, rng)
    beside = [drawn[i].images[k] for i, k in used]
    about = [{"condition": i, "sample": int(drawn[i].index[k])} for i, k in used]
    for i in range(len(used) + c.checks, len(real)):
        beside.append(scramble(real[i], rng))
        about.append({"condition": CHECK, "scrambled": int(index[i])})
    pairs = []
    for i, key in enumerate(about):
        side = int(rng.integers(2))
        uris = picture_uri(real[i]), picture_uri(beside[i])
        pairs.append(uris[::-1] if side else uris)
        about[i] = {"real": side, "image": int(index[i])} | key
    practice = range(c.num, len(used))
    counted = rng.permutation([*range(c.num), *range(len(used), len(pairs))])
    shown = StudyPairs(
        [pairs[i] for i in counted],
        [pairs[i] for i in practice],
        [about[i]["real"] for i in practice],
        c.seconds,
    )
    key = {"study": study_id(shown), "max_failed": c.max_failed}
    key |= {"pairs": [about[i] for i in counted], "practice": [about[i] for i in practice]}
    return shown, key


def scramble(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns an image uint8[h, w, c] with its pixels in random order."""
    return rng.permutation(image.reshape(-1, image.shape[-1])).reshape(image.shape)
