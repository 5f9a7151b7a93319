"""What `make accelerator` runs: a literal list of parts, the most important first.

Imports the standard library alone, as everything in the process that runs the parts.
"""

import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from diffusion.bench import accelerator_report as report
from diffusion.utils.errors import one_line

# Shares of the budget.
TRAINED = 0.74  # the training has saved by then: of nine minutes two are left
END = 0.98  # the last part has ended by then, and the report follows
SAVING, GRACE = 0.06, 0.01  # from SIGTERM to SIGKILL, for the training and for other parts


class Part(NamedTuple):
    """A process of main.py. Its work directory and all patterns are below a scratch folder.

    Attributes:
      name: its title in the report.
      mode, workdir, flags: of its command line; {config}, {large}, {data} and {scratch} stand for
        configs and folders.
      most: share of the budget that it may take.
      read, results: what reads its figures, and the pattern of the file to read.
      needs: pattern of what must be there before.
      files: patterns of what goes to OUT.
      until: share of the budget by which it has ended.
      grace: share of the budget from SIGTERM to SIGKILL.
    """

    name: str
    mode: str
    workdir: str
    flags: str
    most: float
    read: Callable[[pathlib.Path], report.Figures]
    results: str
    needs: str = ""
    files: tuple[str, ...] = ()
    until: float = END
    grace: float = GRACE


def _measure(name: str, part: str, flags: str, most: float) -> Part:
    """Returns a part that runs --mode=bench --part=PART, in a work directory of its own."""
    workdir = f"bench_{name.replace(' ', '_')}"
    results = f"{workdir}/bench/{part}.json"
    return Part(name, "bench", workdir, f"--part={part} {flags}", most, report.read_bench, results)


def _reading(
    name: str,
    mode: str,
    flags: str,
    read: Callable[[pathlib.Path], report.Figures] = report.read_nothing,
    results: str = "",
    files: tuple[str, ...] = (),
    workdir: str = "run",
    needs: str = "",
) -> Part:
    """Returns a part that reads what was trained, by default the checkpoint of its workdir."""
    needs = needs or f"{workdir}/checkpoints/[0-9]*"
    return Part(name, mode, workdir, flags, 0.15, read, results, needs, files)


# A short training wants a short warm-up and average, and no readings on the way.
_SHORT = "--config.optim.warmup=1000 --config.optim.ema=0.9995 --config.train.keep=1"
_SHORT += " --config.train.sample_every=0 --config.train.eval_every=0"
_SOLVER = "--config.sampler.name=dpmpp_2m --config.sampler.grid=logsnr --config.sampler.steps=50"
_FEATURES = '--config.eval.features=\'("classifier","random")\''
_SCORES, _BITS = f"{_SOLVER} {_FEATURES} --config.eval.num=1000", "--config.bpd.num=1000"
_PICTURES = f'{_SOLVER} --config.figures.names=\'("samples","progressive")\''
_CURVE = f"{_SOLVER} {_FEATURES} --config.frontier.num=1000 --config.frontier.seeds='(0,)'"
_CURVE += " --config.frontier.samplers='(\"ddim\",\"dpmpp_2m\")' --config.frontier.steps='(5,20)'"

PLAN = (
    _measure("training", "train", "--config={config}", 0.13),
    _measure("sampling", "sample", "--config={config} --config.sample.batch_size=256", 0.13),
    _measure("training in float32", "train", "--config={config} --config.model.dtype=float32", 0.1),
    _measure("training at 256x256", "train", "--config={large}", 0.12),
    Part(
        name="a short training",
        mode="train",
        workdir="run",
        flags=f"--config={{config}} --config.data.data_dir={{data}} {_SHORT}",
        most=1.0,
        read=report.read_training,
        results="run/metrics.jsonl",
        until=TRAINED,
        grace=SAVING,
    ),
    _reading(
        "weights in 8 bits",
        "export",
        "--int8 --output={scratch}/weights",
        report.read_weights,
        "weights/weights-1-of-*",
        files=("weights/*",),
    ),
    _reading("pictures", "figures", _PICTURES, files=("run/figures/*/[sp]*.png",)),
    _reading("scores", "eval", _SCORES, report.read_scores, "run/eval/*/metrics.json"),
    _reading("bits/dim", "bpd", _BITS, report.read_bits, "run/eval/*/bpd.json"),
    _reading(
        "frontier",
        "frontier",
        _CURVE,
        report.read_frontier,
        "run/frontier/*/frontier.json",
        files=("run/frontier/*/frontier.png",),
    ),
    _reading(
        "import of the 8 bits",
        "import",
        "--input={scratch}/weights",
        workdir="int8",
        needs="weights/*",
    ),
    _reading(
        "scores of the 8 bits",
        "eval",
        _SCORES,
        report.read_scores,
        "int8/eval/*/metrics.json",
        workdir="int8",
    ),
    _reading(
        "bits/dim of the 8 bits",
        "bpd",
        _BITS,
        report.read_bits,
        "int8/eval/*/bpd.json",
        workdir="int8",
    ),
)
# What DEVICE=cpu has in place of these numbers.
REHEARSAL = (
    "--config.sampler.steps=8 --config.sample.batch_size=16 --config.bpd.num=8"
    " --config.eval.num=24 --config.eval.reference_num=60 --config.frontier.num=24"
)


class Settings(NamedTuple):
    """The environment variables of `make accelerator`; out and data are absolute paths."""

    device: str
    out: pathlib.Path
    data: pathlib.Path
    budget_s: float
    config: str
    extra: str


def read_settings(env: Mapping[str, str]) -> Settings:
    """Returns the settings of an environment; an empty value is none. Raises ValueError."""
    env = {name: value for name, value in env.items() if value}
    device, budget = env.get("DEVICE", "gpu"), env.get("BUDGET_S", "540")
    if device not in ("gpu", "tpu", "cpu"):
        raise ValueError(f"DEVICE: expected gpu, tpu or cpu, found {one_line(device)}")
    if not budget.isdecimal():
        raise ValueError(f"BUDGET_S: expected seconds, found {one_line(budget)}")
    out, data = (
        pathlib.Path(env.get(name, folder)).expanduser().resolve()
        for name, folder in (("OUT", "runs/accelerator"), ("DATA", "data"))
    )
    default = "configs/digits.py:tiny" if device == "cpu" else "configs/cifar10.py:bfloat16"
    config = env.get("CONFIG", default)
    return Settings(device, out, data, float(budget), config, env.get("EXTRA", ""))


def command(part: Part, settings: Settings, scratch: pathlib.Path) -> list[str]:
    """Returns the command line of a part; of a flag the last one counts: tuples would add up."""
    s, small = settings, settings.device == "cpu"
    large = f"configs/celebahq256.py:{'tiny' if small else 'bfloat16'}"
    places = {"config": s.config, "large": large, "data": s.data, "scratch": scratch}
    flags = [flag.format_map(places) for flag in shlex.split(part.flags)]
    flags += shlex.split(REHEARSAL) * small + shlex.split(s.extra)
    own = ("main.py", f"--mode={part.mode}", f"--workdir={scratch / part.workdir}")
    return [sys.executable, *own, *{flag.partition("=")[0]: flag for flag in flags}.values()]
