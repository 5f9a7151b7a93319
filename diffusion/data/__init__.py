"""Opens named sources of images, and recognises a data set by its fingerprint.

`loader` reads an ImageDataset into memory or streams it, `augment` turns its bytes into x_0, and
`prepare` makes a data set of the images that a user has.
"""

import difflib
import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath

from diffusion.utils.errors import DataError, error_text
from diffusion.utils.io import is_object_store, local_copy, to_path
from diffusion.utils.object_store import scheme_of

PARALLEL_READS = 128  # records of an object store that one process waits for at a time


class ImageDataset(NamedTuple):
    """One split of a data set.

    `read` maps indices int[k] in 0..n-1 to (image uint8[k, h, w, c], label int32[k]), in any thread
    and any process that it is pickled to. It raises DataError naming a damaged image.
    """

    n: int
    shape: tuple[int, int, int]  # (h, w, c), c 1 or 3
    num_classes: int  # labels are in 0..num_classes-1; 0 classes: all labels are 0
    read: Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return self.n * math.prod(self.shape)


def open_dataset(source: str, split: str, name: str = "", data_dir: str = "") -> ImageDataset:
    """Returns SOURCES[source](split, name, data_dir); raises DataError if it cannot be used."""
    if source not in SOURCES:
        raise DataError(f"data.source: {source!r} is not known; {suggest_names(source, SOURCES)}")
    return SOURCES[source](split, name, data_dir)


def fingerprint(images: ImageDataset) -> str:
    """Returns 16 hexadecimal digits of a SHA-256 over count, shape, classes, images and labels.

    All images of a small set are read; of others 16 MiB of pixels or 1,024 images, evenly spread,
    which takes a moment. Raises DataError.
    """
    limit = max(1024, 2**24 // math.prod(images.shape))
    digest = hashlib.sha256(f"{images.n}{images.shape}{images.num_classes}".encode())
    index = np.unique(np.linspace(0, images.n - 1, min(limit, images.n)).round().astype(int))
    for image, label in map(images.read, np.array_split(index, -(-len(index) // 64))):
        digest.update(image.tobytes() + label.tobytes())
    return digest.hexdigest()[:16]


def suggest_names(name: str, names: Iterable[str], limit: int = 20) -> str:
    """Returns advice that lists the names close to a mistyped one, or else the first few."""
    names = list(names)
    if close := difflib.get_close_matches(name, names, 3):
        return f"nearest: {', '.join(close)}"
    return f"there are: {', '.join(names[:limit])}" + ", …" * (len(names) > limit)


def mismatch(where: object, expected: str, found: object, advice: str = "") -> DataError:
    """Returns the error `where: expected X, found Y; do Z`, with names made printable."""
    text = f"{where}: expected {expected}, found {found}"
    return DataError(escape(f"{text}; {advice}" if advice else text))


def escape(name: str) -> str:
    """Returns a name from a file in printable characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def digits(split: str, name: str = "", data_dir: str = "") -> ImageDataset:
    """Opens scikit-learn's 1,797 handwritten digits, 8x8 grey, which need no download.

    The split test is the 6th, 12th, ... image of each class (296 in all): both splits are balanced
    and hold all writers. Grey levels 0..16 are scaled to 0..255. name and data_dir are not used.
    """
    from sklearn.datasets import load_digits

    _check_split(split, ("train", "test"), "digits")
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
    """Opens a TFDS data set in the array_record layout, without TensorFlow.

    Args:
      split: As the data set names it.
      name: As TFDS names it, `cifar10` or `celeb_a_hq/256`; the newest version is opened. Its
        images are 8-bit grey or RGB of one size; a class feature `label` gives the classes.
      data_dir: The folder that holds it.

    Raises:
      DataError: The data set is missing, unfit or damaged.
    """
    import tensorflow_datasets
    from tensorflow_datasets.core import features

    folder = _find_tfds(name, data_dir)
    if scheme_of(folder) not in ("", "gs"):  # the stores that array_record reads from
        folder = _copy_once(folder)
    try:
        info = tensorflow_datasets.builder_from_directory(folder).info
        kinds = dict(info.features.items())
    except Exception as error:
        why = f"not readable as a TFDS data set: {error_text(error)}"
        raise DataError(f"{folder}: {why}") from error
    if (layout := info.file_format.value) != "array_record":
        advice = "prepare it again with file_format='array_record'"
        raise mismatch(folder, "the layout array_record", layout, advice)
    _check_split(split, info.splits, name)
    if not isinstance(kinds.get("image"), features.Image):
        raise mismatch(folder, "a feature `image` that is an image", ", ".join(sorted(kinds)))
    n, (h, w, c) = info.splits[split].num_examples, kinds["image"].shape
    if c not in (1, 3) or kinds["image"].np_dtype != np.uint8:
        found = f"{np.dtype(kinds['image'].np_dtype)} and {c}"
        raise mismatch(folder, "uint8 images of 1 or 3 channels", found)
    if not n:
        raise mismatch(folder, f"images in the split {split}", "none")
    is_class = isinstance(kinds.get("label"), features.ClassLabel)
    records = _Records(folder, split)
    if h is None or w is None:  # of any size, says the data set: all must be like the first
        h, w, _ = _decode(records, 0, records[[0]][0], None, c).shape
    read = functools.partial(_read, records, (h, w, c), is_class)
    return ImageDataset(n, (h, w, c), kinds["label"].num_classes if is_class else 0, read)


class _Records:
    """Encoded records of a split; opened on first use, and again in every process."""

    def __init__(self, folder: str, split: str):
        self.folder, self.split = folder, split

    def __getitem__(self, index: Sequence[int]) -> list[dict]:
        index = [int(i) for i in index]
        try:
            if not is_object_store(self.folder):
                return self._source.__getitems__(index)
            # A reader waits for one record at a time, and every one takes a round trip.
            return list(self._pool.map(self._source.__getitem__, index))
        except Exception as error:
            what = f"{self.split} cannot be read: {error_text(error)}; copy it anew"
            raise DataError(f"{self.folder}: {what}") from error

    @functools.cached_property
    def _source(self):
        import tensorflow_datasets

        builder = tensorflow_datasets.builder_from_directory(self.folder)
        decoders = {"image": tensorflow_datasets.decode.SkipDecoding()}
        return builder.as_data_source(split=self.split, decoders=decoders)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(PARALLEL_READS)

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "split": self.split}


def _read(records: _Records, shape: tuple[int, int, int], is_class: bool, index: Sequence[int]):
    image, label = np.empty((len(index), *shape), np.uint8), np.zeros(len(index), np.int32)
    for k, (i, record) in enumerate(zip(index, records[index], strict=True)):
        image[k] = _decode(records, i, record, shape[:2], shape[2])
        label[k] = record["label"] if is_class else 0
    return image, label


def _decode(
    records: _Records, i: int, record: dict, size: tuple[int, int] | None, channels: int
) -> np.ndarray:
    """Decodes a PNG or JPEG to uint8[h, w, c]; its header is checked before its pixels."""
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
        what = f"{records.split} image {i}: {error_text(error)}; mend it or leave it out"
        raise DataError(f"{records.folder}: {what}") from error


@functools.cache
def _copy_once(folder: str) -> str:
    return str(local_copy(folder))


def _find_tfds(name: str, data_dir: str) -> str:
    """Returns the folder of a data set's newest version (layout: name[/config]/version)."""
    if not data_dir:
        raise mismatch("data.data_dir", f"the folder that holds {name!r}", "none", "give one")
    root = to_path(data_dir)
    if not root.is_dir():
        advice = "make the data set with --mode=prepare, or name another folder"
        raise mismatch("data.data_dir", "a folder", f"no {data_dir!r}", advice)
    found = _newest_versions(root, root.glob(f"{name}/*/dataset_info.json"))
    if name not in found:  # only now: a bucket may hold many
        infos = [*root.glob("*/*/dataset_info.json"), *root.glob("*/*/*/dataset_info.json")]
        found = _newest_versions(root, infos)
        there = suggest_names(name, sorted(found)) if found else "it holds no TFDS data set"
        advice = "prepare it with --mode=prepare"
        raise DataError(f"data.name: no data set {name!r} in {data_dir}; {there}; {advice}")
    return found[name]


def _newest_versions(root: epath.Path, infos: Iterable[epath.Path]) -> dict[str, str]:
    """Returns {name of a data set: folder of its newest version} of dataset_info.json files."""
    versions = [info.parent for info in infos if re.fullmatch(r"[\d.]+", info.parent.name)]
    versions.sort(key=lambda v: [int(number) for number in re.findall(r"\d+", v.name)])
    return {version.parent.relative_to(root).as_posix(): str(version) for version in versions}


def _check_split(split: str, splits: Iterable[str], name: str) -> None:
    if split not in splits:
        there = suggest_names(split, sorted(splits))
        keys = "bpd.split, eval.references, figures.split"
        raise DataError(f"{name}: expected a split {split!r} ({keys}), found none; {there}")


SOURCES: dict[str, Callable[[str, str, str], ImageDataset]] = {"digits": digits, "tfds": tfds}
