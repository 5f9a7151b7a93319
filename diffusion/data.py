"""Data: named sources of whole data sets, and batches that are a function of (key, step) alone.

A data set is held in memory as bytes. The batch of a step is drawn inside the compiled training
step: no permutation is stored, nothing is saved with a checkpoint, resuming is exact.
"""

import difflib
import hashlib
import inspect
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

MAX_BYTES = 16 * 2**30  # of pixels: what a data set may take of the memory of host and device


class DataError(Exception):
    """A data set that cannot be had; one line: what was expected, what was found, what to do."""


class Dataset(NamedTuple):
    """image: uint8[n, h, w, c]. label: int32[n] in 0..num_classes-1, all 0 if num_classes is 0."""

    image: np.ndarray
    label: np.ndarray
    num_classes: int


def load(source: str, split: str, **config: Any) -> Dataset:
    """SOURCES[source](split, **config), or a DataError that says what is not as it should be."""
    if source not in SOURCES:
        raise DataError(f"source: {source!r} is not known; {_nearest(source, SOURCES)}")
    known = list(inspect.signature(SOURCES[source]).parameters)[1:]
    for key in config:
        if key not in known:
            raise DataError(f"{key}: not a key of source {source!r}; {_nearest(key, known)}")
    return SOURCES[source](split, **config)


def fingerprint(dataset: Dataset) -> str:
    """16 hexadecimal digits of a SHA-256 over shapes, types and every byte, to notice a change."""
    digest = hashlib.sha256()
    for x in (dataset.image, dataset.label, np.int64(dataset.num_classes)):
        digest.update(f"{x.dtype}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------- sources


def digits(split: str, name: str = "", data_dir: str = "") -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, from the package itself.

    test: the 6th, 12th, ... image of each class (296 in all), so that both splits are balanced and
    hold all writers. The grey levels 0..16 are spread over 0..255. name, data_dir: not used.
    """
    from sklearn.datasets import load_digits

    _choose_split(split, ("train", "test"), "digits")
    bunch = load_digits()
    label = bunch.target.astype(np.int32)
    in_test = np.zeros(len(label), bool)
    for k in range(10):
        in_test[np.flatnonzero(label == k)[5::6]] = True
    chosen = in_test == (split == "test")
    image = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    return Dataset(image[chosen], label[chosen], 10)


def tfds(split: str, name: str = "", data_dir: str = "") -> Dataset:
    """The data set `name` of TFDS, stored in data_dir in the array_record layout; no TensorFlow.

    name: as TFDS has it, `cifar10`, `celeb_a_hq/256`; the newest version is read. The images must
    be 8-bit grey or RGB, all of one size; a feature `label`, if it is a class, gives the classes.
    Raises DataError for anything missing, unfit, damaged, or larger than MAX_BYTES.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core import features

    folder = _stored(name, data_dir)
    try:
        builder = tensorflow_datasets.builder_from_directory(folder)
        info, kinds = builder.info, dict(builder.info.features.items())
    except Exception as error:
        raise DataError(f"{folder}: not readable as a TFDS data set: {_line(error)}") from error
    if (layout := info.file_format.value) != "array_record":
        advice = "prepare it again with file_format='array_record'"
        raise DataError(f"{folder}: expected the layout array_record, found {layout}; {advice}")
    _choose_split(split, info.splits, name)
    if not isinstance(kinds.get("image"), features.Image):
        found = ", ".join(sorted(kinds))
        raise DataError(f"{folder}: expected a feature `image` that is an image, found {found}")
    n, (h, w, c) = info.splits[split].num_examples, kinds["image"].shape
    if c not in (1, 3) or kinds["image"].np_dtype != np.uint8:
        found = f"{np.dtype(kinds['image'].np_dtype)} and {c}"
        raise DataError(f"{folder}: expected uint8 images of 1 or 3 channels, found {found}")
    is_class = isinstance(kinds.get("label"), features.ClassLabel)

    def picture(i: int, record: dict, size: tuple[int, int] | None) -> np.ndarray:
        try:
            return _decoded(record["image"], size, c)
        except Exception as error:
            what = f"{split} image {i}: {_line(error)}; mend it or leave it out"
            raise DataError(f"{folder}: {what}") from error

    def read(first: int) -> None:
        span = range(first, min(first + 256, n))
        for i, record in zip(span, records.__getitems__(span), strict=True):
            image[i] = picture(i, record, (h, w))
            label[i] = record["label"] if is_class else 0

    # TFDS decodes one image after the other; their bytes, decoded in threads, are ready sooner.
    decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
    try:
        records = builder.as_data_source(split=split, decoders=decoders)
        if h is None or w is None:  # not fixed: then that of the first image, if all are like it
            h, w, _ = picture(0, records[0], None).shape
        _check_size(folder, (n, h, w, c))
        image, label = np.empty((n, h, w, c), np.uint8), np.zeros(n, np.int32)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(read, range(0, n, 256)))
    except DataError:
        raise
    except Exception as error:  # whatever TFDS, array_record and its C++ have to say
        raise DataError(
            f"{folder}: {split} cannot be read: {_line(error)}; copy it anew"
        ) from error
    return Dataset(image, label, kinds["label"].num_classes if is_class else 0)


def _decoded(encoded: bytes, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """PNG or JPEG -> uint8[h, w, c]. What it is not is found before any pixel is decoded."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    with Image.open(io.BytesIO(encoded)) as image:
        h, w = size or (image.height, image.width)
        if (image.height, image.width, image.mode) != (h, w, mode):
            found = f"{image.height}x{image.width} {image.mode}"
            raise ValueError(f"expected {h}x{w} {mode} like the first, found {found}")
        return np.asarray(image).reshape(h, w, channels)


def _stored(name: str, data_dir: str) -> str:
    """The folder of the newest version of a data set. TFDS's layout: name[/config]/version."""
    if not data_dir:
        raise DataError(f"data_dir: expected the folder that holds {name!r}, found none; give one")
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        raise DataError(f"data_dir: expected a folder, found no {data_dir!r}; check the path")
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    versions = [info.parent for info in infos if re.fullmatch(r"[\d.]+", info.parent.name)]
    versions.sort(key=lambda v: [int(number) for number in re.findall(r"\d+", v.name)])
    found = {version.parent.relative_to(root).as_posix(): str(version) for version in versions}
    if name not in found:
        there = _nearest(name, found) if found else "it holds no TFDS data set"
        raise DataError(f"name: no data set {name!r} in {data_dir}; {there}; prepare it with TFDS")
    return found[name]


def _check_size(where: str, shape: tuple[int, ...]) -> None:
    if (size := int(np.prod(shape, dtype=np.int64))) > MAX_BYTES:
        wanted = f"expected at most {MAX_BYTES / 2**30:.3g} GiB of pixels"
        found = f"{size / 2**30:.3g} GiB ({'x'.join(map(str, shape))})"
        raise DataError(f"{where}: {wanted}, found {found}; use smaller images")


def _choose_split(split: str, splits: Iterable[str], name: str) -> None:
    if split not in splits:
        raise DataError(f"split: {name} has no split {split!r}; {_nearest(split, splits)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    close = difflib.get_close_matches(name, names, 3)
    return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------------------------------- batches

# 8 rounds on at least 2 x 4 bits: with fewer of either, the orders of the smallest sets are seen to
# be unevenly likely.
ROUNDS, MIN_BITS = 8, 4


def shuffled(key: Array, i: Array, n: int) -> Array:
    """What stands at the places i (uint32[...] in 0..n-1) of the random order named by key.

    A bijection of 0..n-1 for any n in 1..2^31-1, computed point by point: no order is stored.
    """
    if not 1 <= n < 2**31:
        raise ValueError(f"n: expected 1..2^31-1, found {n}")
    return walk(random.bits(key, (ROUNDS,), jnp.uint32), i, jnp.uint32(n), half_bits(n))


def walk(keys: Array, i: Array, n: Array, bits: int) -> Array:
    """A Feistel network permutes 0..4^bits-1; what falls outside 0..n-1 goes through it again.

    Until it falls inside, as it must, being on a cycle that began inside (cycle walking: Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). n: uint32[] up to 4^bits.
    """

    def again(x):
        return jnp.where(x < n, x, feistel(keys, x, bits))

    return jax.lax.while_loop(lambda x: jnp.any(x >= n), again, feistel(keys, i, bits))


def half_bits(n: int) -> int:
    """The smallest number, 4 or more, such that 4^half_bits >= n.

    For n > 64 then a pass through the network ends inside 0..n-1 more than one time in four.
    """
    return max(MIN_BITS, ((n - 1).bit_length() + 1) // 2)


def feistel(keys: Array, x: Array, bits: int) -> Array:
    """A bijection of 0..4^bits-1, at x. keys: uint32[rounds]; x: uint32[...]; NumPy's or JAX's.

    Only 32-bit arithmetic that wraps around, so that both give the same numbers.
    """
    mask = np.uint32(2**bits - 1)
    left, right = x >> np.uint32(bits), x & mask
    for k in keys:
        left, right = right, left ^ (_mixed(right ^ k) & mask)
    return (left << np.uint32(bits)) | right


def _mixed(x: Array) -> Array:
    """MurmurHash3's finaliser (Appleby, public domain): every bit depends on all."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def positions(step: Array, batch_size: int, n: int) -> tuple[Array, Array]:
    """Where the batch of a step lies: divmod(step * batch_size + arange(batch_size), n).

    Returns (epoch modulo 2^32, place in the epoch), uint32[b] each; exact for every step < 2^31,
    batch_size < 2^20, n < 2^31, where the product does not fit in the 32 bits that there are.
    """
    if not (1 <= batch_size < 2**20 and 1 <= n < 2**31):
        wanted = "batch_size in 1..2^20-1 and n in 1..2^31-1"
        raise ValueError(f"expected {wanted}, found {batch_size} and {n}")
    step = jnp.asarray(step).astype(jnp.uint32)
    n_, q_b, r_b = (jnp.uint32(x) for x in (n, batch_size // n, batch_size % n))

    def carried(q, r):  # r < 2 n < 2^32
        over = (r >= n_).astype(jnp.uint32)
        return q + over, r - over * n_

    q, r = jnp.uint32(0), jnp.uint32(0)  # the product is q n + r, made bit by bit from the top
    for k in reversed(range(31)):
        bit = (step >> np.uint32(k)) & np.uint32(1)
        q, r = carried(2 * q, 2 * r)
        q, r = carried(q + bit * q_b, r + bit * r_b)
    place = r + jnp.arange(batch_size, dtype=jnp.uint32)
    return q + place // n_, place % n_


def draw(
    image: Array, label: Array, key: Array, step: Array, batch_size: int, flip: bool
) -> tuple[Array, Array]:
    """(x_0 float32[b, h, w, c] in [-1, 1], label int32[b]) of a step; a function of (key, step).

    image uint8[n, h, w, c], label int32[n]: of a Dataset. Every epoch is one random order of all
    images, read on without a gap: a batch may begin in one epoch and end in the next. flip: each
    image is mirrored left to right with probability 1/2, anew at every visit (the official code's
    random_flip_left_right). To be called inside a compiled step, at any step < 2^31.
    """
    if image.dtype != jnp.uint8 or image.ndim != 4 or label.shape != image.shape[:1]:
        found = f"{image.dtype}{list(image.shape)} and {label.dtype}{list(label.shape)}"
        raise ValueError(f"expected image uint8[n, h, w, c] and label int32[n], found {found}")
    n = len(image)
    key_order, key_flip = random.split(key)
    epoch, place = positions(step, batch_size, n)
    order = jax.vmap(lambda e, i: shuffled(random.fold_in(key_order, e), i, n))
    index = order(epoch, place)
    x = image[index]
    if flip:
        mirrored = random.bernoulli(random.fold_in(key_flip, step), shape=(batch_size,))
        x = jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)
    return scale(x), label[index]


def scale(image: Array) -> Array:
    """uint8[...] -> float32[...] in [-1, 1], exactly -1 at 0 and 1 at 255."""
    return image.astype(jnp.float32) / 127.5 - 1


def unscale(x: Array) -> Array:
    """float[...] -> uint8[...]: the nearest level, of what lies outside [-1, 1] the end.

    The official code truncates (utils.unnormalize_data and a cast), and so gives 63 of the 256
    levels one too low; this one undoes `scale` exactly.
    """
    return jnp.clip(jnp.rint((x.astype(jnp.float32) + 1) * 127.5), 0, 255).astype(jnp.uint8)


SOURCES: dict[str, Callable[..., Dataset]] = {"digits": digits, "tfds": tfds}
