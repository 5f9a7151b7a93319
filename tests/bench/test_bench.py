"""--mode=bench: FLOPs of a network, bytes that a program moves, and the parts themselves."""

import importlib.util
import json
import os

import jax
import numpy as np
import pytest

import main
from diffusion import experiment
from diffusion.bench import hlo, profile, pytorch, speed, tpu
from diffusion.bench.timing import PEAKS, Measured, in_turn
from diffusion.modes import bench
from diffusion.unet import UNet
from diffusion.utils.errors import ConfigError
from tests.runs import TINY, run
from tests.test_configs import config_of


def flops_by_formula(net, height, width, channels):
    """Returns the FLOPs of a forward pass of the paper's architecture, layer by layer."""
    levels = range(len(net.ch_mult))
    ch = [net.ch * mult for mult in net.ch_mult]
    pixels = [height * width // 4**i for i in levels]
    attention = [max(height, width) // 2**i in net.attn_resolutions for i in levels]

    def product(n, c_in, c_out):
        return 2 * n * c_in * c_out

    def block(n, c_in, c_out):
        shortcut = product(n, c_in, c_out) if c_in != c_out else 0
        time = product(1, 4 * net.ch, c_out)
        return 9 * (product(n, c_in, c_out) + product(n, c_out, c_out)) + time + shortcut

    def attend(n, c):
        return 4 * product(n, c, c) + 2 * product(n, n, c)

    total = product(1, net.ch, 4 * net.ch) + product(1, 4 * net.ch, 4 * net.ch)
    total += 9 * product(pixels[0], channels, net.ch)
    c, skips = net.ch, [net.ch]
    for i in levels:
        for _ in range(net.num_res_blocks):
            total += block(pixels[i], c, ch[i]) + attention[i] * attend(pixels[i], ch[i])
            c = ch[i]
            skips.append(c)
        if i < levels[-1]:
            total += 9 * product(pixels[i + 1], c, c)
            skips.append(c)
    total += 2 * block(pixels[-1], c, c) + attend(pixels[-1], c)
    for i in reversed(levels):
        for _ in range(net.num_res_blocks + 1):
            total += block(pixels[i], c + skips.pop(), ch[i])
            total += attention[i] * attend(pixels[i], ch[i])
            c = ch[i]
        if i > 0:
            total += 9 * product(pixels[i - 1], c, c)
    return total + 9 * product(pixels[0], c, net.out_ch)


@pytest.mark.parametrize(
    "config, height, width, channels",
    [
        ({}, 32, 32, 3),
        (dict(ch_mult=(1, 1, 2, 2, 4, 4), remat=True), 256, 256, 3),
        (dict(ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), out_ch=1), 8, 8, 1),
        (dict(ch=8, ch_mult=(1, 2, 3), attn_resolutions=(12, 6), out_ch=6), 8, 12, 3),
    ],
)
def test_flops_of_the_traced_network_equal_the_formula(config, height, width, channels):
    net = UNet(**config)
    expected = flops_by_formula(net, height, width, channels)
    assert speed.forward_flops(net, height, width, channels) == expected


def test_flops_do_not_depend_on_the_convolution_that_computes_them():
    exp = experiment.build(config_of("digits"))  # Winograd's
    expected = flops_by_formula(exp.net, *exp.image_shape)
    assert speed.forward_flops(exp.net, *exp.image_shape) == expected


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


def test_bytes_touched_and_moved_from_main_memory():
    fused, copied, both, slice_, reduced = 32, 32, 2 * 32, 16, 2 * 6
    touched, main_memory = hlo.moved_bytes(PROGRAM)
    assert main_memory == fused + copied + both + slice_ + reduced
    # On the chip, `fused` writes 32 bytes; `onchip` reads twice and writes once as many.
    assert touched == fused + reduced + 32 + 3 * 32


def test_collectives_of_a_program():
    assert hlo.collectives(PROGRAM) == {"all-reduce": 6}


@pytest.fixture
def optax_promotes():
    """optax multiplies its int32 step counter with floats, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_only_gradients_travel_between_devices(optax_promotes):
    """A training step on four devices adds up the parameters' gradients and a few metrics."""
    config = config_of("digits", "tiny")
    exp = experiment.build(config)
    text = speed.training_step(config, exp)[0].as_text()
    ((kind, size),) = hlo.collectives(text).items()
    parameters = sum(a.size for a in jax.tree.leaves(exp.abstract_state.params))
    assert kind == "all-reduce" and 4 * parameters <= size <= 4 * (parameters + 64)
    assert "pred[] all-reduce" not in text  # of a loop that the devices go through together


def test_sampling_needs_no_communication(optax_promotes):
    config = config_of("digits", "tiny")
    _, sampling = tpu.lower_steps(config, experiment.build(config))
    assert hlo.collectives(sampling.compile().as_text()) == {}


def test_line_shows_median_and_range():
    line = Measured("what", "s", [3.0, 1.0, 2.0]).line()
    assert line.split() == ["what", "2", "(1", "to", "3)", "s"]


def test_runs_are_timed_in_turn():
    order = []
    runs = [lambda name=name: order.append(name) for name in "ab"]
    took = in_turn(*runs, n=2)
    assert len(took) == 2 and all(len(each) == 2 for each in took)
    # Each once untimed, then both in turn.
    assert order[-2:] == ["a", "b"] and order.count("a") == order.count("b") == 3


def test_peaks_are_plausible():
    for peak in PEAKS.values():
        assert 1e14 < peak.flops < 1e16 and 5e11 < peak.bytes < 1e13


@pytest.mark.parametrize("part", ["train", "sample", "likelihood", "codec", "profile"])
def test_part_prints_and_saves_finite_measurements(part, tmp_path):
    out, err = run(TINY, "--mode=bench", f"--part={part}", f"--workdir={tmp_path}")
    content = json.loads((tmp_path / "bench" / f"{part}.json").read_text())
    lines = content["measured"]
    assert err == "" and content["device"] == "4 x cpu" and content["jax"] == jax.__version__
    assert len({line["what"] for line in lines}) >= 3
    assert all(np.isfinite(line["values"]).all() and line["what"] in out for line in lines)


def test_every_part_of_the_command_line_exists():
    assert set(main.PARTS) == {"all", "tpu", *bench.PARTS}


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


def test_trace_counts_each_operation_once():
    assert profile.durations(HOST) == {"fusion.1": 5.0}
    assert profile.durations(HOST + GPU) == {"dot.1": 4.0}
    assert profile.durations(HOST + GPU[:1] + GPU[2:3] + GPU[4:]) == {"dot.1": 4.0}  # a TPU's


def test_operations_have_the_layer_that_they_come_from():
    known = profile.origins(PROGRAM)
    assert known["fused"] == "x" and known["onchip"] == "" and "main" not in known


def test_tpus_without_their_compiler_give_one_line():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed here")
    with pytest.raises(ConfigError, match=r"--topology=v5e:2x2.*jax\[tpu\]") as error:
        tpu.tpu_mesh("v5e:2x2")
    assert "\n" not in str(error.value)


def make_counters(start):
    """Makes two functions that return their process and the sum of their arguments so far."""
    calls = [start]

    def run(n):
        calls.append(n)
        return os.getpid(), sum(calls)

    return {"a": run, "b": run}


def test_compared_functions_run_in_a_process_of_their_own():
    with pytorch._remote(make_counters, 5) as runs:
        (first, five), (second, six) = runs["a"](0), runs["b"](1)
        assert list(runs) == ["a", "b"] and first == second != os.getpid()
        assert (five, six) == (5, 6)


def broken_installation():
    raise OSError("libtorch.so: undefined symbol")


def test_library_that_cannot_be_imported_gives_one_line(capsys):
    with pytorch._remote(broken_installation) as runs:
        assert runs == {}
    assert "nothing to compare with: libtorch.so: undefined symbol" in capsys.readouterr().out


def test_network_that_diffusers_lacks_gives_one_line(capsys):
    with pytorch.training(config_of("digits", "tiny")) as runs:
        assert runs == {}  # 8 channels: groups of four
    assert capsys.readouterr().out.count("nothing to compare with: ") == 1
