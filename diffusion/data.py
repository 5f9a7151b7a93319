"""Data: named sources of images, and the ways of reading them: whole, streamed, in order.

A set that fits lives as bytes on the device, where the compiled step draws its batches; a larger
one is streamed, the same images in the same batches (batches.py). Evaluation reads a split once, in
order.
"""

import difflib
import functools
import hashlib
import inspect
import io
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

# Here, before there is any thread: while grain is imported, what other threads import (a checkpoint
# that is being saved) comes out as a stand-in that cannot be called (etils' lazy imports).
import grain
import numpy as np

from diffusion import batches

MAX_BYTES = 16 * 2**30  # of pixels: what a whole data set may take of the memory of host and device
THREADS = min(16, os.cpu_count() or 1)  # decoders of pictures, which let go of Python's lock


class DataError(Exception):
    """A data set that cannot be had; one line: what was expected, what was found, what to do."""


class Images(NamedTuple):
    """A split of a data set, wherever it lies.

    n: how many. shape: (h, w, c), c 1 or 3. num_classes: 0 if there are no labels.
    read: ints [k] in 0..n-1 -> (uint8[k, h, w, c], int32[k] labels in 0..num_classes-1, else 0); in
    any thread, and in any process that it is sent to. Raises DataError naming what is damaged.
    """

    n: int
    shape: tuple[int, int, int]
    num_classes: int
    read: Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Of all pixels."""
        return self.n * int(np.prod(self.shape))


class Dataset(NamedTuple):
    """All of it in memory. image: uint8[n, h, w, c]; label, num_classes: as in Images."""

    image: np.ndarray
    label: np.ndarray
    num_classes: int


def find(source: str, split: str, **config: Any) -> Images:
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


def mark(images: Images) -> str:
    """16 hexadecimal digits of a SHA-256 over count, shape and images: all of them, of small sets.

    Of others 16 MiB of pixels, or 1,024 images, evenly spread: a moment; what was done with a set
    before can be known again. Raises DataError.
    """
    most = max(1024, 2**24 // math.prod(images.shape))
    digest = hashlib.sha256(f"{images.n}{images.shape}{images.num_classes}".encode())
    chosen = np.unique(np.linspace(0, images.n - 1, min(most, images.n)).round().astype(int))
    for image, label in map(images.read, np.array_split(chosen, -(-len(chosen) // 64))):
        digest.update(image.tobytes() + label.tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------- reading


def load(images: Images) -> Dataset:
    """The whole set. Raises DataError, at once if it is of more than MAX_BYTES."""
    if images.nbytes > MAX_BYTES:
        wanted = f"expected at most {MAX_BYTES / 2**30:.3g} GiB of pixels"
        found = f"{images.nbytes / 2**30:.3g} GiB ({images.n}x{'x'.join(map(str, images.shape))})"
        raise DataError(f"{wanted}, found {found}; stream it by data.on_device_gib=0")
    image = np.empty((images.n, *images.shape), np.uint8)
    label = np.empty(images.n, np.int32)

    def read(first: int) -> None:
        part = slice(first, min(first + 256, images.n))
        image[part], label[part] = images.read(range(part.start, part.stop))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(0, images.n, 256)))
    return Dataset(image, label, images.num_classes)


def stream(
    images: Images,
    key: Any,
    steps: range,
    batch_size: int,
    rows: np.ndarray | slice = slice(None),
    workers: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(uint8[r, h, w, c], int32[r]) for each of the steps: what batches.taken gives, unflipped.

    key: as for batches.chosen. rows: which of the batch's images are wanted, for a process that
    feeds only some of the devices. workers: processes that read ahead; 0: threads of this one. What
    comes depends on neither. Raises DataError.
    """
    if not len(steps):
        return
    first, last = (step * batch_size // images.n for step in (steps[0], steps[-1] + 1))
    if last - first > MAX_EPOCHS:
        wanted = f"expected at most {MAX_EPOCHS:,} epochs of a set that is streamed"
        raise DataError(
            f"{wanted}, found {last - first:,}; let it live on the device: data.on_device_gib=1"
        )
    words = batches.epoch_words(key, first, last)

    def read(step):
        return images.read(batches.indices(words, first, step, batch_size, images.n)[rows])

    yield from _ahead(read, steps, workers)


MAX_EPOCHS = 2**20  # 32 bytes each: what names the orders of all of them is made beforehand


def in_order(
    images: Images,
    batch_size: int,
    rows: np.ndarray | slice = slice(None),
    workers: int = 0,
    first: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(uint8[r, h, w, c], int32[r], bool[r]) of each batch: every image once, in order.

    The last batch is filled up with the last image, and False says so: nothing is dropped, and all
    batches have one shape. rows, workers: as in `stream`. first: the batch to start from. Raises
    DataError.
    """

    def read(batch):
        at = (batch * batch_size + np.arange(batch_size))[rows]
        return *images.read(np.minimum(at, images.n - 1)), at < images.n

    yield from _ahead(read, range(first, -(-images.n // batch_size)), workers)


def _ahead(read: Callable[[int], Any], numbers: range, workers: int) -> Iterator[Any]:
    """map(read, numbers), in order, read ahead by threads or worker processes."""

    def told(number):  # an error would come out of grain with pages of its own
        try:
            return read(number)
        except DataError as error:
            return error

    threads = max(1, THREADS // max(workers, 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    ahead = grain.MapDataset.range(numbers.start, numbers.stop).map(told).to_iter_dataset(options)
    if workers:
        ahead = ahead.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    for result in ahead:
        if isinstance(result, DataError):
            raise result
        yield result


# ---------------------------------------------------------------------------------------- sources


def digits(split: str, name: str = "", data_dir: str = "") -> Images:
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
    image = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    label = label[chosen]
    return Images(len(image), (8, 8, 1), 10, lambda i: (image[list(i)], label[list(i)]))


def tfds(split: str, name: str = "", data_dir: str = "") -> Images:
    """The data set `name` of TFDS, stored in data_dir in the array_record layout; no TensorFlow.

    name: as TFDS has it, `cifar10`, `celeb_a_hq/256`; the newest version is read. The images must
    be 8-bit grey or RGB, all of one size; a feature `label`, if it is a class, gives the classes.
    Raises DataError for anything missing, unfit or damaged.
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
    if not n:
        raise DataError(f"{folder}: expected images in the split {split}, found none")
    is_class = isinstance(kinds.get("label"), features.ClassLabel)
    records = _Records(folder, split)
    if h is None or w is None:  # not fixed: then that of the first image, if all are like it
        h, w, _ = _decoded(records, 0, records[[0]][0], None, c).shape
    read = functools.partial(_read, records, (h, w, c), is_class)
    return Images(n, (h, w, c), kinds["label"].num_classes if is_class else 0, read)


class _Records:
    """The undecoded records of a split; sent to another process, they are opened anew there."""

    def __init__(self, folder: str, split: str):
        self.folder, self.split = folder, split

    def __getitem__(self, i: Sequence[int]) -> list[dict]:
        try:
            return self._opened.__getitems__([int(k) for k in i])
        except Exception as error:  # whatever array_record and its C++ have to say
            what = f"{self.split} cannot be read: {_line(error)}; copy it anew"
            raise DataError(f"{self.folder}: {what}") from error

    @functools.cached_property
    def _opened(self):
        import tensorflow_datasets

        # TFDS decodes one image after the other; their bytes, decoded in threads, are ready sooner.
        decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
        builder = tensorflow_datasets.builder_from_directory(self.folder)
        return builder.as_data_source(split=self.split, decoders=decoders)

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "split": self.split}


def _read(records: _Records, shape: tuple[int, int, int], is_class: bool, i: Sequence[int]):
    image, label = np.empty((len(i), *shape), np.uint8), np.zeros(len(i), np.int32)
    for k, (number, record) in enumerate(zip(i, records[i], strict=True)):
        image[k] = _decoded(records, number, record, shape[:2], shape[2])
        label[k] = record["label"] if is_class else 0
    return image, label


def _decoded(
    records: _Records, i: int, record: dict, size: tuple[int, int] | None, channels: int
) -> np.ndarray:
    """PNG or JPEG -> uint8[h, w, c]. What it is not is found before any pixel is decoded."""
    from PIL import Image

    mode = "L" if channels == 1 else "RGB"
    try:
        with Image.open(io.BytesIO(record["image"])) as image:
            h, w = size or (image.height, image.width)
            if (image.height, image.width, image.mode) != (h, w, mode):
                found = f"{image.height}x{image.width} {image.mode}"
                raise ValueError(f"expected {h}x{w} {mode} like the first, found {found}")
            return np.asarray(image).reshape(h, w, channels)
    except Exception as error:
        what = f"{records.split} image {i}: {_line(error)}; mend it or leave it out"
        raise DataError(f"{records.folder}: {what}") from error


def _stored(name: str, data_dir: str) -> str:
    """The folder of the newest version of a data set. TFDS's layout: name[/config]/version."""
    if not data_dir:
        raise DataError(f"data_dir: expected the folder that holds {name!r}, found none; give one")
    root = pathlib.Path(data_dir).expanduser()
    if not root.is_dir():
        advice = "make the data set with --mode=prepare, or name another folder"
        raise DataError(f"data_dir: expected a folder, found no {data_dir!r}; {advice}")
    infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
    versions = [info.parent for info in infos if re.fullmatch(r"[\d.]+", info.parent.name)]
    versions.sort(key=lambda v: [int(number) for number in re.findall(r"\d+", v.name)])
    found = {version.parent.relative_to(root).as_posix(): str(version) for version in versions}
    if name not in found:
        there = _nearest(name, found) if found else "it holds no TFDS data set"
        advice = "prepare it with --mode=prepare"
        raise DataError(f"name: no data set {name!r} in {data_dir}; {there}; {advice}")
    return found[name]


def _choose_split(split: str, splits: Iterable[str], name: str) -> None:
    if split not in splits:
        raise DataError(f"split: {name} has no split {split!r}; {_nearest(split, splits)}")


def _nearest(name: str, names: Iterable[str]) -> str:
    names = sorted(names)
    close = difflib.get_close_matches(name, names, 3)
    return f"nearest: {', '.join(close)}" if close else f"there are: {', '.join(names)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


SOURCES: dict[str, Callable[..., Images]] = {"digits": digits, "tfds": tfds}
