"""CRC-32C (Castagnoli), the checksum of TensorFlow's files, at the speed of NumPy.

A CRC is linear over GF(2): the register after n words is the sum, over the words, of "advance by
as many bytes as follow" applied to each. So a long message is cut into rows and folded to one row,
advancing the sum so far by a row's length before the next is added: whole rows at a time, instead
of a loop over bytes. Source: RFC 3720, appendix B.4 (polynomial and test vectors).
"""

import functools
from typing import Any

import numpy as np

POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41 with its bits reversed: bytes enter by their lowest bit
ROWS = (2**14, 2**8)  # words in a row: long rows for long messages, then what is left by short ones
_ALL = 0xFFFFFFFF


def extend(crc: int, data: bytes | memoryview | np.ndarray) -> int:
    """The CRC of a message that begins with the one of `crc` and goes on with these bytes."""
    data, register = np.frombuffer(data, np.uint8), crc ^ _ALL
    for words in ROWS:
        rows = len(data) // (4 * words)
        if rows > 1:
            head, data = np.split(data, [4 * words * rows])
            head = head.view("<u4").reshape(rows, words)
            data = np.concatenate([_folded(register, head, words).view(np.uint8), data])
            register = 0
    table = _bytes()
    for byte in data.tobytes():
        register = table[(register ^ byte) & 0xFF] ^ (register >> 8)
    return register ^ _ALL


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The CRC of these bytes. crc32c(b"123456789") is 0xE3069283."""
    return extend(0, data)


def masked(crc: int) -> int:
    """The CRC as TensorFlow stores it: a checksum of data that itself holds checksums is weak.

    Source: leveldb, util/crc32c.h.
    """
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ALL


def _folded(register: int, rows: np.ndarray, words: int) -> np.ndarray:
    """uint32[n, words] -> uint32[words] of the same remainder."""
    low, high = _advance(4 * words)
    total = rows[0].copy()
    total[0] ^= np.uint32(register)
    for row in rows[1:]:
        total = low[total & 0xFFFF] ^ high[total >> 16] ^ row
    return total


@functools.cache
def _bytes() -> tuple[int, ...]:
    """What the register becomes by one zero byte, for each value of its lowest byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(POLYNOMIAL), np.uint32(0))
    return tuple(map(int, table))


@functools.cache
def _advance(n: int) -> tuple[np.ndarray, np.ndarray]:
    """What the register becomes by n zero bytes, n a power of 2: for its lower and upper half."""
    if n == 1:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        images = np.asarray(_bytes(), np.uint32)[bits & 0xFF] ^ (bits >> 8)
    else:  # twice as far
        low, high = _advance(n // 2)
        bits = np.concatenate([low[1 << np.arange(16)], high[1 << np.arange(16)]])
        images = low[bits & 0xFFFF] ^ high[bits >> 16]
    return _sums(images[:16]), _sums(images[16:])


def _sums(images: Any) -> np.ndarray:
    """uint32[16], the images of single bits -> uint32[2^16], of every value by linearity."""
    table = np.zeros(1, np.uint32)
    for image in images:
        table = np.concatenate([table, table ^ image])
    return table
