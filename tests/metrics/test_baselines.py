"""Code lengths beside bits/dim: closed forms, files, and the numbers of another program."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.metrics import baselines
from diffusion.metrics.baselines import Baseline


def bits_of(rows: list[Baseline]) -> dict[str, float]:
    return {row.name: row.bits for row in rows}


def test_digits_as_another_program_read_them():
    """4.087, 2.425 and 2.171 bits/dim (three digits), by a program that is not this one."""
    train, test = (data.digits(split) for split in ("train", "test"))
    rows = baselines.baselines(train.read(range(1501))[0], test.read(range(296))[0], 17)
    found = [round(row.bits, 3) for row in rows[:3]]
    assert found == [4.087, 2.425, 2.171]
    assert [row.error is None for row in rows] == [True, False, False, True, True]


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_uniform_levels_cost_their_logarithm(levels):
    """No histogram of independent, uniform levels can do better than log2(levels)."""
    rng = np.random.default_rng(0)
    k = rng.integers(0, levels, (4000, 4, 4, 1))
    images = np.rint(k * 255 / (levels - 1)).astype(np.uint8)
    found = bits_of(baselines.baselines(images[:3000], images[3000:], levels))
    assert found["uniform"] == math.log2(levels)
    # A histogram of n images costs about (levels - 1) / (2 n ln 2) bits more, one given 9 contexts
    # nine times as much, doubled where counts are few.
    excess = levels / (2 * 3000 * math.log(2))
    for name, contexts in (("pixel histogram", 1), ("pixel and two neighbours", 9)):
        assert -0.01 < found[name] - math.log2(levels) < 0.01 + 2 * contexts * excess
    assert found["lossless PNG"] > 0.95 * math.log2(levels)


def test_histograms_by_hand():
    """One pixel, three training images 0, 0, 1 of two levels: (2.1, 1.1) / 3.2."""
    train = np.array([0, 0, 255], np.uint8).reshape(3, 1, 1, 1)
    images = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    found = bits_of(baselines.baselines(train, images, 2))
    wanted = -(math.log2(2.1 / 3.2) + math.log2(1.1 / 3.2)) / 2
    np.testing.assert_allclose(found["pixel histogram"], wanted, rtol=1e-12)
    wanted = -(math.log2(2.05 / 3.1) + math.log2(1.05 / 3.1)) / 2
    np.testing.assert_allclose(found["pixel and two neighbours"], wanted, rtol=1e-12)


def test_neighbours_are_used_in_their_own_channel():
    """Columns after the first copy the left one; rows after the first the upper one."""
    rng = np.random.default_rng(0)
    k = rng.choice(np.array([0, 100, 255], np.uint8), (500, 1, 1, 3))
    for shape in ((500, 1, 8, 3), (500, 8, 1, 3)):
        images = np.broadcast_to(k, shape)
        found = bits_of(baselines.baselines(images[:400], images[400:], 256))
        # The first pixel costs log2 3, the others what 0.05 in each of 256 counts takes.
        assert found["pixel histogram"] > math.log2(3)
        smoothing = math.log2(1 + 256 * 0.05 / 120)
        assert found["pixel and two neighbours"] < (math.log2(3) + 8 * smoothing) / 8 + 0.02


@pytest.mark.parametrize("shape", [(7, 8, 8, 1), (12, 5, 3, 3), (2, 1, 1, 1)])
@pytest.mark.parametrize("form", ["PNG", "WebP"])
def test_mosaic_bits_are_those_of_a_lossless_file(tmp_path, shape, form):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / f"mosaic.{form.lower()}"
    path.write_bytes(baselines.encode(baselines.mosaic(images), form))
    with Image.open(path) as image:
        assert image.format == form.upper()
        pixels = np.asarray(image).reshape(image.height, image.width, -1)[..., : shape[3]]
    n, h, w, _ = shape
    rows, columns = pixels.shape[0] // h, pixels.shape[1] // w
    assert n - rows < rows * columns <= n and 0 <= columns - rows < 3
    np.testing.assert_array_equal(pixels[:h, :w], images[0])
    np.testing.assert_array_equal(pixels[-h:, -w:], images[rows * columns - 1])
    values = rows * columns * h * w * shape[3]
    assert baselines.mosaic_bits(images, form) == 8 * path.stat().st_size / values


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_xl_is_read_back_where_it_is_installed(channels):
    pytest.importorskip("pillow_jxl")
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels), np.uint8)
    pixels = baselines.mosaic(images)
    assert baselines.installed("JXL")
    with Image.open(io.BytesIO(baselines.encode(pixels, "JXL"))) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    assert "JXL" in baselines.lossy_curves(images)


def test_formats_that_pillow_lacks_are_not_installed():
    assert baselines.installed("PNG") and not baselines.installed("none of its formats")


def test_blocks_change_nothing(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), np.uint8)
    whole = baselines.baselines(images[:30], images[30:], 9)
    monkeypatch.setattr(baselines, "MAX_COUNTS", 9 * 9 * 7)
    np.testing.assert_allclose(
        [row.bits for row in baselines.baselines(images[:30], images[30:], 9)],
        [row.bits for row in whole],
        rtol=1e-12,
    )


def test_other_images_raise():
    images = np.zeros((3, 4, 4, 1), np.uint8)
    for train, new in ((images[0], images), (images, images[:, :3]), (images.astype(int), images)):
        with pytest.raises(ValueError, match=r"expected uint8\[n, h, w, c\], found"):
            baselines.baselines(train, new)
    with pytest.raises(ValueError, match="expected two or more, found 1"):
        baselines.baselines(images, images[:1])


def test_files_are_of_the_levels_alone():
    """Noise below the distance of two levels costs nothing."""
    rng = np.random.default_rng(0)
    clean = (85 * rng.integers(0, 4, (20, 8, 8, 1))).astype(np.uint8)
    noise = rng.integers(-40, 41, clean.shape)
    noisy = np.clip(clean + noise, 0, 255).astype(np.uint8)
    rows = [baselines.baselines(None, images, 4) for images in (clean, noisy)]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_a_mosaic_fits_into_a_webp():
    images = np.zeros((5000, 4, 256, 1), np.uint8)
    pixels = baselines.mosaic(images)
    assert max(pixels.shape) <= 16_383 and baselines.mosaic_bits(images, "WebP") > 0
