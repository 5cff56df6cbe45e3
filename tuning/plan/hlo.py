"""Reading compiled programs: which buffers they make, what they send between devices, and how often, from XLA's text.

A loop's body counts as often as it turns, which stands in the text where the loop is made or in its condition. A TPU's collectives run
beside other work: then one of them stands in the text several times, and counts once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# They name what another instruction made, or what comes from outside.
NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant", "after-all", "opt-barrier")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
LINE = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)=")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `on_chip` if it lies outside a TPU's main memory."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def nbytes(self) -> int:
        return math.ceil(math.prod(self.shape) * SIZES.get(self.dtype, 0))

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation; `source` is the operation of the traced function that it comes from."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    text: str

    @property
    def source(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices: its kind, the bytes of the larger of what a device puts in and gets out, and how often in a step."""

    kind: str
    nbytes: int
    times: int
    arrays: tuple[Array, ...]
    source: str
    in_loop: bool


class Program:
    """A compiled module, from its text."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = name = ""
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
                name = head[2]
                self.computations[name] = []
                self.entry = name if head[1] else self.entry
            elif name and (start := LINE.match(line)):
                self.computations[name].append(_instruction(start[1], line, line[start.end() :]))

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often each computation runs in one run of the program; those inside fusions too."""
        found: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            found[name] = found.get(name, 0) + times
            for line in self.computations.get(name, ()):
                turns = self._turns(line) if line.op == "while" else 1
                for inner in (inner for names in line.called.values() for inner in names):
                    visit(inner, times * turns)

        visit(self.entry, 1)
        return found

    def _turns(self, loop: Instruction) -> int:
        """How often a loop turns; 1 where the text does not say."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
            return int(known[1])
        lines = [line for name in loop.called.get("condition", ()) for line in self._inside(name)]
        limits = [int(found[1]) for line in lines if line.op == "constant" and (found := re.search(r"constant\((\d+)\)", line.text))]
        return max(limits, default=1)

    def _inside(self, name: str) -> Iterator[Instruction]:
        for line in self.computations.get(name, ()):
            yield line
            for inner in (inner for names in line.called.values() for inner in names):
                yield from self._inside(inner)

    @functools.cached_property
    def loops(self) -> set[str]:
        """The computations that run inside a loop."""
        bodies = [name for lines in self.computations.values() for x in lines if x.op == "while" for name in x.called.get("body", ())]
        return {inner for body in bodies for inner in self._below(body)}

    def _below(self, name: str) -> Iterator[str]:
        yield name
        for line in self.computations.get(name, ()):
            for inner in (inner for names in line.called.values() for inner in names):
                yield from self._below(inner)

    def buffers(self) -> Iterator[tuple[Array, Instruction, str]]:
        """(array, the instruction that makes it, its computation) of everything that lies in main memory: nothing inside a fusion does."""
        inside = {n for lines in self.computations.values() for x in lines if x.op != "while" for key, names in x.called.items()
                  if key in ("calls", "to_apply", "called_computations") for n in names}  # fmt: skip
        for name, lines in self.computations.items():
            if name in self.times and name not in inside:
                yield from ((a, x, name) for x in lines if x.op not in NO_BUFFER for a in x.arrays if not a.on_chip)

    def largest(self, count: int = 12) -> list[tuple[int, str, str]]:
        """(bytes, type, what it is) of the largest different buffers, by size."""
        found: dict[tuple[int, str, str], None] = {}
        for array, line, _ in self.buffers():
            found.setdefault((array.nbytes, str(array), line.source or line.name))
        shapes: dict[str, tuple[int, str, str]] = {}
        for row in sorted(found, key=lambda row: -row[0]):
            shapes.setdefault(row[1], row)
        return list(shapes.values())[:count]

    def collectives(self) -> list[Collective]:
        """Every exchange between devices."""
        found: dict[str, Collective] = {}
        for name, lines in self.computations.items():
            sizes = {x.name: x.nbytes for x in lines}
            for x in lines:
                kind = x.op.removesuffix("-start")
                if kind in COLLECTIVES and name in self.times:
                    channel = re.search(r"channel_id=(\d+)", x.text)
                    arrays = x.arrays[-1:] if x.op.endswith("-start") and kind != "all-reduce" else x.arrays
                    nbytes = max(sum(a.nbytes for a in arrays), sum(sizes.get(o, 0) for o in x.operands))
                    key = f"{kind} {channel[1]}" if channel else f"{name} {x.name}"
                    found.setdefault(key, Collective(kind, nbytes, self.times[name], arrays, x.source, name in self.loops))
        return list(found.values())


def totals(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: how many there are in a step, and how many bytes a device handles in them}."""
    found: dict[str, dict[str, int]] = {}
    for one in collectives:
        row = found.setdefault(one.kind, {"count": 0, "bytes": 0})
        row["count"] += one.times
        row["bytes"] += one.times * one.nbytes
    return found


def _instruction(name: str, line: str, rest: str) -> Instruction:
    kind, rest = _type(rest)
    op = re.match(r"[\w\-]+", rest)
    operands = _operands(rest[op.end() :]) if op else ""
    called = {found[1]: tuple(re.findall(r"%?([\w.\-]+)", _names(rest[found.end() :]))) for found in CALLED.finditer(rest)}
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), re.search(r"S\([1-9]\)", layout) is not None)
        for dtype, shape, layout in ARRAY.findall(kind)
    )
    return Instruction(name, op[0] if op else "", arrays, tuple(re.findall(r"%([\w.\-]+)", operands)), called, line)


def _names(text: str) -> str:
    return text[1 : text.index("}")] if text.startswith("{") else re.split(r"[,\s}]", text, maxsplit=1)[0]


def _type(text: str) -> tuple[str, str]:
    """(the type that the text begins with, what follows it)."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    inside = _operands(text)
    return inside, text[len(inside) + 2 :].lstrip()


def _operands(text: str) -> str:
    """What stands in the parentheses that the text begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[1:i]
    return text
