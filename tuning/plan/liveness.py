"""How many bytes of temporaries a traced function takes at most, by a simple model of what XLA does with it.

The model: results of matrix products, kernels, loops and whatever else cannot be fused lie in memory from where they are made to where they
are last used; what is computed element by element is fused into its users, so that in its place what it is computed from stays alive. A
loop takes what its body takes, once, and what it stacks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """A jaxpr with its calls in place: values are numbers, `bytes` their sizes."""

    ops: list[Op]
    sizes: list[int]
    inputs: list[int]
    outputs: list[int]


def nbytes(aval: Any) -> int:
    shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def flat(jaxpr: Any) -> Flat:
    made = Flat([], [], [], [])

    def new(aval) -> int:
        made.sizes.append(nbytes(aval))
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
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    looked = set()
    for n, op in enumerate(f.ops):
        alive = frozenset().union(*(roots[v] for v in op.inputs if v >= 0)) if op.inputs else frozenset()
        for v in op.outputs:
            roots[v] = frozenset([v]) if op.name in MADE or v in final else alive
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
    stacked = {v for op in f.ops if op.name == "scan" for v in op.outputs[op.params["num_carry"] :]}
    for n, op in enumerate(f.ops):
        live += sum(size[v] for v in births.get(n, ()))
        stacks += sum(size[v] for v in births.get(n, ()) if v in stacked)
        inside = _inside(op, slices) if op.name in LOOPS else 0.0
        if live + inside > best.bytes:
            best = Peak(int(live + inside), int(stacks), int(inside), op.name)
        live -= sum(size[v] for v in deaths.get(n, ()))
        stacks -= sum(size[v] for v in deaths.get(n, ()) if v in stacked)
    return best


def _inside(op: Op, slices: float) -> float:
    if op.name == "scan":
        body, before = op.params["jaxpr"].jaxpr, op.params["num_consts"] + op.params["num_carry"]
        # The carry that goes in lies beside the one that comes out; a stack's slice is written in place.
        outs = op.params["num_carry"]
        return peak(body, lambda i: slices if i >= before else 0.0, lambda i, size: size if i < outs else 0.0, slices).bytes
    inner = [op.params[key] for key in ("body_jaxpr",) if key in op.params] + list(op.params.get("branches", ()))
    return max((peak(getattr(j, "jaxpr", j), slices=slices).bytes for j in inner), default=0.0)
