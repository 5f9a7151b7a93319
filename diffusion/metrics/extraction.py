"""Image sets (a split, an array, files) and the extraction of their features on all devices."""

import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import Mesh

from diffusion.data import ImageDataset
from diffusion.data.loader import iterate_split
from diffusion.data.prepare.archives import Item
from diffusion.data.prepare.image_decoding import (
    FITS,
    ImageSpec,
    NormalizedImage,
    normalize_image,
)
from diffusion.data.prepare.sources import open_source
from diffusion.metrics import classifier, dinov2, features, inception
from diffusion.metrics.feature_set import FeatureSet, add, begin, from_arrays, to_arrays
from diffusion.sharding import batch_sharded, local_rows, make_global_array, replicated
from diffusion.utils import io, partial_results
from diffusion.utils.errors import DataError
from diffusion.utils.multihost import broadcast_from_primary, is_primary

NETWORKS = {  # their kinds; of dinov2 the one of its weights
    "inception": ("inception", "spatial"),
    "dinov2": tuple(dinov2.DINOV2_SIZES),
    "classifier": ("classifier",),
}


class ImageSet(NamedTuple):
    """n images of one shape in a fixed order."""

    name: str
    n: int
    shape: tuple[int, int, int]  # (h, w, c)
    # (batch size, rows, first batch) -> uint8[r, h, w, c], the given rows of each batch, padded.
    batches: Callable[[int, Any, int], Iterator[np.ndarray]]
    warning: str = ""  # what makes its scores less comparable


def image_set_from_split(
    images: ImageDataset, split: str, n: int = 0, workers: int = 0
) -> ImageSet:
    """Returns n images of a split, evenly spaced because sets come sorted; 0 for all of them."""
    subset = evenly_spaced_subset(images, n)

    def batches(batch_size, rows, first):
        return (image for image, *_ in iterate_split(subset, batch_size, rows, workers, first))

    return ImageSet(split, subset.n, images.shape, batches)


def evenly_spaced_subset(images: ImageDataset, n: int) -> ImageDataset:
    """Returns n of the images, evenly spaced; all of them for 0 and where there are not as many."""
    if not 0 < n < images.n:
        return images
    return images._replace(n=n, read=functools.partial(_read_subset, images, n))


def _read_subset(images: ImageDataset, n: int, i: Any) -> tuple[np.ndarray, np.ndarray]:
    return images.read([k * images.n // n for k in i])


def image_set_from_array(name: str, images: np.ndarray) -> ImageSet:
    """Wraps an in-memory array uint8[n, h, w, c] as an ImageSet."""
    n = len(images)

    def batches(batch_size, rows, first):
        for start in range(first * batch_size, n, batch_size):
            yield images[np.minimum(start + np.arange(batch_size)[rows], n - 1)]

    return ImageSet(name, n, images.shape[1:], batches)


def image_set_from_files(
    path: str,
    channels: int = 0,
    max_images: int = 0,
    form: ImageSpec | None = None,
    least: int = 2,
) -> ImageSet:
    """Returns the images of a folder, zip, tar or npz, as they are or brought to a form.

    Args:
      channels: 1, 3, or 0 for those of the first image.
      max_images: 0 for all.
      form: what every image is cropped and resized to, as by --mode=prepare; None: nothing is done.
      least: images that there must be.

    Raises DataError for fewer images; while reading, for an image that is damaged or, if
    there is no form, of another size.
    """
    if not io.to_path(path).exists():
        raise DataError(f"{path}: expected images, found no file or folder")
    source = open_source("folder", archive=path)
    first = next(iter(source.items()), None)
    n = min(max_images or source.count, source.count)
    if first is None or n < least:
        raise DataError(f"{path}: expected {least} or more images, found {n}")
    original = _decode(path, first, ImageSpec(1, 1, 3), any_size=True)
    is_file = isinstance(first.content, bytes)
    is_grey = original.mode[0] in "L1I" if is_file else first.content[0, 0].size == 1
    spec = form or ImageSpec(*original.size, channels or (1 if is_grey else 3))

    def batches(batch_size, rows, first):
        items = itertools.islice(source.items(), first * batch_size, n)
        pixels = (_decode(path, item, spec, form is not None).pixels for item in items)
        while batch := list(itertools.islice(pixels, batch_size)):
            batch += batch[-1:] * (batch_size - len(batch))
            yield np.stack(batch)[rows]

    warnings = []
    if is_file and first.content.startswith(b"\xff\xd8"):
        warnings.append("JPEG files: what their compression lost is part of every score")
    if is_grey != (spec.channels == 1):
        warnings.append("grey images" if is_grey else "colour images, read as grey")
    if form:
        sizes = "{}x{} (the first one) to {}x{}".format(*original.size, *form[:2])
        how = f"as by --mode=prepare: {FITS[form.fit]}; Lanczos, bicubic to enlarge"
        warnings.append(f"resized from {sizes} {how}")
    name, shape = os.path.basename(os.path.normpath(path)), (spec.height, spec.width, spec.channels)
    return ImageSet(name, n, shape, batches, "; ".join(warnings))


def _decode(path: str, item: Item, spec: ImageSpec, any_size: bool) -> NormalizedImage:
    """Decodes an image, whose size must be the spec's unless any_size."""
    try:
        if isinstance(item.content, DataError):
            raise item.content
        image = normalize_image(item.content, spec)
    except DataError as error:  # says nothing of the file
        raise DataError(f"{path}: {item.name}: {error}") from error
    size = spec.height, spec.width
    if image.size != size and not any_size:
        wanted = f"expected images of one size, {size[0]}x{size[1]} like the first"
        found = f"found {image.size[0]}x{image.size[1]} ({item.name})"
        raise DataError(f"{path}: {wanted}, {found}; resize them, or --config.eval.resize=True")
    return image


class FeatureExtractor(NamedTuple):
    """A compiled function from batch-sharded images uint8[b, h, w, c] to all kinds of features."""

    # Gives {kind: (features [b, d], logits [b, k] or None)}, replicated.
    run: Callable[[Array], dict[str, tuple[Array, Array | None]]]
    kinds: dict[str, tuple[int, int]]  # {kind: (d, k or 0)}
    shape: tuple[int, int, int]  # of the images
    fingerprints: Mapping[str, str] = MappingProxyType({})  # {kind: digest of its weights}


def make_extractor(
    names: Iterable[str],
    shape: tuple[int, int, int],
    mesh: Mesh,
    weights: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, str] = MappingProxyType({}),
) -> FeatureExtractor:
    """Returns an extractor that computes all features of images of this shape in one program.

    Names are keys of features.FEATURES, or of `weights`: "inception", which also gives "spatial",
    with those of `inception.fold`, "dinov2" with those of `convert.from_dinov2`, and "classifier"
    with those of `classifier.train`. fingerprints: {name: digest}, where it is not to be made of
    the weights. Raises ValueError for unknown names, and for images that are too small for a kind
    of features.
    """
    names, weights = tuple(names), weights or {}
    known = (*NETWORKS, *features.FEATURES)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]!r} is not known; there are: {', '.join(known)}")
    functions = {name: features.FEATURES[name](shape) for name in names if name not in NETWORKS}
    weights = {name: weights[name] for name in names if name in NETWORKS}

    def apply(weights, images):
        out = {name: (function(images), None) for name, function in functions.items()}
        if "classifier" in names:
            out["classifier"] = classifier.apply(weights["classifier"], images)
        if "inception" in names:
            variables = {"params": weights["inception"]}
            taps = inception.Inception().apply(variables, inception.preprocess(images))
            out["inception"] = taps["2048"], taps["logits_unbiased"]
            out["spatial"] = taps["spatial"], None
        if "dinov2" in names:
            variables = {"params": weights["dinov2"]}
            kind = dinov2.kind_of(weights["dinov2"])
            network = dinov2.DinoV2(*dinov2.DINOV2_SIZES[kind])
            out[kind] = network.apply(variables, dinov2.prepare_images(images)), None
        return out

    everywhere = replicated(mesh)
    digests = {name: fingerprints.get(name) or _fingerprint(tree) for name, tree in weights.items()}
    replicate = functools.partial(jax.make_array_from_process_local_data, everywhere)
    weights = jax.tree.map(replicate, weights)
    shardings = everywhere, batch_sharded(mesh)
    compiled = jax.jit(apply, in_shardings=shardings, out_shardings=everywhere)
    shapes = jax.eval_shape(apply, weights, jax.ShapeDtypeStruct((1, *shape), np.uint8))
    kinds_of = {name: [k for k in NETWORKS.get(name, (name,)) if k in shapes] for name in names}
    order = itertools.chain(*kinds_of.values())
    kinds = {kind: tuple(0 if a is None else a.shape[1] for a in shapes[kind]) for kind in order}
    fingerprints = {kind: digest for name, digest in digests.items() for kind in kinds_of[name]}
    return FeatureExtractor(functools.partial(compiled, weights), kinds, tuple(shape), fingerprints)


def _fingerprint(weights: Any) -> str:
    digest = hashlib.sha256()
    for array in jax.tree.leaves(weights):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:8]


def extract(
    image_set: ImageSet,
    extractor: FeatureExtractor,
    batch_size: int,
    keep: int,
    mesh: Mesh,
    partial: epath.Path | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, FeatureSet]:
    """Returns the FeatureSet of each kind of features, on process 0; {} on the others.

    All processes call this function, with a batch size that is a multiple of the devices. A set
    keeps at most `keep` rows. An interrupted pass resumes from the file `partial`, which is deleted
    at the end. `on_batch` is called after each batch with the number of images done so far. Raises
    DataError for an image that cannot be read.
    """
    name, n, shape, *_ = image_set
    setting = f"{name} {n} {shape} {batch_size} {keep} {extractor.kinds} {extractor.fingerprints}"
    feature_sets: dict[str, FeatureSet] = {}
    if is_primary():
        arrays = partial_results.load(partial, setting)
        for kind, (d, classes) in extractor.kinds.items():
            empty = begin(n, d, keep, classes)
            feature_sets[kind] = from_arrays(arrays, f"{kind}/") if arrays else empty
    done = max((each.stats.n for each in feature_sets.values()), default=0)
    first = -(-broadcast_from_primary(done) // batch_size)
    saved = time.monotonic()
    for done, outputs in _feature_batches(image_set, extractor, batch_size, mesh, first):
        for kind in feature_sets:
            feature_sets[kind] = add(feature_sets[kind], *outputs[kind])
        due = time.monotonic() - saved > partial_results.SAVE_EVERY_S
        if is_primary() and partial and due:
            arrays = {}
            for kind, each in feature_sets.items():
                arrays |= to_arrays(each, f"{kind}/")
            partial_results.save(partial, setting, **arrays)
            saved = time.monotonic()
        on_batch(done)
    if is_primary() and partial:
        partial.unlink(missing_ok=True)
    return feature_sets


def features_of(
    image_set: ImageSet, extractor: FeatureExtractor, batch_size: int, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Returns all features {kind: float32[n, d]} of a set that fits into memory, as `extract`."""
    batches = [out for _, out in _feature_batches(image_set, extractor, batch_size, mesh, 0)]
    return {kind: np.concatenate([out[kind][0] for out in batches]) for kind in extractor.kinds}


def _feature_batches(
    image_set: ImageSet, extractor: FeatureExtractor, batch_size: int, mesh: Mesh, first: int
) -> Iterator[tuple[int, dict[str, tuple[np.ndarray, np.ndarray | None]]]]:
    """Yields the number of images done and the batch's outputs, without padding, on the host."""
    sharding, shape = batch_sharded(mesh), (batch_size, *image_set.shape)
    batches = image_set.batches(batch_size, local_rows(sharding, batch_size), first)
    for i, batch in enumerate(batches, first):
        out = jax.device_get(extractor.run(make_global_array(batch, sharding, shape)))
        done = min((i + 1) * batch_size, image_set.n)
        real = done - i * batch_size
        yield done, jax.tree.map(lambda a, real=real: a[:real], out)
