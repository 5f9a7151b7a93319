"""Writes the model card of exported weights: README.md of the folder, for people and the Hub.

It states what the weights are, what they were trained on and for how long, as far as that is known,
and the scores that the work directory holds.
"""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from diffusion.utils.errors import one_line

IMPORT_FILE = "import.json"  # in a work directory: where its weights are from
SHOWN = ("model.", "process.", "target", "variance")
SHOWN_OF_TRAINING = ("loss.", "optim.", "train.batch_size", "seed")


def render(
    name: str, flat: Mapping[str, Any], step: int, workdir: epath.Path, for_diffusers: bool
) -> str:
    """Returns the card's Markdown.

    Args:
      name: of the exported folder.
      flat: the configuration's flat keys.
      step: of the weights.
      workdir: whose origin and scores are stated.
      for_diffusers: whether the folder has files for diffusers.
    """
    height, classes = flat["data.image_size"], flat["model.num_classes"]
    null = flat["model.null_class"]
    data = flat["data.name"] or flat["data.source"]
    no_class = {-1: f", or {classes} for no class", -2: ""}.get(null, f"; {null} is no class")
    usage = (CONDITIONAL if classes else UNCONDITIONAL) if for_diffusers else NOT_FOR_DIFFUSERS
    scores = list(_read_scores(workdir))
    shown = SHOWN + SHOWN_OF_TRAINING * (flat["train.steps"] > 0)
    values = [(key, one_line(value, 100)) for key, value in flat.items() if key.startswith(shown)]
    config = [(key, f"`{value}`") for key, value in values]
    return FRONT * for_diffusers + CARD.format(
        name=name,
        data=f" of `{data}`" if data else "",
        size=f"{height}x{flat['data.image_width'] or height}",
        channels=flat["data.channels"],
        origin=_origin(workdir, step, flat["train.batch_size"]),
        usage=usage.format(name=name, last=classes - 1, no_class=no_class),
        scores=_table(("step", "what", "value"), *scores) if scores else "None was measured.\n",
        config=_table(("key", "value"), *config),
    )


def _origin(workdir: epath.Path, step: int, batch: int) -> str:
    """Returns how the weights came about: trained here, imported, or both."""
    try:
        record = json.loads((workdir / IMPORT_FILE).read_text())
        source, first = record["input"], record["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return f"after {step:,} steps of batch {batch}. Trained with JAX and Flax."
    if not record.get("revision"):  # a path of this machine's
        source = os.path.basename(os.path.normpath(source))
    text = f"imported from {source}" + (f" at step {first:,}" if first else "")
    steps = f", then trained for {step - first:,} steps of batch {batch} with JAX and Flax"
    return text + (steps if step > first else "") + "."


def _table(*rows: tuple[str, ...]) -> str:
    lines = [" | ".join(row) for row in rows]
    lines.insert(1, " | ".join("---" for _ in rows[0]))
    return "".join(f"| {line} |\n" for line in lines)


def _read_scores(workdir: epath.Path) -> Iterator[tuple[str, str, str]]:
    """Yields (step, what, value) of all scores in workdir/eval/*/ that can be read."""
    readers = {"metrics.json": _metrics, "bpd.json": _bits_per_dim}
    for path in sorted(workdir.glob("eval/*/*.json")):
        try:
            content = json.loads(path.read_text())
            for what, value, error in readers[path.name](content):
                uncertainty = "" if error is None else f" ± {error:.2g}"
                yield f"{content['step']:,}", what, f"{value:.5g}{uncertainty}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # another file, or one that a killed run left unfinished


def _metrics(content: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    sampler, samples = content["sampler"], f"{content['samples']:,} samples"
    steps = len(sampler["times"]) or sampler["steps"]
    for weights, by_reference in content["scores"].items():
        source = f"{samples} of {weights} weights by {sampler['name']} in {steps} steps"
        for reference, scores in by_reference.items():
            against = f" against {reference}" if reference else ""
            for name, score in scores.items():
                yield f"{name}, {source}{against}", score["value"], score["error"]


def _bits_per_dim(content: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    weights = content.get("weights", "ema")
    of = "" if weights == "ema" else f" of {weights} weights"
    for name, score in content["bits_per_dim"].items():
        yield f"bits/dim{of}, {name}, {content['images']:,} images", score["mean"], score["error"]


FRONT = """---
library_name: diffusers
tags:
- ddpm
- unconditional-image-generation
---

"""
CARD = """# {name}

A denoising diffusion model (Ho et al. 2020, arXiv:2006.11239){data}, {size} with {channels}
channels, {origin}

## Use

{usage}
The raw and averaged weights are a Flax tree in `flax.safetensors`. To sample, score or train on
with the program that made them:

```
python main.py --mode=import --input={name} --workdir=runs/{name}
```

## Scores

{scores}
## Config

{config}
`ddpm.json` has all of it.
"""
UNCONDITIONAL = """```python
from diffusers import DDPMPipeline

DDPMPipeline.from_pretrained("{name}")().images[0].save("sample.png")
```
"""
CONDITIONAL = """```python
from diffusers import DDPMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{name}", subfolder="unet")
scheduler = DDPMScheduler.from_pretrained("{name}", subfolder="scheduler")
```

The network takes `class_labels`: 0 to {last}{no_class}. `DDPMPipeline` loads it, but gives it none.
"""
NOT_FOR_DIFFUSERS = "diffusers has no form for this model.\n"
