"""R28: 200,000 mutated files are refused, or decode to the same pixels, or to a prefix's."""

import time
import tracemalloc

import google_crc32c
import numpy as np
import pytest

from diffusion.codec import container, progressive
from diffusion.codec.container import Header, Reader
from diffusion.utils.errors import IntegrityError
from tests.codec.test_codec import IMAGES, KEY, LEVELS, SHAPE, five_steps, make

pytestmark = pytest.mark.soak
FILES, MIB = 200_000, 2**20
SEGMENTS = 6  # of five_steps and x_0


@pytest.fixture(scope="module")
def written():
    """(codec, header, content) of 44 images in groups of 20."""
    codec = make(five_steps(), 20)
    header = Header(0, 44, *SHAPE, LEVELS, 20, 20, 5, codec.plan, b"abcd", b"efgh", b"ijkl")
    segments = progressive.encode_groups(codec, IMAGES, 0, KEY).segments
    parts = [container.segment_bytes(header, *pair) for pair in enumerate(segments)]
    return codec, header, container.header_bytes(header) + b"".join(parts)


def decode(codec, wanted, content):
    """Returns (segments read, Decoded) as --mode=decompress does. Raises IntegrityError."""
    reader = Reader(content)
    header = container.read_header(reader)
    plan, segments = header.plan, []
    if header != wanted._replace(plan=plan) or plan.ts[0] > codec.process.T:
        raise IntegrityError("another header: the model and its digests refuse it")
    while not plan.decoder:
        segment = container.read_segment(reader, header, plan)
        if segment is None:
            break
        plan = segment.plan
        segments.append(segment.groups)
    codec = codec._replace(plan=plan)
    return len(segments), progressive.decode_groups(codec, segments, 0, 44)


def mutate(content, rng):
    """Changes, removes, inserts, repeats or cuts bytes."""
    data, at = bytearray(content), int(rng.integers(len(content)))
    n = int(rng.integers(1, 9))
    kind = rng.integers(5)
    if kind == 0:
        data[at] ^= int(rng.integers(1, 256))
    elif kind == 1:
        data[at : at + n] = rng.bytes(n)
    elif kind == 2:
        del data[at : at + n]
    elif kind == 3:
        data[at:at] = data[at : at + n]
    else:
        del data[at:]
    return bytes(data)


def with_right_checksum(content, rng):
    """Damages a variance or the body of a segment, not their lengths, and mends its checksum."""
    reader = Reader(content)
    header = container.read_header(reader)
    plan = header.plan
    for _ in range(int(rng.integers(1, SEGMENTS + 1))):
        start = reader.at
        plan = container.read_segment(reader, header, plan).plan
    inside, data = Reader(content), bytearray(content)
    inside.at = start
    inside.number()
    variance = inside.at
    inside.take(2 if plan.decoder else 1)
    inside.number()
    places = [variance, *range(inside.at, reader.at - 4)]
    data[int(rng.choice(places))] ^= int(rng.integers(1, 256))
    crc = google_crc32c.value(bytes(data[start : reader.at - 4]))
    data[reader.at - 4 : reader.at] = crc.to_bytes(4, "little")
    return bytes(data)


def test_mutated_files(written, figures):
    codec, header, content = written
    whole, decoded = decode(codec, header, content)
    np.testing.assert_array_equal(decoded.index, IMAGES)
    prefixes = {}
    rng, began = np.random.default_rng(0), time.monotonic()
    counts = dict.fromkeys(("refused", "a prefix", "the same pixels", "mended and refused"), 0)
    tracemalloc.start()
    for i in range(FILES):
        mended = i % 200 == 0
        damaged = with_right_checksum(content, rng) if mended else mutate(content, rng)
        if not mended and damaged == content:
            continue
        try:
            n, found = decode(codec, header, damaged)
        except IntegrityError:
            counts["mended and refused" if mended else "refused"] += 1
            continue
        if n == whole:  # bytes after the end
            np.testing.assert_array_equal(found.index, IMAGES)
            counts["the same pixels"] += 1
        else:
            assert not mended and found.index is None
            x_0 = prefixes.setdefault(n, found.x_0)
            np.testing.assert_array_equal(found.x_0, x_0)
            counts["a prefix"] += 1
    most = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    assert most < 300
    seconds = time.monotonic() - began
    figures("R28", {"files": FILES} | counts | {"MiB": round(most), "s": round(seconds)})


def test_every_truncation(written):
    codec, header, content = written
    seen = []
    for n in range(len(content)):
        try:
            seen.append(decode(codec, header, content[:n])[0])
        except IntegrityError:
            assert not seen  # only within the header
    assert seen == sorted(seen) and set(seen) == set(range(len(codec.plan.ts)))
