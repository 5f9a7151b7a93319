"""What the length of an average changes: scores and bits/dim against it, for --mode=eval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffusion import metrics
from diffusion.modes import _split_pass
from diffusion.modes._common import Trained
from diffusion.modes._scores import Reference, Scorer
from diffusion.plotting import curves
from diffusion.utils.multihost import is_primary


def lengths_of(names: Sequence[str]) -> dict[str, float]:
    """Returns {weights: relative length} of those that are named by one, the shortest first."""
    found = {name: float(name.partition(":")[2]) for name in names if ":" in name}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def compare_averages(
    models: Sequence[Trained],
    results: Mapping[str, Any],
    scorer: Scorer,
    reference: Reference,
    path: epath.Path,
    notes: list[str],
) -> dict[str, Any]:
    """Reads bits/dim of every model, and draws them beside its scores against the lengths.

    Args:
      results: {weights: {reference: {score: {"value", "error"}}}}, of which the first features'
        distance and precision are drawn.
      path: of the picture.
      notes: gets a line for each reading that says which length is best.

    Returns what metrics.json notes of the bits/dim. All processes take part.
    """
    # Models share a chain, unless each has learned its own.
    chains = {id(model.exp): model for model in models}
    read = {key: _split_pass.make_bpd_fn(model) for key, model in chains.items()}
    bits = np.stack([read[id(model.exp)](model.params) for model in models])
    content = {"split": models[0].config.bpd.split, "images": bits.shape[1]}
    panels = [("bits/dim", True, compared(bits, [model.weights for model in models]))]
    content["weights"] = {k: {"mean": m, "error": e} for k, (m, e) in panels[0][2].items()}
    if not is_primary():
        return content
    kind = next(iter(scorer.extractor.kinds))
    for metric, lower in (("precision", False), ("fd", True)):
        name = metrics.metric_name(metric, kind, models[0].config.eval.num)
        found = {weights: by[reference.name].get(name) for weights, by in results.items()}
        if all(found.values()):
            read_from = {k: (score["value"], score["error"] or 0.0) for k, score in found.items()}
            panels.insert(0, (name, lower, read_from))
    lengths = lengths_of([*results])
    for name, lower, readings in panels:
        best = min(lengths, key=lambda k: readings[k][0] * (1 if lower else -1))
        others = [best, *(k for k in readings if k not in lengths)]
        words = ", ".join("{} {:.4g} +- {:.2g}".format(k, *readings[k]) for k in others)
        notes.append(f"the best length by {name}: {words}")
    curves.plot_averages(path, [curves.AveragePanel(*panel, lengths) for panel in panels])
    return content


def compared(values: np.ndarray, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Returns {name: (mean, error)} of values [m, n] of m models on the same n images, to compare.

    An image's own mean over the models is taken out of the errors, with the m / (m - 1) that this
    asks for (Morey 2008): images differ far more than models do.
    """
    own = values - values.mean(0)
    m, n = values.shape
    errors = own.std(1, ddof=1) / np.sqrt(n) * np.sqrt(m / (m - 1))
    return {
        name: (float(v), float(e)) for name, v, e in zip(names, values.mean(1), errors, strict=True)
    }
