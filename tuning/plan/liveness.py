"""How many bytes of temporaries a traced function takes at most, by a simple model of what compilers do with it.

The model: results of matrix products, kernels, loops and whatever else cannot be fused lie in memory from where they are made to where they
are last used; what is computed element by element is fused into its users, so that in its place what it is computed from stays alive,
unless it is smaller than that; products by experts give their places to it. A loop takes what its body takes, once, and what it stacks. A
kernel that is kept in codes is an array where it multiplies, and heads that are narrower than a TPU's lanes are filled up; heads that are
made float32 lie in memory, and so does float32 that goes into a product. All of it is then packed as XLA does, roughly, and what the gaps
take counts. How near this comes is in experiments/pod_compilation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# Their jaxpr stands in the place where they are called.
CALLS = (
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "custom_vmap_call", "shard_map", "custom_lin", "named_call",
)  # fmt: skip
LOOPS = ("scan", "while", "cond")
MADE = (
    "dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "scatter_add", "sort", "pallas_call", "concatenate",
    "dynamic_update_slice", "cumsum", "top_k", "ragged_dot_general", "ragged_dot", "argsort", "reduce_sum", "reduce_max", "reduce_and",
    "argmax", "random_bits", "custom_call", "platform_index", "all_gather", "reduce_scatter", *LOOPS,
)  # fmt: skip
VIEWS = ("reshape", "squeeze", "expand_dims", "convert_element_type", "transpose", "copy", "optimization_barrier")
LANES = 128
SCALAR = 8  # bytes
SMALLER = 0.75  # a result of less than this share of what it is made of is kept in its place
SMALL = 4096  # a buffer of less than the whole divided by this leaves no gap that counts
SHORT = 256  # a product over no more numbers than this is added up where its sum lies


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation on values that are numbers; `over` is how many numbers a product adds up."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    over: int = 0


@dataclasses.dataclass
class Flat:
    """A jaxpr with its calls in place. sizes: bytes by value; codes: the values of whole numbers in a byte; heads: those that a reshape
    split into heads; fed: float32 that is read as a whole, by a product for one."""

    ops: list[Op]
    sizes: list[int]
    inputs: list[int]
    outputs: list[int]
    codes: set[int]
    heads: set[int]
    fed: set[int]


@dataclasses.dataclass(frozen=True)
class Peak:
    """bytes: at most; kept: of what loops stacked for later ones, at that time."""

    bytes: int
    kept: int


class Buffer(NamedTuple):
    """Bytes that are there from `start` to `end`; the whole takes time 0 to 1. stacked: by a loop, for a later one; final: an output."""

    start: float
    end: float
    nbytes: float
    stacked: bool = False
    final: bool = False


@dataclasses.dataclass(frozen=True)
class Habits:
    """slices    share of what a loop reads a slice of in each turn that is made anew (1: it is gathered from its shards)
    matrices  share of that which is there of a matrix, where products take it shard by shard
    ahead     bytes that a loop over inputs of the whole has there besides, of what its turn will come to
    """

    slices: float = 0.0
    matrices: float = 1.0
    ahead: float = 0.0

    def nbytes(self, aval: Any) -> int:
        """Bytes of an array; of one that ends in heads, [..., T, H], with H filled up to LANES."""
        shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
        padded = (*shape[:-1], -(-shape[-1] // LANES) * LANES) if len(shape) >= 4 and shape[-1] >= LANES // 4 else shape
        return int(math.prod(padded) * getattr(dtype, "itemsize", 0))


def peak(
    jaxpr: Any, habits: Habits, held: Callable[[int], float] = lambda i: 0.0, result: Callable[[int, int], float] = lambda i, size: size
) -> Peak:
    """The most that a jaxpr takes of memory, without its inputs.

    held    share of the i-th input's bytes that are made anew where it is used
    result  (i, bytes) -> bytes of the i-th output
    """
    made = buffers(jaxpr, habits, held, result, (0.0, 1.0))
    moment, most = _fullest(made)
    large = [one for one in made if one.nbytes * SMALL >= most and not one.final]
    gaps = packed(large) - _fullest(large)[1]
    return Peak(int(most + gaps), int(sum(one.nbytes for one in made if one.stacked and one.start <= moment < one.end)))


def packed(buffers: Sequence[Buffer]) -> float:
    """The bytes that buffers take with the gaps between them, if those that are there longest are placed first, and each in the smallest
    gap that it fits in."""
    placed: list[tuple[Buffer, float]] = []
    top = 0.0
    for one in sorted(buffers, key=lambda one: (one.start - one.end, -one.nbytes)):
        free, gaps = 0.0, []
        for at, end in sorted((at, at + other.nbytes) for other, at in placed if other.start < one.end and one.start < other.end):
            if at - free >= one.nbytes:
                gaps.append((at - free, free))
            free = max(free, end)
        at = min(gaps)[1] if gaps else free
        placed.append((one, at))
        top = max(top, at + one.nbytes)
    return top


def _fullest(buffers: Sequence[Buffer]) -> tuple[float, float]:
    """(when most is there, how much)."""
    changes = sorted([(one.start, one.nbytes) for one in buffers] + [(one.end, -one.nbytes) for one in buffers])
    levels = itertools.accumulate(nbytes for _, nbytes in changes)
    return max(zip((time for time, _ in changes), levels, strict=True), key=lambda level: level[1], default=(0.0, 0.0))


def buffers(
    jaxpr: Any, habits: Habits, held: Callable[[int], float], result: Callable[[int, int], float], span: tuple[float, float]
) -> list[Buffer]:
    """What `peak` is of; the jaxpr takes the time of `span`."""
    f = flat(jaxpr, habits)
    final = {v for v in f.outputs if v >= 0}
    size = [float(s) for s in f.sizes]
    for i, v in enumerate(f.inputs):
        size[v] *= held(i)
    for i, v in enumerate(f.outputs):
        if v >= 0 and v not in f.inputs:
            size[v] = result(i, f.sizes[v])
    scans = [op for op in f.ops if op.name == "scan"]
    read = {v for op in scans for v in op.inputs}
    for op in scans:
        shares = _stacked(op, habits)
        for v in set(op.outputs[op.params["num_carry"] :]):
            size[v] *= shares.get(v, 0.0) if v in read else v in shares
    for op in f.ops:
        if op.name == "cond" and all(v < 0 or f.sizes[v] <= SCALAR for v in op.inputs):  # constants, which are folded into what reads them
            for v in op.outputs:
                size[v] = 0.0
    stacks = {v for op in scans for v in op.outputs[op.params["num_carry"] :]} - final
    time = lambda n: span[0] + (span[1] - span[0]) * n / (len(f.ops) + 1)  # noqa: E731
    made, lives = [], _lives(f, size, final)
    given: dict[int, float] = {}
    for v, (first, last) in sorted(lives.items(), key=lambda life: life[1]):
        # A product by experts (a choice by platform), into which nothing is fused, gives its place to what is computed from it and ends it.
        taken = f.ops[first].name not in MADE and 0 < size[v] <= given.get(first, 0.0)
        if taken or f.ops[first].name == "cond":
            given[last] = max(size[v], given.get(last, 0.0))
        first += taken
        # What an output is made of element by element lies in its place.
        in_place = last < len(f.ops) and f.ops[last].name not in MADE and not final.isdisjoint(f.ops[last].outputs)
        made.append(Buffer(time(first), time(last if in_place else last + 1), size[v], v in stacks, v in final))
    for n, op in enumerate(f.ops):
        if op.name in LOOPS:
            made += _inside(op, habits, (time(n), time(n + 1)))
        if op.name == "scan" and not set(op.inputs[op.params["num_consts"] + op.params["num_carry"] :]).isdisjoint(f.inputs):
            made.append(Buffer(time(n), time(n + 1), habits.ahead))
    return [one for one in made if one.nbytes and one.start < one.end]


def flat(jaxpr: Any, habits: Habits) -> Flat:
    """A jaxpr as a list of operations; the calls in it are opened, loops are not."""
    made, seen = Flat([], [], [], [], set(), set(), set()), {}

    def new(aval) -> int:
        made.sizes.append(habits.nbytes(aval))
        if str(getattr(aval, "dtype", "")) in ("int8", "uint8"):
            made.codes.add(len(made.sizes) - 1)
        return len(made.sizes) - 1

    def walk(jaxpr, inputs: Sequence[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, -1)
        at = lambda var: -1 if hasattr(var, "val") else known[var]  # noqa: E731
        for eqn in jaxpr.eqns:
            ins = [at(var) for var in eqn.invars]
            inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if key in eqn.params), None)
            if eqn.primitive.name in CALLS and inner is not None:
                inner = getattr(inner, "jaxpr", inner)
                outs = walk(inner, ins[len(ins) - len(inner.invars) :])
            else:
                # Both passes make the same heads wider: compilers do so once.
                key = (ins[0], str(eqn.outvars[0].aval.dtype)) if _widens(eqn) and ins[0] in made.heads else None
                outs = seen.get(key) or [new(var.aval) for var in eqn.outvars]
                if key not in seen:
                    made.ops.append(Op(eqn.primitive.name, tuple(ins), tuple(outs), eqn.params, _over(eqn)))
                    _mark(made, eqn, ins, outs)
                if key:
                    seen[key] = outs
            known.update(zip(eqn.outvars, outs, strict=True))
        return [at(var) for var in jaxpr.outvars]

    made.inputs = [new(var.aval) for var in jaxpr.invars]
    made.outputs = walk(jaxpr, made.inputs)
    return made


def _widens(eqn: Any) -> bool:
    return eqn.primitive.name == "convert_element_type" and eqn.outvars[0].aval.dtype.itemsize > eqn.invars[0].aval.dtype.itemsize


def _mark(made: Flat, eqn: Any, ins: Sequence[int], outs: Sequence[int]) -> None:
    """Adds an operation's values to `heads` and `fed`."""
    if not outs:
        return
    name, result = eqn.primitive.name, eqn.outvars[0].aval
    if name == "reshape" and result.ndim == 4 > eqn.invars[0].aval.ndim:
        made.heads.update(outs)
    if name == "dot_general":
        made.fed.update(v for v, var in zip(ins, eqn.invars, strict=True) if v >= 0 and _is_plain(var.aval))
    # The gradient of capped logits reads them and what they are capped from.
    if (name == "tanh" or (name == "mul" and not made.fed.isdisjoint(ins))) and _is_plain(result):
        made.fed.update(outs)


def _is_plain(aval: Any) -> bool:
    """Whether it is float32, and not of heads: what is made of scores goes into its product as it comes."""
    return aval.ndim <= 3 and str(aval.dtype) == "float32"


def _over(eqn: Any) -> int:
    if eqn.primitive.name != "dot_general":
        return 0
    (axes, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)


def _lives(f: Flat, size: Sequence[float], final: set[int]) -> dict[int, tuple[int, int]]:
    """{value that lies in memory: (the operation that it is there from, the last that it is used by)}."""
    roots = [frozenset([v]) for v in range(len(size))]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    summed = _summed(f)
    for n, op in enumerate(f.ops):
        for v in op.inputs if op.name in ("dot_general", "ragged_dot_general") else ():
            if v >= 0 and roots[v] & f.codes:
                roots[v] = frozenset([v])
        alive = frozenset().union(*(roots[v] for v in op.inputs if v >= 0))
        for v in op.outputs:
            smaller = len(alive) > 1 and size[v] <= SMALLER * sum(size[r] for r in alive)
            wider = op.name == "convert_element_type" and op.inputs[0] in f.heads and f.sizes[v] > f.sizes[op.inputs[0]]  # than the heads
            made = (op.name in MADE or v in final or smaller or wider or v in f.fed) and v not in summed
            roots[v] = frozenset([v]) if made else alive
            first.setdefault(v, n)
            last.setdefault(v, n)
        for v in alive:
            if not (op.name == "gather" and v in op.inputs[:1] and v in f.inputs):  # rows are looked up where they are
                last[v] = n
                first.setdefault(v, n)
    last |= {r: len(f.ops) for v in final for r in roots[v]}
    return {v: (n, last[v]) for v, n in first.items() if roots[v] == frozenset([v]) and size[v]}


def _summed(f: Flat) -> set[int]:
    """Products over few numbers that are only added to what a loop carries."""
    products = {op.outputs[0]: op.over for op in f.ops if op.name == "dot_general"}
    origin: dict[int, int] = {}
    for op in f.ops:
        if op.name in VIEWS and op.inputs[0] >= 0:
            origin[op.outputs[0]] = origin.get(op.inputs[0], op.inputs[0])
    added = (v for op in f.ops if op.name in ("add", "add_any") and not set(f.inputs).isdisjoint(op.inputs) for v in op.inputs)
    return {w for v in added if 0 < products.get(w := origin.get(v, v), 0) <= SHORT}


def _stacked(scan: Op, habits: Habits) -> dict[int, float]:
    """{stacked result of a loop that is there: the share of it that is}. What is computed element by element from a turn's own slices alone
    is made again where it is read, what is the same but for its shape is there once, and what was made wider is kept as it was."""
    carries, before = scan.params["num_carry"], scan.params["num_consts"] + scan.params["num_carry"]
    body = flat(scan.params["jaxpr"].jaxpr, habits)
    moving, origins = set(body.inputs[scan.params["num_consts"] : before]), dict[int, int]()
    for op in body.ops:
        if op.name in MADE or moving.intersection(op.inputs):
            moving.update(op.outputs)
        if op.name in VIEWS and op.inputs[0] >= 0:
            origins[op.outputs[0]] = origins.get(op.inputs[0], op.inputs[0])
    kept: dict[tuple[int, int], tuple[int, float]] = {}
    for v, made in zip(scan.outputs[carries:], body.outputs[carries:], strict=True):
        if made in moving:
            origin, size = origins.get(made, made), max(body.sizes[made], 1)
            kept.setdefault((origin, size), (v, min(1.0, body.sizes[origin] / size)))
    return dict(kept.values())


def _inside(op: Op, habits: Habits, span: tuple[float, float]) -> list[Buffer]:
    """What a loop makes in one turn, besides what it takes in and gives."""
    habits, nothing = dataclasses.replace(habits, ahead=0.0), lambda i, *_: 0.0
    if op.name == "scan":
        body, before = op.params["jaxpr"].jaxpr, op.params["num_consts"] + op.params["num_carry"]
        # What a turn hands on is written where the loop's results lie, which count outside.
        ranks = [getattr(var.aval, "ndim", 0) for var in body.invars]
        share = lambda i: habits.slices * (habits.matrices if ranks[i] == 2 else 1.0) if i >= before else 0.0  # noqa: E731
        return buffers(body, habits, share, nothing, span)
    inner = [op.params[key] for key in ("body_jaxpr",) if key in op.params] + list(op.params.get("branches", ()))
    found = [buffers(getattr(j, "jaxpr", j), habits, nothing, nothing, span) for j in inner]
    return max(found, key=lambda made: _fullest(made)[1], default=[])
