"""--mode=compress: images as a file that the model decodes, at any prefix or to the last bit."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import random
from ml_collections import ConfigDict

from diffusion import experiment
from diffusion.codec import bits_back, container, plan, progressive
from diffusion.codec.bits_back import Unfinished
from diffusion.codec.container import BITS_BACK, PROGRESSIVE, Header
from diffusion.codec.plan import Codec, Plan
from diffusion.codec.progressive import Encoded, dimensions
from diffusion.data import augment
from diffusion.metrics import baselines, extraction
from diffusion.metrics.extraction import ImageSet
from diffusion.modes import _codec
from diffusion.modes._codec import Model
from diffusion.modes._split_pass import kept_variances
from diffusion.plotting import curves
from diffusion.plotting.image_grid import save_png
from diffusion.plotting.labelled_grid import labelled_grid
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, call_for_key, lookup
from diffusion.utils import io, logging, partial_results
from diffusion.utils.errors import ConfigError, DataError, WorkdirError
from diffusion.utils.progress import Progress

RATES, SHOWN = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0), 8  # bits/dim and images of codec_images.png
LOSSLESS = "PNG", "WebP", "JXL"
BOUND_IMAGES = 512  # at most so many are read for the bound
FILE_KINDS = {"progressive": PROGRESSIVE, "archive": BITS_BACK}


def run(run: Run) -> None:
    """Encodes the images of --input, a split or files, into the file --output.

    Prints what every step takes beside its term of the bound, and what other formats take; these
    go to workdir/eval/STEP/codec.json or archive.json too. Raises ConfigError, DataError,
    WorkdirError.
    """
    c, inputs, output = run.config.codec, run.flags.input, run.flags.output
    if len(inputs) != 1 or not output:
        found = f"found {len(inputs)} and {'one' if output else 'none'}"
        raise ConfigError(f"--mode=compress: expected one --input and one --output, {found}")
    kind, path = lookup(FILE_KINDS, "codec.kind", c.kind), io.to_path(output)
    if path.exists():
        raise WorkdirError(f"--output={output}: expected a new file, found one; choose another")
    model = _codec.load_model(run)
    trained, exp = model.trained, model.trained.exp
    images = open_input(run.config, exp, inputs[0])
    header = plan_file(run.config, model, images, kind)
    codec = _codec.make_codec(model, header)
    header = header._replace(probe=_codec.probe(codec, header.batch))
    what = f"{images.n:,} images of {images.name}, {header.group:,} in a group"
    logging.info(f"encoding   {what}, {len(header.plan.ts)} evaluations of the network")
    partial = path.with_name(f"{path.name}.partial.npz")
    folder, pictures = trained.folder("eval"), ""
    if kind == BITS_BACK:
        report = encode_archive(header, codec, images, path, partial)
    else:
        encoded = encode_progressive(header, codec, images, partial)
        report = write_file(header, codec, images, encoded, path)
        save_png(folder / "codec_images.png", prefixes(header, codec, images, encoded, report))
    partial.unlink(missing_ok=True)
    report |= other_formats(images, header)
    note = folder / ("codec.json" if kind == PROGRESSIVE else "archive.json")
    io.save_json(note, {"file": output, "input": inputs[0]} | report)
    if kind == PROGRESSIVE:
        curves.plot_codecs(folder / "codec.png", _codec.measured_curves(folder))
        pictures = ", codec.png, codec_images.png"
    size = len(io.read_bytes(path))
    logging.info(f"done       {path} ({size:,} bytes), {note}{pictures}")


def plan_file(config: ConfigDict, model: Model, images: ImageSet, kind: int) -> Header:
    """Returns the header of a file of these images, still without the probe. Raises ConfigError."""
    c, exp = config.codec, model.trained.exp
    group, batch = min(c.group, images.n), min(c.batch_size, images.n)
    about = (kind, images.n, *images.shape, exp.levels, group, batch, c.seed)
    made = Plan((exp.process.T,), (), 0.0, c.candidates, c.padding)
    header = Header(*about, made, model.weights, model.config, b"")
    call_for_key(container.check_header, "codec", header)  # before minutes of measuring
    optimum = kept_variances(model.trained)
    if kind == BITS_BACK:
        made = plan.make_archive_plan(exp.process, optimum, c.steps)
    else:
        sizes = group * math.prod(images.shape), c.steps, c.candidates, c.padding
        made = plan.make_plan(exp.process, optimum, *sizes)
    return header._replace(plan=made)


def open_input(config: ConfigDict, exp: experiment.Experiment, name: str) -> ImageSet:
    """Opens a split of the config's data, "train" or "test", or files. Raises DataError."""
    if name in ("train", "test"):
        images = experiment.load_split(config, exp, name)
        return extraction.image_set_from_split(images, name)
    images = extraction.image_set_from_files(name, exp.image_shape[2], least=1)
    if images.shape != exp.image_shape:
        wanted, found = ("x".join(map(str, shape)) for shape in (exp.image_shape, images.shape))
        raise DataError(f"--input={name}: expected images of {wanted}, found {found}; resize them")
    return images


def read_blocks(images: ImageSet, size: int, levels: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yields the images int[n, h, w, c] of 0..levels - 1, `size` at a time.

    Raises DataError for pixels that are not on the levels.
    """
    for i, batch in enumerate(images.batches(size, slice(None), first), first):
        pixels = batch[: images.n - i * size]
        index = baselines.to_levels(pixels, levels)
        if not np.array_equal(_codec.to_pixels(index, levels), pixels):
            wanted = f"expected the {levels} levels of data.levels, evenly spaced over 0..255"
            raise DataError(f"--input: {wanted}, found other values; use a model of 256 levels")
        yield index.astype(np.int64)


def partial_setting(header: Header) -> str:
    """Returns what unfinished work depends on, besides the images."""
    return repr((container.MAGIC, header))


def encode_progressive(
    header: Header, codec: Codec, images: ImageSet, partial: epath.Path
) -> Encoded:
    """Returns the segments of all groups; shows progress, resumes from `partial`."""
    setting = partial_setting(header)
    todo, parts, sums = [*_codec.blocks(header)], [], []
    stored = partial_results.load(partial, setting)
    before = (
        {} if stored is None else dict(zip(stored["sums"].tolist(), _unpack(stored), strict=True))
    )
    saved, key = time.monotonic(), random.key(header.seed)
    with Progress(header.images, unit="image") as progress:
        blocks = read_blocks(images, todo[0].images, header.levels)
        for block, index in zip(todo, blocks, strict=True):
            # Files of other images have the same header: what is kept must be of these.
            sums.append(f"{block.first_image} {plan.checksum(index).hex()}")
            if sums[-1] in before:
                parts.append(before[sums[-1]])
                continue
            preemption.raise_if_requested()
            each = random.fold_in(key, block.first_group)
            parts.append(progressive.encode_groups(codec, index, block.first_group, each))
            progress(block.first_image + block.images)
            if time.monotonic() - saved > partial_results.SAVE_EVERY_S:
                partial_results.save(partial, setting, sums=np.array(sums), **_pack(parts))
                saved = time.monotonic()
    steps = zip(*(part.segments for part in parts), strict=True)
    segments = [[*itertools.chain(*each)] for each in steps]
    return Encoded(segments, sum(part.mse for part in parts))


def _pack(parts: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """Returns encoded blocks as arrays."""
    flat = [content for part in parts for step in part.segments for content in step]
    return {
        "bytes": np.frombuffer(b"".join(flat), np.uint8),
        "lengths": np.array([*map(len, flat)]),
        "groups": np.array([len(part.segments[0]) for part in parts]),
        "mse": np.stack([part.mse for part in parts]),
    }


def _unpack(stored: Mapping[str, np.ndarray]) -> list[Encoded]:
    cuts = np.cumsum(stored["lengths"])[:-1]
    flat = iter([part.tobytes() for part in np.split(stored["bytes"], cuts)])
    parts = []
    for groups, mse in zip(stored["groups"], stored["mse"], strict=True):
        parts.append(Encoded([[next(flat) for _ in range(groups)] for _ in mse], mse))
    return parts


def write_file(
    header: Header, codec: Codec, images: ImageSet, encoded: Encoded, path: epath.Path
) -> dict[str, Any]:
    """Writes a progressive file; returns and prints what each step takes."""
    parts = [container.header_bytes(header)]
    parts += [container.segment_bytes(header, *pair) for pair in enumerate(encoded.segments)]
    io.save_bytes(path, b"".join(parts))
    some = next(read_blocks(images, min(BOUND_IMAGES, images.n), header.levels))
    found = progressive.file_bound(codec, some, header.seed)
    bits = 8 * np.cumsum([len(part) for part in parts]) / (header.images * dimensions(codec))
    coded = 8 * np.array([sum(map(len, segment)) for segment in encoded.segments])
    coded = np.append(0, np.cumsum(coded) / (header.images * dimensions(codec)))
    bound = np.append(0, np.cumsum(found.bits) / some.size)
    rmse, bound_rmse = (
        np.append(127.5 * np.sqrt(mse / dims), 0.0)
        for mse, dims in ((encoded.mse, header.images * dimensions(codec)), (found.mse, some.size))
    )
    of = f" (bound: of {len(some):,} images)" if len(some) < header.images else ""
    logging.info(f"           after t   bits/dim   coded   bound  ratio   rmse   bound{of}")
    points = []
    for i, t in enumerate([*header.plan.ts, 0]):
        row = {"t": t, "bits": bits[i], "coded": coded[i], "bound": bound[i]}
        points.append(row | {"rmse": rmse[i], "bound_rmse": bound_rmse[i]})
        if i:
            sizes = f"{bits[i]:11.4f}{coded[i]:8.4f}{bound[i]:8.4f}{bits[i] / bound[i]:7.3f}"
            logging.info(f"{t or 'x_0':>18}{sizes}{rmse[i]:7.2f}{bound_rmse[i]:8.2f}")
    return {"kind": "progressive", "header_bytes": len(parts[0]), "points": points}


def prefixes(
    header: Header, codec: Codec, images: ImageSet, encoded: Encoded, report: Mapping[str, Any]
) -> np.ndarray:
    """Returns a picture of the first images at several rates, uint8[H, W, 3]."""
    block = next(_codec.blocks(header))
    segments = [segment[: block.groups] for segment in encoded.segments[:-1]]
    bits = [point["bits"] for point in report["points"]]
    inner = range(1, len(bits) - 1)
    nearest = (min(inner, key=lambda k: abs(math.log(bits[k] / rate)), default=0) for rate in RATES)
    steps = [k for k in dict.fromkeys(nearest) if k]
    rows = []
    for k, decoded in enumerate(progressive.decode_prefixes(codec, segments, 0, block.images)):
        if k in steps:
            x_0 = jnp.asarray(decoded.x_0[:SHOWN])
            rows.append(np.asarray(augment.unscale(x_0, header.levels)))
    rows.append(next(images.batches(block.images, slice(None), 0))[:SHOWN])
    size = header.images * math.prod(header.shape) / 8
    labels = [f"{bits[k]:.2f} bits/dim, {bits[k] * size:,.0f} bytes" for k in [*steps, -1]]
    note = (
        f"what is known of {len(rows[-1])} of its {header.images:,} images; the last row is exact"
    )
    return labelled_grid(np.stack(rows), rows=labels, title="A file at some lengths", note=note)


def encode_archive(
    header: Header, codec: Codec, images: ImageSet, path: epath.Path, partial: epath.Path
) -> dict[str, Any]:
    """Writes a bits-back archive; returns and prints what it takes. Resumes from `partial`."""
    setting = partial_setting(header)
    stored = partial_results.load(partial, setting)
    unfinished, before = bits_back.begin_archive(codec, header.batch), []
    if stored is not None:
        before = stored["sums"].tolist()
        unfinished = Unfinished(stored["words"], int(stored["lowest"]), float(stored["bound"]))
    sums, done, saved = [], len(before) * header.batch, time.monotonic()
    with Progress(header.images, min(done, header.images), unit="image") as progress:
        for index in read_blocks(images, header.batch, header.levels):
            sums.append(plan.checksum(index).hex())
            if len(sums) <= len(before):
                if sums[-1] == before[len(sums) - 1]:
                    continue
                partial.unlink()  # of other images
                return encode_archive(header, codec, images, path, partial)
            preemption.raise_if_requested()
            unfinished = bits_back.encode_batch(codec, unfinished, index)
            progress(done := min(done + header.batch, header.images))
            if time.monotonic() - saved > partial_results.SAVE_EVERY_S:
                content = {"sums": np.array(sums)} | unfinished._asdict()
                partial_results.save(partial, setting, **content)
                saved = time.monotonic()
    found = bits_back.finish_archive(codec, unfinished, header.batch)
    body = found.words.astype("<u4").tobytes()
    content = container.header_bytes(header) + container.archive_bytes(header, body)
    io.save_bytes(path, content)
    dims = header.images * math.prod(header.shape)
    initial, plan_bytes = 32 * found.initial, len(content) - len(body)
    bits = {"file": 8 * len(content), "initial": initial, "plan": 8 * plan_bytes}
    rows = {name: n / dims for name, n in (bits | {"bound": found.bound}).items()}
    ratio = (8 * len(body) - initial) / found.bound
    logging.info(
        f"archive    {rows['file']:.4f} bits/dim, of which {rows['initial']:.4f} it began with and "
        f"{rows['plan']:.4f} its header; "
        f"the rest is {ratio:.4f} times its bound {rows['bound']:.4f}"
    )
    return {"kind": "archive", "ratio": ratio} | rows


def other_formats(images: ImageSet, header: Header) -> dict[str, Any]:
    """Returns and prints what the first images take in other formats, side by side in one file."""
    n = min(images.n, max(1, baselines.MOSAIC_BYTES // math.prod(images.shape)))
    pixels = next(images.batches(n, slice(None), 0))
    lossless = {
        form: baselines.mosaic_bits(pixels, form) for form in LOSSLESS if baselines.installed(form)
    }
    listed = ", ".join(f"{form} {bits:.4f}" for form, bits in lossless.items())
    logging.info(f"lossless   {listed} bits/dim ({n:,} images side by side in one file)")
    return {"lossless": lossless, "lossy": baselines.lossy_curves(pixels)}
