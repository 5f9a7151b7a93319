"""Finds values of a configuration that are out of range, before anything is built or written."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default
from diffusion.runtime.config import flatten, lookup, suggest
from diffusion.utils.errors import ConfigError, one_line

POSITIVE = (lambda x: x > 0, "a number above 0")
COUNT = (lambda x: x >= 1, "an int of 1 or more")
TWO = (lambda x: x >= 2, "an int of 2 or more")
NONE_OR_TWO = (lambda x: x == 0 or x >= 2, "an int of 2 or more, or 0 for none")
FRACTION = (lambda x: x < 1, "a number in [0, 1)")
BETA, BETAS = (lambda x: 0 < x <= 1, "a number in (0, 1]"), "a tuple of numbers in (0, 1]"
SEED = (lambda x: x < 2**32, "an int in 0..2^32-1")
SEEDS = (
    lambda x: len(x) > 0 and max(x) < 2**32 and len({*x}) == len(x),
    "a tuple of distinct ints in 0..2^32-1",
)
COUNTS = (lambda x: all(isinstance(n, int) and n >= 1 for n in x), "a tuple of ints of 1 or more")
STEPS = (
    lambda x: len(x) in (0, 2) and COUNTS[0](x),
    "(first step, number of steps), two ints of 1 or more, or () for none",
)
ZERO_OR_ONE = (lambda x: x in (0, 1), "0 or 1")
NAMES = (lambda x: all(isinstance(n, str) and n for n in x), "a tuple of names, or () for none")
SOME = (lambda x: len(x) > 0 and all(x), "a tuple that is not empty")

WEIGHTS = 'ema, raw, or ema:LENGTH such as "ema:0.07", between 0 and 0.28'


def _is_length(x: Any) -> bool:
    """Returns whether x is a relative length of an average; 0.2887 is that of the plain mean."""
    return isinstance(x, float) and 0 < x < 0.28


def _is_weights(name: Any) -> bool:
    """Returns whether the name is ema, raw or ema:LENGTH."""
    kind, _, length = str(name).partition(":")
    try:
        return name in ("ema", "raw") or (kind == "ema" and _is_length(float(length)))
    except ValueError:
        return False


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda x: x in names, " or ".join(names)


# key -> (test, what the test wants), beyond the type of the default and "finite, 0 or more".
VALIDATORS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("seed", "bpd.seed", "codec.seed", "figures.seed", "sample.seed"), SEED),
    "study.seed": SEED,
    "study.num": COUNT,
    "study.max_failed": (lambda x: x <= 1, "a fraction in [0, 1]"),
    **dict.fromkeys(("study.samplers", "study.samples"), NAMES),
    **dict.fromkeys(("model.ch", "model.num_res_blocks", "data.image_size", "process.T"), COUNT),
    **dict.fromkeys(("data.channels", "optim.clip_groups", "optim.accumulate"), COUNT),
    **dict.fromkeys(("train.batch_size", "train.log_every", "train.save_every"), COUNT),
    **dict.fromkeys(("train.keep", "train.preview.steps", "train.preview.num"), COUNT),
    **dict.fromkeys(("sampler.steps", "sampler.order", "sampler.corrections", "sample.num"), COUNT),
    **dict.fromkeys(("train.snapshots", "train.steps_per_dispatch"), COUNT),
    **dict.fromkeys(("bpd.batch_size", "eval.batch_size", "sample.batch_size"), COUNT),
    **dict.fromkeys(("codec.group", "codec.batch_size", "codec.steps"), COUNT),
    "codec.candidates": (lambda x: 4 <= x <= 22, "an int in 4..22"),
    "codec.kind": _one_of("progressive", "archive"),
    "codec.decode": _one_of("x_0", "ode"),
    **dict.fromkeys(("figures.num", "figures.rows", "figures.jump", "figures.repeats"), COUNT),
    **dict.fromkeys(("sampler.estimate", "bpd.quick", "eval.num", "eval.keep"), TWO),
    **dict.fromkeys(("figures.scored", "report.frames"), TWO),
    "frontier.num": (lambda x: x >= 6, "an int of 6 or more"),  # five neighbours and itself
    **dict.fromkeys(
        ("bpd.estimate", "bpd.ode", "bpd.continuous", "eval.reference_num", "eval.quick"),
        NONE_OR_TWO,
    ),
    **dict.fromkeys(("model.dropout", "optim.ema", "train.label_dropout"), FRACTION),
    "data.holdout": FRACTION,
    **dict.fromkeys(("process.beta_start", "process.beta_end"), BETA),
    **dict.fromkeys(("optim.lr", "optim.clip", "sampler.snr", "train.heartbeat_s"), POSITIVE),
    **dict.fromkeys(("model.norm_eps", "sampler.clip_range"), POSITIVE),
    **dict.fromkeys(("model.downsample_padding", "model.freq_shift"), ZERO_OR_ONE),
    **dict.fromkeys(("model.attn_resolutions", "sampler.times", "bpd.steps"), COUNTS),
    **dict.fromkeys(("eval.features", "eval.references", "figures.names", "data.include"), SOME),
    **dict.fromkeys(("frontier.samplers", "frontier.grids", "frontier.steps"), SOME),
    "model.ch_mult": SOME,
    "model.dtype": _one_of("float32", "bfloat16"),
    "train.profile": STEPS,
    "train.on_nonfinite": _one_of("halt", "skip", "rollback"),
    "data.on_error": _one_of("skip", "fail"),
    "data.levels": (lambda x: 2 <= x <= 256, "an int in 2..256"),
    "data.fit": _one_of("crop", "pad", "stretch"),
    "data.exclude": (lambda x: all(isinstance(p, str) for p in x), "patterns such as ('*/old/*',)"),
    "data.background": (lambda x: len(x) == 3 and max(x) <= 255, "three ints in 0..255"),
    "figures.animation": _one_of("gif", "webp"),
    "model.fourier": (lambda x: all(isinstance(n, int) for n in x), "a tuple of ints of 0 or more"),
    "process.betas": (lambda x: all(isinstance(b, int | float) and 0 < b <= 1 for b in x), BETAS),
    "sampler.threshold": (lambda x: x <= 1, "a fraction in [0, 1], 0 for none"),
    "sampler.threshold_max": (lambda x: x == 0 or x >= 1, "a number of 1 or more, or 0 for none"),
    **dict.fromkeys(("eval.seeds", "frontier.seeds", "sweep.seeds"), SEEDS),
    "sweep.equal": _one_of("steps", "flops"),
    "sweep.evaluations": COUNT,
    "optim.posthoc": (
        lambda x: all(map(_is_length, x)) and len({*x}) == len(x),
        "a tuple of distinct numbers between 0 and 0.28, or () for none",
    ),
    **dict.fromkeys(("weights", "train.init_weights"), (_is_weights, WEIGHTS)),
    "study.weights": (
        lambda x: all(map(_is_weights, x)) and len({*x}) == len(x),
        f"a tuple of {WEIGHTS}, or () for `weights`",
    ),
    "eval.weights": (
        lambda x: len(x) > 0 and all(map(_is_weights, x)) and len({*x}) == len(x),
        f"a tuple of {WEIGHTS}",
    ),
}
SIGNED = (
    *("process.gamma_min", "process.gamma_max", "loss.log_mean"),
    *("model.null_class", "sampler.guidance", "sample.label"),
)


def _tables() -> dict[str, Iterable[str]]:
    """Returns {key: the names it may have}; imported here, so that --help does not import JAX."""
    from diffusion import (
        continuous,
        losses,
        optimisers,
        samplers,
        schedules,
        targets,
        timestep_samplers,
        weightings,
    )
    from diffusion.data import SOURCES
    from diffusion.data.prepare.sources import ORIGINS

    return {
        "process.schedule": schedules.SCHEDULES,
        "target": targets.TARGETS,
        "variance": targets.VARIANCES,
        "loss.name": losses.LOSSES,
        "loss.schedule": continuous.GAMMAS,
        "loss.weighting": weightings.WEIGHTINGS,
        "train.timesteps": timestep_samplers.TIMESTEP_SAMPLERS,
        "optim.name": optimisers.OPTIMISERS,
        "optim.schedule": optimisers.LR_SCHEDULES,
        "sampler.name": samplers.SAMPLERS,
        "sampler.grid": samplers.GRIDS,
        "train.preview.sampler": samplers.SAMPLERS,
        "train.preview.grid": samplers.GRIDS,
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
    if config.loss.name == "consistency" and config.train.timesteps != "uniform":
        why = "as the loss consistency draws noise levels of its own"
        found = config.train.timesteps
        raise ConfigError(
            f"train.timesteps: expected uniform, {why}, found {found}; see loss.log_mean"
        )
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
