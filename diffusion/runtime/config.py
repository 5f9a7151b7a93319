"""The configuration that the command line means, checked before anything is built or written.

`resolve` parses flags into a `Run`; `validate` finds every value that is out of range. Whatever is
wrong is a ConfigError that names the key, what was expected, what was found and what to do.
"""

import difflib
import inspect
import math
import os
import pathlib
import runpy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import default
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
    *("data.source", "data.name", "data.flip"),
)
MOVED = {"train.num_samples": "train.preview.num"}  # keys of earlier versions
YOUNGER = (  # keys that earlier versions lacked
    *("model.attention_head_dim", "model.downsample_padding", "model.flip_sin_to_cos"),
    *("model.freq_shift", "model.norm_eps", "model.null_class", "process.betas"),
    *("sampler.clip_range", "sampler.threshold_max"),
)
ABSENT = "absent"


class Run(NamedTuple):
    """What the command line asked for.

    config: the validated configuration; overrides: the keys typed as flags, {"sampler.steps": 20};
    config_given: whether --config was typed; flags: the other flags, by attribute.
    """

    mode: str
    config: ConfigDict
    workdir: pathlib.Path
    flags: Any
    overrides: Mapping[str, Any] = {}
    config_given: bool = False


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
    argv = [_from_root(argument) for argument in argv]
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
    workdir = pathlib.Path(flag_values.workdir or pathlib.Path("runs", name))
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


def cache_dir() -> pathlib.Path:
    """Returns the folder of what runs share: compiled programs, downloads, statistics."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "ddpm-jax"


# Validation


POSITIVE = (lambda x: x > 0, "a number above 0")
COUNT = (lambda x: x >= 1, "an int of 1 or more")
TWO = (lambda x: x >= 2, "an int of 2 or more")
NONE_OR_TWO = (lambda x: x == 0 or x >= 2, "an int of 2 or more, or 0 for none")
FRACTION = (lambda x: x < 1, "a number in [0, 1)")
BETA, BETAS = (lambda x: 0 < x <= 1, "a number in (0, 1]"), "a tuple of numbers in (0, 1]"
SEED = (lambda x: x < 2**32, "an int in 0..2^32-1")
COUNTS = (lambda x: all(isinstance(n, int) and n >= 1 for n in x), "a tuple of ints of 1 or more")
ZERO_OR_ONE = (lambda x: x in (0, 1), "0 or 1")
SOME = (lambda x: len(x) > 0 and all(x), "a tuple that is not empty")


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda x: x in names, " or ".join(names)


# key -> (test, what the test wants), beyond the type of the default and "finite, 0 or more".
VALIDATORS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("seed", "bpd.seed", "figures.seed", "sample.seed"), SEED),
    **dict.fromkeys(("model.ch", "model.num_res_blocks", "data.image_size", "process.T"), COUNT),
    **dict.fromkeys(("data.channels", "optim.clip_groups", "optim.accumulate"), COUNT),
    **dict.fromkeys(("train.batch_size", "train.log_every"), COUNT),
    **dict.fromkeys(("train.save_every", "train.keep", "train.preview.steps"), COUNT),
    **dict.fromkeys(("train.preview.num", "sampler.steps", "sampler.order"), COUNT),
    **dict.fromkeys(("sampler.corrections", "bpd.batch_size", "eval.batch_size"), COUNT),
    **dict.fromkeys(("figures.num", "figures.rows", "figures.jump", "figures.repeats"), COUNT),
    **dict.fromkeys(("sample.num", "sample.batch_size"), COUNT),
    **dict.fromkeys(("sampler.estimate", "bpd.quick", "eval.num", "eval.keep"), TWO),
    **dict.fromkeys(("figures.scored", "frontier.num"), TWO),
    **dict.fromkeys(("bpd.estimate", "bpd.ode", "eval.reference_num", "eval.quick"), NONE_OR_TWO),
    **dict.fromkeys(("model.dropout", "optim.ema", "train.label_dropout"), FRACTION),
    **dict.fromkeys(("process.beta_start", "process.beta_end"), BETA),
    **dict.fromkeys(("optim.lr", "optim.clip", "sampler.snr", "train.heartbeat_s"), POSITIVE),
    **dict.fromkeys(("model.norm_eps", "sampler.clip_range"), POSITIVE),
    **dict.fromkeys(("model.downsample_padding", "model.freq_shift"), ZERO_OR_ONE),
    **dict.fromkeys(("model.attn_resolutions", "sampler.times", "bpd.steps"), COUNTS),
    **dict.fromkeys(("model.ch_mult", "frontier.steps"), SOME),
    **dict.fromkeys(("eval.features", "eval.references", "figures.names"), SOME),
    **dict.fromkeys(("frontier.samplers", "frontier.grids"), SOME),
    "model.dtype": _one_of("float32", "bfloat16"),
    "train.on_nonfinite": _one_of("halt", "skip", "rollback"),
    "data.on_error": _one_of("skip", "fail"),
    "data.fit": _one_of("crop", "pad", "stretch"),
    "data.include": SOME,
    "data.exclude": (lambda x: all(isinstance(p, str) for p in x), "patterns such as ('*/old/*',)"),
    "data.background": (lambda x: len(x) == 3 and max(x) <= 255, "three ints in 0..255"),
    "data.holdout": FRACTION,
    "figures.animation": _one_of("gif", "webp"),
    "process.betas": (lambda x: all(isinstance(b, int | float) and 0 < b <= 1 for b in x), BETAS),
    "sampler.threshold": (lambda x: x <= 1, "a fraction in [0, 1], 0 for none"),
    "sampler.threshold_max": (lambda x: x == 0 or x >= 1, "a number of 1 or more, or 0 for none"),
    "eval.seeds": (lambda x: len(x) > 0 and max(x) < 2**32, "a tuple of ints in 0..2^32-1"),
    "eval.weights": (lambda x: x and {*x} <= {"ema", "raw"}, 'a tuple of "ema", "raw" or both'),
}
SIGNED = ("model.null_class", "sampler.guidance", "sample.label")


def _tables() -> dict[str, Iterable[str]]:
    """Returns {key: the names it may have}; imported here, so that --help does not import JAX."""
    from diffusion import losses, samplers, schedules, targets
    from diffusion.data import SOURCES
    from diffusion.data.prepare.sources import ORIGINS

    return {
        "process.schedule": schedules.SCHEDULES,
        "target": targets.TARGETS,
        "variance": targets.VARIANCES,
        "loss.name": losses.LOSSES,
        "sampler.name": samplers.SAMPLERS,
        "sampler.grid": samplers.GRIDS,
        "train.preview.sampler": samplers.SAMPLERS,
        "data.source": {**SOURCES, **ORIGINS, "": None},
    }


def validate(config: ConfigDict, devices: int = 1) -> None:
    """Checks that every key is known and present and every value in its range.

    devices: that share each batch. Raises ConfigError.
    """
    flat, known = flatten(config), flatten(default.get_config())
    for key in known:
        if key not in flat:
            raise ConfigError(f"{key}: missing in the config; configs/default.py has every key")
    for key, value in flat.items():
        if key in known:
            _check_value(key, value, known[key])
        elif not key.startswith("loss."):
            raise ConfigError(f"{key}: no such key; {suggest(key, known)}")
    for key, table in _tables().items():
        lookup(table, key, flat[key])
    if (n := len(config.process.betas)) not in (0, T := config.process.T):
        raise ConfigError(f"process.betas: expected process.T = {T} numbers or none, found {n}")
    _check_batch(config, devices)
    _check_classes(config, flat)


def _check_value(key: str, value: Any, example: Any) -> None:
    numbers = value if isinstance(value, tuple | list) else [value]
    numbers = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool)]
    low = -math.inf if key in SIGNED else 0
    test, wanted = VALIDATORS.get(key, (lambda x: True, "a number of 0 or more"))
    found = one_line(repr(value), 80)
    if not _same_type(value, example):
        raise ConfigError(f"{key}: expected {_type_name(example)}, found {found}")
    if not all(math.isfinite(x) and x >= low for x in numbers) or not test(value):
        raise ConfigError(f"{key}: expected {wanted}, found {found}")


def _same_type(value: Any, example: Any) -> bool:
    if isinstance(example, tuple):
        elements = value if example else ()  # of an empty example only the validator knows
        return isinstance(value, tuple | list) and all(_same_type(x, example[0]) for x in elements)
    kinds = (int, float) if isinstance(example, float) else type(example)
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(example, bool)


def _type_name(example: Any) -> str:
    names = {bool: "True or False", str: "a name", float: "a number", int: "an int"}
    return names.get(type(example)) or f"a tuple such as {example or (1, 2)}"


def _check_batch(config: ConfigDict, devices: int) -> None:
    size, parts, groups = config.train.batch_size, config.optim.accumulate, config.optim.clip_groups
    multiple = math.lcm(devices * parts, parts * groups)
    if size % multiple:
        above = -(-size // multiple) * multiple
        use = f"{above - multiple} or {above}" if above > multiple else f"{above}"
        why = f"{devices} devices, optim.accumulate {parts}, optim.clip_groups {groups}"
        wanted = f"expected a multiple of {multiple} ({why}), found {size}; use {use}"
        raise ConfigError(f"train.batch_size: {wanted}")


def _check_classes(config: ConfigDict, flat: Mapping[str, Any]) -> None:
    classes, null, label = config.model.num_classes, config.model.null_class, config.sample.label
    if null < -2 or 0 < classes <= null:
        wanted = f"-2, -1 or a class below {classes}"
        raise ConfigError(f"model.null_class: expected {wanted}, found {null}")
    for key in ("sampler.guidance", "train.label_dropout"):
        if flat[key] and (not classes or null == -2):
            lacking = 'a label of "no class"' if classes else "classes (model.num_classes)"
            how = "; if class N is one, give --config.model.null_class=N" if classes else ""
            wanted = f"expected 0 for a model without {lacking}"
            raise ConfigError(f"{key}: {wanted}, found {flat[key]}{how}")
    if not -1 <= label < classes:  # without classes, -1 alone
        wanted = f"-1 or a class below {classes}" if classes else "-1, for a model without classes"
        raise ConfigError(f"sample.label: expected {wanted}, found {label}")
