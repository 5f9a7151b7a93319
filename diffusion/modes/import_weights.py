"""--mode=import: weights of other programs into a new work directory, as if trained there.

The input is the official TensorFlow checkpoint, diffusers' files, a Hugging Face repository or what
--mode=export wrote. The network follows from the files' own settings, or else from the shapes of
the arrays. Data and training are those of a file of configs/ whose network this is and whose name
the input has; else they are not known: data.source is "" and train.steps 0 until they are given.
"""

import contextlib
import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from configs import default
from diffusion import convert, experiment
from diffusion.convert import model_card, readers, tf_checkpoint
from diffusion.convert.unet_names import network_structure
from diffusion.experiment import Experiment
from diffusion.modes._common import atomic_folder, check_empty, open_checkpoints
from diffusion.runtime.config import (
    ROOT,
    Run,
    differences,
    fill_defaults,
    flatten,
    with_overrides,
)
from diffusion.runtime.validation import validate
from diffusion.sharding import replicated
from diffusion.train_step import TrainState
from diffusion.utils import io, logging
from diffusion.utils.errors import ConfigError, IntegrityError, one_line
from diffusion.utils.multihost import is_primary

ATTENTION_RESOLUTION = 16  # of every network in the paper (appendix B)
NO_EXPERIMENT = ("default", "folder")  # files of configs/ that stand for any data
# Keys that tell one network from another, and those of a network that do not.
TELLING, NOT_TELLING = (
    ("model.", "data.image_", "data.channels"),
    ("model.dropout", "model.null_class", "model.dtype", "model.remat"),
)
UNKNOWN = {"data.source": "", "data.name": "", "train.steps": 0}


def run(run: Run) -> None:
    """Imports --input into the new --workdir. Raises ConfigError, WorkdirError, IntegrityError."""
    if len(run.flags.input) != 1 or run.flags.workdir is None:
        raise ConfigError("--mode=import: expected one --input=WEIGHTS and a new --workdir")
    config = run.config if run.config_given else None
    import_weights(run.flags.input[0], run.workdir, config, run.overrides)


def import_weights(
    source: str,
    workdir: epath.Path,
    config: ConfigDict | None = None,
    overrides: Mapping[str, Any] = {},
) -> None:
    """Makes a work directory of weights. The optimiser starts afresh, the step is the files' own.

    Args:
      source: what `readers.read` takes, or ORGANISATION/NAME at Hugging Face.
      workdir: a new or empty folder.
      config: of the work directory; None: deduced from the weights.
      overrides: flat keys that have precedence over what is deduced.

    Raises:
      ConfigError: there is no such input, or our network or the config cannot be this one.
      WorkdirError: the work directory is in use or cannot be written.
      IntegrityError: the files are damaged, or do not hold the network that the config describes.
    """
    check_empty(workdir, "--workdir")
    path, revision = locate(source)
    found = readers.read(path)
    logging.info(f"read       {found.kind}, step {found.step:,}")
    for note in found.notes:
        logging.info(f"           {note}")
    if config is not None:
        report_conflicts(found.stated, config)
    elif found.config is not None:
        config = with_overrides(stored_config(found.config, path), overrides)
    else:
        config = deduce_config(deduce_keys(found.params, found.stated | overrides, source), source)
    validate(config, jax.device_count())
    state = make_state(found, experiment.build(config), source)
    with atomic_folder(workdir) as folder:
        with contextlib.closing(open_checkpoints(folder)) as checkpoints:
            checkpoints.save(found.step, state)
        if is_primary():
            record = {"input": source, "revision": revision, "kind": found.kind}
            record |= {"step": found.step, "stated": found.stated, "notes": found.notes}
            io.save_json(folder / model_card.IMPORT_FILE, record)
            io.save_json(folder / "config.json", config.to_dict())
    logging.info("optimiser  new: weights come without its moments, so training warms up again")
    logging.info(f"done       {workdir}; samples: python main.py --mode=sample --workdir={workdir}")


def locate(source: str) -> tuple[pathlib.Path, str | None]:
    """Returns where the input is, and its revision if it was downloaded from Hugging Face."""
    path = io.local_copy(source)
    is_local = path.exists() or tf_checkpoint.find_prefix(path)
    if is_local or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return path, None
    path, revision = download_repository(source)
    logging.info(f"downloaded {source}, revision {revision}")
    return path, revision


def download_repository(name: str) -> tuple[pathlib.Path, str]:
    """Downloads a Hugging Face repository. Returns (folder, revision). Raises ConfigError."""
    try:
        import huggingface_hub
    except ImportError as error:
        how = "pip install huggingface_hub, or download it yourself and give the folder"
        raise ConfigError(f"--input={name}: no such file here; {how}") from error
    try:
        info = huggingface_hub.HfApi().model_info(name)
        is_safe = any(file.rfilename.endswith(".safetensors") for file in info.siblings)
        patterns = ["*.json", "*.safetensors" if is_safe else "*.bin"]
        folder = huggingface_hub.snapshot_download(name, revision=info.sha, allow_patterns=patterns)
    except Exception as error:  # of the network or the library: anything
        why = one_line(error) or type(error).__name__
        raise ConfigError(f"--input={name}: cannot be downloaded: {why}") from error
    return pathlib.Path(folder), info.sha


def stored_config(content: Mapping[str, Any], path: pathlib.Path) -> ConfigDict:
    """Returns the config of an exported folder, with defaults for keys that are younger."""
    try:
        return fill_defaults(content)
    except (AttributeError, TypeError, ValueError) as error:
        file = path / readers.CONFIG_FILE
        raise IntegrityError(f"{file}: expected a config: {one_line(error)}") from error


def report_conflicts(stated: Mapping[str, Any], config: ConfigDict) -> None:
    """Prints where the files and the given config differ."""
    flat = flatten(config)
    for key, value in stated.items():
        if flat.get(key, value) != value:
            theirs, ours = (one_line(repr(x), 80) for x in (value, flat[key]))
            conflict = f"the files state {theirs}, the config {ours}"
            logging.info(f"note       {key}: {conflict}; the config has precedence")


def deduce_config(keys: Mapping[str, Any], source: str) -> ConfigDict:
    """Returns the experiment that this is, or the default of unknown origin, with these keys."""
    name, base = find_experiment(keys, source) or ("", default.get_config())
    config = with_overrides(base, keys if name else UNKNOWN | keys)
    config.sampler.steps = min(config.sampler.steps, config.process.T)
    if name:
        logging.info(f"config     {name}, by network and name, with")
        lines = differences(base, config, ("",)) or ["no changes"]
    else:
        logging.info(f"config     imported from {source}; its data and training are not known")
        lines = [f"{key}: {one_line(value, 80)}" for key, value in keys.items()]
    for line in lines:
        logging.info(f"           {line}")
    return config


def deduce_keys(
    params: Mapping[str, Any], stated: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Returns the stated keys, and those that follow from the names and shapes of the parameters.

    Raises ConfigError, if neither gives the image size, and IntegrityError.
    """
    shapes = {name: np.shape(a) for name, a in convert.flatten_params(params).items()}
    structure = network_structure(shapes, "flax")
    levels = [f"down_{i}/block_0/conv1/kernel" for i in range(structure.levels)]
    kernels = [shapes.get(name, ()) for name in ("conv_in/kernel", "conv_out/kernel", *levels)]
    if not levels or any(len(shape) != 4 for shape in kernels):
        raise IntegrityError(f"--input={source}: expected the kernels of a U-Net, found others")
    (in_ch, ch), (_, out_ch), *level_shapes = (shape[2:] for shape in kernels)
    channels = [shape[1] for shape in level_shapes]
    if out_ch not in (in_ch, 2 * in_ch) or not ch or any(c % ch for c in channels):
        expected = f"{in_ch} or {2 * in_ch} output channels, levels of multiples of {ch}"
        found = f"{out_ch} and {one_line(channels, 100)}"
        raise IntegrityError(f"--input={source}: expected {expected}, found {found}")
    rows, *_ = shapes.get("class_emb/embedding") or (0,)
    has_extra = rows > 0 and stated.get("model.null_class", -1) == -1  # the last is "no class"
    flat = {
        "model.ch": ch,
        "model.ch_mult": tuple(c // ch for c in channels),
        "model.num_res_blocks": structure.blocks,
        "model.num_classes": rows - has_extra,
        "data.channels": in_ch,
        "data.image_width": 0,
    }
    if out_ch > in_ch:  # with a loss that trains it
        flat["variance"] = "learned"
        learned_range = stated.get("variance") == "learned_range"
        flat["loss.name"] = "hybrid" if learned_range else "vlb"
    attended = [i for i, has in enumerate(structure.attention) if has]
    if len(attended) == 1:
        flat["data.image_size"] = ATTENTION_RESOLUTION << attended[0]
    flat |= stated
    if "data.image_size" not in flat:
        how = "give --config.data.image_size"
        raise ConfigError(f"--input={source}: the weights do not determine the image size; {how}")
    longer = max(flat["data.image_size"], flat["data.image_width"])
    return {"model.attn_resolutions": tuple(longer >> i for i in attended)} | flat


def find_experiment(flat: Mapping[str, Any], source: str) -> tuple[str, ConfigDict] | None:
    """Returns the file of configs/, or a variant, that has this network and is named in `source`.

    Of several variants it is the one that differs in the fewest keys. None if there is no such
    file, or more than one: a network alone does not tell what it was trained on.
    """
    found = []
    for path in sorted((ROOT / "configs").glob("[a-z]*.py")):
        words = [word for word in path.stem.split("_") if _has_word(source, word)]
        if not words or path.stem in NO_EXPERIMENT:
            continue
        module = importlib.import_module(f"configs.{path.stem}")
        for variant in ("", *getattr(module, "VARIANTS", ())):
            config = module.get_config(variant)
            known = flatten(config)
            differing = {key for key, value in flat.items() if known.get(key) != value}
            if not any(k.startswith(TELLING) for k in differing.difference(NOT_TELLING)):
                name = f"configs/{path.name}" + (f":{variant}" if variant else "")
                found.append((-len(words), len(differing), variant != "", name, config))
    nearest = [entry for entry in found if entry[0] == min(e[0] for e in found)]
    if len({name.partition(":")[0] for *_, name, _ in nearest}) != 1:
        return None
    *_, name, config = min(nearest, key=lambda entry: entry[:3])
    return name, config


def _has_word(text: str, word: str) -> bool:
    """Whether a name has the word: cifar10 is in ddpm-cifar10-32 and CIFAR-10, not in cifar100."""
    pattern = re.sub(r"(?<=[a-z])(?=[0-9])", "[-_]?", word)
    return bool(re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", text.lower()))


def make_state(found: readers.Weights, exp: Experiment, source: str) -> TrainState:
    """Returns the replicated training state of these weights.

    Raises ConfigError, IntegrityError.
    """
    if exp.averages:
        why = "as the steps before these weights are not known"
        raise ConfigError(f"optim.posthoc: expected () for --mode=import, {why}")
    expected = _array_types(exp.abstract_state.params)
    for name, tree in (("raw", found.params), ("averaged", found.ema)):
        types = _array_types(tree)
        if wrong := [n for n in sorted(expected | types) if expected.get(n) != types.get(n)]:
            first = wrong[0]
            problem = f"expected {expected.get(first, 'none')}, found {types.get(first, 'none')}"
            raise IntegrityError(
                f"--input={source}: {len(wrong)} of the {name} weights do not fit the config: "
                f"{one_line(first, 100)}: {problem}"
            )
    sharding = replicated(exp.mesh)

    def replicate(tree):
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree
        )

    params = replicate(found.params)
    return TrainState(
        step=replicate(np.asarray(found.step, np.int32)),
        params=params,
        ema=replicate(found.ema),
        opt_state=jax.jit(exp.tx.init, out_shardings=sharding)(params),
        times=replicate(exp.timesteps.init()) if exp.timesteps else (),
    )


def _array_types(tree: Mapping[str, Any]) -> dict[str, str]:
    """Returns {name: "float32[3, 3, 3, 32]"}."""
    return {n: f"{a.dtype}{list(a.shape)}" for n, a in convert.flatten_params(tree).items()}
