"""--mode=decompress: the images of a file of --mode=compress, exact or as far as they are known."""

import hashlib
import json

import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import random
from PIL import Image

from diffusion.codec import bits_back, container, progressive
from diffusion.codec.container import BITS_BACK, Header, Reader
from diffusion.codec.plan import Codec, Plan
from diffusion.codec.progressive import Decoded
from diffusion.data import augment
from diffusion.modes import _codec
from diffusion.modes._codec import Model
from diffusion.modes._common import check_empty
from diffusion.modes._split_pass import trained_chain
from diffusion.process import Process
from diffusion.runtime import preemption
from diffusion.runtime.config import Run, lookup
from diffusion.samplers import ancestral, base, timesteps
from diffusion.utils import io, logging
from diffusion.utils.errors import ConfigError, DataError, IntegrityError, error_text
from diffusion.utils.progress import Progress

ODE_STEPS = 20
UNFINISHED = "unfinished.json"  # in the folder, while images are missing from it


def run(run: Run) -> None:
    """Decodes --input into PNG files 000000.png, ... of the folder --output.

    Of a progressive file it takes at most codec.steps_decoded steps and codec.bytes bytes. Raises
    ConfigError, DataError, IntegrityError, WorkdirError.
    """
    inputs, output = run.flags.input, run.flags.output
    if len(inputs) != 1 or not output:
        found = f"found {len(inputs)} and {'one' if output else 'none'}"
        raise ConfigError(f"--mode=decompress: expected one --input and one --output, {found}")
    name, folder = inputs[0], io.to_path(output)
    try:
        content = io.read_bytes(io.to_path(name))
    except OSError as error:
        raise DataError(f"--input={name}: cannot be read: {error_text(error)}") from error
    try:
        decode_file(run, content, folder)
    except IntegrityError as error:
        raise IntegrityError(f"--input={name}: {error}") from error


def decode_file(run: Run, content: bytes, folder: epath.Path) -> None:
    """Decodes a file's content. Raises IntegrityError without the file's name."""
    c = run.config.codec
    reader = Reader(content[: c.bytes or None])
    header = container.read_header(reader)
    model = _codec.load_model(run)
    check_model(header, model)
    codec = _codec.make_codec(model, header)
    found = _codec.probe(codec, header.batch)
    same = found == header.probe
    prints = f"encoded where the network computes {header.probe.hex()}, here it does {found.hex()}"
    if header.kind == BITS_BACK:
        if not same:
            raise IntegrityError(f"an archive decodes only where it was encoded: {prints}")
        return decode_archive(header, codec, reader, folder)
    plan, segments = read_segments(header, reader, c.steps_decoded)
    codec = codec._replace(plan=plan)
    unfinished = {"sha256": hashlib.sha256(content).hexdigest(), "steps": len(segments)}
    unfinished |= {"decode": c.decode}
    done = _prepare(folder, unfinished)
    finish = lookup(DECODERS, "codec.decode", c.decode)
    with Progress(header.images, min(done, header.images), unit="image") as progress:
        for block in _codec.blocks(header):
            if block.first_image + block.images <= done:
                continue
            preemption.raise_if_requested()
            part = slice(block.first_group, block.first_group + block.groups)
            mine = [segment[part] for segment in segments]
            try:
                decoded = progressive.decode_groups(codec, mine, block.first_group, block.images)
            except IntegrityError as error:
                raise IntegrityError(f"{error}; {'damaged' if same else prints}") from error
            _save(folder, finish(model, header, decoded), block.first_image)
            progress(block.first_image + block.images)
    (folder / UNFINISHED).unlink()
    what = "exact" if plan.decoder else f"segments read: {len(segments)}, to t = {plan.ts[-1]}"
    logging.info(f"done       {folder}: {header.images:,} images, {what}")


def check_model(header: Header, model: Model) -> None:
    """Raises IntegrityError unless a file is of the model."""
    for name in ("config", "weights"):
        wanted, found = getattr(header, name), getattr(model, name)
        if wanted != found:
            advice = "name its work directory, and its weights with --config.weights"
            raise IntegrityError(f"made with {name} {wanted.hex()}, found {found.hex()}; {advice}")
    exp = model.trained.exp
    fits = (header.shape, header.levels) == (exp.image_shape, exp.levels)
    if not fits or header.plan.ts[0] > exp.process.T:
        raise IntegrityError(f"header: images of {header.shape} or its times do not fit the model")


def read_segments(header: Header, reader: Reader, most: int) -> tuple[Plan, list[list[bytes]]]:
    """Returns the whole segments of a file, at most `most` (0: all), and the plan of their steps.

    Notes where the file was cut.
    """
    plan, segments = header.plan, []
    while not plan.decoder and (len(segments) < most or not most):
        try:
            segment = container.read_segment(reader, header, plan)
        except IntegrityError as error:
            n = len(segments)
            advice = f"; --config.codec.steps_decoded={n} decodes what is before it" if n else ""
            raise IntegrityError(f"segment {n + 1}: {error}{advice}") from error
        if segment is None:
            logging.info(f"note       the file ends within segment {len(segments) + 1}")
            break
        plan = segment.plan
        segments.append(segment.groups)
    return plan, segments


def decode_archive(header: Header, codec: Codec, reader: Reader, folder: epath.Path) -> None:
    """Decodes a bits-back archive, whose last images come first."""
    found = container.read_segment(reader, header, header.plan)
    if found is None or len(found.groups[0]) % 4:
        raise IntegrityError("the archive is not whole")
    codec = codec._replace(plan=found.plan)
    words = np.frombuffer(found.groups[0], "<u4").astype(np.uint32)
    check_empty(folder, "--output")
    images, left = [], header.images
    with Progress(header.images, unit="image") as progress:
        for index in bits_back.decode_batches(codec, words, header.images, header.batch):
            preemption.raise_if_requested()
            images.append(_codec.to_pixels(index, header.levels))
            left -= len(index)
            progress(header.images - left)
    _save(folder, np.concatenate(images[::-1]), 0)
    logging.info(f"done       {folder}: {header.images:,} images, exact")


def _prepare(folder: epath.Path, unfinished: dict) -> int:
    """Makes the folder, or finds how many images are in one that was interrupted."""
    note = folder / UNFINISHED
    try:
        if note.exists() and json.loads(note.read_text()) == unfinished:
            return len(list(folder.glob("*.png")))
    except (OSError, ValueError):
        pass
    check_empty(folder, "--output")
    folder.mkdir(parents=True, exist_ok=True)
    io.save_json(note, unfinished)
    return 0


def _save(folder: epath.Path, pixels: np.ndarray, first: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pixels, first):
        pixels = image[..., 0] if image.shape[2] == 1 else image
        with io.atomic_write(folder / f"{i:06d}.png") as file:
            Image.fromarray(pixels).save(file, "PNG")


def predicted(model: Model, header: Header, decoded: Decoded) -> np.ndarray:
    """Returns the exact pixels if they are known, else those of the predicted x_0, uint8."""
    if decoded.index is not None:
        return _codec.to_pixels(decoded.index, header.levels)
    return np.asarray(augment.unscale(jnp.asarray(decoded.x_0), header.levels))


def by_ode(model: Model, header: Header, decoded: Decoded) -> np.ndarray:
    """Returns the exact pixels if they are known, else the end of the flow from x_t, uint8.

    The flow is that of DDIM, on the grid timesteps.angle from t to 0.
    """
    if decoded.index is not None:
        return _codec.to_pixels(decoded.index, header.levels)
    exp, trained = model.trained.exp, model.trained
    chain = Process(*(values[: decoded.t + 1] for values in exp.process))
    ts = timesteps.angle(chain, min(decoded.t, ODE_STEPS))
    sampler = ancestral.ddim(exp.process)
    label = _codec.no_class(exp, len(decoded.x))
    predict = trained_chain(trained).predictor(trained.params, label)
    x_0 = base.sample(sampler, predict, random.key(0), jnp.asarray(decoded.x), ts)
    return np.asarray(augment.unscale(x_0, header.levels))


DECODERS = {"x_0": predicted, "ode": by_ode}
