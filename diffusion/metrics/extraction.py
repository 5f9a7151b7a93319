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

from diffusion import data
from diffusion.data import loader
from diffusion.data.prepare import archives, image_decoding, sources
from diffusion.metrics import feature_set, features, inception
from diffusion.metrics.feature_set import FeatureSet
from diffusion.runtime.config import call_for_key, lookup
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils.errors import DataError
from diffusion.utils.io import save_bytes
from diffusion.utils.multihost import broadcast_from_primary
from diffusion.utils.progress import Progress

KINDS = {"inception": ("inception", "spatial")}  # of features.FEATURES: the name itself


KEEP_S = 30  # seconds between two writings of what is read so far


class ImageSet(NamedTuple):
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


def image_set_from_split(images: data.ImageDataset, split: str, n: int = 0, workers: int = 0) -> ImageSet:
    """n images of a split, evenly spread, as sets may come sorted; 0: all of them."""
    some = images
    if 0 < n < images.n:
        some = images._replace(n=n, read=functools.partial(_read_some, images, n))

    def batches(size, rows, first):
        return (batch[0] for batch in loader.iterate_split(some, size, rows, workers, first))

    return ImageSet(split, some.n, images.shape, batches)


def _read_some(images: data.ImageDataset, n: int, i: Any) -> tuple[np.ndarray, np.ndarray]:
    return images.read([k * images.n // n for k in i])


def image_set_from_array(name: str, images: np.ndarray) -> ImageSet:
    """uint8[n, h, w, c], here already."""
    read = lambda i: (images[list(i)], np.zeros(len(i), np.int32))  # noqa: E731
    return image_set_from_split(data.ImageDataset(len(images), images.shape[1:], 0, read), name)


def image_set_from_files(path: str, channels: int = 0, most: int = 0) -> ImageSet:
    """The images of a folder, zip, tar or npz, as they are: none is cropped or resized.

    channels: 1 or 3, 0: as the first one has. most: of them, 0: all. Raises Fatal; while they are
    read, for an image of another size or one that cannot be read.
    """
    try:
        source = sources.open_source("folder", archive=path)
        first = next(iter(source.items()))
    except (archives.SourceError, StopIteration) as error:
        why = str(error).removeprefix("data.archive: ") or "expected images, found none"
        raise DataError(why if path in why else f"{path}: {why}") from error
    look = image_decoding.ImageSpec(1, 1, 3)
    size, mode = _picture(path, first, look)[2:4]
    grey = first.content.shape[2:] in ((), (1,)) if mode == "array" else mode[0] in "L1I"
    own = 1 if grey else 3
    channels = channels or own
    rule = image_decoding.ImageSpec(*size, channels)
    n = min(most, source.count) or source.count
    if n < 2:
        raise DataError(f"{path}: expected two images or more, found {n}")

    def rows_of(items: Iterable[archives.Item]) -> Iterator[np.ndarray]:
        for item in items:
            picture = _picture(path, item, rule)
            if picture.size != size:
                wanted = f"expected images of one size, {size[0]}x{size[1]} like the first"
                found = f"found {picture.size[0]}x{picture.size[1]} ({item.name})"
                raise DataError(f"{path}: {wanted}, {found}; prepare them alike")
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
    return ImageSet(pathlib.Path(path).name, n, (*size, channels), batches, concern)


def _picture(path: str, item: archives.Item, rule: image_decoding.ImageSpec) -> image_decoding.NormalizedImage:
    try:
        if isinstance(item.content, archives.SourceError):
            raise item.content
        return image_decoding.normalize_image(item.content, rule)
    except (archives.SourceError, image_decoding.ImageError) as error:
        raise DataError(f"{path}: {item.name}: {error}") from error


class FeatureExtractor(NamedTuple):
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
) -> FeatureExtractor:
    """All kinds of features of a batch in one compiled pass.

    names: of features.FEATURES, and "inception", which also gives "spatial". weights: of the
    network, as inception.fold gives them. Raises DDPMError for unknown names, and images too small.
    """
    known = {"inception": None, **features.FEATURES}
    for name in names:
        lookup(known, "eval.features", name)
    own = {
        name: call_for_key(features.FEATURES[name], "eval.features", shape)
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

    whole, split = replicated(mesh), batch_sharded(mesh)
    mark = mark_of(weights) if "inception" in names else ""
    weights = jax.tree.map(lambda a: make_global_array(np.asarray(a), whole, a.shape), weights)
    compiled = jax.jit(on_images, in_shardings=(whole, split), out_shardings=whole)
    images = jax.ShapeDtypeStruct((mesh.size, *shape), np.uint8)
    shapes = jax.eval_shape(on_images, weights, images)
    order = [kind for name in names for kind in KINDS.get(name, (name,))]
    sizes = {kind: (f.shape[1], 0 if g is None else g.shape[1]) for kind, (f, g) in shapes.items()}
    kinds = {kind: sizes[kind] for kind in order}
    return FeatureExtractor(functools.partial(compiled, weights), kinds, tuple(shape), mark)


def mark_of(weights: Any) -> str:
    """8 hexadecimal digits of a SHA-256 over all arrays of a tree."""
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weights):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:8]


def extract(
    some: ImageSet,
    extractor: FeatureExtractor,
    size: int,
    keep: int,
    mesh: jax.sharding.Mesh,
    kept: pathlib.Path | None = None,
    silent: bool = False,
) -> dict[str, FeatureSet]:
    """What is kept of all images of a set, for each kind of features. Shows progress.

    size: images a batch, a multiple of the devices. kept: where what is read so far is written, to
    go on from, or None. Every process takes part; only the first keeps anything, the others get {}.
    Raises DDPMError for what cannot be scored; DataError and DDPMError while reading.
    """
    split, keeps = batch_sharded(mesh), jax.process_index() == 0
    rows = local_rows(split, size)
    setting = f"{some.name} {some.n} {some.shape} {size} {keep} {extractor.kinds} {extractor.mark}"
    done, samples = _taken_up(kept, setting) if keeps else (0, {})
    if keeps and not samples:
        samples = {k: feature_set.begin(some.n, d, keep, c) for k, (d, c) in extractor.kinds.items()}
    done, saved = broadcast_from_primary(done), time.monotonic()
    begun = -(-done // size)
    with Progress(some.n, done, unit="image", silent=silent or not keeps) as shown:
        for i, batch in enumerate(some.batches(size, rows, begun), begun):
            out = extractor.run(make_global_array(batch, split, (size, *some.shape)))
            real = min(size, some.n - i * size)
            if keeps:
                out = jax.device_get(out)
                samples = {
                    kind: call_for_key(feature_set.add, some.name, sample, *_head(out[kind], real))
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


def features_of(
    some: ImageSet, extractor: FeatureExtractor, size: int, mesh: jax.sharding.Mesh
) -> dict[str, np.ndarray]:
    """All features of a set that fits into memory: {kind: float32[n, d]}. Raises as `read`."""
    split = batch_sharded(mesh)
    parts: dict[str, list[np.ndarray]] = {kind: [] for kind in extractor.kinds}
    for batch in some.batches(size, local_rows(split, size), 0):
        out = extractor.run(make_global_array(batch, split, (size, *some.shape)))
        for kind, (f, _) in jax.device_get(out).items():
            parts[kind].append(f)
    return {kind: np.concatenate(each)[: some.n] for kind, each in parts.items()}


def _put_down(kept: pathlib.Path, setting: str, samples: dict[str, FeatureSet]) -> None:
    arrays = {
        f"{kind}/{name}": array
        for kind, sample in samples.items()
        for name, array in feature_set.to_arrays(sample).items()
    }
    content = io.BytesIO()
    np.savez(content, setting=setting, **arrays)
    save_bytes(kept, content.getvalue())


def _taken_up(kept: pathlib.Path | None, setting: str) -> tuple[int, dict[str, FeatureSet]]:
    """(images read, what was kept of them) by an earlier pass of the same setting, or of none."""
    try:
        with np.load(io.BytesIO(kept.read_bytes())) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop("setting")) != setting:
            return 0, {}
        return _samples(arrays)
    except (AttributeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return 0, {}


def _samples(arrays: dict[str, np.ndarray]) -> tuple[int, dict[str, FeatureSet]]:
    kinds = dict.fromkeys(name.partition("/")[0] for name in arrays)
    samples = {
        kind: feature_set.from_arrays(
            {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith(f"{kind}/")}
        )
        for kind in kinds
    }
    counts = {sample.stats.n for sample in samples.values()}
    return (counts.pop(), samples) if len(counts) == 1 else (0, {})
