"""safetensors files: written and read again, and damaged or false ones."""

import os
import stat

import numpy as np
import pytest

from diffusion.convert import safetensors_file
from diffusion.utils.errors import IntegrityError
from tests.convert.test_torch_file import BYTES, NUMBERS, VALUES, refused


def test_round_trip(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = {name: array for name, array in VALUES.items() if name != "bfloat16"}
    safetensors_file.write(path, arrays)
    back = safetensors_file.read(path)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_decides_who_may_read_a_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        safetensors_file.write(tmp_path / "x.safetensors", {"x": NUMBERS})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def header(text, data=BYTES, length=None):
    text = text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


X = '{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}'


@pytest.mark.parametrize(
    "content, words",
    [
        (header(X[:-1] + ", " + X[1:]), "x is there twice"),
        (header(X, np.array([1, np.nan, 2], "<f4").tobytes()), "x holds nan at [1]"),
        (header(X.replace("[3]", "[4]")), "not a complete safetensors file"),
        (
            header(X.replace("[3]", "[0, 1099511627776]").replace("12", "0"), b""),
            "x claims the shape",
        ),
        (header(X.replace("[3]", "[-3]")), "not a complete safetensors file"),
        (header(X.replace("[3]", "3")), "not a complete safetensors file"),
        (
            header(X.replace("F32", "BF16").replace("12", "6"), b"\0" * 6),
            "expected a type of F64, F32",
        ),
        (
            header(X.replace("F32", "F8_E4M3").replace("12", "3"), b"\0" * 3),
            "found F8_E4M3",
        ),
        (header(X.replace("12", "16")), "not a complete safetensors file"),
        (header(X, BYTES[:-1]), "not a complete safetensors file"),
        (header(X, BYTES + b"?"), "not a complete safetensors file"),
        (header(X, length=2**40), "header too large"),
        (header(X, length=3), "not a complete safetensors file"),
        (header("{" + '"x": [' * 9000), "not a complete safetensors file"),
        (header('{"x": 3}'), "not a complete safetensors file"),
    ],
)
def test_false_files_are_refused(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(safetensors_file.read, path, words)


def test_damaged_files_are_refused_or_read(tmp_path):
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    safetensors_file.write(path, {"x": NUMBERS, "y": np.arange(4)})
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
        try:
            assert sum(array.nbytes for array in safetensors_file.read(path).values()) <= len(whole)
        except IntegrityError as error:
            assert "\n" not in str(error)
