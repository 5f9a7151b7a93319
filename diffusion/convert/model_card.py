"""The model card that goes with exported weights: README.md of the folder, for people and the Hub.

It says what the weights are, what they were trained on and for how long, and which scores were
found in the work directory, with nothing added to them.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

SHOWN = ("model.", "process.", "target", "variance", "loss.", "optim.", "train.batch_size", "seed")


class CardScore(NamedTuple):
    """One number of one file of the work directory. error: a standard error, None if not known."""

    step: int
    name: str
    value: float
    error: float | None


def scores(workdir: pathlib.Path) -> list[CardScore]:
    """All numbers of workdir/eval/*/metrics.json and bpd.json, as far as they can be read."""
    found = []
    for path in sorted(workdir.glob("eval/*/*.json")):
        reader = {"metrics.json": _of_metrics, "bpd.json": _of_bpd}.get(path.name)
        try:
            found += reader(json.loads(path.read_text())) if reader else []
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
    return found


def _of_metrics(content: Mapping[str, Any]) -> Iterator[CardScore]:
    for weights, by_reference in content["scores"].items():
        for against, named in by_reference.items():
            for name, entry in named.items():
                sampler = content["sampler"]
                steps = len(sampler["times"]) or sampler["steps"]
                what = f"{name}, {content['samples']:,} samples of {weights} weights"
                what += f" by {sampler['name']} in {steps} steps"
                what += f" against {against}" if against else ""
                yield CardScore(content["step"], what, float(entry["value"]), entry["error"])


def _of_bpd(content: Mapping[str, Any]) -> Iterator[CardScore]:
    for name, entry in content["bits_per_dim"].items():
        what = f"bits/dim, {name}, {content['images']:,} images"
        yield CardScore(content["step"], what, float(entry["mean"]), entry["error"])


def text(
    name: str, flat: Mapping[str, Any], step: int, scores: list[CardScore], diffusers: bool
) -> str:
    """The card. flat: the config's keys; diffusers: whether the folder has that library's files."""
    data = flat["data.name"] or flat["data.source"]
    size = f"{flat['data.image_size']}x{flat['data.image_width'] or flat['data.image_size']}"
    parts = [
        FRONT if diffusers else "",
        f"# {name}\n",
        f"A denoising diffusion model (Ho et al. 2020, arXiv 2006.11239) of `{data}`, {size} with "
        f"{flat['data.channels']} channels, after {step:,} steps of batch "
        f"{flat['train.batch_size']}. Trained with JAX and Flax.\n",
        "## Use\n",
        _use(name, flat["model.num_classes"]) if diffusers else WITHOUT,
        BACK.format(name=name),
        "## Scores\n",
        _table(("step", "what", "value"), map(_row, scores)) if scores else "None was measured.\n",
        "## Config\n",
        _table(("key", "value"), [(k, f"`{v}`") for k, v in flat.items() if k.startswith(SHOWN)]),
        "The whole of it is in `ddpm.json`.\n",
    ]
    return "\n".join(filter(None, parts))


def _use(name: str, classes: int) -> str:
    if classes:
        return CONDITIONAL.format(name=name, classes=classes, last=classes - 1)
    return PIPELINE.format(name=name)


def _row(score: CardScore) -> tuple[str, str, str]:
    error = "" if score.error is None else f" ± {score.error:.2g}"
    return f"{score.step:,}", score.name, f"{score.value:.5g}{error}"


def _table(head, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


FRONT = """---
library_name: diffusers
tags:
- ddpm
- unconditional-image-generation
---
"""
PIPELINE = """```python
from diffusers import DDPMPipeline

DDPMPipeline.from_pretrained("{name}")().images[0].save("sample.png")
```
"""
CONDITIONAL = """```python
from diffusers import DDPMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{name}", subfolder="unet")
scheduler = DDPMScheduler.from_pretrained("{name}", subfolder="scheduler")
```

The network takes `class_labels`: 0 to {last}, or {classes} for no class. `DDPMPipeline` loads it,
but gives it none.
"""
WITHOUT = "diffusers has no form for this model; its weights are in `flax.safetensors`.\n"
BACK = """\
The weights, raw and averaged, are a Flax tree in `flax.safetensors`. To sample, score or train on
with the program that made them:

```
python main.py --mode=import --input={name} --workdir=runs/{name}
```
"""
