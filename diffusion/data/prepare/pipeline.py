"""Makes a data set of a source of images, or surveys what it would hold.

The source is read once, in order; a pool of processes brings each image to the spec's form; the
results are counted and written in the same order. So the same images give the same bytes, with any
number of processes. Memory grows by 16 bytes an image: a hash to find duplicates, and its size.
"""

import array
import collections
import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from diffusion.data import escape, mismatch
from diffusion.data.prepare import tfds_writer
from diffusion.data.prepare.archives import Item, Source
from diffusion.data.prepare.image_decoding import FITS, ImageError, ImageSpec, normalize_image
from diffusion.data.prepare.parallel import parallel_map
from diffusion.utils.errors import DataError

SPLITS = ("train", "test")
MAX_SKIPPED_NAMES = 100
SAMPLE_IMAGES, SAMPLE_BYTES = 64, 32 * 2**20  # in a summary, whichever is less
REPORT_EVERY = 256  # images
MAX_FEW_LEVELS = 64  # more are so near to each other that any few values may be among them


class Summary(NamedTuple):
    """What a source holds, and what a data set takes of it.

    Duplicates have the same pixels in the data set, by 64 bits of BLAKE2b: among ten million images
    the probability of any mistake is 3e-6.
    """

    images: dict[str, int]  # by split, without empty ones
    skipped: tuple[tuple[str, str], ...]  # (name, why) of the first 100
    num_skipped: int  # of all
    smallest: tuple[int, int]  # (h, w) by area, as it came, upright
    largest: tuple[int, int]
    frequent: tuple[tuple[tuple[int, int], int], ...]  # the three most frequent sizes, with counts
    modes: dict[str, int]  # Pillow's name, or 'array' -> count
    classes: dict[str, int]  # name -> count
    low: int  # of all values stored, 0..255
    high: int
    levels: int  # see `evenly_spaced_levels`
    mean: float
    repeats: dict[str, int]  # split -> images that repeat an earlier one of the split
    shared: int  # images of test that are in train
    unchanged: int  # stored as they came: files byte for byte, arrays pixel for pixel
    num_bytes: int  # of the records
    sample: np.ndarray  # uint8[k, h, w, c], k <= 64 images from all over the data set, in order


def prepare(
    source: Source,
    spec: ImageSpec,
    folder: str | os.PathLike,
    name: str,
    *,
    shard_bytes: int = 256 * 2**20,
    **options,
) -> Summary:
    """Writes the data set folder/name, with features `image` and, if there are classes, `label`.

    A file is filled up to shard_bytes; other options are those of `survey`. Raises DataError as
    `survey` does, and if the data set exists or cannot be written. An error leaves nothing of it.
    """
    with tfds_writer.create_folder(folder, name) as new:
        writer = tfds_writer.Writer(new, shard_bytes)
        summary = survey(source, spec, **options, write=writer.write)
        how = _description(spec, options.get("holdout", 0.0))
        about = "\n".join([source.about, how, *describe(summary)])
        writer.finish(name, spec[:3], source.classes, about)
    return summary


def survey(
    source: Source,
    spec: ImageSpec,
    *,
    holdout: float | Collection[str] = 0.0,
    on_error: str = "skip",
    workers: int = 0,
    report: Callable[[int], None] = lambda done: None,
    write: Callable[[str, bytes], None] = lambda split, record: None,
) -> Summary:
    """Returns the summary of the data set that `prepare` would write.

    Args:
      source: The images.
      spec: The form that all images are brought to.
      holdout: What goes to the split test, for a source without splits: names, or a fraction in
        [0, 1). Its images are those for which the SHA-256 of the name in UTF-8, its first 8 bytes
        as a big-endian number over 2^64, lies below it, whatever other images there are.
      on_error: 'skip' images that cannot be used, or 'fail' at the first.
      workers: Processes; 1 for this one alone, 0 for one a core.
      report: Called with the number of images done.
      write: Called with (split, record) of each image.

    Raises:
      DataError: No image can be used, the source is damaged, or `holdout` does not fit it.
    """
    if on_error not in ("skip", "fail"):
        raise ValueError(f"on_error: expected skip or fail, found {on_error!r}")
    tfds_writer.check_classes(source.classes)
    split_of = _Splitter(holdout)
    tally, done = _Tally(spec), 0
    results = parallel_map(
        functools.partial(_encode_item, spec, source.classes),
        source.items(),
        workers,
        nbytes=functools.partial(_item_bytes, math.prod(spec[:3])),
        name=lambda item: escape(item.name),
    )
    with contextlib.closing(results):
        for done, (item, result) in enumerate(results, 1):
            split = split_of(item)
            if isinstance(result, _Encoded):
                tally.add(split, item.label, result)
                write(split, result.record)
            elif on_error == "fail":
                raise DataError(f"{escape(item.name)}: {result}")
            else:
                tally.skip(escape(item.name), result)
            if done % REPORT_EVERY == 0:
                report(done)
    if done % REPORT_EVERY:
        report(done)
    split_of.check_all_found()
    return tally.summary(source.classes)


def describe(summary: Summary) -> list[str]:
    """Returns a few lines for people; the first five skipped images are named."""
    s = summary
    sizes = ", ".join(f"{h}x{w} ({count:,})" for (h, w), count in s.frequent)
    if s.smallest != s.largest:
        smallest, largest = (f"{h}x{w}" for h, w in (s.smallest, s.largest))
        sizes = f"{smallest} to {largest}, most often {sizes}"
    modes = ", ".join(f"{mode} ({count:,})" for mode, count in s.modes.items())
    lines = [
        f"{sum(s.images.values()):,} images: {_counts(s.images)}; {s.num_skipped:,} skipped",
        f"original height x width: {sizes}",
        f"original modes: {modes}; {s.unchanged:,} images are stored unchanged",
        f"values {s.low} to {s.high}, mean {s.mean:.1f}; {s.num_bytes / 1e6:,.1f} MB",
    ]
    if s.levels < 256:
        advice = f"train with --config.data.levels={s.levels}"
        lines.append(f"{s.levels} levels, evenly spaced over 0..255: {advice}")
    if s.classes:
        fewest, most = (f(s.classes, key=s.classes.get) for f in (min, max))
        ends = f"{s.classes[fewest]:,} ({fewest}) to {s.classes[most]:,} ({most})"
        ends = ends if s.classes[fewest] < s.classes[most] else f"{s.classes[fewest]:,}"
        lines.append(f"{len(s.classes):,} classes of {ends} images")
    shared = f"; {s.shared:,} images of test are in train as well" if "test" in s.images else ""
    lines.append(f"duplicates: {_counts(s.repeats)}{shared}")
    lines += [f"skipped {name}: {why}" for name, why in s.skipped[:5]]
    return lines + ([f"skipped {s.num_skipped - 5:,} more"] if s.num_skipped > 5 else [])


def evenly_spaced_levels(occurring: np.ndarray) -> int:
    """Returns the least number of levels, evenly spaced over 0..255, that has all values.

    Args:
      occurring: bool[256], which values occur: levels that were rounded, or truncated, to integers.

    Returns:
      2 to MAX_FEW_LEVELS, of which at least half occur, or 256.
    """
    values = occurring.nonzero()[0]
    for levels in range(2, min(MAX_FEW_LEVELS, 2 * len(values)) + 1):
        exact = np.arange(levels) * 255 / (levels - 1)
        if any(np.isin(values, to_byte(exact)).all() for to_byte in (np.rint, np.floor)):
            return levels
    return 256


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} in {split}" for split, count in counts.items())


def describe_spec(spec: ImageSpec) -> str:
    """Returns the form of the images, in words."""
    kind = "grey" if spec.channels == 1 else "RGB"
    size = f"{spec.height}x{spec.width} (height x width), 8 bits, {kind}"
    return f"{size}: {FITS[spec.fit]}, on a background of RGB {tuple(spec.background)}"


def _description(spec: ImageSpec, holdout: float | Collection[str]) -> str:
    text = (
        f"Every image is {describe_spec(spec)}; averaged over boxes and resampled by Lanczos's "
        "filter if larger, enlarged bicubically if smaller. Images that need none of this are "
        "stored as they came, others as PNG."
    )
    if isinstance(holdout, float | int):
        held = f"the SHA-256 of their name, over its range, is below {holdout}"
    else:
        held = f"their name is among {len(holdout):,} given names"
    return text + (f" Images are in test if {held}." if holdout else "")


class _Encoded(NamedTuple):
    """An image ready to be written, and what the summary needs of it."""

    record: bytes
    hash: int
    size: tuple[int, int]
    mode: str
    changed: bool
    occurring: np.ndarray  # bool[256], the values that it has
    total: int  # the sum of its values


def _item_bytes(values: int, item: Item) -> int:
    """Returns the bytes that an image takes under way: as it came and, about, as a record."""
    x = item.content
    return values + 1024 + (len(x) if isinstance(x, bytes) else getattr(x, "nbytes", 0))


def _encode_item(spec: ImageSpec, classes: tuple[str, ...], item: Item) -> _Encoded | str:
    """Returns the image of an item, encoded, or why it cannot be used."""
    if isinstance(item.content, DataError):
        return str(item.content).removeprefix(f"{item.name}: ")
    if classes and not 0 <= item.label < len(classes):
        return f"expected a label of 0 to {len(classes) - 1}, found {item.label}"
    try:
        image = normalize_image(item.content, spec)
    except ImageError as error:
        return str(error)
    x = image.pixels
    return _Encoded(
        record=tfds_writer.make_encoder(spec[:3], classes)(image.encoded, item.label),
        hash=int.from_bytes(hashlib.blake2b(x.tobytes(), digest_size=8).digest(), "big"),
        size=image.size,
        mode=image.mode,
        changed=image.changed,
        occurring=np.bincount(x.ravel(), minlength=256) > 0,
        total=int(x.sum(dtype=np.int64)),
    )


class _Splitter:
    """Maps items to splits."""

    def __init__(self, holdout: float | Collection[str]):
        if isinstance(holdout, str):
            raise mismatch("data.holdout", "a fraction or several names", repr(holdout))
        by_name = not isinstance(holdout, float | int)
        if not by_name and not 0 <= holdout < 1:
            raise mismatch("data.holdout", "a fraction in [0, 1)", holdout)
        self._fraction, self._names = (0.0, frozenset(holdout)) if by_name else (holdout, ())
        self._missing, self._example = set(self._names), "there is no image"

    def __call__(self, item: Item) -> str:
        if item.split and (self._names or self._fraction):
            found = f"{item.name} in {item.split}"
            raise mismatch("data.holdout", "a source without splits", found, "use 0.0")
        self._missing.discard(item.name)
        self._example = f"they are like {item.name}"
        held = item.name in self._names or _name_hash(item.name) < self._fraction
        return item.split or ("test" if held else "train")

    def check_all_found(self) -> None:
        if self._missing:
            found = f"{', '.join(sorted(self._missing)[:5])} ({len(self._missing):,} in all)"
            raise mismatch("data.holdout_names", "names of images", found, self._example)


def _name_hash(name: str) -> float:
    """Returns a number in [0, 1) that is uniform over names."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class _Tally:
    """Counts images for a summary."""

    def __init__(self, spec: ImageSpec):
        self.spec, self.values = spec, math.prod(spec[:3])
        self.hashes = {split: array.array("Q") for split in SPLITS}
        self.sizes = array.array("Q")
        self.modes, self.labels = collections.Counter(), collections.Counter()
        self.skipped, self.num_skipped = [], 0
        self.total, self.unchanged, self.num_bytes = 0, 0, 0
        self.occurring = np.zeros(256, bool)
        self.sample_size = min(SAMPLE_IMAGES, max(1, SAMPLE_BYTES // self.values))
        self.sample, self.stride = [], 1  # every stride-th record, at most 2 * sample_size

    def add(self, split: str, label: int, x: _Encoded) -> None:
        if len(self.sizes) % self.stride == 0:
            self.sample.append(x.record)
            if len(self.sample) == 2 * self.sample_size:
                self.sample, self.stride = self.sample[::2], 2 * self.stride
        self.hashes[split].append(x.hash)
        self.sizes.append(x.size[0] << 32 | x.size[1])
        self.modes[x.mode] += 1
        self.labels[label] += 1
        self.occurring |= x.occurring
        self.total += x.total
        self.unchanged += not x.changed
        self.num_bytes += len(x.record)

    def skip(self, name: str, why: str) -> None:
        self.num_skipped += 1
        if len(self.skipped) < MAX_SKIPPED_NAMES:
            self.skipped.append((name, why))

    def summary(self, classes: tuple[str, ...]) -> Summary:
        n = len(self.sizes)
        if not n and not self.skipped:
            raise DataError("expected images, found none in the source; choose another")
        if not n:
            name, why = self.skipped[0]
            raise DataError(f"none of {self.num_skipped:,} images can be used; {name}: {why}")
        sizes, counts = np.unique(np.frombuffer(self.sizes, np.uint64), return_counts=True)
        areas = (sizes >> 32) * (sizes & 0xFFFFFFFF)
        by_count = np.argsort(-counts, kind="stable")[:3]
        hashes = {split: np.frombuffer(x, np.uint64) for split, x in self.hashes.items()}
        for x in hashes.values():
            x.sort()  # in place: np.unique and np.isin would take several times the memory
        train, test = hashes["train"], hashes["test"]
        shared = np.searchsorted(train, test, "right") > np.searchsorted(train, test)
        hashes = {split: x for split, x in hashes.items() if len(x)}
        return Summary(
            images={split: len(x) for split, x in hashes.items()},
            skipped=tuple(self.skipped),
            num_skipped=self.num_skipped,
            smallest=_unpack(sizes[areas.argmin()]),
            largest=_unpack(sizes[areas.argmax()]),
            frequent=tuple((_unpack(sizes[i]), int(counts[i])) for i in by_count),
            modes=dict(self.modes.most_common()),
            classes={name: self.labels[label] for label, name in enumerate(classes)},
            low=int(self.occurring.nonzero()[0][0]),
            high=int(self.occurring.nonzero()[0][-1]),
            levels=evenly_spaced_levels(self.occurring),
            mean=self.total / (n * self.values),
            repeats={split: int((x[1:] == x[:-1]).sum()) for split, x in hashes.items()},
            shared=int(shared.sum()),
            unchanged=self.unchanged,
            num_bytes=self.num_bytes,
            sample=self._sample_pixels(),
        )

    def _sample_pixels(self) -> np.ndarray:
        n = len(self.sample)
        chosen = np.linspace(0, n - 1, min(self.sample_size, n)).round().astype(int)
        files = [tfds_writer.image_of(self.sample[i]) for i in chosen]
        return np.stack([normalize_image(file, self.spec).pixels for file in files])


def _unpack(size: np.uint64) -> tuple[int, int]:
    return int(size) >> 32, int(size) & 0xFFFFFFFF
