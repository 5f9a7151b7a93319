"""The settings that a sweep's name or grid stands for."""

import itertools

import numpy as np
import pytest

from diffusion import experiment
from diffusion.modes._sweep_cells import SWEEPS, cell_config, make_cells, parse_grid, share
from diffusion.runtime import validation
from diffusion.runtime.config import flatten, with_overrides
from diffusion.utils.errors import ConfigError
from tests.test_configs import config_of


def swept(config="digits", **sweep):
    return with_overrides(config_of(config), {f"sweep.{key}": x for key, x in sweep.items()})


@pytest.mark.parametrize("config", ["digits", "cifar10"])
@pytest.mark.parametrize("name", SWEEPS)
def test_a_named_sweep_varies_one_key_at_a_time(name, config):
    """The configured setting is among its own; every setting has a name and can be trained."""
    base = swept(config, name=name)
    cells = make_cells(base)
    settings = {cell.label: cell for cell in cells}
    assert len(cells) == 3 * len(settings) > 3 and len({cell.name for cell in cells}) == len(cells)
    flat = flatten(base)
    assert sum(all(flat[k] == v for k, v in c.values.items()) for c in settings.values()) == 1
    for cell in settings.values():
        assert len(cell.values) <= 1
        validation.validate(cell_config(base, cell))
        assert cell.seed == cell_config(base, cell).seed


@pytest.mark.parametrize("schedule", ["linear", "quad", "const"])
def test_the_sweep_of_T_keeps_the_noise_at_the_end(schedule):
    """The betas grow as 1 / T: sum log(1 - beta_t) is within a tenth, of T = 50 a fifth."""
    small = {"process.schedule": schedule, "model.ch": 8, "model.ch_mult": (1,)}
    base = with_overrides(swept(name="T"), small)
    ends = {}
    for cell in make_cells(base):
        config = cell_config(base, cell)
        p = experiment.build(config).process
        assert p.T == config.process.T and config.sampler.steps == p.T
        ends[p.T] = np.log(p.alpha_bar[-1])
    assert ends.keys() == {50, 100, 250, 500, 1000}
    for T, end in ends.items():
        np.testing.assert_allclose(end, ends[1000], rtol=0.3 if T == 50 else 0.15)


def test_a_grid_is_every_combination_and_nothing_else():
    text = "process.T=50,1000; target=eps,v;model.ch_mult=(1,2),(1,);seed=3,4"
    base = swept(grid=text, seeds=(0,))
    cells = make_cells(base)
    wanted = itertools.product((50, 1000), ("eps", "v"), ((1, 2), (1,)), (3, 4))
    found = [(*(tuple(v) if isinstance(v, list) else v for v in c.values.values()), c.seed)
             for c in cells]  # fmt: skip
    assert found == list(wanted)
    config = cell_config(base, cells[0])
    assert config.process.beta_end == base.process.beta_end  # what is typed is what is trained
    assert config.sampler.steps == 50


def test_values_have_the_types_of_their_keys():
    config = config_of("digits")
    text = "optim.lr=1,0.5;model.attn_resolutions=4,8;data.flip=True,False;optim.posthoc=(),(0.1,)"
    found = parse_grid(text, config)
    assert found == {
        "optim.lr": (1.0, 0.5),
        "model.attn_resolutions": ((4,), (8,)),
        "data.flip": (True, False),
        "optim.posthoc": ((), (0.1,)),
    }
    assert all(isinstance(x, float) for x in found["optim.lr"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "sweep: expected one of sweep.name"),
        ("process.t=5", "process.t: no such key; nearest: process.T"),
        ("process.T", "process.T=VALUE,VALUE"),
        ("process.T=", "process.T=VALUE,VALUE"),
        ("process.T=50,50", "distinct values"),
        ("process.T=50;process.T=60", "each key once"),
        ("sweep.part=1/2", "no such key"),
        (";;", "expected KEY=VALUE"),
    ],
)
def test_what_is_no_grid_is_one_line(text, message):
    with pytest.raises(ConfigError) as error:
        make_cells(swept(grid=text))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_and_a_grid_are_not_both():
    with pytest.raises(ConfigError, match="give one"):
        make_cells(swept(name="T", grid="seed=1"))
    with pytest.raises(ConfigError, match=r"sweep.name: 'time' is not known"):
        make_cells(swept(name="time"))


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_parts_share_the_cells(n):
    cells = make_cells(swept(name="T"))
    parts = [share(cells, f"{i}/{n}") for i in range(1, n + 1)]
    assert sorted(c.name for part in parts for c in part) == sorted(c.name for c in cells)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("part", ["", "0/3", "4/3", "1/0", "1", "a/b", "-1/3", "1/3/5", "1 / 3"])
def test_what_is_no_part_is_one_line(part):
    with pytest.raises(ConfigError, match=r"^sweep\.part: expected I/N"):
        share([], part)
