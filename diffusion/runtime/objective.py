"""The loss that a configuration means, and what it must not say about it."""

import inspect

from ml_collections import ConfigDict

from configs.default import get_config
from diffusion.losses import LOSSES, Loss
from diffusion.process import Process
from diffusion.runtime.config import call_for_key, lookup
from diffusion.targets import Target, Variance
from diffusion.utils.errors import ConfigError
from diffusion.weightings import output_weights


def build_loss(config: ConfigDict, p: Process, target: Target, variance: Variance) -> Loss:
    """Builds config.loss; a key of it that this loss does not read must have its default.

    Raises ConfigError.
    """
    defaults = get_config().loss.to_dict()
    left = defaults | config.loss.to_dict()
    name = left.pop("name")
    make = lookup(LOSSES, "loss.name", name)
    known, options = inspect.signature(make).parameters, {}
    if "levels" in known:
        options["levels"] = config.data.levels
    if "weights" in known:
        chosen = left.pop("weighting"), left.pop("gamma"), left.pop("k")
        try:
            options["weights"] = output_weights(p, target, *chosen)
        except ValueError as error:  # it begins with the option's name
            raise ConfigError(f"loss.{error}") from error
    for key, value in left.items():
        if key in known or key not in defaults:  # of the latter the loss itself complains
            options[key] = value
        elif value != defaults[key]:
            wanted = f"expected {defaults[key]!r}, as the loss {name} has no such option"
            raise ConfigError(f"loss.{key}: {wanted}, found {value!r}; leave it out")
    return call_for_key(make, "loss", p, target, variance, **options)
