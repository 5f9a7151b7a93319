"""The configuration that the command line means.

`resolve` parses flags into a `Run`. Whatever is wrong is a ConfigError that names the key, what was
expected, what was found and what to do.
"""

import difflib
import importlib
import inspect
import os
import pathlib
import runpy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from configs import default
from diffusion.utils import io
from diffusion.utils.errors import ConfigError, one_line

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEFAULT = str(ROOT / "configs" / "digits.py")  # what `python main.py` alone trains

# Keys and sections that decide what a training is; all others may change in a work directory.
NETWORK_KEYS = (
    *("model.", "process.", "target", "variance"),
    *("data.image_size", "data.image_width", "data.channels"),
)
TRAINING_KEYS = (
    *(*NETWORK_KEYS, "seed", "loss.", "optim.", "train.batch_size", "train.label_dropout"),
    *("train.init_weights", "train.timesteps"),
    *("data.source", "data.name", "data.flip", "data.levels"),
)
MOVED = {"train.num_samples": "train.preview.num"}  # keys of earlier versions
YOUNGER = (  # keys that earlier versions lacked
    *("model.scale_shift", "model.normalization"),
    *("model.attention_head_dim", "model.downsample_padding", "model.flip_sin_to_cos"),
    *("model.freq_shift", "model.norm_eps", "model.null_class", "process.betas"),
    *("sampler.clip_range", "sampler.threshold_max", "data.levels", "train.profile"),
    *("train.timesteps", "loss.weighting", "loss.gamma", "loss.k", "loss.vlb_weight"),
    *("loss.schedule", "process.gamma_min", "process.gamma_max", "model.fourier"),
    *("bpd.continuous", "train.init_weights", "train.preview.grid"),
    *("optim.name", "optim.schedule", "optim.weight_decay", "optim.posthoc"),
    *("train.snapshots", "weights"),
    *("loss.stage", "loss.stage_steps", "loss.c", "loss.log_mean", "loss.log_std"),
)
ABSENT = "absent"


class Run(NamedTuple):
    """What the command line asked for.

    config: the validated configuration; overrides: the keys typed as flags, {"sampler.steps": 20};
    config_given: whether --config was typed; flags: the other flags, by attribute; modes: {mode:
    its module}.
    """

    mode: str
    config: ConfigDict
    workdir: epath.Path
    flags: Any
    overrides: Mapping[str, Any] = {}
    config_given: bool = False
    modes: Mapping[str, str] = {}

    def call(self) -> None:
        """Runs the mode, whose module is imported now."""
        importlib.import_module(self.modes[self.mode]).run(self)


# Command line


def resolve(flag_values: flags.FlagValues, argv: list[str], load: Callable) -> Run:
    """Parses the command line.

    Without --workdir the work directory is runs/ and the config's name. Without --config the config
    is that of the work directory, if it has one, else the default. Typed keys override either.

    Args:
      flag_values: with the flags config, workdir and mode; reads argv.
      argv: the command line, argv[0] the program.
      load: workdir -> the config stored there, a nested dict, or None.

    Raises: ConfigError.
    """
    first = ("--config=", "-config=")  # keys that are typed before it have no types yet
    argv = [argv[0], *sorted(map(_from_root, argv[1:]), key=lambda a: not a.startswith(first))]
    given = any(_name(argument) == "config" for argument in argv[1:])
    if not given:
        argv = [argv[0], f"--config={DEFAULT}", *argv[1:]]
    config_flags.DEFINE_config_file(
        "config", None, "configs/NAME.py[:VARIANT]", flag_values=flag_values, sys_argv=argv
    )
    try:
        rest = flag_values(argv)
        flag_values["config"].value.items()  # an unreadable file is noticed at the first use
    except Exception as error:  # a config file is code: it may raise anything
        raise ConfigError(_explain(argv, error, flag_values)) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]}: expected only flags such as --mode=sample; see --help")
    flag = flag_values["config"]
    overrides = config_flags.get_override_values(flag)
    path, _, variant = config_flags.get_config_filename(flag).partition(":")
    name = "-".join([pathlib.Path(path).stem, *filter(None, variant.split(","))])
    workdir = io.to_path(flag_values.workdir or f"runs/{name}")
    config = flag.value
    if not given and (stored := load(workdir)):
        config = fill_defaults(stored)
        config.update_from_flattened_dict(overrides)
    return Run(flag_values.mode, config, workdir, flag_values, overrides, given)


def _name(argument: str) -> str:
    return argument.lstrip("-").partition("=")[0]


def _from_root(argument: str) -> str:
    """Takes a --config that is not below the current directory from beside main.py."""
    path = argument.partition("=")[2]
    file = path.partition(":")[0]
    if _name(argument) != "config" or os.path.exists(file) or not (ROOT / file).is_file():
        return argument
    return f"--config={ROOT / path}"


def _explain(argv: list[str], error: Exception, flag_values: flags.FlagValues) -> str:
    """Says what is wrong with the command line, by looking at it or in the error's words."""
    named = [a.partition("=")[2] for a in argv if _name(a) == "config"]
    config = named[-1] if named else ""
    path, _, variant = config.partition(":")
    module: dict[str, Any] = {}
    try:
        module = runpy.run_path(path)
        known = flatten(module["get_config"](*([variant] if variant else [])))
    except OSError:
        files = [f"configs/{f.name}" for f in (ROOT / "configs").glob("*.py")]
        return f"--config={config}: cannot be read; {suggest(path, files)}"
    except Exception as cause:
        variants = module.get("VARIANTS", {})
        for name in filter(None, variant.split(",")):
            if name not in variants:
                return f"--config={config}: no such variant; {suggest(name, variants)}"
        return f"--config={config}: cannot be used: {type(cause).__name__}: {one_line(cause)}"
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.")
        if not name.startswith("config."):
            continue
        if key in MOVED:
            return f"{key}: expected its new name {MOVED[key]}; use --config.{MOVED[key]}={value}"
        if key not in known:
            return f"{key}: no such key; {suggest(key, known)}"
        if name in str(error):
            old = known[key]
            return f"{key}: expected {type(old).__name__} such as {old!r}, found {value!r}"
    if isinstance(error, flags.UnrecognizedFlagError):
        return f"--{error.flagname}: no such flag; there are --{', --'.join(flag_values)}"
    return one_line(error)


# Configurations as values


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens {"a": {"b": 1}} to {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping | ConfigDict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nests {"a.b": 1} as {"a": {"b": 1}}: the inverse of `flatten`."""
    nested: dict = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def with_overrides(config: ConfigDict, flat: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of the config with other values of some keys, {"sampler.steps": 20}."""
    return ConfigDict(unflatten(flatten(config) | dict(flat)))


def fill_defaults(stored: Mapping[str, Any]) -> ConfigDict:
    """Returns a config read from JSON, with defaults for keys that are younger than it."""
    flat = flatten(_with_tuples(stored))
    for old, new in MOVED.items():
        if old in flat:
            flat[new] = flat.pop(old)
    return ConfigDict(unflatten(flatten(default.get_config()) | flat))


def _with_tuples(x: Any) -> Any:
    """Turns the lists of JSON into the tuples of configs."""
    if isinstance(x, Mapping | ConfigDict):
        return {key: _with_tuples(value) for key, value in x.items()}
    return tuple(map(_with_tuples, x)) if isinstance(x, list | tuple) else x


def without_younger_defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out keys that earlier versions lacked, where they have their defaults."""
    defaults = flatten(default.get_config())
    return {k: value for k, value in flat.items() if k not in YOUNGER or value != defaults[k]}


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], keys: tuple[str, ...] = TRAINING_KEYS
) -> list[str]:
    """Returns `key: was X, now Y` for every differing key that begins with one of `keys`.

    A key that a side lacks has its default there; one without a default counts as absent before,
    unless its new value means "none".
    """
    defaults = flatten(default.get_config())
    old, new = (defaults | flatten(_with_tuples(side)) for side in (old, new))
    return [
        f"{k}: was {one_line(old.get(k, ABSENT), 80)}, now {one_line(new.get(k, ABSENT), 80)}"
        for k in sorted(old | new)
        if k.startswith(keys) and old.get(k, ABSENT) != new.get(k, ABSENT) and (k in old or new[k])
    ]


def suggest(name: str, names: Iterable[str]) -> str:
    """Returns the nearest names to one that does not exist, or else all of them, for a message."""
    names = sorted(filter(None, names))
    close = difflib.get_close_matches(name, names, 3, 0.5)
    return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"


def lookup(table: Mapping[str, Any], key: str, name: str) -> Any:
    """Returns table[name]. Raises ConfigError that says what `key` could have been."""
    if name not in table:
        raise ConfigError(f"{key}: {name!r} is not known; {suggest(str(name), table)}")
    return table[name]


def call_for_key(function: Callable, key: str, *args, **kwargs) -> Any:
    """Returns function(...); its complaints about arguments become ConfigErrors of the key."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        where = f"{function.__module__}.{function.__name__}"
        raise ConfigError(f"{key}: {error}; see {where}") from error
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ConfigError(f"{key}: {one_line(error)}") from error


def cache_dir() -> epath.Path:
    """Returns the folder of what runs share: compiled programs, downloads, statistics."""
    cache = io.to_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if io.is_object_store(cache):
        advice = "JAX_COMPILATION_CACHE_DIR may be in a bucket"
        raise ConfigError(f"XDG_CACHE_HOME: expected a local folder, found {cache}; {advice}")
    return cache / "ddpm-jax"
