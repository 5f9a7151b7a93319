"""The file: a header, one segment for each step of all groups, then one for x_0.

    header    magic b"\\xd0DPM", version 1, numbers as below, CRC-32C of all before it
    segment   length, CRC-32C of the body, body
    body      for each group but the last its length; then the groups' bytes

Numbers are LEB128: seven bits a byte, the lowest first, the eighth says that more follow. Checksums
have four bytes, the lowest first. docs/codec.md describes every field.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from diffusion.codec.plan import BITS, Plan
from diffusion.utils.errors import IntegrityError

MAGIC = b"\xd0DPM\x01"
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
    "max_size": (2, 22),
    "padding": (0, 21),
    "steps": (0, 2**16),
}
MAX_DIMS, MAX_BITS = 2**24, 64  # of a group, and of a dimension at one step


class Header(NamedTuple):
    """What a file is and what decodes it.

    Attributes:
        kind: PROGRESSIVE or BITS_BACK.
        images, height, width, channels, levels: of the images.
        group: images that are coded together.
        batch: images of a call of the network.
        seed: of the shared randomness.
        plan: the steps.
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
    """Returns the header as it stands in the file."""
    h, plan = header, header.plan
    numbers = [h.kind, h.images, *h.shape, h.levels, h.group, h.batch, h.seed]
    falls = [a - b for a, b in zip(plan.ts, [*plan.ts[1:], 0], strict=True)]
    numbers += [plan.max_size, plan.padding, len(plan.bits), *falls]
    parts = [MAGIC, *map(leb128, numbers), bytes(plan.variances), bytes(plan.bits)]
    parts += [np.float32(plan.decoder).tobytes()[2:], h.weights, h.config, h.probe]
    content = b"".join(parts)
    return content + _crc(content)


def read_header(reader: Reader) -> Header:
    """Reads the header. Raises IntegrityError."""
    try:
        if reader.take(len(MAGIC)) != MAGIC:
            raise IntegrityError("expected a file that --mode=compress wrote, found another kind")
        found = {name: reader.number() for name in LIMITS}
        n = found["steps"]
        if n > len(reader.content):
            raise EOFError
        falls = [reader.number() for _ in range(n + 1)]
        variances, bits = (tuple(reader.take(n)) for _ in range(2))
        decoder = float(np.frombuffer(b"\0\0" + reader.take(2), "<f4")[0])
        digests = [reader.take(DIGEST) for _ in range(3)]
        end = reader.at
        if reader.take(4) != _crc(reader.content[:end]):
            raise IntegrityError("the header is damaged: its checksum is another")
    except EOFError as error:
        raise IntegrityError("the file ends within its header") from error
    ts = tuple(itertools.accumulate(reversed(falls)))[::-1]
    for name, (low, high) in LIMITS.items():
        if not low <= found[name] <= high:
            raise IntegrityError(f"header: expected {name} in {low}..{high}, found {found[name]}")
    plan_ = Plan(ts, variances, decoder, bits, found["max_size"], found["padding"])
    for name in ("max_size", "padding", "steps"):
        del found[name]
    _check(plan_, found)
    return Header(**found, plan=plan_, weights=digests[0], config=digests[1], probe=digests[2])


def _check(plan: Plan, found: dict[str, int]) -> None:
    dims = found["group"] * found["height"] * found["width"] * found["channels"]
    if plan.padding >= plan.max_size or dims > MAX_DIMS:
        raise IntegrityError("header: its sizes do not fit together")
    if not all(a > b for a, b in zip(plan.ts, [*plan.ts[1:], 0], strict=True)):
        raise IntegrityError("header: expected falling times")
    if not (math.isfinite(plan.decoder) and plan.decoder > 0):
        raise IntegrityError("header: expected a variance above 0")
    if any(BITS[code] > MAX_BITS * dims for code in plan.bits):
        raise IntegrityError("header: its bits do not fit its images")


def segment_bytes(groups: Sequence[bytes]) -> bytes:
    """Returns a segment of all groups' bytes."""
    body = b"".join([*(leb128(len(part)) for part in groups[:-1]), *groups])
    return leb128(len(body)) + _crc(body) + body


def read_segment(reader: Reader, groups: int) -> list[bytes] | None:
    """Returns each group's bytes of the next segment; None where the file ends before its end.

    Raises IntegrityError for a damaged segment.
    """
    try:
        length, crc = reader.number(), reader.take(4)
        body = reader.take(length)
    except EOFError:
        return None
    if _crc(body) != crc:
        raise IntegrityError("its checksum is another")
    inside = Reader(body)
    try:
        if groups - 1 > len(body):
            raise EOFError
        parts = [inside.take(n) for n in [inside.number() for _ in range(groups - 1)]]
    except EOFError as error:
        raise IntegrityError("its groups are longer than it is") from error
    return [*parts, body[inside.at :]]
