"""The file: a header, then a segment for each step, then one for x_0.

    header    magic b"\\xd0DPM", version 2, numbers as below, checksum
    segment   how far t falls, p's variance, length of the body, body, checksum
    the last  0, variance of p(x_0 | x_t), length of the body, body, checksum
    body      for each group but the last its length; then the groups' bytes

A step of an archive has neither body nor checksum: all is in the last one. Numbers are LEB128:
seven bits a byte, the lowest first, the eighth says that more follow. A checksum is the CRC-32C of
all bytes of the header or segment, the lowest byte first. docs/codec.md describes every field.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from diffusion.codec.plan import Plan
from diffusion.utils.errors import IntegrityError

MAGIC = b"\xd0DPM\x02"
PROGRESSIVE, BITS_BACK = range(2)  # kinds of files
DIGEST = 4  # bytes of each of the digests
LIMITS = {  # of what a header may claim, so that a damaged one costs no memory
    "kind": (0, 1),
    "images": (1, 2**32),
    "height": (1, 2**14),
    "width": (1, 2**14),
    "channels": (1, 16),
    "levels": (2, 2**16),
    "group": (1, 2**20),
    "batch": (1, 2**16),
    "seed": (0, 2**32 - 1),
    "candidates": (2, 22),
    "padding": (0, 21),
    "T": (1, 2**32),
}
MAX_DIMS = 2**24  # of a group


class Header(NamedTuple):
    """What a file is and what decodes it.

    Attributes:
        kind: PROGRESSIVE or BITS_BACK.
        images, height, width, channels, levels: of the images.
        group: images that are coded together.
        batch: images of a call of the network.
        seed: of the shared randomness.
        plan: the steps; of a file being read, those that were read.
        weights, config, probe: digests of the weights, of what the config says of the model, and of
            the network's output on the encoder's machine; 4 bytes each.
    """

    kind: int
    images: int
    height: int
    width: int
    channels: int
    levels: int
    group: int
    batch: int
    seed: int
    plan: Plan
    weights: bytes
    config: bytes
    probe: bytes

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns (height, width, channels) of an image."""
        return self.height, self.width, self.channels


def leb128(number: int) -> bytes:
    """Returns a number that is not negative, seven bits a byte."""
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


class Reader:
    """Takes numbers and bytes from the front of a file's content.

    Raises EOFError where the content ends before them.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def number(self) -> int:
        """Returns the next LEB128 number. Raises IntegrityError for one above 2^63."""
        number = shift = 0
        while True:
            (byte,) = self.take(1)
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 56:
                raise IntegrityError("expected a number below 2^63, found a longer one")

    def take(self, n: int) -> bytes:
        """Returns the next n bytes."""
        if n > len(self.content) - self.at:
            raise EOFError
        self.at += n
        return self.content[self.at - n : self.at]


def _crc(content: bytes) -> bytes:
    return google_crc32c.value(content).to_bytes(4, "little")


def header_bytes(header: Header) -> bytes:
    """Returns the header as it stands in the file, with nothing of its steps."""
    numbers = map(leb128, _numbers(header).values())
    content = b"".join([MAGIC, *numbers, header.weights, header.config, header.probe])
    return content + _crc(content)


def read_header(reader: Reader) -> Header:
    """Reads the header, whose plan has no steps yet. Raises IntegrityError."""
    try:
        if reader.take(len(MAGIC)) != MAGIC:
            raise IntegrityError("expected a file that --mode=compress wrote, found another kind")
        found = {name: reader.number() for name in LIMITS}
        digests = [reader.take(DIGEST) for _ in range(3)]
        end = reader.at
        if reader.take(4) != _crc(reader.content[:end]):
            raise IntegrityError("the header is damaged: its checksum is another")
    except EOFError as error:
        raise IntegrityError("the file ends within its header") from error
    plan = Plan((found.pop("T"),), (), 0.0, found.pop("candidates"), found.pop("padding"))
    header = Header(**found, plan=plan, weights=digests[0], config=digests[1], probe=digests[2])
    try:
        check_header(header)
    except ValueError as error:
        raise IntegrityError(f"header: {error}") from error
    return header


def check_header(header: Header) -> None:
    """Raises ValueError unless a header is within the LIMITS, of writing as of reading."""
    for name, value in _numbers(header).items():
        low, high = LIMITS[name]
        if not low <= value <= high:
            raise ValueError(f"expected {name} in {low}..{high}, found {value}")
    h, plan = header, header.plan
    if plan.padding >= plan.candidates:
        raise ValueError(f"expected padding of 0 to {plan.candidates - 1}, found {plan.padding}")
    each = math.prod(h.shape)
    if h.group * each > MAX_DIMS:
        most = f"expected at most {MAX_DIMS // each:,} images of {each:,} numbers in a group"
        raise ValueError(f"{most}, found {h.group:,}")


def _numbers(header: Header) -> dict[str, int]:
    """Returns the header's numbers in the order of the file."""
    h, plan = header, header.plan
    values = h.kind, h.images, *h.shape, h.levels, h.group, h.batch, h.seed
    return dict(zip(LIMITS, (*values, plan.candidates, plan.padding, plan.ts[0]), strict=True))


def segment_bytes(header: Header, i: int, groups: Sequence[bytes]) -> bytes:
    """Returns the segment of step i, or of x_0, from all groups' bytes."""
    ts, steps = header.plan.ts, len(header.plan.variances)
    step = _step_bytes(ts[i] - ts[i + 1], header.plan.variances[i]) if i < steps else _end(header)
    body = b"".join([*(leb128(len(part)) for part in groups[:-1]), *groups])
    content = step + leb128(len(body)) + body
    return content + _crc(content)


def archive_bytes(header: Header, body: bytes) -> bytes:
    """Returns all of an archive behind its header."""
    ts = header.plan.ts
    falls = [a - b for a, b in itertools.pairwise(ts)]
    content = b"".join(map(_step_bytes, falls, header.plan.variances))
    content += _end(header) + leb128(len(body)) + body
    return content + _crc(content)


def _step_bytes(fall: int, variance: int) -> bytes:
    return leb128(fall) + bytes([variance])


def _end(header: Header) -> bytes:
    return leb128(0) + np.array(header.plan.decoder, "<f4").tobytes()[2:]


class Segment(NamedTuple):
    """A segment of a file, the plan with its step, and each group's bytes."""

    plan: Plan
    groups: list[bytes]


def read_segment(reader: Reader, header: Header, plan: Plan) -> Segment | None:
    """Returns the segment behind the steps of a plan; None where the file ends before its end.

    Of an archive it is all that there is. Raises IntegrityError for a damaged segment.
    """
    first = reader.at
    try:
        while fall := reader.number():
            ts, variances = (*plan.ts, plan.ts[-1] - fall), (*plan.variances, *reader.take(1))
            if ts[-1] < 1:
                raise IntegrityError(f"expected a time of 1 or more, found {ts[-1]}")
            plan = plan._replace(ts=ts, variances=variances)
            if header.kind == PROGRESSIVE:
                break
        if not fall:
            decoder = np.frombuffer(b"\0\0" + reader.take(2), "<f4")[0]
            plan = plan._replace(decoder=float(decoder))
        body = reader.take(reader.number())
        end = reader.at
        crc = reader.take(4)
    except EOFError:
        return None
    if _crc(reader.content[first:end]) != crc:
        raise IntegrityError("its checksum is another")
    if not (fall or 0 < plan.decoder < math.inf):
        raise IntegrityError(f"expected a variance above 0, found {plan.decoder}")
    groups = 1 if header.kind == BITS_BACK else -(-header.images // header.group)
    inside = Reader(body)
    try:
        if groups - 1 > len(body):
            raise EOFError
        parts = [inside.take(n) for n in [inside.number() for _ in range(groups - 1)]]
    except EOFError as error:
        raise IntegrityError("its groups are longer than it is") from error
    return Segment(plan, [*parts, body[inside.at :]])
