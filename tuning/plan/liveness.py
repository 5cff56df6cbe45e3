"""How many bytes of temporaries a traced function takes at most, by a simple model of what XLA does with it.

The model: results of matrix products, kernels, loops and whatever else cannot be fused lie in memory from where they are made to where they
are last used; what is computed element by element is fused into its users, so that in its place what it is computed from stays alive. A
loop takes what its body takes, once, and what it stacks. A kernel that is kept in codes is an array where it multiplies. Where heads are
narrower than a TPU's lanes, they are padded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

VIEWS = ("reshape", "squeeze", "expand_dims", "convert_element_type", "transpose", "copy", "optimization_barrier")
LANES = 128
SMALLER = 0.75  # a result of less than this share of what it is made of is kept in its place

# Their jaxpr stands in the place where they are called.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
         "custom_vjp_call_jaxpr", "shard_map", "custom_lin", "named_call")  # fmt: skip
LOOPS = ("scan", "while", "cond")
MADE = (
    "dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "scatter_add", "sort", "pallas_call", "concatenate",
    "dynamic_update_slice", "cumsum", "top_k", "ragged_dot_general", "ragged_dot", "argsort", "reduce_sum", "reduce_max", "reduce_and",
    "argmax", "random_bits", "custom_call", "platform_index", *LOOPS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]


@dataclasses.dataclass
class Flat:
    """A jaxpr with its calls in place: values are numbers; `codes` are those of whole numbers in a byte."""

    ops: list[Op]
    sizes: list[int]
    inputs: list[int]
    outputs: list[int]
    codes: set[int]


def nbytes(aval: Any) -> int:
    """Bytes of an array; of one that ends in heads, [..., T, H], with H filled up to LANES."""
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    padded = (*shape[:-1], -(-shape[-1] // LANES) * LANES) if len(shape) >= 4 and shape[-1] >= LANES // 4 else shape
    return math.prod(padded) * getattr(dtype, "itemsize", 0)


def flat(jaxpr: Any) -> Flat:
    made = Flat([], [], [], [], set())

    def new(aval) -> int:
        made.sizes.append(nbytes(aval))
        if str(getattr(aval, "dtype", "")) in ("int8", "uint8"):
            made.codes.add(len(made.sizes) - 1)
        return len(made.sizes) - 1

    def walk(jaxpr, inputs: Sequence[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        at = lambda var: known[var] if not hasattr(var, "val") else -1  # noqa: E731
        for var in jaxpr.constvars:
            known[var] = -1
        for eqn in jaxpr.eqns:
            ins = [at(var) for var in eqn.invars]
            inner = next((eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params), None)
            if eqn.primitive.name in CALLS and inner is not None:
                inner = getattr(inner, "jaxpr", inner)
                outs = walk(inner, ins[len(ins) - len(inner.invars) :])
            else:
                outs = [new(var.aval) for var in eqn.outvars]
                made.ops.append(Op(eqn.primitive.name, tuple(ins), tuple(outs), eqn.params))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [at(var) for var in jaxpr.outvars]

    made.inputs = [new(var.aval) for var in jaxpr.invars]
    made.outputs = walk(jaxpr, made.inputs)
    return made


@dataclasses.dataclass
class Peak:
    """bytes: at most; kept: of what loops stacked, at that time; inside: of what the loop that runs then takes."""

    bytes: int = 0
    kept: int = 0
    inside: int = 0
    at: str = ""


def peak(
    jaxpr: Any,
    held: Callable[[int], float] = lambda i: 0.0,
    result: Callable[[int, int], float] = lambda i, size: size,
    slices: float = 1.0,
) -> Peak:
    """The most that a jaxpr has in memory at a time, without its inputs.

    held    share of the i-th input's bytes that are made anew where it is used (1: it is gathered from its shards)
    result  (i, bytes) -> bytes of the i-th output
    slices  the same as held, of what a loop reads a slice of in each turn
    """
    f = flat(jaxpr)
    size = [float(s) for s in f.sizes]
    roots: list[frozenset[int]] = [frozenset([i]) for i in range(len(size))]
    for i, v in enumerate(f.inputs):
        size[v] *= held(i)
    for i, v in enumerate(f.outputs):
        if v >= 0 and v not in f.inputs:
            size[v] = result(i, f.sizes[v])
    final = {v for v in f.outputs if v >= 0}
    for op in f.ops:
        if op.name == "scan":
            for v in set(op.outputs[op.params["num_carry"] :]) - _stacked(op):
                size[v] = 0.0
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    looked = set()
    for n, op in enumerate(f.ops):
        if op.name == "dot_general":
            for v in op.inputs:
                if v >= 0 and roots[v] & f.codes:
                    roots[v] = frozenset([v])
        alive = frozenset().union(*(roots[v] for v in op.inputs if v >= 0)) if op.inputs else frozenset()
        for v in op.outputs:
            smaller = len(alive) > 1 and size[v] <= SMALLER * sum(size[r] for r in alive)
            roots[v] = frozenset([v]) if op.name in MADE or v in final or smaller else alive
        for v in alive:
            if op.name == "gather" and v in op.inputs[:1] and v in f.inputs:
                looked.add(v)
                continue
            last[v] = n
            first.setdefault(v, n)
        for v in op.outputs:
            first.setdefault(v, n)
            last.setdefault(v, n)
    for v in final:
        for r in roots[v]:
            last[r] = len(f.ops)
    births: dict[int, list[int]] = {}
    deaths: dict[int, list[int]] = {}
    for v, n in first.items():
        if roots[v] == frozenset([v]) and size[v]:
            births.setdefault(n, []).append(v)
            deaths.setdefault(last[v], []).append(v)
    best, live, stacks = Peak(), 0.0, 0.0
    stacked = {v for op in f.ops if op.name == "scan" for v in op.outputs[op.params["num_carry"] :]} - final
    for n, op in enumerate(f.ops):
        in_place = op.name not in MADE and not final.isdisjoint(op.outputs)  # in the place of what is not needed any more
        if in_place:
            live -= sum(size[v] for v in deaths.get(n, ()))
        live += sum(size[v] for v in births.get(n, ()))
        stacks += sum(size[v] for v in births.get(n, ()) if v in stacked)
        inside = _inside(op, slices) if op.name in LOOPS else 0.0
        if live + inside > best.bytes:
            best = Peak(int(live + inside), int(stacks), int(inside), op.name)
        if not in_place:
            live -= sum(size[v] for v in deaths.get(n, ()))
        stacks -= sum(size[v] for v in deaths.get(n, ()) if v in stacked)
    return best


def _stacked(scan: Op) -> set[int]:
    """Those stacked results of a loop that are there: what follows from a turn's own slices alone is made again where it is read, and what
    is the same but for its shape is there once."""
    carries, before = scan.params["num_carry"], scan.params["num_consts"] + scan.params["num_carry"]
    body = flat(scan.params["jaxpr"].jaxpr)
    moving, same = set(body.inputs[scan.params["num_consts"] : before]), {}
    for op in body.ops:
        if moving.intersection(op.inputs):
            moving.update(op.outputs)
        if op.name in VIEWS and op.inputs[0] >= 0:
            same[op.outputs[0]] = same.get(op.inputs[0], op.inputs[0]), body.sizes[op.outputs[0]]
    kept: dict[Any, int] = {}
    for v, made in zip(scan.outputs[carries:], body.outputs[carries:], strict=True):
        if made in moving:
            kept.setdefault(same.get(made, made), v)
    return set(kept.values())


def _inside(op: Op, slices: float) -> float:
    if op.name == "scan":
        body, before = op.params["jaxpr"].jaxpr, op.params["num_consts"] + op.params["num_carry"]
        # What a turn hands on is written where the loop's results lie, which count outside.
        return peak(body, lambda i: slices if i >= before else 0.0, lambda i, size: 0.0, slices).bytes
    inner = [op.params[key] for key in ("body_jaxpr",) if key in op.params] + list(op.params.get("branches", ()))
    return max((peak(getattr(j, "jaxpr", j), slices=slices).bytes for j in inner), default=0.0)
