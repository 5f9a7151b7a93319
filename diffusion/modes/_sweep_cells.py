"""The cells of a sweep: which configurations a name or a grid stands for."""

import ast
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion.runtime.config import flatten, lookup, suggest, with_overrides
from diffusion.utils.errors import ConfigError

Levels = tuple | Callable[[ConfigDict], tuple]  # values of a key, or what they are for a config
MAX_CELL_NAME = 120  # characters of a cell's folder


class Cell(NamedTuple):
    """One training of a sweep.

    values: of the keys that vary, {"process.T": 50}; changes: these and all that follows from them.
    """

    values: dict[str, Any]
    changes: dict[str, Any]
    seed: int

    @property
    def label(self) -> str:
        """Returns the values in words, `process.T=50`, or `as configured`."""
        return ", ".join(f"{k}={v}" for k, v in self.values.items()) or "as configured"

    @property
    def name(self) -> str:
        """Returns the name of the cell's folder."""
        text = ",".join(f"{k}={_short(v)}" for k, v in self.values.items()) or "as-configured"
        return f"{text},seed={self.seed}"


def _short(value: Any) -> str:
    items = value if isinstance(value, tuple | list) else [value]
    return "+".join(re.sub(r"[^\w.-]", "", str(x)) for x in items) or "none"


def _attention(config: ConfigDict) -> tuple:
    """No resolution, the config's own, every one."""
    sides = [config.data.image_size // 2**i for i in range(len(config.model.ch_mult))]
    return (), tuple(config.model.attn_resolutions), tuple(sides)


def _times(key: str, *factors: float) -> Callable[[ConfigDict], tuple]:
    def levels(config):
        value = flatten(config)[key]
        return tuple(type(value)(value * factor) for factor in factors)

    return levels


# {name: {key: its values}}: each key varies alone, the others are as configured.
SWEEPS: dict[str, dict[str, Levels]] = {
    "T": {"process.T": (50, 100, 250, 500, 1000)},
    "objective": {
        "target": ("eps", "x0", "mu", "v"),
        "loss.name": ("simple", "vlb"),
        "loss.weighting": ("simple", "min_snr"),
        "train.timesteps": ("uniform", "low_discrepancy"),
    },
    "schedule": {"process.schedule": ("linear", "cosine", "sigmoid")},
    "architecture": {
        "model.attn_resolutions": _attention,
        "model.dropout": (0.0, 0.1, 0.3),
        "model.ch": _times("model.ch", 0.5, 1, 2),
        "model.num_res_blocks": (1, 2, 3),
        "model.scale_shift": (False, True),
        "model.normalization": ("group", "rms"),
    },
    "ema": {"optim.ema": (0.0, 0.9, 0.99, 0.995, 0.999)},
    "optimiser": {
        "optim.name": ("adam", "adamw", "muon"),
        "optim.lr": _times("optim.lr", 0.5, 1, 2),
    },
}


def make_cells(config: ConfigDict) -> list[Cell]:
    """Returns the cells of config.sweep in the order in which they are trained.

    A named sweep varies one key at a time and has the config as it is among its cells; a grid is
    all combinations of its values. Raises ConfigError.
    """
    c = config.sweep
    if bool(c.name) == bool(c.grid):
        found = f"found {c.name!r} and {c.grid!r}"
        wanted = f"expected one of sweep.name ({', '.join(SWEEPS)}) and sweep.grid"
        raise ConfigError(f"sweep: {wanted}, {found}; give one")
    if c.grid:
        grid = parse_grid(c.grid, config)
        seeds = grid.pop("seed", tuple(c.seeds))
        each = [dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    else:
        each, seeds = _one_at_a_time(config, lookup(SWEEPS, "sweep.name", c.name)), c.seeds
    cells = [Cell(v, _changes(config, v, bool(c.name)), s) for v in each for s in seeds]
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1 or len(name) > MAX_CELL_NAME:
            wanted = f"expected names of folders that differ, of at most {MAX_CELL_NAME} characters"
            raise ConfigError(f"sweep.grid: {wanted}, found {name}; vary fewer keys at once")
    return cells


def _one_at_a_time(config: ConfigDict, levels: Mapping[str, Levels]) -> list[dict[str, Any]]:
    flat, each = flatten(config), []
    for key, values in levels.items():
        values = values(config) if callable(values) else values
        own = flat[key]
        if len(levels) == 1:  # in order, the config's own among them
            return [{key: value} for value in ([] if own in values else [own]) + list(values)]
        each += [{key: value} for value in dict.fromkeys(values) if value != own]
    return [{}, *each]


def _changes(config: ConfigDict, values: Mapping[str, Any], named: bool) -> dict[str, Any]:
    """Returns the values and what has to follow them: a chain's sampler has at most T steps.

    In a named sweep the betas are scaled with 1 / T, which keeps alpha_bar at the end.
    """
    changes, T = dict(values), values.get("process.T", config.process.T)
    if "sampler.steps" not in values and isinstance(T, int):
        changes["sampler.steps"] = min(config.sampler.steps, T)
    if named and T != config.process.T:
        for key in ("beta_start", "beta_end"):
            changes[f"process.{key}"] = config.process[key] * config.process.T / T
    return {k: v for k, v in changes.items() if v != flatten(config)[k]}


def cell_config(config: ConfigDict, cell: Cell) -> ConfigDict:
    """Returns the configuration of a cell's training."""
    return with_overrides(config, cell.changes | {"seed": cell.seed})


def parse_grid(text: str, config: ConfigDict) -> dict[str, tuple]:
    """Parses "process.T=50,100;target=eps,v;model.ch_mult=(1,2),(1,2,2);seed=0,1".

    Values are Python literals, or names without quotes. Raises ConfigError.
    """
    grid: dict[str, tuple] = {}
    known = flatten(config)
    for part in filter(None, (p.strip() for p in text.split(";"))):
        key, equals, values = (s.strip() for s in part.partition("="))
        if key not in known or key.startswith("sweep."):
            raise ConfigError(f"sweep.grid: {key}: no such key; {suggest(key, known)}")
        items = _split(values)
        grid_values = tuple(_literal(item) for item in items)
        if (
            not equals
            or not items
            or key in grid
            or len({repr(v) for v in grid_values}) < len(items)
        ):
            wanted = f"expected each key once, as {key}=VALUE,VALUE with distinct values"
            raise ConfigError(f"sweep.grid: {wanted}, found {part!r}")
        grid[key] = tuple(_as(known[key], v) for v in grid_values)
    if not grid:
        raise ConfigError(f"sweep.grid: expected KEY=VALUE,VALUE;KEY=..., found {text!r}")
    return grid


def _split(text: str) -> list[str]:
    """Splits at the commas that are outside of brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _as(old: Any, value: Any) -> Any:
    """Returns an int as a float and one number as a tuple where the key holds such."""
    if isinstance(old, tuple) and not isinstance(value, tuple | list):
        return (value,)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def share(cells: Sequence[Cell], part: str) -> list[Cell]:
    """Returns the cells of part "I/N", every N-th from the I-th. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"sweep.part: expected I/N with 1 <= I <= N, such as 3/8, found {part!r}")
    return list(cells[i - 1 :: n])
