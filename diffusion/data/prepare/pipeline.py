"""Preparation: a source of images -> a data set to train on, or only what is in it.

The source is read once, in order; a crew of processes makes each image what the rule asks for; what
comes back is counted and written, in the same order. So the same images give the same bytes, with
any number of processes. Memory does not grow with the number of images, but for 16 bytes of each: a
hash, by which duplicates are found, and the size it came in.
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

from diffusion.data.prepare import archives, image_decoding, parallel, tfds_writer

SPLITS = ("train", "test")
NAMED = 100  # of the images left out are kept by name; all are counted
SAMPLE, SAMPLE_BYTES = 64, 32 * 2**20  # images in a summary, if they take no more memory


class PrepareError(Exception):
    """One line: what was expected, what was found, what to do."""


class Summary(NamedTuple):
    """What came, and what the set holds of it.

    images: {split: how many}, without splits that have none. skipped: (name, why) of the first 100
    that are not in the set; num_skipped: of all. smallest, largest: sizes (h, w) as they came,
    upright, by area; frequent: the three most frequent, with how many. modes: {Pillow's word, or
    'array': how many}. classes: {name: how many}. low, high, mean: of all values stored, 0..255.
    repeats: {split: images with the pixels of an earlier one of the split}; shared: images of test
    with the pixels of one of train; both by 64 bits of BLAKE2b, so that among ten million images
    the chance of any mistake is 3e-6. unchanged: stored as they came, files byte for byte, arrays
    pixel for pixel. num_bytes: of the records. sample: uint8[k, h, w, c], k <= 64 images from all
    over the set, in order.
    """

    images: dict[str, int]
    skipped: tuple[tuple[str, str], ...]
    num_skipped: int
    smallest: tuple[int, int]
    largest: tuple[int, int]
    frequent: tuple[tuple[tuple[int, int], int], ...]
    modes: dict[str, int]
    classes: dict[str, int]
    low: int
    high: int
    mean: float
    repeats: dict[str, int]
    shared: int
    unchanged: int
    num_bytes: int
    sample: np.ndarray


def prepare(
    source: archives.Source,
    rule: image_decoding.ImageSpec,
    folder: str | os.PathLike,
    name: str,
    *,
    version: str = "1.0.0",
    holdout: float | Collection[str] = 0.0,
    on_error: str = "skip",
    workers: int | None = None,
    shard_bytes: int = 256 * 2**20,
    report: Callable[[int], None] = lambda done: None,
) -> Summary:
    """Writes folder/name/version, with the feature `image` and, if there are classes, `label`.

    holdout: what goes to test of a source that leaves it open. A fraction in [0, 1): the images for
    which the SHA-256 of the name in UTF-8, its first 8 bytes as a big-endian number over 2^64, is
    below it; so neither other images nor their order have a say. Or a collection of names.
    on_error: what to do about an image that cannot be used, a key of ON_ERROR. workers: processes;
    1: this one alone; None: as many as there are cores, up to 16. shard_bytes: files are filled up
    to this. report: is told how many images are done.

    The set is there when it is whole, or not at all. Raises PrepareError; and SourceError, if the
    source as a whole does.
    """
    with _one_error(), tfds_writer.whole(folder, name, version) as new:
        writer = tfds_writer.Writer(new, shard_bytes)
        summary = _pass(source, rule, holdout, on_error, workers, report, writer.write)
        about = "\n".join([source.about, _how(rule, holdout), *describe(summary)])
        writer.finish(name, version, rule[:3], source.classes, about)
    return summary


def survey(
    source: archives.Source,
    rule: image_decoding.ImageSpec,
    *,
    holdout: float | Collection[str] = 0.0,
    on_error: str = "skip",
    workers: int | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> Summary:
    """What `prepare` would return, and raise about the images; nothing is written anywhere."""
    with _one_error():
        return _pass(source, rule, holdout, on_error, workers, report, lambda split, record: None)


@contextlib.contextmanager
def _one_error():
    try:
        yield
    except parallel.WorkerError as error:
        where = f"{_shown(error.item.name)}: " if error.item else ""
        raise PrepareError(f"{where}{error}") from error
    except tfds_writer.RecordsError as error:
        raise PrepareError(str(error)) from error




def describe(summary: Summary) -> list[str]:
    """A few lines for people; the first five images left out are named."""
    s = summary
    sizes = ", ".join(f"{h}x{w} ({count:,})" for (h, w), count in s.frequent)
    if s.smallest != s.largest:
        smallest, largest = (f"{h}x{w}" for h, w in (s.smallest, s.largest))
        sizes = f"{smallest} to {largest}, most often {sizes}"
    modes = ", ".join(f"{mode} ({count:,})" for mode, count in s.modes.items())
    lines = [
        f"{sum(s.images.values()):,} images: {_counts(s.images)}; {s.num_skipped:,} skipped",
        f"height x width as they came: {sizes}",
        f"modes as they came: {modes}; {s.unchanged:,} images are stored unchanged",
        f"values {s.low} to {s.high}, mean {s.mean:.1f}; {s.num_bytes / 1e6:,.1f} MB",
    ]
    if s.classes:
        few, many = (f(s.classes, key=s.classes.get) for f in (min, max))
        ends = f"{s.classes[few]:,} ({few}) to {s.classes[many]:,} ({many})"
        ends = ends if s.classes[few] < s.classes[many] else f"{s.classes[few]:,}"
        lines.append(f"{len(s.classes):,} classes of {ends} images")
    shared = f"; {s.shared:,} images of test are in train as well" if "test" in s.images else ""
    lines.append(f"duplicates: {_counts(s.repeats)}{shared}")
    lines += [f"skipped {name}: {why}" for name, why in s.skipped[:5]]
    return lines + ([f"skipped {s.num_skipped - 5:,} more"] if s.num_skipped > 5 else [])


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} in {split}" for split, count in counts.items())


def _how(rule: image_decoding.ImageSpec, holdout: float | Collection[str]) -> str:
    """The rules, for the description of the set."""
    h, w, channels, background = rule
    kind = "grey" if channels == 1 else "RGB"
    text = (
        f"Every image is {h}x{w} (height x width), 8 bits, {kind}: the largest rectangle of this "
        "shape from its middle, averaged over boxes and resampled by Lanczos's filter if larger, "
        f"enlarged bicubically if smaller; what is transparent lies on RGB {tuple(background)}. "
        "What needed none of this is stored as it came, all else as PNG."
    )
    if isinstance(holdout, float | int):
        held = f"the SHA-256 of their name, over its range, is below {holdout}"
    else:
        held = f"their name is among {len(holdout):,} that were given"
    return text + (f" Images are in test if {held}." if holdout else "")


def _shown(name: str) -> str:
    """A file may be called anything: on the console that is one line, and no command to it."""
    return "".join(c if c.isprintable() else "?" for c in name)




class _Cleaned(NamedTuple):
    """An image ready to be written, and what is counted of it. total: the sum of its values."""

    record: bytes
    hash: int
    size: tuple[int, int]
    mode: str
    changed: bool
    low: int
    high: int
    total: int


def _pass(source, rule, holdout, on_error, workers, report, write) -> Summary:
    """Every image once, in order: cleaned, counted, and given to write(split, record)."""
    if on_error not in ON_ERROR:
        raise PrepareError(f"on_error: expected {' or '.join(ON_ERROR)}, found {on_error!r}")
    if workers is not None and workers < 1:
        raise PrepareError(f"workers: expected 1 or more, found {workers}")
    tfds_writer.check_classes(source.classes)
    split_of, unmet = _splitter(holdout)
    tally, done, like = _Tally(rule), 0, "there is no image"
    size = functools.partial(_size, values=math.prod(rule[:3]))
    args = rule, source.classes
    cleaned = parallel.parallel_map(_cleaner, args, source.items(), size, workers or parallel.cores())
    with contextlib.closing(cleaned) as chunks:
        for items, results in chunks:
            for item, result in zip(items, results, strict=True):
                split = split_of(item)
                if isinstance(result, _Cleaned):
                    tally.add(split, item.label, result)
                    write(split, result.record)
                else:
                    ON_ERROR[on_error](tally, _shown(item.name), result)
            done += len(items)
            like = f"they are like {_shown(items[0].name)}"
            report(done)
    if unmet:
        found = f"{', '.join(map(_shown, sorted(unmet)[:5]))} ({len(unmet):,} in all)"
        raise PrepareError(f"holdout: expected names of images, found {found}; {like}")
    return tally.summary(source.classes)


def _size(item: archives.Item, values: int) -> int:
    """Bytes that an image takes while it is under way: as it came, and, about, as it will be."""
    x = item.content
    return values + (len(x) if isinstance(x, bytes) else getattr(x, "nbytes", 0))


def _cleaner(
    rule: image_decoding.ImageSpec, classes: tuple[str, ...]
) -> Callable[[archives.Item], _Cleaned | str]:
    """item -> what to write, or why it cannot be used."""
    encode = tfds_writer.encoder(rule[:3], classes)

    def clean(item: archives.Item) -> _Cleaned | str:
        if isinstance(item.content, archives.SourceError):
            return str(item.content).removeprefix(f"{item.name}: ")
        if classes and not 0 <= item.label < len(classes):
            return f"expected a label of 0 to {len(classes) - 1}, found {item.label}"
        try:
            picture = image_decoding.normalize_image(item.content, rule)
        except image_decoding.ImageError as error:
            return str(error)
        x = picture.pixels
        return _Cleaned(
            record=encode(picture.encoded, item.label),
            hash=int.from_bytes(hashlib.blake2b(x.tobytes(), digest_size=8).digest(), "big"),
            size=picture.size,
            mode=picture.mode,
            changed=picture.changed,
            low=int(x.min()),
            high=int(x.max()),
            total=int(x.sum(dtype=np.int64)),
        )

    return clean


def _splitter(
    holdout: float | Collection[str],
) -> tuple[Callable[[archives.Item], str], set[str]]:
    """(item -> its split, the names held out that no item has had yet)."""
    if isinstance(holdout, str):
        raise PrepareError(f"holdout: expected a fraction or several names, found {holdout!r}")
    by_name = not isinstance(holdout, float | int)
    if not by_name and not 0 <= holdout < 1:
        raise PrepareError(f"holdout: expected a fraction in [0, 1), found {holdout}")
    names = frozenset(holdout if by_name else ())
    unmet = set(names)

    def split_of(item: archives.Item) -> str:
        if item.split and holdout:
            found = f"{_shown(item.name)} in {item.split}"
            raise PrepareError(f"holdout: expected a source without splits, found {found}; use 0.0")
        unmet.discard(item.name)
        held = item.name in names if by_name else _fraction(item.name) < holdout
        return item.split or ("test" if held else "train")

    return split_of, unmet


def _fraction(name: str) -> float:
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64




class _Tally:
    """What becomes a summary."""

    def __init__(self, rule: image_decoding.ImageSpec):
        self.rule, self.values = rule, math.prod(rule[:3])
        self.hashes = {split: array.array("Q") for split in SPLITS}
        self.sizes = array.array("Q")
        self.modes, self.labels = collections.Counter(), collections.Counter()
        self.skipped, self.num_skipped = [], 0
        self.low, self.high, self.total, self.unchanged, self.num_bytes = 255, 0, 0, 0, 0
        self.room = min(SAMPLE, max(1, SAMPLE_BYTES // self.values))
        self.sample, self.stride = [], 1

    def add(self, split: str, label: int, x: _Cleaned) -> None:
        if len(self.sizes) % self.stride == 0:
            self.sample.append(x.record)
            if len(self.sample) == 2 * self.room:
                self.sample, self.stride = self.sample[::2], 2 * self.stride
        self.hashes[split].append(x.hash)
        self.sizes.append(x.size[0] << 32 | x.size[1])
        self.modes[x.mode] += 1
        self.labels[label] += 1
        self.low, self.high = min(self.low, x.low), max(self.high, x.high)
        self.total += x.total
        self.unchanged += not x.changed
        self.num_bytes += len(x.record)

    def skip(self, name: str, why: str) -> None:
        self.num_skipped += 1
        if len(self.skipped) < NAMED:
            self.skipped.append((name, why))

    def fail(self, name: str, why: str) -> None:
        raise PrepareError(f"{name}: {why}")

    def summary(self, classes: tuple[str, ...]) -> Summary:
        n = len(self.sizes)
        if not n and not self.skipped:
            raise PrepareError("expected images, found none in the source; choose another")
        if not n:
            name, why = self.skipped[0]
            raise PrepareError(f"none of {self.num_skipped:,} images can be used; {name}: {why}")
        sizes, counts = np.unique(np.frombuffer(self.sizes, np.uint64), return_counts=True)
        areas = (sizes >> 32) * (sizes & 0xFFFFFFFF)
        frequent = np.argsort(-counts, kind="stable")[:3]
        hashes = {split: np.frombuffer(x, np.uint64) for split, x in self.hashes.items()}
        for x in hashes.values():
            x.sort()  # in place, where np.unique and np.isin would take several times as much
        there = {split: x for split, x in hashes.items() if len(x)}
        return Summary(
            images={split: len(x) for split, x in there.items()},
            skipped=tuple(self.skipped),
            num_skipped=self.num_skipped,
            smallest=_unpacked(sizes[areas.argmin()]),
            largest=_unpacked(sizes[areas.argmax()]),
            frequent=tuple((_unpacked(sizes[i]), int(counts[i])) for i in frequent),
            modes=dict(self.modes.most_common()),
            classes={name: self.labels[label] for label, name in enumerate(classes)},
            low=self.low,
            high=self.high,
            mean=self.total / (n * self.values),
            repeats={split: int((x[1:] == x[:-1]).sum()) for split, x in there.items()},
            shared=_shared(hashes["train"], hashes["test"]),
            unchanged=self.unchanged,
            num_bytes=self.num_bytes,
            sample=self._pixels(),
        )

    def _pixels(self) -> np.ndarray:
        """Evenly spaced ones, decoded, of those that were kept."""
        n = len(self.sample)
        chosen = np.linspace(0, n - 1, min(self.room, n)).round().astype(int)
        files = [tfds_writer.image_of(self.sample[i]) for i in chosen]
        return np.stack([image_decoding.normalize_image(file, self.rule).pixels for file in files])


def _unpacked(size: np.uint64) -> tuple[int, int]:
    return int(size) >> 32, int(size) & 0xFFFFFFFF


def _shared(train: np.ndarray, test: np.ndarray) -> int:
    """How many of test are in train; both are sorted."""
    return int((np.searchsorted(train, test, "right") > np.searchsorted(train, test)).sum())


ON_ERROR: dict[str, Callable[[_Tally, str, str], None]] = {"skip": _Tally.skip, "fail": _Tally.fail}
