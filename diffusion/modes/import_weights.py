"""--mode=import and --mode=export: weights of others into a work directory, and out of one again.

What comes in may be the official TensorFlow checkpoint, diffusers' files, a Hugging Face repository
or what --mode=export wrote. The network is told by the files' own settings, or else by the shapes
of the arrays; the rest of the config is that of the nearest file of configs/. Either the whole work
directory or output folder comes to be, or nothing.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from diffusion import checkpoint, convert, experiment, train_step
from diffusion.convert import readers, tf_checkpoint
from diffusion.convert.readers import CONFIG, Found
from diffusion.runtime.config import (
    CONFIG,
    HERE,
    INTEGRITY,
    differences,
    fill_defaults,
    flatten,
    validate,
    with_overrides,
)
from diffusion.sharding import replicated
from diffusion.utils.errors import DDPMError, IntegrityError, WorkdirError

RESOLUTION = 16  # where every network of the paper has its attention (appendix B)


RECORD = "import.json"  # in the work directory: where its weights are from


MOST_LETTERS = 1500  # of what is said of an input


MOST_LINES = 8  # of what differs: of another network it would be hundreds


Fetch = Callable[[str], tuple[pathlib.Path, str]]


def refusal(source: str, code: int, why: object) -> DDPMError:
    """The one line about an input; names in files may be long and hold line breaks."""
    line = " ".join(f"{why}".split())
    return Fatal(
        code, f"--input={source}: {line[:MOST_LETTERS]}{' ...' * (len(line) > MOST_LETTERS)}"
    )


def fetch(name: str) -> tuple[pathlib.Path, str]:
    """(folder, revision) of a Hugging Face repository, downloaded. Raises Fatal."""
    try:
        import huggingface_hub
    except ImportError as error:
        how = "pip install huggingface_hub, or download it yourself and give the folder"
        raise refusal(name, CONFIG, f"no such file here; {how}") from error
    try:
        about = huggingface_hub.HfApi().model_info(name)
        safe = any(file.rfilename.endswith(".safetensors") for file in about.siblings)
        patterns = ["*.json", "*.safetensors" if safe else "*.bin"]
        folder = huggingface_hub.snapshot_download(
            name, revision=about.sha, allow_patterns=patterns
        )
    except Exception as error:  # of the network, of requests, of the hub: anything
        why = " ".join(str(error).split()) or type(error).__name__
        raise refusal(name, CONFIG, f"cannot be downloaded: {why}") from error
    return pathlib.Path(folder), about.sha


def import_weights(
    source: str,
    config: ConfigDict | None,
    workdir: pathlib.Path,
    say: Callable[[str], None],
    overrides: Mapping[str, Any] | None = None,
    fetch: Fetch = fetch,
) -> None:
    """Makes a work directory of the weights at `source`, as if it had been trained in.

    source: what inputs.read takes, or ORGANISATION/NAME at Hugging Face. config: that of the work
    directory; None: deduced, with `overrides`, flat keys, having the last word. say: is given lines
    for the user. fetch: see there.
    The optimiser starts afresh. The step is the files' own, 0 where they do not tell.
    Raises DDPMError: 2 for what is no input or not for this config, 4 for the work directory, 6 for
    what is damaged or not one whole network.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        expected = "expected no such work directory, or an empty one"
        raise WorkdirError(f"{workdir}: {expected}; choose another --workdir")
    path, revision = find(source, fetch)
    if revision:
        say(f"downloaded {source}, revision {revision}")
    try:
        found = readers.read(path)
        size = convert.sizes(found.params)
    except readers.Unsupported as error:
        raise refusal(source, CONFIG, error) from error
    except (IntegrityError, ValueError) as error:
        raise refusal(source, INTEGRITY, error) from error
    say(f"read       {found.kind}, step {found.step:,}")
    for note in found.notes:
        say(f"           {note}")
    if config is not None:
        compare(found.stated, config, say)
    elif found.config is not None:
        config = with_overrides(own_config(found.config, source), overrides or {})
    else:
        config = deduced_config(found, size, source, overrides or {}, say)
    validate(config, jax.device_count())
    x = experiment.build(config)
    state = make_state(found, x, source)
    record = {"input": source, "revision": revision, "kind": found.kind, "step": found.step}
    record |= {"stated": found.stated, "notes": found.notes}
    with whole_folder(workdir) as part:
        with contextlib.closing(checkpoint.Checkpoints(part / "checkpoints")) as checkpoints:
            checkpoints.save(found.step, state)
        if jax.process_index() == 0:
            write_json(part / RECORD, record)
            write_json(part / "config.json", config.to_dict())
    say("optimiser  fresh: no moments came along; a training that goes on warms up anew")
    say(f"done       {workdir}; samples: python main.py --mode=sample --workdir={workdir}")


def find(source: str, fetch: Fetch) -> tuple[pathlib.Path, str | None]:
    """(where the input lies, its revision at Hugging Face if it was downloaded from there)."""
    path = pathlib.Path(source).expanduser()
    here = path.exists() or tf_checkpoint.prefix_of(path)
    return (path, None) if here or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) else fetch(source)


def own_config(content: Mapping[str, Any], source: str) -> ConfigDict:
    """The config that came with the weights; keys younger than it are as in the default config."""
    default = importlib.import_module("configs.digits").get_config()
    try:
        return fill_defaults(content, default)
    except (AttributeError, TypeError, ValueError) as error:
        raise refusal(source, INTEGRITY, f"{CONFIG} is no config: {error}") from error


def deduced_config(
    found: Found,
    size: convert.Sizes,
    source: str,
    overrides: Mapping[str, Any],
    say: Callable[[str], None],
) -> ConfigDict:
    """The nearest of configs/, changed in what the weights or their files say; says in what."""
    stated = deduce(size, {**found.stated, **overrides}, source)
    name, near = nearest(stated, source)
    config = with_overrides(near, stated)
    config.sampler.steps = min(config.sampler.steps, config.process.T)
    say(f"config     {name}, the nearest, with")
    lines = differences(near.to_dict(), config.to_dict(), free=())
    for line in lines or ["nothing changed"]:
        say(f"           {line}")
    return config


def compare(stated: Mapping[str, Any], config: ConfigDict, say: Callable[[str], None]) -> None:
    """Says in what the files and a config that was given differ."""
    flat = flatten(config)
    for key, value in stated.items():
        if flat.get(key, value) != value:
            say(f"note       {key}: the files say {value!r}, the config {flat[key]!r}; it counts")


def deduce(size: convert.Sizes, stated: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The stated keys, and those that follow from the shapes of the arrays. Raises Fatal."""
    if size.out_ch not in (size.in_ch, 2 * size.in_ch):
        wanted = f"{size.in_ch} output channels, or twice that for a learned variance"
        raise refusal(source, INTEGRITY, f"expected {wanted}, found {size.out_ch}")
    flat = {
        "model.ch": size.ch,
        "model.ch_mult": size.ch_mult,
        "model.num_res_blocks": size.num_res_blocks,
        "model.num_classes": size.num_classes,
        "data.channels": size.in_ch,
        "data.image_width": 0,
    }
    if size.out_ch > size.in_ch:
        flat["variance"] = "learned"
    levels = [i for i, has in enumerate(size.attention) if has]
    if len(levels) == 1:
        flat["data.image_size"] = RESOLUTION << levels[0]
    flat |= stated
    if "data.image_size" not in flat:
        how = "the weights do not tell the size of the images; give --config.data.image_size"
        raise refusal(source, CONFIG, how)
    longer = max(flat["data.image_size"], flat["data.image_width"])
    return {"model.attn_resolutions": tuple(longer >> i for i in levels)} | flat


def nearest(flat: Mapping[str, Any], source: str) -> tuple[str, ConfigDict]:
    """(--config, its config) of configs/, variants too, that differs in fewest of these keys.

    Of equals the one whose name is in the source's, then the first.
    """
    letters = re.sub(r"[^a-z0-9]", "", source.lower())

    def order(item):
        name, config = item
        theirs = flatten(config)
        differing = sum(theirs.get(key) != value for key, value in flat.items())
        words = name.partition(":")[0].split("_")
        alike = sum(len(word) for word in words if word in letters)
        return differing, -alike, ":" in name

    name, config = min(_configs(), key=order)
    stem, colon, variant = name.partition(":")
    return f"configs/{stem}.py{colon}{variant}", config


def _configs() -> Iterator[tuple[str, ConfigDict]]:
    for path in sorted((HERE / "configs").glob("[a-z]*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        for variant in ("", *module.VARIANTS):
            name = f"{path.stem}:{variant}" if variant else path.stem
            yield name, module.get_config(variant)


def make_state(found: Found, x: experiment.Experiment, source: str) -> train_step.TrainState:
    """The state of these weights on every device, seen to be what the network has. Raises Fatal."""
    abstract = experiment.abstract_state(x)
    whole = replicated(x.mesh)
    for name, tree in (("raw", found.params), ("averaged", found.ema)):
        if lines := misfits(tree, abstract.params):
            more = f"; {len(lines) - 8} more" if len(lines) > 8 else ""
            message = f"the {name} weights do not fit the config: {'; '.join(lines[:8])}{more}"
            raise refusal(source, INTEGRITY, message)

    def everywhere(tree):
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, whole, lambda index: a[index]), tree
        )

    params = everywhere(found.params)
    opt_state = jax.jit(x.tx.init, out_shardings=whole)(params)
    return train_step.TrainState(
        everywhere(np.asarray(found.step, np.int32)), params, everywhere(found.ema), opt_state
    )


def misfits(tree: Mapping[str, Any], abstract: Mapping[str, Any]) -> list[str]:
    """`NAME: expected TYPE[SHAPE], found TYPE[SHAPE]` for every array that is not as it should."""

    def kinds(tree):
        flat = convert.flattened(tree)
        return {name: f"{a.dtype}{list(a.shape)}" for name, a in flat.items()}

    wanted, have = kinds(abstract), kinds(tree)
    return [
        f"{name}: expected {wanted.get(name, 'none')}, found {have.get(name, 'none')}"
        for name in sorted(wanted | have)
        if wanted.get(name) != have.get(name)
    ]


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, that takes this one's place once all processes are done with it."""
    first, folder = jax.process_index() == 0, folder.absolute()
    part = folder.with_name(f".{folder.name}.unfinished")  # a name that no one gives
    try:
        if first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        _sync("made")
        yield part
        _sync("written")
        if first:
            os.replace(part, folder)
        _sync("moved")
    except OSError as error:
        why = error.strerror or error
        raise WorkdirError(f"{folder}: cannot write there: {why}") from error
    finally:
        if first:
            shutil.rmtree(part, ignore_errors=True)


def _sync(name: str) -> None:
    multihost_utils.sync_global_devices(f"transfer {name}")


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
