"""Bytes that a compiled program moves, read from its HLO text.

`cost_analysis()["bytes accessed"]` adds up what every operation touches. On a TPU that is mostly
on-chip memory (VMEM, marked S(1) in a layout), into which operands are prefetched piece by piece,
each piece counted with its whole operand. What bounds a step is the traffic of main memory (HBM):
the arrays that are not marked so.
"""

import collections
import itertools
import re
from typing import NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
# They rename an array, or end what another operation began and was counted for.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
BITCAST = 'custom_call_target="ConcatBitcast"'  # prefetched slices become one array
FREE |= {"copy-done", "slice-done", "async-done", "all-reduce-done", "opt-barrier", "partition-id"}


def arrays(types: str) -> list[tuple[int, bool]]:
    """Returns (bytes, in main memory?) of each array in "(f32[2,3]{1,0:T(8,128)S(1)}, …)"."""
    found = []
    for kind, shape, layout in ARRAY.findall(types):
        size = SIZES[kind]
        for side in filter(None, shape.split(",")):
            size *= int(side)
        found.append((size, "S(1)" not in layout))
    return found


def collectives(text: str) -> dict[str, int]:
    """Returns {kind: bytes that it delivers to each chip} of a program's collectives."""
    total: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        match = LINE.match(line)
        if match and match[3].removesuffix("-start") in COLLECTIVES:
            total[match[3].removesuffix("-start")] += sum(size for size, _ in arrays(match[2]))
    return dict(total)


class Moved(NamedTuple):
    """Bytes that a program's entry moves; loops count one iteration, gathers the whole operand."""

    touched: int  # read and written by operations, without transfers between memories
    main: int  # read from and written to main memory, with transfers


def moved(text: str) -> Moved:
    """Returns the bytes that a compiled program moves, from its text."""
    entry = text[text.index("\nENTRY") :]
    lines = filter(None, map(LINE.match, entry[: entry.index("\n}")].splitlines()))
    operations = {match[1]: match for match in lines}
    touched = main = 0
    for _, types, kind, rest in (match.groups() for match in operations.values()):
        if kind in FREE or BITCAST in rest:
            continue
        if kind in ("copy-start", "slice-start"):
            main += _fetched(types)
            continue
        names = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        operands = [operations[name][2] for name in names if name in operations]
        for size, in_main in itertools.chain(*map(arrays, [types, *operands])):
            touched += size
            main += size * in_main
    return Moved(touched, main)


def _fetched(types: str) -> int:
    """Returns the copy's bytes of a transfer's (source, copy, counter) types, in either order.

    Twice that if both ends are in main memory.
    """
    ends = [end for end in arrays(types) if end[0] > 4]
    moved = min((size for size, _ in ends), default=0)
    return moved * min(2, sum(main for _, main in ends))
