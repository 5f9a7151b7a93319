"""Files come back as they were written, and damaged ones are refused."""

import numpy as np
import pytest

from diffusion.codec import container
from diffusion.codec.container import Header, Reader
from diffusion.codec.plan import Plan
from diffusion.utils.errors import IntegrityError

PLAN = Plan((1000, 300, 7), (28, 255), 0.0078125, (90, 133), 17, 4)
HEADER = Header(0, 296, 8, 8, 1, 17, 100, 64, 2**32 - 1, PLAN, b"abcd", b"efgh", b"ijkl")
FILE = container.header_bytes(HEADER)


def test_a_header_comes_back():
    reader = Reader(FILE + b"more")
    assert container.read_header(reader) == HEADER
    assert reader.content[reader.at :] == b"more"
    assert len(FILE) < 60


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
    "times that rise": HEADER._replace(plan=PLAN._replace(ts=(7, 7, 3))),
    "time 0": HEADER._replace(plan=PLAN._replace(ts=(9, 3, 0))),
    "padding": HEADER._replace(plan=PLAN._replace(padding=17)),
    "long lists": HEADER._replace(plan=PLAN._replace(max_size=40)),
    "more bits than images have": HEADER._replace(plan=PLAN._replace(bits=(255, 255))),
    "no variance": HEADER._replace(plan=PLAN._replace(decoder=0.0)),
    "NaN": HEADER._replace(plan=PLAN._replace(decoder=float("nan"))),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_header_with_a_right_checksum_is_checked_too(name):
    with pytest.raises(IntegrityError, match="header"):
        container.read_header(Reader(container.header_bytes(IMPOSSIBLE[name])))


@pytest.mark.parametrize(
    "groups", [[b""], [b"abc"], [b"", b"xy", b""], [bytes(300), b"1", bytes(5)]]
)
def test_segments_come_back(groups):
    content = container.segment_bytes(groups)
    assert container.read_segment(Reader(content + b"next"), len(groups)) == groups
    for i in range(len(content)):
        assert container.read_segment(Reader(content[:i]), len(groups)) is None


def test_a_damaged_segment_is_refused():
    content = container.segment_bytes([b"first", b"second"])
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= rng.integers(1, 256)
        try:
            found = container.read_segment(Reader(bytes(damaged)), 2)
        except IntegrityError:
            continue
        assert found is None  # its length is beyond the end
    with pytest.raises(IntegrityError):
        container.read_segment(Reader(content), 40)


@pytest.mark.parametrize("number", [0, 127, 128, 300, 2**32, 2**56 - 1])
def test_numbers_come_back(number):
    assert Reader(container.leb128(number)).number() == number


def test_an_endless_number_is_refused():
    with pytest.raises(IntegrityError):
        Reader(b"\xff" * 20).number()
