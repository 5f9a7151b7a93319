"""Files come back as they were written, and damaged ones are refused."""

import numpy as np
import pytest

from diffusion.codec import container
from diffusion.codec.container import Header, Reader
from diffusion.codec.plan import Plan
from diffusion.utils.errors import IntegrityError

PLAN = Plan((1000, 300, 7), (28, 255), 0.0078125, 17, 4)
HEADER = Header(0, 296, 8, 8, 1, 17, 100, 64, 2**32 - 1, PLAN, b"abcd", b"efgh", b"ijkl")
EMPTY = PLAN._replace(ts=(1000,), variances=(), decoder=0.0)
FILE = container.header_bytes(HEADER)
GROUPS = [[b"", b"xy", b""], [b"a", bytes(300), b"1"], [b"", b"", b"end"]]
SEGMENTS = [container.segment_bytes(HEADER, i, groups) for i, groups in enumerate(GROUPS)]


def test_a_header_comes_back():
    reader = Reader(FILE + b"more")
    assert container.read_header(reader) == HEADER._replace(plan=EMPTY)
    assert reader.content[reader.at :] == b"more"
    assert len(FILE) < 45


def test_no_damaged_header_is_taken():
    for i in range(len(FILE)):
        with pytest.raises(IntegrityError):
            container.read_header(Reader(FILE[:i]))
        for bit in range(8):
            damaged = bytearray(FILE)
            damaged[i] ^= 1 << bit
            with pytest.raises(IntegrityError):
                container.read_header(Reader(bytes(damaged)))


IMPOSSIBLE = {
    "kind": HEADER._replace(kind=2),
    "no images": HEADER._replace(images=0),
    "one level": HEADER._replace(levels=1),
    "too large a group": HEADER._replace(group=2**20, height=2**10),
    "time 0": HEADER._replace(plan=PLAN._replace(ts=(0,))),
    "padding": HEADER._replace(plan=PLAN._replace(padding=17)),
    "long lists": HEADER._replace(plan=PLAN._replace(candidates=40)),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_header_with_a_right_checksum_is_checked_too(name):
    with pytest.raises(IntegrityError, match="header"):
        container.read_header(Reader(container.header_bytes(IMPOSSIBLE[name])))


def read(content):
    """Returns (plan, groups of every segment) of a progressive file behind its header."""
    reader, plan, found = Reader(content), EMPTY, []
    while segment := container.read_segment(reader, HEADER, plan):
        plan = segment.plan
        found.append(segment.groups)
        if plan.decoder:
            break
    return plan, found


def test_steps_and_segments_come_back():
    assert read(b"".join(SEGMENTS) + b"more") == (PLAN, GROUPS)


def test_every_prefix_has_its_whole_segments():
    ends = np.cumsum([*map(len, SEGMENTS)])
    content = b"".join(SEGMENTS)
    for i in range(len(content)):
        plan, found = read(content[:i])
        n = np.sum(ends <= i)
        assert found == GROUPS[:n] and plan.decoder == 0
        assert (plan.ts, plan.variances) == (PLAN.ts[: n + 1], PLAN.variances[:n])


def test_a_damaged_segment_is_refused():
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(SEGMENTS[1])
        damaged[rng.integers(len(damaged))] ^= rng.integers(1, 256)
        plan = EMPTY._replace(ts=PLAN.ts[:2], variances=PLAN.variances[:1])
        try:
            found = container.read_segment(Reader(bytes(damaged)), HEADER, plan)
        except IntegrityError:
            continue
        assert found is None  # its length is beyond the end


@pytest.mark.parametrize(
    "plan, images",
    [
        (PLAN._replace(ts=(1000, 1000, 300)), 296),  # ends at once, with bytes for a variance
        (PLAN._replace(ts=(1000, 0, 0)), 296),
        (PLAN._replace(decoder=0.0), 296),
        (PLAN._replace(decoder=float("nan")), 296),
        (PLAN._replace(decoder=float("inf")), 296),
        (PLAN, 100_000),  # a group for every byte and more
    ],
)
def test_a_segment_with_a_right_checksum_is_checked_too(plan, images):
    header = HEADER._replace(plan=plan, images=images)
    parts = [container.segment_bytes(header, i, groups) for i, groups in enumerate(GROUPS)]
    reader, known = Reader(b"".join(parts)), EMPTY
    with pytest.raises(IntegrityError):
        while not known.decoder:
            known = container.read_segment(reader, header, known).plan


def test_an_archive_comes_back():
    header = HEADER._replace(kind=container.BITS_BACK)
    content = container.archive_bytes(header, b"words")
    found = container.read_segment(Reader(content + b"more"), header, EMPTY)
    assert found == (PLAN, [b"words"])
    for i in range(len(content)):
        assert container.read_segment(Reader(content[:i]), header, EMPTY) is None
    for i in range(len(content)):
        damaged = bytearray(content)
        damaged[i] ^= 1
        try:
            assert container.read_segment(Reader(bytes(damaged)), header, EMPTY) is None
        except IntegrityError:
            pass


@pytest.mark.parametrize("number", [0, 127, 128, 300, 2**32, 2**56 - 1])
def test_numbers_come_back(number):
    assert Reader(container.leb128(number)).number() == number


def test_an_endless_number_is_refused():
    with pytest.raises(IntegrityError):
        Reader(b"\xff" * 20).number()
