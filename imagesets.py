"""Sets of images, and what is kept of them once they were read through some kinds of features.

A set is a split of the data, or a folder, zip, tar or npz. It is read once, in batches over all
devices; what is kept of it (metrics.Sample) does not grow with it, and is written now and then, so
that a pass that was killed goes on.
"""

import functools
import hashlib
import io
import itertools
import pathlib
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

import settings
from diffusion import data, features, figures, inception, log, metrics, train
from diffusion.ingest import pictures, sources
from diffusion.metrics import Sample
from settings import Fatal

KINDS = {"inception": ("inception", "spatial")}  # of features.FEATURES: the name itself
KEEP_S = 30  # seconds between two writings of what is read so far

# ------------------------------------------------------------------------------------------- sets


class Set(NamedTuple):
    """n images of one shape (h, w, c), in a fixed order.

    batches: (size, rows, first batch) -> the rows of each batch of `size`, uint8[r, h, w, c]; the
             last batch is filled up.
    concern: what a reader of its scores should know, or "".
    """

    name: str
    n: int
    shape: tuple[int, int, int]
    batches: Callable[[int, Any, int], Iterator[np.ndarray]]
    concern: str = ""


def of_split(images: data.Images, split: str, n: int = 0, workers: int = 0) -> Set:
    """n images of a split, evenly spread, as sets may come sorted; 0: all of them."""
    some = images
    if 0 < n < images.n:
        some = images._replace(n=n, read=functools.partial(_read_some, images, n))

    def batches(size, rows, first):
        return (batch[0] for batch in data.in_order(some, size, rows, workers, first))

    return Set(split, some.n, images.shape, batches)


def _read_some(images: data.Images, n: int, i: Any) -> tuple[np.ndarray, np.ndarray]:
    return images.read([k * images.n // n for k in i])


def of_array(name: str, images: np.ndarray) -> Set:
    """uint8[n, h, w, c], here already."""
    read = lambda i: (images[list(i)], np.zeros(len(i), np.int32))  # noqa: E731
    return of_split(data.Images(len(images), images.shape[1:], 0, read), name)


def of_files(path: str, channels: int = 0, most: int = 0) -> Set:
    """The images of a folder, zip, tar or npz, as they are: none is cropped or resized.

    channels: 1 or 3, 0: as the first one has. most: of them, 0: all. Raises Fatal; while they are
    read, for an image of another size or one that cannot be read.
    """
    try:
        source = sources.open_source("folder", archive=path)
        first = next(iter(source.items()))
    except (sources.SourceError, StopIteration) as error:
        why = str(error).removeprefix("data.archive: ") or "expected images, found none"
        raise Fatal(settings.DATA, why if path in why else f"{path}: {why}") from error
    look = pictures.Rule(1, 1, 3)
    size, mode = _picture(path, first, look)[2:4]
    grey = first.content.shape[2:] in ((), (1,)) if mode == "array" else mode[0] in "L1I"
    own = 1 if grey else 3
    channels = channels or own
    rule = pictures.Rule(*size, channels)
    n = min(most, source.count) or source.count
    if n < 2:
        raise Fatal(settings.DATA, f"{path}: expected two images or more, found {n}")

    def rows_of(items: Iterable[sources.Item]) -> Iterator[np.ndarray]:
        for item in items:
            picture = _picture(path, item, rule)
            if picture.size != size:
                wanted = f"expected images of one size, {size[0]}x{size[1]} like the first"
                found = f"found {picture.size[0]}x{picture.size[1]} ({item.name})"
                raise Fatal(settings.DATA, f"{path}: {wanted}, {found}; prepare them alike")
            yield picture.pixels

    def batches(size, rows, first):
        pixels = rows_of(itertools.islice(source.items(), first * size, n))
        while batch := list(itertools.islice(pixels, size)):
            batch += batch[-1:] * (size - len(batch))
            yield np.stack(batch)[rows]

    concerns = []
    if isinstance(first.content, bytes) and first.content[:2] == b"\xff\xd8":
        concerns.append("JPEG files: what their compression lost is part of every score")
    if channels != own:
        concerns.append("colour images, read as grey" if channels == 1 else "grey images")
    concern = "; ".join(concerns)
    return Set(pathlib.Path(path).name, n, (*size, channels), batches, concern)


def _picture(path: str, item: sources.Item, rule: pictures.Rule) -> pictures.Picture:
    try:
        if isinstance(item.content, sources.SourceError):
            raise item.content
        return pictures.clean(item.content, rule)
    except (sources.SourceError, pictures.PictureError) as error:
        raise Fatal(settings.DATA, f"{path}: {item.name}: {error}") from error


# --------------------------------------------------------------------------------------- features


class Extractor(NamedTuple):
    """run: uint8[b, h, w, c] over the devices -> {kind: (features [b, d], logits [b, k] or None)}.

    kinds: {kind: (d, k or 0)}. shape: (h, w, c) of the images. mark: hexadecimal digits that tell
    the network's weights from others, "" without it.
    """

    run: Callable[[Array], dict[str, tuple[Array, Array | None]]]
    kinds: dict[str, tuple[int, int]]
    shape: tuple[int, int, int]
    mark: str = ""


def make_extractor(
    names: Iterable[str], shape: tuple[int, int, int], mesh: jax.sharding.Mesh, weights: Any = None
) -> Extractor:
    """All kinds of features of a batch in one compiled pass.

    names: of features.FEATURES, and "inception", which also gives "spatial". weights: of the
    network, as inception.fold gives them. Raises Fatal for unknown names, and images too small.
    """
    known = {"inception": None, **features.FEATURES}
    for name in names:
        settings.choose(known, "eval.features", name)
    own = {
        name: settings.call(features.FEATURES[name], "eval.features", shape)
        for name in names
        if name != "inception"
    }
    network = inception.Inception()

    def on_images(weights, images):
        out = {name: (function(images), None) for name, function in own.items()}
        if "inception" in names:
            taps = network.apply({"params": weights}, inception.preprocess(images))
            out["inception"] = taps["2048"], taps["logits_unbiased"]
            out["spatial"] = taps["spatial"], None
        return out

    whole, split = train.replicated(mesh), train.sharded(mesh)
    mark = mark_of(weights) if "inception" in names else ""
    weights = jax.tree.map(lambda a: train.spread(np.asarray(a), whole, a.shape), weights)
    compiled = jax.jit(on_images, in_shardings=(whole, split), out_shardings=whole)
    images = jax.ShapeDtypeStruct((mesh.size, *shape), np.uint8)
    shapes = jax.eval_shape(on_images, weights, images)
    order = [kind for name in names for kind in KINDS.get(name, (name,))]
    sizes = {kind: (f.shape[1], 0 if g is None else g.shape[1]) for kind, (f, g) in shapes.items()}
    kinds = {kind: sizes[kind] for kind in order}
    return Extractor(functools.partial(compiled, weights), kinds, tuple(shape), mark)


def mark_of(weights: Any) -> str:
    """8 hexadecimal digits of a SHA-256 over all arrays of a tree."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:8]


def read(
    some: Set,
    extractor: Extractor,
    size: int,
    keep: int,
    mesh: jax.sharding.Mesh,
    kept: pathlib.Path | None = None,
    silent: bool = False,
) -> dict[str, Sample]:
    """What is kept of all images of a set, for each kind of features. Shows progress.

    size: images a batch, a multiple of the devices. kept: where what is read so far is written, to
    go on from, or None. Every process takes part; only the first keeps anything, the others get {}.
    Raises Fatal for what cannot be scored; DataError and Fatal while reading.
    """
    split, keeps = train.sharded(mesh), jax.process_index() == 0
    rows = train.rows_here(split, size)
    setting = f"{some.name} {some.n} {some.shape} {size} {keep} {extractor.kinds} {extractor.mark}"
    done, samples = _taken_up(kept, setting) if keeps else (0, {})
    if keeps and not samples:
        samples = {k: metrics.begin(some.n, d, keep, c) for k, (d, c) in extractor.kinds.items()}
    done, saved = first_says(done), time.monotonic()
    begun = -(-done // size)
    with log.Progress(some.n, done, unit="image", silent=silent or not keeps) as shown:
        for i, batch in enumerate(some.batches(size, rows, begun), begun):
            out = extractor.run(train.spread(batch, split, (size, *some.shape)))
            real = min(size, some.n - i * size)
            if keeps:
                out = jax.device_get(out)
                samples = {
                    kind: settings.call(metrics.add, some.name, sample, *_head(out[kind], real))
                    for kind, sample in samples.items()
                }
            shown(i * size + real)
            if keeps and kept and time.monotonic() - saved > KEEP_S:
                _put_down(kept, setting, samples)
                saved = time.monotonic()
    if keeps and kept:
        kept.unlink(missing_ok=True)
    return samples


def _head(both, n):
    """The first n of (features, logits or None)."""
    return [None if array is None else array[:n] for array in both]


def first_says(number: int) -> int:
    """The number that process 0 has, in every process; all of them ask."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def features_of(
    some: Set, extractor: Extractor, size: int, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """All features of a set that fits into memory: {kind: float32[n, d]}. Raises as `read`."""
    split = train.sharded(mesh)
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in extractor.kinds}
    for batch in some.batches(size, train.rows_here(split, size), 0):
        out = extractor.run(train.spread(batch, split, (size, *some.shape)))
        for kind, (f, _) in jax.device_get(out).items():
            parts[kind].append(f)
    return {kind: np.concatenate(each)[: some.n] for kind, each in parts.items()}


def all_say(flag: bool) -> bool:
    """Whether the flag is set in every process; all of them ask, and wait for each other."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def _put_down(kept: pathlib.Path, setting: str, samples: dict[str, Sample]) -> None:
    arrays = {
        f"{kind}/{name}": array
        for kind, sample in samples.items()
        for name, array in metrics.to_arrays(sample).items()
    }
    content = io.BytesIO()
    np.savez(content, setting=setting, **arrays)
    figures.save_bytes(kept, content.getvalue())


def _taken_up(kept: pathlib.Path | None, setting: str) -> tuple[int, dict[str, Sample]]:
    """(images read, what was kept of them) by an earlier pass of the same setting, or of none."""
    try:
        with np.load(io.BytesIO(kept.read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("setting")) != setting:
            return 0, {}
        return _samples(arrays)
    except (AttributeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return 0, {}


def _samples(arrays: dict[str, np.ndarray]) -> tuple[int, dict[str, Sample]]:
    kinds = dict.fromkeys(name.partition("/")[0] for name in arrays)
    samples = {
        kind: metrics.from_arrays(
            {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{kind}/")}
        )
        for kind in kinds
    }
    counts = {sample.stats.n for sample in samples.values()}
    return (counts.pop(), samples) if len(counts) == 1 else (0, {})
