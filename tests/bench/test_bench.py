"""What --mode=bench counts: FLOPs of a network, and what a compiled program moves."""

import importlib.util
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import experiment
from diffusion.bench import hlo, profile, pytorch, speed, suite, tpu
from diffusion.bench.timing import PEAKS, Measured, in_turn
from diffusion.unet import UNet
from diffusion.utils.errors import ConfigError
from tests.test_configs import config_of


@pytest.fixture
def optax_promotes():
    """optax multiplies its int32 step counter with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def counted(jaxpr):
    """FLOPs of all products and convolutions in a traced program."""
    total = 0
    for eqn in jaxpr.eqns:
        for p in eqn.params.values():
            inner = getattr(p, "jaxpr", p)
            total += counted(inner) if hasattr(inner, "eqns") else 0
        out = math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "conv_general_dilated":
            height, width, c_in, _ = eqn.invars[1].aval.shape
            total += 2 * out * height * width * c_in
        elif eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return total


@pytest.mark.parametrize(
    "config, height, width, channels",
    [
        ({}, 32, 32, 3),
        (dict(ch_mult=(1, 1, 2, 2, 4, 4)), 256, 256, 3),
        (dict(ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), out_ch=1), 8, 8, 1),
        (dict(ch=8, ch_mult=(1, 2, 3), attn_resolutions=(12, 6), out_ch=6), 8, 12, 3),
    ],
)
def test_flops_by_formula_are_those_of_the_traced_network(config, height, width, channels):
    net = UNet(**config, dtype="bfloat16")  # of float32, a CPU computes large ones another way
    x, t = jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32), jnp.zeros(1)
    params = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, t, train=False), x)
    jaxpr = jax.make_jaxpr(lambda p, x: net.apply(p, x, t, train=False))(params, x)
    assert speed.forward_flops(net, height, width, channels) == counted(jaxpr.jaxpr)


# By hand: of main memory, `fused` reads 2 x 4 x 4 bytes and writes none (S(1) is the chip's own),
# `copy-start` reads, `copy-start.1` moves both ways, the all-reduce reads and writes 3 x 2 bytes.
PROGRAM = """
HloModule step
%inner (p: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} add(%p, %p)
}

ENTRY %main (a: f32[2,4], b: bf16[3]) -> f32[2,4] {
  %a = f32[2,4]{1,0:T(8,128)} parameter(0)
  %b = bf16[3]{0:T(256)} parameter(1)
  %fused = f32[2,4]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%inner, metadata={op_name="x"}
  %copy-start = (f32[2,4]{1,0:S(1)}, f32[2,4]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[2,4]{1,0:S(1)} copy-done(%copy-start)
  %copy-start.1 = (f32[2,4]{1,0}, f32[2,4]{0,1}, u32[]{:S(2)}) copy-start(%a)
  %slice-start = ((f32[2,4]{1,0}), f32[1,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)
  %all-reduce = bf16[3]{0} all-reduce(%b), replica_groups={{0,1}}, to_apply=%inner
  %whole = f32[2,4]{1,0:S(1)} custom-call(%b, %b), custom_call_target="ConcatBitcast"
  ROOT %onchip = f32[2,4]{1,0:S(1)} multiply(%fused, %copy-done)
}
"""


def test_bytes_of_main_memory():
    fused, copied, both, slice_, reduced = 32, 32, 2 * 32, 16, 2 * 6
    found = hlo.moved(PROGRAM)
    assert found.main == fused + copied + both + slice_ + reduced
    # Besides: what `fused` and `onchip` write, and what `onchip` reads, all on the chip.
    assert found.touched == fused + reduced + 32 + 3 * 32


def test_collectives_of_a_program():
    assert hlo.collectives(PROGRAM) == {"all-reduce": 6}


def test_the_step_s_only_collectives_are_the_gradient_s(optax_promotes):
    """On four devices: as many bytes as there are parameters, and a few metrics."""
    config = config_of("digits", "tiny")
    exp = experiment.build(config)
    state = experiment.abstract_state(exp)
    index = jax.ShapeDtypeStruct((16,), jnp.int32)
    image = jax.ShapeDtypeStruct((100, 64), jnp.uint8)
    label = jax.ShapeDtypeStruct((100,), jnp.int32)
    update = experiment.make_update(config, exp, True)
    text = update.lower(state, index, image, label).compile().as_text()
    ((kind, size),) = hlo.collectives(text).items()
    parameters = sum(a.size for a in jax.tree.leaves(state.params))
    assert kind == "all-reduce" and 4 * parameters <= size <= 4 * (parameters + 64)
    assert "pred[] all-reduce" not in text  # of a loop that the devices go through together


def test_a_line_is_the_median_and_its_spread():
    line = Measured("what", "s", [3.0, 1.0, 2.0]).line()
    assert line.split() == ["what", "2", "(1", "to", "3)", "s"]


def test_runs_are_measured_in_turn():
    order = []
    runs = [lambda name=name: order.append(name) for name in "ab"]
    took = in_turn(*runs, n=2)
    assert len(took) == 2 and all(len(each) == 2 for each in took)
    # Each once unmeasured, then both in turn.
    assert order[-2:] == ["a", "b"] and order.count("a") == order.count("b") == 3


def test_peaks_are_of_chips_of_today():
    for peak in PEAKS.values():
        assert 1e14 < peak.flops < 1e16 and 5e11 < peak.bytes < 1e13


@pytest.mark.parametrize("part", ["train", "sample", "likelihood", "profile"])
def test_a_part_runs(part, optax_promotes):
    config = config_of("digits", "tiny")
    lines = list(suite.PARTS[part](config, experiment.build(config)))
    assert len({line.what for line in lines}) >= 3
    assert all(np.isfinite(line.values).all() and line.unit is not None for line in lines)


def span(pid, tid, name, dur, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": 0, "dur": dur, "args": args}


def names(kind, pid, tid, name):
    return {"ph": "M", "pid": pid, "tid": tid, "name": f"{kind}_name", "args": {"name": name}}


HOST = [
    names("process", 7, 0, "/host:CPU"),
    names("thread", 7, 1, "python"),
    names("thread", 7, 2, "tf_XLAEigen/3"),
    span(7, 1, "PjitFunction", 9.0),
    span(7, 2, "fusion.1", 2.0),
    span(7, 2, "fusion.1", 3.0),
]
GPU = [
    names("process", 1, 0, "/device:GPU:0"),
    names("thread", 1, 14, "Stream #14(Compute)"),
    names("thread", 1, 15, "XLA Ops"),
    span(1, 14, "ampere_sgemm", 4.0, hlo_op="dot.1"),
    span(1, 15, "dot.1", 4.0),
]


def test_a_trace_counts_operations_once():
    assert profile.durations(HOST) == {"fusion.1": 5.0}
    assert profile.durations(HOST + GPU) == {"dot.1": 4.0}
    assert profile.durations(HOST + GPU[:1] + GPU[2:3] + GPU[4:]) == {"dot.1": 4.0}  # a TPU's


def test_operations_know_where_they_come_from():
    known = profile.operations(PROGRAM)
    assert known["fused"] == "x" and known["onchip"] == "" and "main" not in known


def test_tpus_without_their_compiler_are_one_line():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed here")
    with pytest.raises(ConfigError, match=r"--topology=v5e:2x2.*jax\[tpu\]") as error:
        tpu.mesh_of("v5e:2x2")
    assert "\n" not in str(error.value)


def counted_calls(start):
    """Stands for what is made of PyTorch: two things to call, which remember their process."""
    calls = [start]

    def run(n):
        calls.append(n)
        return os.getpid(), sum(calls)

    return {"a": run, "b": run}


def test_what_is_compared_lives_in_a_process_of_its_own():
    with pytorch._remote(counted_calls, 5) as runs:
        (first, five), (second, six) = runs["a"](0), runs["b"](1)
        assert list(runs) == ["a", "b"] and first == second != os.getpid()
        assert (five, six) == (5, 6)


def broken_installation():
    raise OSError("libtorch.so: undefined symbol")


def test_a_library_that_cannot_be_imported_is_not_compared(capsys):
    with pytorch._remote(broken_installation) as runs:
        assert runs == {}
    assert "nothing to compare with: libtorch.so: undefined symbol" in capsys.readouterr().out


def test_a_network_that_diffusers_has_not_is_not_compared():
    with pytorch.training(config_of("digits", "tiny")) as runs:
        assert runs == {}  # 8 channels: groups of four
