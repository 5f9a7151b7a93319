"""The range coder against the entropy; distributions against DiffC's and closed forms."""

import numpy as np
import pytest
from scipy.stats import norm

from diffusion.codec import entropy
from diffusion.codec.entropy import RangeDecoder, RangeEncoder
from tests.oracle import official


def coded(starts, widths, precision=24):
    encoder = RangeEncoder()
    for start, width in zip(starts, widths, strict=True):
        encoder.encode(start, width, precision)
    return encoder.finish()


def test_files_are_as_long_as_the_entropy():
    """Of 1e5 symbols; the last byte and rounding cost at most 1e-4 of it."""
    rng = np.random.default_rng(0)
    counts = np.maximum(1, rng.dirichlet(np.full(50, 0.3)) * 2**24).astype(int)
    counts[counts.argmax()] += 2**24 - counts.sum()
    starts = np.append(0, np.cumsum(counts)[:-1])
    x = rng.choice(50, 100_000, p=counts / 2**24)
    content = coded(starts[x].tolist(), counts[x].tolist())
    assert 8 * len(content) < -np.log2(counts[x] / 2**24).sum() * (1 + 1e-4) + 16
    decoder, ends = RangeDecoder(content), np.append(starts, 2**24)
    for k in x[:2000]:
        assert np.searchsorted(ends, decoder.peek(), "right") - 1 == k
        decoder.advance(int(starts[k]), int(counts[k]))


@pytest.mark.parametrize("high", [0, 1])  # the ends of the range, where carries run through
def test_any_intervals_come_back(high):
    rng = np.random.default_rng(high)
    for n in range(60):
        widths = rng.integers(1, 2 ** rng.integers(1, 24, n), endpoint=True)
        starts = (2**24 - widths) if high else rng.integers(0, 2**24 - widths + 1)
        decoder = RangeDecoder(coded(starts.tolist(), widths.tolist()))
        for start, width in zip(starts.tolist(), widths.tolist(), strict=True):
            assert start <= decoder.peek() < start + width
            decoder.advance(start, width)


def test_nothing_takes_nothing():
    assert coded([], []) == b""
    assert coded([0] * 9, [2**24] * 9) == b""


@official("codec", "zipf_table.*")
def test_zipf_tables_are_those_of_diffc(codec):
    for i, (exponent, n) in enumerate(
        zip(codec["zipf_table.s"], codec["zipf_table.n"], strict=True)
    ):
        found = entropy.zipf_cumulative(float(exponent), int(n))
        codec.close(f"zipf_table.{i}.cmf", found[:2048] if n > 2048 else found)
        codec.close(f"zipf_table.{i}.last_16", found[-16:])
        codec.close(f"zipf_table.{i}.zero_probability_symbols", np.sum(np.diff(found) == 0))
    codec.compared |= {"zipf_table.s", "zipf_table.n"}


@pytest.mark.parametrize("size", [1, 2, 9, 17])
def test_indices_come_back(size):
    rng = np.random.default_rng(size)
    most = 2**size - 2
    indices = [0, most, *rng.integers(0, most, 50, endpoint=True).tolist()]
    encoder = RangeEncoder()
    for k in indices:
        entropy.encode_index(encoder, k, size)
    decoder = RangeDecoder(encoder.finish())
    assert [entropy.decode_index(decoder, size) for _ in indices] == indices


def test_octaves_are_the_same_wherever_powers_are_rounded_differently():
    """No start of an octave is so near to an integer that an error of 1e-11 would change it."""
    for size in range(1, 23):
        masses = np.arange(1, 2**size, dtype=np.float64) ** -entropy.EXPONENT
        starts = np.cumsum(masses)[2 ** np.arange(1, size) - 2] / masses.sum() * 2**24
        assert np.all(np.abs(starts - np.round(starts)) > 2**24 * 1e-11)
        assert np.all(np.diff(entropy.octaves(size)) > 0)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_pixels_have_the_gaussian_of_eq_13(levels):
    mean, std = np.linspace(-1, 1, 7).astype(np.float32), 0.1
    rows = entropy.gaussian_cumulative(mean, std, levels)
    assert (
        rows.shape == (7, levels + 1) and np.all(rows[:, 0] == 0) and np.all(rows[:, -1] == 2**24)
    )
    widths = np.diff(rows)
    assert widths.min() >= 1
    centres, half = np.linspace(-1, 1, levels), 1 / (levels - 1)
    upper = np.where(centres == 1, 1, norm.cdf(centres + half, mean[:, None], std))
    lower = np.where(centres == -1, 0, norm.cdf(centres - half, mean[:, None], std))
    np.testing.assert_allclose(widths / 2**24, upper - lower, atol=2 * levels / 2**24)
