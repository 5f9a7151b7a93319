"""Weights of the U-Net as others keep them: read into Flax trees, whatever the kind of the input.

The official TensorFlow checkpoint, a folder of diffusers, what --mode=export wrote, and single
files; READERS are asked in turn. What the files state of the network and its chain comes along as
config keys.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion import convert
from diffusion.convert import diffusers_config, files, tf_checkpoint
from diffusion.utils.errors import IntegrityError

FLAX, CONFIG = "flax.safetensors", "ddpm.json"
UNET = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MOST_JSON = 2**20  # bytes
EMA = "/ExponentialMovingAverage"  # how TensorFlow names the average of a variable
MOMENTS = ("/Adam", "/Adam_1")


class Unsupported(Exception):
    """Nothing that can be read, or a network that ours cannot be; one line, with what would do."""


class Found(NamedTuple):
    """What an input holds.

    params, ema: trees of numpy arrays; step: number of updates that made them, 0 if not known.
    stated: flat config keys that the files state, {"model.ch": 128}. config: a whole one, as it was
    exported, with lists for tuples. notes: lines for the user.
    """

    kind: str
    params: Mapping[str, Any]
    ema: Mapping[str, Any]
    step: int
    stated: Mapping[str, Any] = {}
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


def read_exported(path: pathlib.Path) -> Found | None:
    """A folder of --mode=export: its own config, raw and averaged weights."""
    if not (path / FLAX).is_file() or not (path / CONFIG).is_file():
        return None
    found = read_file(path / FLAX)
    if not found.kind.startswith("Flax"):
        raise IntegrityError(f"{path / FLAX}: expected names that begin with params/ and ema/")
    return found._replace(kind="an exported folder", config=_json(path / CONFIG))


def read_diffusers(path: pathlib.Path) -> Found | None:
    """A folder of diffusers, of a pipeline (unet/, scheduler/) or flat."""
    unet = path / "unet" if (path / "unet").is_dir() else path
    if not (unet / "config.json").is_file():
        return None
    weights = [unet / name for name in UNET if (unet / name).is_file()]
    if not weights:
        raise IntegrityError(f"{unet}: expected {' or '.join(UNET)}, found neither")
    chain = [p for p in (path / "scheduler", path) if (p / "scheduler_config.json").is_file()]
    scheduler = _json(chain[0] / "scheduler_config.json") if chain else None
    try:
        stated = diffusers_config.config_of_diffusers(_json(unet / "config.json"), scheduler)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    found, classes = read_file(weights[0]), stated["model.num_classes"]
    note = (f"class {classes}, the last one, is taken as no class",) if classes else ()
    return found._replace(kind="diffusers", stated=stated, notes=(*found.notes, *note))


def read_tensorflow(path: pathlib.Path) -> Found | None:
    """A checkpoint of the official code: PREFIX of its files, or their folder."""
    prefix = tf_checkpoint.prefix_of(path)
    if prefix is None:
        return None
    opened = tf_checkpoint.open_bundle(prefix)

    def wanted(name):
        of_network = name.startswith("model/") and not name.endswith(MOMENTS)
        return of_network or name == "global_step"

    found = of_official(tf_checkpoint.read(opened, wanted))
    left = sorted(name for name in opened.entries if not name.startswith("model/"))
    left = [name for name in left if name != "global_step"]
    note = (f"left out: {', '.join(left[:8])}{' ...' * (len(left) > 8)}",) if left else ()
    return found._replace(notes=(*found.notes, *note))


def read_file(path: pathlib.Path) -> Found | None:
    """One file of arrays, safetensors or PyTorch's, of any of the naming schemes."""
    if not path.is_file():
        return None
    arrays = files.read(path)
    if any(name.startswith(("params/", "ema/")) for name in arrays):
        return of_flax(arrays)
    if any(name.startswith("model/") for name in arrays):
        return of_official(arrays)
    params = convert.from_diffusers(arrays)
    return Found("a file of diffusers' names", params, params, 0, notes=(_only("one set"),))


def of_flax(arrays: Mapping[str, np.ndarray]) -> Found:
    """params/..., ema/... and step, as --mode=export writes them."""
    parts: dict[str, dict] = {"params": {}, "ema": {}, "step": {}}
    for name, array in arrays.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ValueError(f"{name}: expected params/..., ema/... and step")
        parts[part][rest] = array
    step = parts["step"].get("", np.zeros(1, np.int64))
    params, ema = (convert.nested(parts[part]) for part in ("params", "ema"))
    return _both("Flax names", params, ema, _step(step))


def of_official(arrays: Mapping[str, np.ndarray]) -> Found:
    """The official code's variables, raw, averaged or both, and global_step."""
    arrays = dict(arrays)
    step = _step(arrays.pop("global_step", np.zeros((), np.int64)))
    ema = {name.removesuffix(EMA): a for name, a in arrays.items() if name.endswith(EMA)}
    raw = {name: a for name, a in arrays.items() if not name.endswith((EMA, *MOMENTS))}
    raw, ema = (convert.from_official(part) if part else {} for part in (raw, ema))
    return _both("official names", raw, ema, step)


READERS = (read_exported, read_diffusers, read_tensorflow, read_file)


def read(path: pathlib.Path) -> Found:
    """What the input holds, of whatever kind.

    Raises Unsupported; WeightsError and ValueError for what is damaged, or not one whole network.
    """
    for reader in READERS:
        if found := reader(path):
            return found
    raise Unsupported(
        "expected a TensorFlow checkpoint, a folder of diffusers or of --mode=export, or a file of "
        "safetensors or PyTorch; found none of them there"
    )


def _both(kind: str, params: dict, ema: dict, step: int) -> Found:
    """Where only one of raw and averaged weights is there, both are that one."""
    if not params and not ema:
        raise ValueError("expected the parameters of a U-Net, found none")
    only = () if params and ema else (_only("only the averages" if ema else "no averages"),)
    return Found(kind, params or ema, ema or params, step, notes=only)


def _only(what: str) -> str:
    return f"{what} of the weights: they are taken both as raw and as averaged"


def _step(array: np.ndarray) -> int:
    if array.size != 1 or array.dtype.kind not in "iu" or not 0 <= array.item() < 2**31:
        found = array.item() if array.size == 1 else list(array.shape)
        raise ValueError(f"step: expected one whole number of updates, found {found}")
    return int(array.item())


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_JSON:
            raise IntegrityError(f"{path}: expected settings, found {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: expected a table of settings, found {type(content).__name__}")
    return content
