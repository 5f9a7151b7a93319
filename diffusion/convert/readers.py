"""Reads weights of the U-Net as other programs and --mode=export keep them, into Flax trees.

Inputs are the official TensorFlow checkpoint, a folder of diffusers, an exported folder, or a
single file; READERS are tried in turn. What the files state of the network and its process is
returned as configuration keys.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion import convert
from diffusion.convert import diffusers_config, files, int8_weights, tf_checkpoint
from diffusion.convert.validation import integrity_errors, summarize
from diffusion.utils.errors import ConfigError, IntegrityError

FLAX_FILE, CONFIG_FILE = "flax.safetensors", "ddpm.json"  # of an exported folder
DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MAX_JSON_BYTES = 2**20
EMA_SUFFIX = "/ExponentialMovingAverage"  # of TensorFlow's name for a variable's average
ADAM_SUFFIXES = ("/Adam", "/Adam_1")


class Weights(NamedTuple):
    """What an input holds.

    kind: the input's format, in words. params, ema: trees of numpy arrays. step: number of updates,
    0 if unknown. stated: flat configuration keys that the files state. config: the configuration of
    an exported folder, as JSON has it. notes: lines for the user.
    """

    kind: str
    params: Mapping[str, Any]
    ema: Mapping[str, Any]
    step: int
    stated: Mapping[str, Any] = {}
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def read(path: pathlib.Path) -> Weights:
    """Returns what the input holds.

    Raises ConfigError for no input, or a network that ours cannot be; IntegrityError for files that
    are damaged, or do not hold exactly one network.
    """
    for reader in READERS:
        if (found := reader(path)) is not None:
            return found
    expected = "a TensorFlow checkpoint, a folder of diffusers or of --mode=export, or a file"
    raise ConfigError(f"{path}: expected {expected} of safetensors or PyTorch; found none")


def _read_exported(path: pathlib.Path) -> Weights | None:
    """Reads a folder of --mode=export: raw and averaged weights and their configuration."""
    if not (path / FLAX_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        return None
    with integrity_errors(path / FLAX_FILE):
        found = from_flax(files.read(path / FLAX_FILE))
    return found._replace(kind="an exported folder", config=_read_json(path / CONFIG_FILE))


def _read_int8(path: pathlib.Path) -> Weights | None:
    """Reads a folder of --mode=export --int8: averaged weights and their configuration."""
    if not any(path.glob(int8_weights.INT8_FILES)):
        return None
    arrays, metadata = int8_weights.read_set(path)
    with integrity_errors(path):
        config = json.loads(metadata.get("config", "null"))
        if not isinstance(config, dict):
            raise ValueError("expected a config among the metadata, found none")
        return from_flax(arrays)._replace(kind="weights in 8 bits", config=config)


def _read_diffusers(path: pathlib.Path) -> Weights | None:
    """Reads a folder of diffusers: a pipeline with unet/ and scheduler/, or all in one."""
    unet = path / "unet" if (path / "unet").is_dir() else path
    if not (unet / "config.json").is_file():
        return None
    weights = next((unet / name for name in DIFFUSERS_FILES if (unet / name).is_file()), None)
    if weights is None:
        raise IntegrityError(f"{unet}: expected {' or '.join(DIFFUSERS_FILES)}, found neither")
    chain = [p for p in (path / "scheduler", path) if (p / "scheduler_config.json").is_file()]
    scheduler = _read_json(chain[0] / "scheduler_config.json") if chain else None
    network = _read_json(unet / "config.json")
    try:
        stated = diffusers_config.from_diffusers_config(network, scheduler)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return _read_file(weights)._replace(kind="diffusers", stated=stated)


def _read_tensorflow(path: pathlib.Path) -> Weights | None:
    """Reads a checkpoint of the official code: PREFIX of its files, or their folder."""
    prefix = tf_checkpoint.find_prefix(path)
    if prefix is None:
        return None
    bundle = tf_checkpoint.open_bundle(prefix)
    ours = [n for n in bundle.entries if n.startswith("model/") or n == "global_step"]
    arrays = tf_checkpoint.read(bundle, [n for n in ours if not n.endswith(ADAM_SUFFIXES)])
    with integrity_errors(prefix):
        found = from_official_checkpoint(arrays)
    left = sorted(set(bundle.entries).difference(ours))
    note = (f"left out: {summarize(left, 8)}",) if left else ()
    return found._replace(notes=(*found.notes, *note))


def _read_file(path: pathlib.Path) -> Weights | None:
    """Reads one file of arrays of any naming scheme."""
    if not path.is_file():
        return None
    arrays = files.read(path)
    with integrity_errors(path):
        if any(name.startswith(("params/", "ema/")) for name in arrays):
            return from_flax(arrays)
        if any(name.startswith("model/") for name in arrays):
            return from_official_checkpoint(arrays)
        found = _weights("a file of diffusers' names", convert.from_diffusers(arrays), {}, 0)
        if "class_emb" not in found.params:
            return found
        note = 'none of the classes is known as "no class", which guidance needs: if class N is one'
        notes = (*found.notes, f"{note}, give --config.model.null_class=N")
        return found._replace(stated={"model.null_class": -2}, notes=notes)


READERS = (_read_exported, _read_int8, _read_diffusers, _read_tensorflow, _read_file)


def from_flax(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Splits params/..., ema/... and step, as --mode=export writes them. Raises ValueError."""
    parts: dict[str, dict] = {"params": {}, "ema": {}, "step": {}}
    for name, array in arrays.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ValueError(f"{name}: expected params/..., ema/... and step")
        parts[part][rest] = array
    params, ema = (convert.unflatten_params(parts[part]) for part in ("params", "ema"))
    return _weights("Flax names", params, ema, parts["step"].get("", np.int64(0)))


def from_official_checkpoint(arrays: Mapping[str, np.ndarray]) -> Weights:
    """Splits the official code's variables: raw, averaged or both, and global_step."""
    ema = {n.removesuffix(EMA_SUFFIX): a for n, a in arrays.items() if n.endswith(EMA_SUFFIX)}
    other = (EMA_SUFFIX, *ADAM_SUFFIXES, "global_step")
    raw = {name: array for name, array in arrays.items() if not name.endswith(other)}
    params, ema = (convert.from_official(part) if part else {} for part in (raw, ema))
    return _weights("official names", params, ema, arrays.get("global_step", np.int64(0)))


def _weights(kind: str, params: dict, ema: dict, step: Any) -> Weights:
    """Checks the step, and uses the raw weights for missing averages or the reverse."""
    if not params and not ema:
        raise ValueError("expected the parameters of a U-Net, found none")
    step = np.asarray(step)
    if step.size != 1 or step.dtype.kind not in "iu" or not 0 <= step.item() < 2**31:
        found = step.item() if step.size == 1 else f"shape {list(step.shape)}"
        raise ValueError(f"step: expected a number of updates, found {found}")
    note = "only averaged weights" if ema else "no averaged weights"
    notes = () if params and ema else (f"{note}: one set is taken both as raw and as averaged",)
    return Weights(kind, params or ema, ema or params, int(step.item()), notes=notes)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    with integrity_errors(path):
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"expected settings, found {size:,} bytes")
        try:
            content = json.loads(path.read_text())
        except RecursionError as error:
            raise ValueError("cannot be read: nested too deeply") from error
        if not isinstance(content, dict):
            raise ValueError(f"expected a table of settings, found {type(content).__name__}")
        return content
