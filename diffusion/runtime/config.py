"""What the user typed: flags and configuration, checked before anything is built or written.

Everything that can be wrong here ends in one line that names the field, what was given and what
would do. `main.py` receives a ConfigDict that it can trust.
"""

import difflib
import inspect
import math
import os
import pathlib
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from diffusion import data, losses, samplers, schedules, targets
from diffusion.data.prepare import sources
from diffusion.samplers import timesteps
from diffusion.utils.errors import ConfigError, DDPMError

HERE = pathlib.Path(__file__).resolve().parent


DEFAULT = str(HERE / "configs" / "digits.py")  # what `python main.py` alone trains


# Exit codes, one for each kind of thing that a user can mend.
CONFIG, DATA, WORKDIR, NON_FINITE, INTEGRITY, PEER, STOPPED = 2, 3, 4, 5, 6, 7, 75


# Keys that may change when a work directory is used again: they leave the training as it was, or
# have done their work when the data set was prepared.
FREE = (
    *("train.steps", "train.log_every", "train.sample_every", "train.save_every", "train.keep"),
    *("train.eval_every", "train.hang_s", "train.on_nonfinite", "frontier.", "figures."),
    *(
        "train.num_samples",
        "sampler.",
        "sample.",
        "bpd.",
        "eval.",
        "data.data_dir",
        "data.on_device_gib",
    ),
    *("data.workers", "data.archive", "data.accept_incomplete", "data.on_error", "data.holdout"),
    *("data.holdout_names", "data.background"),
)


ABSENT = "absent"


def suggest(name: str, names: Iterable[str]) -> str:
    """What to write after a name that does not exist: the nearest names first, then the rest."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, 3, 0.5)
    return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"


def parse(argv: list[str]) -> list[str]:
    """absl's flag parser, every complaint one line and exit code 2. Returns [program]."""
    if not any(a.lstrip("-").partition("=")[0] == "config" for a in argv[1:]):
        argv = [argv[0], f"--config={DEFAULT}", *argv[1:]]
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS["config"].value.items()  # a file that cannot be read is told of at first use
    except Exception as error:  # a config file is code: anything may come out of it
        exit_with(ConfigError(_explain(argv, error)))
    if len(rest) > 1:
        exit_with(ConfigError(f"{rest[1]}: expected only flags such as --mode=sample; see --help"))
    return rest


def _explain(argv: list[str], error: Exception) -> str:
    """What is wrong with the command line: found by looking at it, else in the error's words."""
    named = [a.partition("=")[2] for a in argv if a.lstrip("-").startswith("config=")]
    config = named[-1] if named else ""
    path, _, variant = config.partition(":")
    try:
        module = runpy.run_path(path)
        known = flatten(module["get_config"](*([variant] if variant else [])))
    except OSError:
        files = [f"configs/{f}" for f in os.listdir(HERE / "configs") if f.endswith(".py")]
        return f"--config={config}: cannot be read; {suggest(path, files)}"
    except KeyError:
        wrong = [v for v in variant.split(",") if v not in module.get("VARIANTS", {})]
        if not wrong:
            raise
        return f"--config={config}: no such variant; {suggest(wrong[0], module['VARIANTS'])}"
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        key = name.removeprefix("config.")
        if name.startswith("config.") and key not in known:
            return f"{key}: no such key; {suggest(key, known)}"
        if name.startswith("config.") and name in str(error):
            old = known[key]
            return f"{key}: expected {type(old).__name__} such as {old!r}, found {value!r}"
    if isinstance(error, flags.UnrecognizedFlagError):
        known = "--config, --workdir, --mode, --input, --output, --dry_run, --part, --topology, "
        known += "--replay, --help"
        return f"--{error.flagname}: no such flag; there are {known}"
    return " ".join(str(error).split())


def resolve(
    config: ConfigDict, workdir: str | None, remembered: Callable[[pathlib.Path], dict | None]
) -> tuple[ConfigDict, pathlib.Path]:
    """The config and the work directory that the command line means.

    Without --workdir it is runs/ and the config's name. Without --config it is the one that the
    work directory was made with (`remembered`), if it was made. Overrides come on top of either.
    """
    flag = flags.FLAGS["config"]
    filename = config_flags.get_config_filename(flag)
    path, _, variant = filename.partition(":")
    name = "-".join([pathlib.Path(path).stem, *filter(None, variant.split(","))])
    workdir = pathlib.Path(workdir or pathlib.Path("runs", name))
    old = remembered(workdir) if filename == DEFAULT else None
    if old:
        config = fill_defaults(old, config)
        config.update_from_flattened_dict(config_flags.get_override_values(flag))
    return config, workdir


def fill_defaults(old: Mapping[str, Any], default: ConfigDict) -> ConfigDict:
    """The config of an older run; keys that came into the program after it are as by default."""
    young = {key: value for key, value in flatten(default).items() if key in RULES}
    return ConfigDict(unflatten(young | flatten(tuples(old))))


def tuples(x: Any) -> Any:
    """JSON has lists where configs have tuples."""
    if isinstance(x, dict):
        return {key: tuples(value) for key, value in x.items()}
    return tuple(map(tuples, x)) if isinstance(x, list) else x


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= (
            flatten(value, f"{name}.") if isinstance(value, Mapping | ConfigDict) else {name: value}
        )
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}: the inverse of `flatten`."""
    nested: dict = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        section = nested
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def typed_flags() -> tuple[bool, dict[str, Any]]:
    """(whether --config was given, the single keys that were)."""
    flag = flags.FLAGS["config"]
    given = config_flags.get_config_filename(flag) != DEFAULT
    return given, config_flags.get_override_values(flag)


def check_sampler_options() -> None:
    """Raises DDPMError for a typed option that the chosen sampler does not have."""
    config, (_, keys) = flags.FLAGS["config"].value, typed_flags()
    known = {n: set(inspect.signature(f).parameters) for n, f in samplers.SAMPLERS.items()}
    own, every = known.get(config.sampler.name, set()), set().union(*known.values())
    for key in keys:
        option = key.removeprefix("sampler.")
        if key.startswith("sampler.") and option in every - own:
            having = ", ".join(n for n, options in known.items() if option in options)
            name = config.sampler.name
            raise ConfigError(f"{key}: the sampler {name} has no such option; {having} have it")


def with_overrides(config: ConfigDict, flat: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with some keys of other values, {"sampler.steps": 20}."""
    return ConfigDict(unflatten(flatten(config) | dict(flat)))


def cache_dir() -> pathlib.Path:
    """Where what all runs may use again lies: compiled programs, downloads, statistics."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "ddpm-jax"


def lookup(table: Mapping[str, Any], key: str, name: str) -> Any:
    """table[name], or the line that says what `key` could have been."""
    if name not in table:
        raise ConfigError(f"{key}: {name!r} is not known; {suggest(str(name), table)}")
    return table[name]


def call_for_key(function: Callable, key: str, *args, **kwargs) -> Any:
    """function(...), with its complaints about arguments told as those of the config's key."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{key}: {error}; see {function.__module__}.{function.__name__}"
        ) from error
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -math.inf < x < math.inf


def _positive(x: Any) -> bool:
    return _number(x) and x > 0


def _flag(x: Any) -> bool:
    return isinstance(x, bool)


def _count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def _counts(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) > 0 and all(map(_count, x))


def _seed(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**32


def _words(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) > 0 and all(isinstance(w, str) and w for w in x)


# key -> (test, what the test wants). A key that stands neither here nor in a table is an error.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_seed, "an int in 0..2^32-1"),
    "model.ch": (_count, "an int, 1 or more"),
    "model.ch_mult": (_counts, "a tuple of ints, 1 or more each"),
    "model.num_res_blocks": (_count, "an int, 1 or more"),
    "model.attn_resolutions": (lambda x: not len(x) or _counts(x), "a tuple of ints"),
    "model.dropout": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "model.num_classes": (lambda x: x == 0 or _count(x), "an int, 0 for none"),
    "model.dtype": (lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
    "data.source": (lambda x: isinstance(x, str), "a name"),
    "data.name": (lambda x: isinstance(x, str), "a name"),
    "data.data_dir": (lambda x: isinstance(x, str), "a folder"),
    "data.image_size": (_count, "an int, 1 or more"),
    "data.image_width": (lambda x: x == 0 or _count(x), "an int, 0 for as wide as high"),
    "data.channels": (_count, "an int, 1 or more"),
    "data.flip": (_flag, "True or False"),
    "data.on_device_gib": (lambda x: _number(x) and x >= 0, "a number, 0 or more"),
    "data.workers": (lambda x: x == 0 or _count(x), "an int, 0 for threads"),
    "data.archive": (lambda x: isinstance(x, str), "a file or folder"),
    "data.accept_incomplete": (_flag, "True or False"),
    "data.on_error": (lambda x: x in ("skip", "fail"), "skip or fail"),
    "data.holdout": (lambda x: _number(x) and 0 <= x < 1, "a fraction in [0, 1)"),
    "data.holdout_names": (lambda x: isinstance(x, str), "a file of names"),
    "data.background": (
        lambda x: len(x) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in x),
        "three ints in 0..255",
    ),
    "process.schedule": (lambda x: isinstance(x, str), "a name"),
    "process.T": (_count, "an int, 1 or more"),
    "process.beta_start": (lambda x: _positive(x) and x <= 1, "a number in (0, 1]"),
    "process.beta_end": (lambda x: _positive(x) and x <= 1, "a number in (0, 1]"),
    "target": (lambda x: isinstance(x, str), "a name"),
    "variance": (lambda x: isinstance(x, str), "a name"),
    "optim.lr": (_positive, "a number above 0"),
    "optim.warmup": (lambda x: x == 0 or _count(x), "an int, 0 for none"),
    "optim.clip": (_positive, "a number above 0"),
    "optim.clip_groups": (_count, "an int, 1 or more"),
    "optim.accumulate": (_count, "an int, 1 or more"),
    "optim.ema": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "train.batch_size": (_count, "an int, 1 or more"),
    "train.steps": (_count, "an int, 1 or more"),
    "train.log_every": (_count, "an int, 1 or more"),
    "train.sample_every": (_count, "an int, 1 or more"),
    "train.save_every": (_count, "an int, 1 or more"),
    "train.eval_every": (lambda x: x == 0 or _count(x), "an int, 0 for never"),
    "train.keep": (_count, "an int, 1 or more"),
    "train.keep_every": (lambda x: x == 0 or _count(x), "an int, 0 for none"),
    "train.keep_best": (lambda x: x == 0 or _count(x), "an int, 0 for none"),
    "train.on_nonfinite": (lambda x: x in ("halt", "skip", "rollback"), "halt, skip or rollback"),
    "train.hang_s": (lambda x: _number(x) and x >= 0, "seconds, 0 for never"),
    "train.num_samples": (_count, "an int, 1 or more"),
    "train.label_dropout": (lambda x: 0 <= x < 1, "a number in [0, 1)"),
    "sampler.steps": (_count, "an int, 1 or more"),
    "sampler.times": (lambda x: not len(x) or _counts(x), "a tuple of ints, 1 or more each"),
    "sampler.clip": (_flag, "True or False"),
    "sampler.threshold": (lambda x: _number(x) and 0 <= x <= 1, "a share in [0, 1], 0 for none"),
    "sampler.variance": (lambda x: isinstance(x, str), "a name"),
    "sampler.estimate": (lambda x: _count(x) and x > 1, "an int, 2 or more"),
    "sampler.guidance": (_number, "a number, 0 for none"),
    "sampler.eta": (_number, "a number in [0, 1]"),
    "sampler.order": (_count, "1, 2 or 3"),
    "sampler.variant": (lambda x: isinstance(x, str), "bh1 or bh2"),
    "sampler.corrector": (_flag, "True or False"),
    "sampler.solver": (lambda x: isinstance(x, str), "a name"),
    "sampler.predictor": (lambda x: isinstance(x, str), "ancestral or ddim"),
    "sampler.corrections": (_count, "an int, 1 or more"),
    "sampler.snr": (_positive, "a number above 0"),
    "bpd.split": (lambda x: isinstance(x, str), "a name"),
    "bpd.num": (lambda x: x == 0 or _count(x), "an int, 0 for all"),
    "bpd.quick": (lambda x: _count(x) and x > 1, "an int, 2 or more"),
    "bpd.batch_size": (_count, "an int, 1 or more"),
    "bpd.seed": (_seed, "an int in 0..2^32-1"),
    "bpd.estimate": (lambda x: x == 0 or (_count(x) and x > 1), "an int, 2 or more, 0 for none"),
    "bpd.steps": (lambda x: not len(x) or _counts(x), "a tuple of ints"),
    "bpd.ode": (lambda x: x == 0 or (_count(x) and x > 1), "an int, 2 or more, 0 for none"),
    "eval.num": (lambda x: _count(x) and x > 1, "an int, 2 or more"),
    "eval.batch_size": (_count, "an int, 1 or more"),
    "eval.seeds": (lambda x: len(x) and all(map(_seed, x)), "a tuple of ints in 0..2^32-1"),
    "eval.weights": (
        lambda x: len(x) and set(x) <= {"ema", "raw"},
        'a tuple of "ema", "raw" or both',
    ),
    "eval.features": (_words, "a tuple of names"),
    "eval.inception": (lambda x: isinstance(x, str), "a file"),
    "eval.references": (_words, "a tuple of splits, or of files and folders"),
    "eval.reference_num": (lambda x: x == 0 or (_count(x) and x > 1), "an int, 0 for all"),
    "eval.keep": (lambda x: _count(x) and x > 1, "an int, 2 or more"),
    "eval.quick": (lambda x: x == 0 or (_count(x) and x > 1), "an int, 2 or more, 0 for none"),
    "figures.names": (_words, "a tuple of names"),
    "figures.seed": (_seed, "an int in 0..2^32-1"),
    "figures.num": (_count, "an int, 1 or more"),
    "figures.rows": (_count, "an int, 1 or more"),
    "figures.split": (lambda x: isinstance(x, str), "a name"),
    "figures.scored": (lambda x: _count(x) and x > 1, "an int, 2 or more"),
    "figures.mask": (lambda x: isinstance(x, str), "left, right, centre or a picture"),
    "figures.jump": (_count, "an int, 1 or more"),
    "figures.repeats": (_count, "an int, 1 or more"),
    "figures.animation": (lambda x: x in ("gif", "webp"), "gif or webp"),
    "frontier.samplers": (_words, "a tuple of names"),
    "frontier.grids": (_words, "a tuple of names"),
    "frontier.steps": (_counts, "a tuple of ints, 1 or more each"),
    "frontier.num": (lambda x: _count(x) and x > 1, "an int, 2 or more"),
    "sample.num": (_count, "an int, 1 or more"),
    "sample.batch_size": (_count, "an int, 1 or more"),
    "sample.seed": (_seed, "an int in 0..2^32-1"),
    "sample.label": (lambda x: isinstance(x, int), "a class, or -1 for all in turn"),
}


# Sub-dicts of one entry of a table each; the table's functions check the other keys.
TABLES = {
    "process.schedule": schedules.SCHEDULES,
    "target": targets.TARGETS,
    "variance": targets.VARIANCES,
    "loss.name": losses.LOSSES,
    "sampler.name": samplers.SAMPLERS,
    "sampler.grid": timesteps.GRIDS,
    "data.source": data.SOURCES | sources.ORIGINS,
}


def validate(config: ConfigDict, devices: int) -> None:
    """Every key known and present, every value in its range, every name in its table. Or Fatal."""
    flat = flatten(config)
    required = [*RULES, *(key for key in TABLES if key not in RULES)]
    for key in required:
        if key not in flat:
            raise ConfigError(f"{key}: missing in the config; configs/digits.py has every key")
    for key, value in flat.items():
        if key in RULES:
            test, wanted = RULES[key]
            try:
                good = test(value)
            except TypeError:
                good = False
            if not good:
                raise ConfigError(f"{key}: expected {wanted}, found {value!r}")
        elif key not in TABLES and not key.startswith("loss."):
            raise ConfigError(f"{key}: no such key; {suggest(key, required)}")
        if key in TABLES:
            lookup(TABLES[key], key, value)
    size, parts = config.train.batch_size, config.optim.accumulate
    every = math.lcm(devices * parts, parts * config.optim.clip_groups)
    if size % every:
        above = -(-size // every) * every
        use = f"{above - every} or {above}" if above > every else f"{above}"
        why = f"{devices} devices, optim.accumulate {parts}"
        why += f", optim.clip_groups {config.optim.clip_groups}"
        message = f"expected a multiple of {every} ({why}), found {size}; use {use}"
        raise ConfigError(f"train.batch_size: {message}")
    classes, label = config.model.num_classes, config.sample.label
    for key in ("sampler.guidance", "train.label_dropout"):
        if flat[key] and not classes:
            wanted = "expected 0 for a model without classes (model.num_classes)"
            raise ConfigError(f"{key}: {wanted}, found {flat[key]}")
    if not -1 <= label < classes:  # without classes, -1 alone
        wanted = f"-1 or a class below {classes}" if classes else "-1, for a model without classes"
        raise ConfigError(f"sample.label: expected {wanted}, found {label}")


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...] = FREE
) -> list[str]:
    """`key: was X, now Y` for every key that decides what a training is and is not the same.

    A key that came after the old run has a value that means "none", or it was not the same.
    """
    old, new = flatten(tuples(old)), flatten(tuples(dict(new)))
    keys = [k for k in sorted(old | new) if not k.startswith(free)]
    return [
        f"{k}: was {old.get(k, ABSENT)}, now {new.get(k, ABSENT)}"
        for k in keys
        if old.get(k, ABSENT) != new.get(k, ABSENT) and (k in old or new[k])
    ]


def data_key_message(error: Exception, section: ConfigDict) -> str:
    """An error of data or its preparation; what begins with a key gets the key's full name."""
    key = str(error).partition(":")[0]
    return f"data.{error}" if key in section else str(error)


def exit_with(fatal: DDPMError) -> NoReturn:
    """The one line, and out."""
    print(f"ddpm: error[{fatal.code}]: {fatal}", file=sys.stderr, flush=True)
    sys.exit(fatal.code)
