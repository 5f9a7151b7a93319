"""Weights in 8 bits: what rounding may change, and sets of files that are not one."""

import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.convert import int8_weights, safetensors_file
from diffusion.utils.errors import IntegrityError

RANDOM = np.random.default_rng(0)
HALF = 0.5 * (1 + 1e-4)  # a quotient of up to 127 is rounded in float32 before it is an integer


def kernel(*shape):
    """Kernels whose channels have magnitudes from 1e-3 to 1e3."""
    sizes = np.geomspace(1e-3, 1e3, shape[-1])
    return np.float32(RANDOM.standard_normal(shape) * sizes)


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (5, 7), (1, 1), (2, 0, 3)])
def test_an_error_is_at_most_half_a_step_of_its_channel(shape):
    w = kernel(*shape)
    q, scale = int8_weights.quantize(w)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and scale.shape == shape[-1:]
    back = int8_weights.dequantize(q, scale)
    assert back.dtype == np.float32 and back.shape == shape
    assert (np.abs(np.float64(back) - w) <= HALF * scale).all()
    if w.size:  # the step is no larger than it must be
        np.testing.assert_allclose(scale, np.abs(w).max(axis=(*range(w.ndim - 1),)) / 127, 1e-6)


def test_multiples_of_a_step_are_exact():
    steps = RANDOM.integers(-127, 128, (50, 3))
    steps[0] = 127, -127, 127
    w = np.float32(steps * [0.25, 2.0**-100, 2.0**100])
    q, scale = int8_weights.quantize(w)
    np.testing.assert_array_equal(q, steps)
    np.testing.assert_array_equal(int8_weights.dequantize(q, scale), w)


def test_channels_of_nothing_and_of_extremes():
    """0, the least and the largest float32, which do not touch a channel of ordinary size."""
    most, least = np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal
    w = np.float32([[0, least, most, 1], [0, -least, -most, -0.5], [0, 0, most, 0]])
    back = int8_weights.dequantize(*int8_weights.quantize(w))
    assert np.isfinite(back).all() and not back[:, 0].any()
    assert (np.abs(back[:, 1]) <= np.finfo(np.float32).tiny).all()
    np.testing.assert_allclose(back[:, 2], w[:, 2], rtol=1e-6)
    np.testing.assert_allclose(back[:, 3], w[:, 3], rtol=0, atol=HALF / 127)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_types_are_rounded_as_their_values_in_float32(dtype):
    w = kernel(4, 5).astype(dtype)
    for found, wanted in zip(
        int8_weights.quantize(w), int8_weights.quantize(w.astype(np.float32)), strict=True
    ):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_vectors_and_numbers_stay_as_they_are():
    arrays = {"bias": kernel(6), "step": np.array([7], np.int64), "kernel": kernel(3, 6)}
    packed = int8_weights.quantize_arrays(arrays)
    assert packed.keys() == {"bias", "step", "kernel", "kernel:scale"}
    back = int8_weights.dequantize_arrays(packed)
    assert back.keys() == arrays.keys()
    for name in ("bias", "step"):
        np.testing.assert_array_equal(back[name], arrays[name])
        assert back[name].dtype == arrays[name].dtype


@pytest.mark.parametrize(
    "packed",
    [
        {"w": np.zeros((2, 3), np.int8), "w:scale": np.zeros(2, np.float32)},
        {"w": np.zeros((2, 3), np.float32), "w:scale": np.zeros(3, np.float32)},
    ],
)
def test_scales_that_do_not_fit_are_refused(packed):
    with pytest.raises(ValueError, match=r"^w: expected int8 and a scale per output channel"):
        int8_weights.dequantize_arrays(packed)


def test_relative_error_is_of_all_arrays_together():
    a = {"x": np.array([3.0, 0.0]), "y": np.array([[4.0]])}
    b = {"x": np.array([3.0, 0.3]), "y": np.array([[4.4]])}
    assert int8_weights.relative_error(a, b) == pytest.approx(0.5 / 5)
    assert int8_weights.relative_error(a, a) == 0


@pytest.fixture
def small_files(monkeypatch):
    """Files of at most 100 bytes of arrays."""
    monkeypatch.setattr(int8_weights, "ARRAY_BYTES", 100)


PACKED = {name: RANDOM.integers(-127, 128, (5, 8), np.int8) for name in "abcde"}


def written(folder, packed=PACKED):
    folder.mkdir()
    int8_weights.write_set(folder, packed, {"about": "x"})
    return folder


def test_a_set_is_read_as_it_was_written(small_files, tmp_path):
    folder = written(tmp_path / "set")
    names = [f"weights-{i}-of-3.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in folder.iterdir()) == names
    (folder / "report.md").write_text("beside it")
    arrays, metadata = int8_weights.read_set(folder)
    assert metadata["about"] == "x" and arrays.keys() == PACKED.keys()
    for name, array in PACKED.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_an_array_larger_than_a_file_has_one_of_its_own(small_files, tmp_path):
    large = {"b": np.ones((20, 20), np.int8), "c": np.zeros(8, np.int8)}
    arrays, _ = int8_weights.read_set(written(tmp_path / "set", large))
    np.testing.assert_array_equal(arrays["b"], large["b"])
    assert len([*(tmp_path / "set").iterdir()]) == 2


FIRST, SECOND = "weights-1-of-3.safetensors", "weights-2-of-3.safetensors"


def cut(folder, other):
    path = folder / SECOND
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder, other):
    data = bytearray((folder / SECOND).read_bytes())
    data[-1] ^= 1
    (folder / SECOND).write_bytes(data)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder, other: (folder / SECOND).unlink(), f"the 3 files of one set.*{SECOND}"),
        (lambda folder, other: (folder / FIRST).rename(folder / "weights-1-of-2.safetensors"), "3"),
        (lambda folder, other: (folder / FIRST).rename(folder / "weights-x-of-y.safetensors"), "3"),
        (
            lambda folder, other: shutil.copy(other / SECOND, folder),
            "one set, found another digest",
        ),
        (lambda folder, other: shutil.copy(other / SECOND, folder / FIRST), "another digest"),
        (flip, "another digest"),
        (cut, "not a complete safetensors file"),
        (
            lambda folder, other: safetensors_file.write(folder / SECOND, {"b": PACKED["b"]}),
            "another digest",
        ),
    ],
    ids=["missing", "of two sets", "names", "mixed", "twice", "flipped", "cut", "no metadata"],
)
def test_sets_that_are_not_one_are_refused(small_files, tmp_path, spoil, words):
    folder = written(tmp_path / "set")
    other = written(tmp_path / "other", {name: -array for name, array in PACKED.items()})
    spoil(folder, other)
    with pytest.raises(IntegrityError, match=re.escape(str(folder)) + f".*{words}") as error:
        int8_weights.read_set(folder)
    assert "\n" not in str(error.value)
