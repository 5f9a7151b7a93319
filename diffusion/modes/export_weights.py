"""export_weights."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion import convert, train_step
from diffusion.convert import diffusers_config, model_card, safetensors_file
from diffusion.convert.readers import CONFIG, FLAX, UNET
from diffusion.modes.import_weights import whole_folder, write_json
from diffusion.runtime.config import flatten
from diffusion.utils.errors import WorkdirError


def export_weights(
    config: ConfigDict,
    workdir: pathlib.Path,
    step: int,
    state: train_step.TrainState,
    output: pathlib.Path,
    say: Callable[[str], None],
) -> None:
    """Writes the folder `output`: the weights for others, and all that --mode=import needs.

        model_index.json, unet/, scheduler/   the averaged weights for diffusers' DDPMPipeline
        flax.safetensors, ddpm.json           params/..., ema/..., step; the config
        README.md                             the model card

    What diffusers cannot express is said, and the rest is written. Raises Fatal.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WorkdirError(f"--output={output}: it is there already; choose another")
    flat, pipeline = flatten(config), {}
    try:
        pipeline = diffusers_config.to_diffusers_config(flat)
    except ValueError as error:
        say(f"note       nothing for diffusers: {error}")
    params, ema = (jax.device_get(tree) for tree in (state.params, state.ema))
    with whole_folder(output) as part:
        if jax.process_index() == 0:
            for name, content in {**pipeline, CONFIG: config.to_dict()}.items():
                write_json(part / name, content)
            if pipeline:
                safetensors_file.write(part / "unet" / UNET[0], convert.to_diffusers(ema))
            arrays = {"params": params, "ema": ema, "step": np.array([step], np.int64)}
            safetensors_file.write(part / FLAX, convert.flattened(arrays))
            text = model_card.text(output.name, flat, step, model_card.scores(workdir), bool(pipeline))
            (part / "README.md").write_text(text)
    what = "for diffusers and for --mode=import" if pipeline else "for --mode=import"
    say(f"done       {output}: step {step:,}, {what}")
