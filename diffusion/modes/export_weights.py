"""--mode=export: the newest checkpoint as a folder for diffusers, for --mode=import and the Hub.

With --int8 it is the averaged weights alone in 8 bits each, for --mode=import.
"""

import json
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion import convert, experiment
from diffusion.convert import diffusers_config, int8_weights, model_card, safetensors_file
from diffusion.convert.readers import CONFIG_FILE, DIFFUSERS_FILES, FLAX_FILE
from diffusion.modes import _sampling
from diffusion.modes._common import Trained, atomic_folder, check_empty, load_state, load_trained
from diffusion.runtime.config import Run, flatten, with_overrides
from diffusion.sharding import replicated
from diffusion.train_step import TrainState
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError
from diffusion.utils.io import save_json, save_text, to_path
from diffusion.utils.multihost import is_primary

# Snapshots stay behind, and so does what needs them.
WITHOUT_SNAPSHOTS = {"optim.posthoc": (), "weights": "ema", "eval.weights": ("ema",)}
COMPARED = 16  # samples that 8 bits are judged by


def run(run: Run) -> None:
    """Exports the newest checkpoint to --output. Raises ConfigError, WorkdirError."""
    if run.flags.output is None:
        raise ConfigError("--mode=export: expected --output=FOLDER, found none")
    exp, weights = experiment.build(run.config), run.config.weights
    if run.flags.int8:
        export_int8_weights(_sampling.load_for_sampling(run, exp), to_path(run.flags.output))
        return
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
            for name, content in {**pipeline, CONFIG_FILE: portable_config(config)}.items():
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


def export_int8_weights(trained: Trained, output: epath.Path) -> None:
    """Writes the folder `output` of int8_weights.write_set: ema/..., step; the config; the loss.

    What is lost is measured and noted. Raises WorkdirError.
    """
    check_empty(output, "--output")
    params = convert.flatten_params(jax.device_get(trained.params))
    packed = int8_weights.quantize_arrays(params)
    rounded = int8_weights.dequantize_arrays(packed)
    error = int8_weights.relative_error(params, rounded)
    loss = {
        "relative_error": error,
        **sample_difference(trained, convert.unflatten_params(rounded)),
    }
    metadata = {"config": json.dumps(portable_config(trained.config)), "loss": json.dumps(loss)}
    packed = {f"ema/{name}": array for name, array in packed.items()}
    packed["step"] = np.array([trained.step], np.int64)
    with atomic_folder(output) as folder:
        if is_primary():
            int8_weights.write_set(folder, packed, metadata)
    logging.info(f"8 bits     change the weights by {error:.2%}, {loss['samples']} samples of the")
    of = f"255 grey levels (root mean square), {loss['max']} at most"
    logging.info(f"           same noise ({loss['sampler']}) by {loss['rms']:.3g} of {of}")
    logging.info(f"done       {output}: step {trained.step:,}, for --mode=import")


def sample_difference(trained: Trained, params: Any) -> dict[str, Any]:
    """Returns how far samples of other weights are from those of the same noise, in grey levels."""
    config = _sampling.preview_config(trained.config, trained.exp)
    sampler = _sampling.compile_sampler(config, trained.exp, COMPARED)
    others = jax.device_put(params, replicated(trained.exp.mesh))
    images, changed = (
        np.concatenate([*_sampling.draw(sampler, each, config.sample.seed, COMPARED)]).astype(int)
        for each in (trained.params, others)
    )
    error = np.abs(changed - images)
    found = {"rms": float(np.sqrt(np.mean(error**2))), "max": int(error.max())}
    return {"samples": COMPARED, "sampler": _sampling.describe_sampler(config), **found}


def portable_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as JSON has it, without what needs snapshots."""
    return with_overrides(config, WITHOUT_SNAPSHOTS if config.optim.posthoc else {}).to_dict()
