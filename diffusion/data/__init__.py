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
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.utils.errors import DataError


class ImageDataset(NamedTuple):
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


class ArrayDataset(NamedTuple):
    """All of it in memory. image: uint8[n, h, w, c]; label, num_classes: as in Images."""

    image: np.ndarray
    label: np.ndarray
    num_classes: int


def open_dataset(source: str, split: str, **config: Any) -> ImageDataset:
    """SOURCES[source](split, **config), or a DataError that says what is not as it should be."""
    if source not in SOURCES:
        raise DataError(f"source: {source!r} is not known; {_nearest(source, SOURCES)}")
    known = list(inspect.signature(SOURCES[source]).parameters)[1:]
    for key in config:
        if key not in known:
            raise DataError(f"{key}: not a key of source {source!r}; {_nearest(key, known)}")
    return SOURCES[source](split, **config)


def dataset_digest(dataset: ArrayDataset) -> str:
    """16 hexadecimal digits of a SHA-256 over shapes, types and every byte, to notice a change."""
    digest = hashlib.sha256()
    for x in (dataset.image, dataset.label, np.int64(dataset.num_classes)):
        digest.update(f"{x.dtype}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()[:16]


def fingerprint(images: ImageDataset) -> str:
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


def digits(split: str, name: str = "", data_dir: str = "") -> ImageDataset:
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
    return ImageDataset(len(image), (8, 8, 1), 10, lambda i: (image[list(i)], label[list(i)]))


def tfds(split: str, name: str = "", data_dir: str = "") -> ImageDataset:
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
    return ImageDataset(n, (h, w, c), kinds["label"].num_classes if is_class else 0, read)


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


SOURCES: dict[str, Callable[..., ImageDataset]] = {"digits": digits, "tfds": tfds}
