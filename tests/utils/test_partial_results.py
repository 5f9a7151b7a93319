"""diffusion.utils.partial_results: a pass resumes from its own intact results only."""

import os

import numpy as np
import pytest

from diffusion.utils import partial_results

ARRAYS = {"done": np.int64(7), "total": np.arange(6.0).reshape(2, 3)}


def test_results_read_back_under_their_setting_alone(tmp_path):
    path = tmp_path / "a" / "pass.npz"
    assert partial_results.load(path, "n=8") is None
    assert partial_results.load(None, "n=8") is None
    partial_results.save(path, "n=8", **ARRAYS)
    loaded = partial_results.load(path, "n=8")
    assert loaded.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], x, strict=True)
    assert partial_results.load(path, "n=9") is None
    assert os.listdir(path.parent) == ["pass.npz"]


@pytest.mark.parametrize("damage", ["flip", "cut", "zero"])
def test_damage_starts_the_pass_anew_or_is_harmless(tmp_path, damage):
    path = tmp_path / "pass.npz"
    partial_results.save(path, "n=8", **ARRAYS)
    content = path.read_bytes()
    for i in range(8 * len(content) if damage == "flip" else len(content)):
        bad = bytearray(content)
        if damage == "flip":
            bad[i // 8] ^= 1 << i % 8
        elif damage == "zero":
            bad[i : i + 64] = bytes(len(bad[i : i + 64]))
        else:
            del bad[i:]
        path.write_bytes(bad)
        loaded = partial_results.load(path, "n=8")
        if loaded is not None:
            assert loaded.keys() == ARRAYS.keys()
            for name, x in ARRAYS.items():
                np.testing.assert_array_equal(loaded[name], x, strict=True)


def test_other_files_start_the_pass_anew(tmp_path):
    path = tmp_path / "pass.npz"
    np.savez(path, **ARRAYS)
    assert partial_results.load(path, "n=8") is None
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    assert partial_results.load(path, "n=8") is None
    for content in (b"", b"text", b"PK\x03\x04"):
        path.write_bytes(content)
        assert partial_results.load(path, "n=8") is None
