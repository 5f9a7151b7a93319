"""--mode=sweep: trainings over a grid of settings and seeds, each read in the same way.

    workdir/cells/SETTING,seed=N     a work directory, trained, resumed and read by the other modes
    workdir/sweep.{json,csv,md}      readings with their errors, and what matters, in words
    workdir/{effects,KEY}.png        what each value changes; readings over each key that varies

A killed sweep goes on where it was. Several machines share one by sweep.part; whichever ends last
writes the results, and a later start without sweep.part writes them again.
"""

import json
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.dispatch import dispatch_sizes, group_inputs
from diffusion.modes import _sweep_results as results
from diffusion.modes._nonfinite import compile_update, not_halted
from diffusion.modes._sweep_cells import Cell, cell_config, make_cells, share
from diffusion.plotting.sweep_curves import (
    EffectPanel,
    SweepPanel,
    plot_agreement,
    plot_effects,
    plot_sweep,
)
from diffusion.runtime import validation
from diffusion.runtime.config import Run, flatten, with_overrides
from diffusion.utils import logging
from diffusion.utils.errors import ConfigError, NonFiniteError, WorkdirError, one_line
from diffusion.utils.io import save_json, save_text
from diffusion.utils.multihost import broadcast_from_primary, is_primary
from diffusion.utils.progress import human_time

LOSS_SHARE = 0.1  # of the training at its end over which the loss is averaged
READING_VERSION = 2  # of how cells are read; another one reads them again


def run(run: Run) -> None:
    """Trains and reads the cells of this part; writes the results once all cells are there.

    A cell whose training diverges is a failure in the table; any other error ends the sweep.
    Raises ConfigError for a cell that cannot be trained before any is.
    """
    cells = make_cells(run.config)
    mine = share(cells, run.config.sweep.part)
    for cell in {cell.label: cell for cell in mine}.values():
        check(run, cell)
    todo = [cell for cell in mine if broadcast_from_primary(load_readings(run, cell) is None)]
    if is_primary():
        everything = with_overrides(run.config, {"sweep.part": "1/1"})  # for --workdir alone
        save_json(run.workdir / "config.json", everything.to_dict())
    settings = len({cell.label for cell in cells})
    part = (
        "" if len(mine) == len(cells) else f", {len(mine)} of them in part {run.config.sweep.part}"
    )
    logging.info(
        f"sweep      {len(cells)} trainings of {settings} settings{part}, {len(todo)} to do"
    )
    began, flops = time.monotonic(), {}
    for i, cell in enumerate(todo):
        left = (time.monotonic() - began) / i * (len(todo) - i) if i else 0.0
        about = f", about {human_time(left)} left" if i else ""
        logging.info(f"cell       {i + 1}/{len(todo)}: {cell.label}, seed {cell.seed}{about}")
        readings = train_and_read(run, cell, flops)
        if is_primary():
            content = {"setting": reading_setting(run, cell), "readings": readings}
            save_json(folder_of(run, cell) / "sweep_readings.json", content)
        jax.clear_caches()  # the programs of other settings
    if is_primary():
        write_results(run, cells)


def folder_of(run: Run, cell: Cell) -> epath.Path:
    """Returns the work directory of a cell."""
    return run.workdir / "cells" / cell.name


def check(run: Run, cell: Cell) -> None:
    """Raises ConfigError, with the cell's name, for a setting that cannot be trained."""
    config = cell_config(run.config, cell)
    try:
        validation.validate(config, jax.device_count())
        exp = experiment.build(config)
        for reading in read_configs(config).values():
            experiment.make_sampler(reading, exp)
    except ConfigError as error:
        raise ConfigError(f"sweep: {cell.label}: {error}") from None


# One cell


def train_and_read(run: Run, cell: Cell, flops: dict[str, float]) -> dict[str, Any]:
    """Trains a cell, reads its scores, bits/dim and costs; returns {reading: value}.

    flops: of a step of the settings that were counted before, by their labels; "": as configured.
    """
    config, folder, costs = cell_config(run.config, cell), folder_of(run, cell), {}
    if cell.label not in flops:
        flops[cell.label] = count_flops(config)
    if run.config.sweep.equal == "flops":
        if "" not in flops:
            flops[""] = count_flops(run.config)
        steps = max(1, round(config.train.steps * flops[""] / flops[cell.label]))
        config = with_overrides(config, {"train.steps": steps})
    exp = experiment.build(config)
    cell_run = run._replace(
        mode="train", config=config, workdir=folder, overrides={}, config_given=True
    )
    try:
        cell_run.call()
    except NonFiniteError as error:
        return {"failed": one_line(error)}
    costs["training steps"] = config.train.steps
    costs["FLOPs a step"] = flops[cell.label]
    costs["parameters"] = sum(a.size for a in jax.tree.leaves(exp.abstract_state.params))
    readings = read_log(folder)
    step = f"{config.train.steps:08d}"
    if readings_of_bits := bits_config(config, exp):
        cell_run._replace(mode="bpd", config=readings_of_bits).call()
        bits = _read_json(folder / "eval" / step / "bpd.json")["bits_per_dim"]
        readings["bits/dim"] = min(each["mean"] for each in bits.values())
    for name, reading in read_configs(config).items():
        cell_run._replace(mode="eval", config=reading).call()
        scores = _read_json(folder / "eval" / step / "metrics.json")["scores"]
        for found in scores["ema"].values():
            readings |= {f"{score}{name}": entry["value"] for score, entry in found.items()}
    return readings | costs


def read_configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns {suffix of the scores' names: configuration of --mode=eval}.

    Settings are compared at equal evaluations, by the sampler of the previews; where T varies, by
    the config's own sampler with its steps as well.
    """
    c, preview = config.sweep, config.train.preview
    changes = {"eval.seeds": (0,), "eval.weights": ("ema",), "eval.references": ("train",)}
    changes["sampler.times"] = ()
    fast = {"sampler.name": preview.sampler, "sampler.grid": preview.grid}
    fast["sampler.steps"] = min(c.evaluations, config.process.T)
    out = {"": with_overrides(config, changes | fast)}
    if c.chain or c.name == "T":
        out[results.BY + config.sampler.name] = with_overrides(config, changes)
    return out


def bits_config(config: ConfigDict, exp: experiment.Experiment) -> ConfigDict | None:
    """Returns the configuration of --mode=bpd, None where a loss has no bits/dim.

    Of bpd.quick test images; of a variance that is not learned also the best for so many training
    images, the least of the bounds being the reading.
    """
    if config.loss.name == "consistency":
        return None
    changes: dict[str, Any] = {"bpd.num": config.bpd.quick, "bpd.steps": (), "bpd.ode": 0}
    changes["weights"] = "ema"  # as of the samples
    if exp.variance.outputs == 1 and not exp.continuous:
        changes["bpd.estimate"] = config.bpd.estimate or config.bpd.quick
    return with_overrides(config, changes)


def read_log(folder: epath.Path) -> dict[str, float]:
    """Returns the loss at the end of a training, and the seconds that its steps took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    last = lines[-max(1, round(LOSS_SHARE * len(lines))) :]
    per_step = [sum(line[f"train/{p}_ms"] for p in ("input", "device", "host")) for line in lines]
    seconds = float(np.mean(per_step)) * lines[-1]["step"] / 1000
    return {"loss": float(np.mean([x["train/loss"] for x in last])), "seconds": seconds}


def count_flops(config: ConfigDict) -> float:
    """Returns the FLOPs of the training's own program for a step, on one device, by its compiler.

    The training finds it compiled.
    """
    exp = experiment.build(config)
    images = experiment.load_split(config, exp)
    update, make_inputs = experiment.make_input_pipeline(config, exp, images)
    sizes = dispatch_sizes(0, 1, config.train.steps_per_dispatch, lambda step: True)
    inputs = next(group_inputs(make_inputs(0), sizes, config.train.steps_per_dispatch))
    args = exp.abstract_state, not_halted(exp), inputs
    return compile_update(update, config.train.on_nonfinite, *args).cost_analysis()["flops"]


def reading_setting(run: Run, cell: Cell) -> dict[str, Any]:
    """Returns what the readings of a cell follow from; those of another setting are read again."""
    config = cell_config(run.config, cell)
    sections = ("model", "process", "loss", "optim", "train", "data", "sampler", "bpd", "eval")
    flat = flatten({name: config[name] for name in sections})
    names = {k: config[k] for k in ("target", "variance", "seed")}
    sweep = {k: config.sweep[k] for k in ("equal", "evaluations", "chain")}
    setting = flat | names | sweep | {"version": READING_VERSION}
    return json.loads(json.dumps(setting, default=list))


def load_readings(run: Run, cell: Cell) -> dict[str, Any] | None:
    """Returns the readings that a cell has, None if it has none, or of another setting."""
    path = folder_of(run, cell) / "sweep_readings.json"
    if not path.exists():
        return None
    content = _read_json(path)
    return content["readings"] if content["setting"] == reading_setting(run, cell) else None


def study_errors(run: Run, name: str) -> dict[str, float]:
    """Returns the error rate of people in the newest study of a cell, {} where nobody was asked."""
    paths = sorted((run.workdir / "cells" / name / "study").glob("*/results.json"))
    if not paths:
        return {}
    conditions = _read_json(paths[-1])["conditions"]
    return {results.PEOPLE: float(np.mean([each["rate"] for each in conditions]))}


def _read_json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path}: cannot be read: {one_line(error)}; delete it") from error


# All cells


def write_results(run: Run, cells: list[Cell]) -> None:
    """Writes and prints the results of all cells, or says how many are missing."""
    found = {cell.name: load_readings(run, cell) for cell in cells}
    found = {name: each and each | study_errors(run, name) for name, each in found.items()}
    missing = sum(readings is None for readings in found.values())
    if missing:
        logging.info(f"done       {missing} of {len(cells)} trainings are left to other parts")
        return
    settings = results.by_setting(cells, found)
    effects = results.effects(settings, flatten(run.config))
    said = results.sentences(effects, settings)
    keys = list(dict.fromkeys(key for each in settings for key in each.values))
    names = list(dict.fromkeys(name for each in settings for name in each.readings))
    name = run.config.sweep.name or run.config.sweep.grid
    agreement = results.score_agreement(settings)
    content = {"name": name, "equal": run.config.sweep.equal, "keys": keys}
    content |= {"cells": results.summary(settings), "sentences": said}
    content["effects"] = results.effects_to_json(effects)  # as in effects.png
    if agreement:
        content["agreement"] = results.agreement_to_json(agreement)
        args = agreement.names, agreement.cells, *agreement.spearman
        plot_agreement(run.workdir / "agreement.png", *args)
    save_json(run.workdir / "sweep.json", content | {"config": run.config.to_dict()})
    save_text(run.workdir / "sweep.csv", results.to_csv(settings))
    shown = results.main_readings(names)
    lines = results.readings_table(settings, shown)
    text = [f"# Sweep: {name}", "", "```", *lines, "```", "", *(f"- {line}" for line in said), ""]
    save_text(run.workdir / "sweep.md", "\n".join(text))
    if effects:
        plot_effects(run.workdir / "effects.png", effect_panels(effects))
    for key in keys if shown else ():
        plot_sweep(run.workdir / f"{key}.png", key, panels(settings, key, run.config))
    for line in [*lines, *said]:
        logging.info(line)
    logging.info(f"done       {run.workdir}/sweep.json, sweep.csv, sweep.md, effects.png, KEY.png")


def effect_panels(effects: list[results.Effect]) -> list[EffectPanel]:
    """Returns the effects of all settings on each reading."""
    out: dict[str, EffectPanel] = {}
    for e in effects:
        panel = EffectPanel(e.reading, {}, not results.is_better(e.reading, 1.0))
        effect = e.difference, e.margin
        out.setdefault(e.reading, panel).effects[f"{e.key}={e.value}"] = effect
    return list(out.values())


def panels(settings: list[results.CellReadings], key: str, config: ConfigDict) -> list[SweepPanel]:
    """Returns the main readings over the values of a key; a line is cells that differ in it alone.

    Of a named sweep, which varies one key at a time, that is the line through the configured cell.
    A score of several samplers' samples is one panel with a line for each.
    """
    configured = flatten(config)
    keys = dict.fromkeys(k for each in settings for k in each.values)
    full = [{k: configured[k] for k in keys} | each.values for each in settings]
    rest = [{k: v for k, v in each.items() if k != key} for each in full]
    if not config.sweep.grid:
        rest = [{} if all(each[k] == configured[k] for k in each) else None for each in rest]
    names = results.main_readings(list({n: 0 for each in settings for n in each.readings}))
    out: dict[str, SweepPanel] = {}
    for name in names:
        base = results.base_reading(name)
        panel = out.setdefault(base, SweepPanel(base, {}, not results.is_better(base, 1.0)))
        by = name.removeprefix(base).strip()
        if not by and any(other.startswith(base + results.BY) for other in names):
            by = "at equal evaluations"
        for each, values, other in zip(settings, full, rest, strict=True):
            mean, error = results.mean_and_error(each.readings.get(name, np.array([])))
            if other is not None:
                label = ", ".join([*(f"{k}={v}" for k, v in other.items()), *([by] if by else [])])
                panel.lines.setdefault(label, []).append((values[key], mean, error or 0.0))
    return list(out.values())
