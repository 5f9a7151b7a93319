"""Code lengths that a reading of bits/dim has to beat: simple histograms, PNG and WebP."""

import contextlib
import io
import math
from typing import NamedTuple

import numpy as np

PIXEL_COUNT, NEIGHBOUR_COUNT = 0.1, 0.05  # added to every count of a histogram
MAX_COUNTS, MAX_KEYS = 2**22, 2**24  # of the histograms that are in memory at a time
BASELINES_VERSION = 1  # of all of these, for caches
MAX_MOSAIC_SIDE = 16_383  # pixels
MOSAIC_BYTES = 2**22  # of the pixels that are compressed; lossless WebP takes seconds for these


class Baseline(NamedTuple):
    """A code length in bits/dim, and its standard error over images where it is a mean of these."""

    name: str
    bits: float
    error: float | None = None


def baselines(train: np.ndarray | None, images: np.ndarray, levels: int = 256) -> list[Baseline]:
    """Returns the code lengths of images uint8[m, h, w, c] by models of train uint8[n, h, w, c].

    Values are brought to `levels` levels, evenly spaced over 0..255. The models are

    - one histogram for all pixels, in which all levels are alike: log2(levels) bits/dim;
    - a histogram for each pixel and channel, with 0.1 added to each count;
    - a histogram for each pixel and channel and each class of its left and its upper neighbour,
      with 0.05 added to each count. Level 0, the other levels below the middle one, and the rest
      are the three classes; a neighbour outside of the image counts as level 0.

    Without training images there are no histograms. PNG and WebP, lossless, are those of
    `mosaic_bits`. Raises ValueError for other shapes or types, and fewer than two images.
    """
    for role, each in (("train", images if train is None else train), ("images", images)):
        if each.dtype != np.uint8 or each.shape[1:] != images.shape[1:] or each.ndim != 4:
            raise ValueError(f"{role}: expected uint8[n, h, w, c], found {each.dtype}{each.shape}")
    if len(images) < 2:
        raise ValueError(f"images: expected two or more, found {len(images)}")
    new, rows = to_levels(images, levels), [Baseline("uniform", math.log2(levels))]
    if train is not None:
        seen = to_levels(train, levels)
        contexts = [_neighbour_classes(k, levels) for k in (seen, new)]
        for name, count, (seen_in, new_in) in (
            ("pixel histogram", PIXEL_COUNT, map(np.zeros_like, contexts)),
            ("pixel and two neighbours", NEIGHBOUR_COUNT, contexts),
        ):
            bits = _histogram_bits(seen, new, seen_in, new_in, levels, count)
            error = float(bits.std(ddof=1) / len(bits) ** 0.5)
            rows.append(Baseline(name, float(bits.mean()), error))
    stored = np.rint(new * (255 / (levels - 1))).astype(np.uint8)
    return rows + [Baseline(f"lossless {k}", mosaic_bits(stored, k)) for k in ("PNG", "WebP")]


def to_levels(images: np.ndarray, levels: int) -> np.ndarray:
    """Returns the number uint8[...] of each value's nearest level, as data.augment.scale has it."""
    return np.rint(np.arange(256) * ((levels - 1) / 255)).astype(np.uint8)[images]


def _neighbour_classes(k: np.ndarray, levels: int) -> np.ndarray:
    """Returns 0..8 for each value of k uint8[n, h, w, c]: 3 of its left, 1 of its upper class."""
    classes = (k > 0).astype(np.uint8) + (k >= levels // 2)
    context = np.zeros_like(classes)
    context[:, :, 1:] += 3 * classes[:, :, :-1]
    context[:, 1:] += classes[:, :-1]
    return context


def _histogram_bits(seen, new, seen_in, new_in, levels, count) -> np.ndarray:
    """Returns the bits/dim of each image of `new`, float64[m], by histograms of `seen`.

    A histogram belongs to a dimension and a context of it in 0..8.
    """
    d = math.prod(new.shape[1:])
    seen, new, seen_in, new_in = (a.reshape(len(a), d) for a in (seen, new, seen_in, new_in))
    bits = np.zeros(len(new))
    block = min(MAX_COUNTS // (9 * levels), MAX_KEYS // max(len(seen), len(new)))
    block = max(1, block)
    for first in range(0, d, block):
        part = slice(first, first + block)
        place = 9 * np.arange(seen[:, part].shape[1], dtype=np.int32)
        key = (place + seen_in[:, part]) * levels + seen[:, part]
        counts = np.bincount(key.ravel(), minlength=len(place) * 9 * levels) + count
        counts = counts.reshape(-1, levels)
        log_p = np.log2(counts / counts.sum(1, keepdims=True)).ravel()
        bits -= log_p[(place + new_in[:, part]) * levels + new[:, part]].sum(1)
    return bits / d


def mosaic(images: np.ndarray) -> np.ndarray:
    """Returns the first images uint8[n, h, w, c] side by side without a gap, uint8[H, W, c].

    Rows are as long as columns or up to two images longer. There are at most 4 MiB of pixels, and
    sides of at most 16,383, which is WebP's limit.
    """
    n, h, w, c = images.shape
    n = max(1, min(n, MOSAIC_BYTES // (h * w * c)))
    rows = max(1, min(math.isqrt(n), MAX_MOSAIC_SIDE // h))
    columns = max(1, min(n // rows, MAX_MOSAIC_SIDE // w))
    grid = images[: rows * columns].reshape(rows, columns, h, w, c)
    return grid.transpose(0, 2, 1, 3, 4).reshape(rows * h, columns * w, c)


def encode(pixels: np.ndarray, form: str) -> bytes:
    """Returns a lossless file of pixels uint8[H, W, c]: "PNG", "WebP" or "JXL", slowest setting."""
    from PIL import Image

    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    if form == "PNG":
        image.save(file, form, optimize=True)
    elif form == "JXL":
        image.save(file, form, lossless=True, effort=9)
    else:
        image.save(file, form, lossless=True, quality=100, method=6)
    return file.getvalue()


def mosaic_bits(images: np.ndarray, form: str) -> float:
    """Returns the size of the file of a mosaic of images uint8[n, h, w, c], in bits/dim."""
    pixels = mosaic(images)
    return 8 * len(encode(pixels, form)) / pixels.size


LOSSY = {  # other formats' qualities, and what Pillow calls them
    "JPEG": [{"quality": q} for q in (5, 10, 20, 40, 60, 80, 95)],
    "WebP": [{"quality": q, "method": 6} for q in (0, 5, 20, 40, 60, 80, 95)],
    "AVIF": [{"quality": q} for q in (5, 20, 35, 50, 65, 80, 95)],
    "JXL": [{"quality": q} for q in (5, 20, 35, 50, 65, 80, 95)],
    "JPEG2000": [{"quality_mode": "dB", "quality_layers": [q]} for q in (20, 24, 28, 32, 36, 40)],
}


def installed(form: str) -> bool:
    """Returns whether Pillow writes a format here; JPEG XL ("JXL") with the package pillow_jxl."""
    from PIL import Image, features

    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 -- adds the format to Pillow
    Image.init()
    return form.upper() in Image.SAVE and (form != "JPEG2000" or features.check("jpg_2000"))


def lossy_curves(images: np.ndarray) -> dict[str, list[tuple[float, float]]]:
    """Returns {format: [(bits/dim, root mean squared error on 0..255), ...]} of a mosaic.

    The size of a file of an empty mosaic is subtracted: for small images headers would be most of
    it. Formats that this Pillow lacks are left out.
    """
    from PIL import Image

    pixels = mosaic(images)
    grey = pixels.shape[2] == 1
    both = [Image.fromarray(a[..., 0] if grey else a) for a in (pixels, np.zeros_like(pixels))]
    curves: dict[str, list[tuple[float, float]]] = {}
    for form, qualities in LOSSY.items():
        if not installed(form):
            continue
        for options in qualities:
            files = [io.BytesIO(), io.BytesIO()]
            for image, file in zip(both, files, strict=True):
                image.save(file, form, **options)
            sizes = [len(file.getvalue()) for file in files]
            with Image.open(files[0]) as decoded:
                back = np.asarray(decoded.convert(both[0].mode)).reshape(pixels.shape)
            rmse = float(np.sqrt(np.mean((back.astype(np.float64) - pixels) ** 2)))
            bits = 8 * max(sizes[0] - sizes[1], 0) / pixels.size
            curves.setdefault(form, []).append((bits, rmse))
    return curves
