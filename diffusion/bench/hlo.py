"""Bytes that a compiled program moves, read from its HLO text.

`cost_analysis()["bytes accessed"]` adds up what every operation touches. On a TPU that is mostly
on-chip memory (VMEM, marked S(1) in a layout), into which operands are prefetched piece by piece,
each piece counted with its whole operand. What bounds a step is the traffic of main memory (HBM):
the arrays that are not marked so.
"""

import collections
import re

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
# They rename an array, or end what another operation began and was counted for.
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
FREE |= {"copy-done", "slice-done", "async-done", "all-reduce-done", "opt-barrier", "partition-id"}
BITCAST = 'custom_call_target="ConcatBitcast"'  # prefetched slices become one array


def operations(text: str) -> dict[str, tuple[str, str, str]]:
    """Returns {name: (types, kind, operands and attributes)} of the operations of a text."""
    lines = filter(None, map(LINE.match, text.splitlines()))
    return {name: (types, kind, rest) for name, types, kind, rest in (m.groups() for m in lines)}


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
    for types, kind, _ in operations(text).values():
        if (kind := kind.removesuffix("-start")) in COLLECTIVES:
            total[kind] += sum(size for size, _ in arrays(types))
    return dict(total)


def moved_bytes(text: str) -> tuple[int, int]:
    """Returns the bytes that a program's entry (touches, moves from and to main memory).

    Only the second number includes transfers between memories. Loops count one iteration, gathers
    the whole operand.
    """
    entry = text[text.index("\nENTRY") :]
    known = operations(entry[: entry.index("\n}")])
    touched = main = 0
    for types, kind, rest in known.values():
        if kind in FREE or BITCAST in rest:
            continue
        if kind in ("copy-start", "slice-start"):
            main += _transferred(types)
            continue
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        for each in (types, *(known[name][0] for name in operands if name in known)):
            for size, in_main in arrays(each):
                touched += size
                main += size * in_main
    return touched, main


def _transferred(types: str) -> int:
    """Returns the bytes of main memory that (source, copy, counter) move, in either order."""
    ends = [end for end in arrays(types) if end[0] > 4]
    copied = min((size for size, _ in ends), default=0)
    return copied * min(2, sum(in_main for _, in_main in ends))
