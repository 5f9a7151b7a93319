"""--mode=export: the newest checkpoint as a folder for diffusers, for --mode=import and the Hub."""

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion import convert, experiment
from diffusion.convert import diffusers_config, model_card, safetensors_file
from diffusion.convert.readers import CONFIG_FILE, DIFFUSERS_FILES, FLAX_FILE
from diffusion.modes._common import atomic_folder, check_empty, load_state, load_trained
from diffusion.runtime.config import Run, flatten, with_overrides
from diffusion.train_step import TrainState
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError
from diffusion.utils.io import save_json, save_text, to_path
from diffusion.utils.multihost import is_primary

# Snapshots stay behind, and so does what needs them.
WITHOUT_SNAPSHOTS = {"optim.posthoc": (), "weights": "ema", "eval.weights": ("ema",)}


def run(run: Run) -> None:
    """Exports the newest checkpoint to --output. Raises ConfigError, WorkdirError."""
    if run.flags.output is None:
        raise ConfigError("--mode=export: expected --output=FOLDER, found none")
    exp, weights = experiment.build(run.config), run.config.weights
    state = load_state(run, exp)
    if weights != "ema":
        logging.info(f"exporting  {weights} in place of the averaged weights")
        state = state._replace(ema=load_trained(run, exp).params)
    export_weights(run.config, run.workdir, state, to_path(run.flags.output))


def export_weights(
    config: ConfigDict, workdir: epath.Path, state: TrainState, output: epath.Path
) -> None:
    """Writes the folder `output`:

        model_index.json, unet/, scheduler/   the averaged weights for diffusers' DDPMPipeline
        flax.safetensors, ddpm.json           params/..., ema/..., step; the config
        README.md                             the model card, with the scores found in `workdir`

    What diffusers cannot express is left out with a note. Raises WorkdirError.
    """
    check_empty(output, "--output")
    flat, pipeline = flatten(config), {}
    try:
        pipeline = diffusers_config.to_diffusers_config(flat)
    except ValueError as error:
        logging.info(f"note       nothing for diffusers: {error}")
    step, params, ema = jax.device_get((state.step, state.params, state.ema))
    with atomic_folder(output) as folder:
        if is_primary():
            portable = with_overrides(config, WITHOUT_SNAPSHOTS if config.optim.posthoc else {})
            for name, content in {**pipeline, CONFIG_FILE: portable.to_dict()}.items():
                save_json(folder / name, content)
            if pipeline:
                path = folder / "unet" / DIFFUSERS_FILES[0]
                safetensors_file.write(path, convert.to_diffusers(ema))
            arrays = {"params": params, "ema": ema, "step": np.array([step], np.int64)}
            safetensors_file.write(folder / FLAX_FILE, convert.flatten_params(arrays))
            card = model_card.render(output.name, flat, int(step), workdir, bool(pipeline))
            save_text(folder / "README.md", card)
    readers = "diffusers and --mode=import" if pipeline else "--mode=import"
    logging.info(f"done       {output}: step {step:,}, for {readers}")
