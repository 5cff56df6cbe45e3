"""How many bytes of temporaries a traced function takes at most, by a simple model of what compilers do with it.

The model: results of matrix products, kernels, loops and whatever else cannot be fused lie in memory from where they are made to where they
are last used; what is computed element by element is fused into its users, so that in its place what it is computed from stays alive,
unless it is smaller than that. A loop takes what its body takes, once, and what it stacks. A kernel that is kept in codes is an array where
it multiplies, and heads that are narrower than a TPU's lanes are filled up. How near this comes is in experiments/pod_compilation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """A jaxpr with its calls in place. `sizes` are bytes by value; `codes` are the values of whole numbers in a byte."""

    ops: list[Op]
    sizes: list[int]
    inputs: list[int]
    outputs: list[int]
    codes: set[int]


@dataclasses.dataclass(frozen=True)
class Peak:
    """bytes: at most; kept: of what loops stacked for later ones, at that time."""

    bytes: int
    kept: int


@dataclasses.dataclass(frozen=True)
class Habits:
    """slices  share of what a loop reads a slice of in each turn that is made anew (1: it is gathered from its shards)
    ahead   bytes that a loop over inputs of the whole has there besides, of what its turn will come to
    """

    slices: float = 0.0
    ahead: float = 0.0

    def nbytes(self, aval: Any) -> int:
        """Bytes of an array; of one that ends in heads, [..., T, H], with H filled up to LANES."""
        shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", None)
        padded = (*shape[:-1], -(-shape[-1] // LANES) * LANES) if len(shape) >= 4 and shape[-1] >= LANES // 4 else shape
        return int(math.prod(padded) * getattr(dtype, "itemsize", 0))


def peak(
    jaxpr: Any, habits: Habits, held: Callable[[int], float] = lambda i: 0.0, result: Callable[[int, int], float] = lambda i, size: size
) -> Peak:
    """The most that a jaxpr has in memory at a time, without its inputs.

    held    share of the i-th input's bytes that are made anew where it is used
    result  (i, bytes) -> bytes of the i-th output
    """
    f = flat(jaxpr, habits)
    final = {v for v in f.outputs if v >= 0}
    size = [float(s) for s in f.sizes]
    for i, v in enumerate(f.inputs):
        size[v] *= held(i)
    for i, v in enumerate(f.outputs):
        if v >= 0 and v not in f.inputs:
            size[v] = result(i, f.sizes[v])
    scans = [op for op in f.ops if op.name == "scan"]
    for op in scans:
        for v in set(op.outputs[op.params["num_carry"] :]) - _stacked(op, habits):
            size[v] = 0.0
    for op in f.ops:
        if op.name == "cond" and all(v < 0 or f.sizes[v] <= SCALAR for v in op.inputs):  # constants, which are folded into what reads them
            for v in op.outputs:
                size[v] = 0.0
    births, deaths = _lives(f, size, final)
    stacks = {v for op in scans for v in op.outputs[op.params["num_carry"] :]} - final
    best, live, kept = Peak(0, 0), 0.0, 0.0
    for n, op in enumerate(f.ops):
        in_place = op.name not in MADE and not final.isdisjoint(op.outputs)  # in the place of what is not needed any more
        born, dead = births.get(n, ()), deaths.get(n, ())
        live += sum(size[v] for v in born) - (sum(size[v] for v in dead) if in_place else 0.0)
        kept += sum(size[v] for v in born if v in stacks)
        inside = _inside(op, habits) if op.name in LOOPS else 0.0
        if op.name == "scan" and not set(op.inputs[op.params["num_consts"] + op.params["num_carry"] :]).isdisjoint(f.inputs):
            inside += habits.ahead
        if (now := live + inside) > best.bytes:
            best = Peak(int(now), int(kept))
        live -= 0.0 if in_place else sum(size[v] for v in dead)
        kept -= sum(size[v] for v in dead if v in stacks)
    return best


def flat(jaxpr: Any, habits: Habits) -> Flat:
    """A jaxpr as a list of operations; the calls in it are opened, loops are not."""
    made = Flat([], [], [], [], set())

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
                outs = [new(var.aval) for var in eqn.outvars]
                made.ops.append(Op(eqn.primitive.name, tuple(ins), tuple(outs), eqn.params, _over(eqn)))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [at(var) for var in jaxpr.outvars]

    made.inputs = [new(var.aval) for var in jaxpr.invars]
    made.outputs = walk(jaxpr, made.inputs)
    return made


def _over(eqn: Any) -> int:
    if eqn.primitive.name != "dot_general":
        return 0
    (axes, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.invars[0].aval.shape[axis] for axis in axes)


def _lives(f: Flat, size: Sequence[float], final: set[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """{operation: values that are there from it on}, and {operation: values that are last used by it}."""
    roots = [frozenset([v]) for v in range(len(size))]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    summed = _summed(f)
    for n, op in enumerate(f.ops):
        for v in op.inputs if op.name == "dot_general" else ():
            if v >= 0 and roots[v] & f.codes:
                roots[v] = frozenset([v])
        alive = frozenset().union(*(roots[v] for v in op.inputs if v >= 0))
        for v in op.outputs:
            smaller = len(alive) > 1 and size[v] <= SMALLER * sum(size[r] for r in alive)
            made = (op.name in MADE or v in final or smaller) and v not in summed
            roots[v] = frozenset([v]) if made else alive
            first.setdefault(v, n)
            last.setdefault(v, n)
        for v in alive:
            if not (op.name == "gather" and v in op.inputs[:1] and v in f.inputs):  # rows are looked up where they are
                last[v] = n
                first.setdefault(v, n)
    last |= {r: len(f.ops) for v in final for r in roots[v]}
    births: dict[int, list[int]] = {}
    deaths: dict[int, list[int]] = {}
    for v, n in first.items():
        if roots[v] == frozenset([v]) and size[v]:
            births.setdefault(n, []).append(v)
            deaths.setdefault(last[v], []).append(v)
    return births, deaths


def _summed(f: Flat) -> set[int]:
    """Products over few numbers that are only added to what a loop carries."""
    products = {op.outputs[0]: op.over for op in f.ops if op.name == "dot_general"}
    origin: dict[int, int] = {}
    for op in f.ops:
        if op.name in VIEWS and op.inputs[0] >= 0:
            origin[op.outputs[0]] = origin.get(op.inputs[0], op.inputs[0])
    added = (v for op in f.ops if op.name in ("add", "add_any") and not set(f.inputs).isdisjoint(op.inputs) for v in op.inputs)
    return {w for v in added if 0 < products.get(w := origin.get(v, v), 0) <= SHORT}


def _stacked(scan: Op, habits: Habits) -> set[int]:
    """Those stacked results of a loop that are there: what is computed element by element from a turn's own slices alone is made again
    where it is read, and what is the same but for its shape is there once."""
    carries, before = scan.params["num_carry"], scan.params["num_consts"] + scan.params["num_carry"]
    body = flat(scan.params["jaxpr"].jaxpr, habits)
    moving, same = set(body.inputs[scan.params["num_consts"] : before]), {}
    for op in body.ops:
        if op.name in MADE or moving.intersection(op.inputs):
            moving.update(op.outputs)
        if op.name in VIEWS and op.inputs[0] >= 0:
            same[op.outputs[0]] = same.get(op.inputs[0], op.inputs[0]), body.sizes[op.outputs[0]]
    kept: dict[Any, int] = {}
    for v, made in zip(scan.outputs[carries:], body.outputs[carries:], strict=True):
        if made in moving:
            kept.setdefault(same.get(made, made), v)
    return set(kept.values())


def _inside(op: Op, habits: Habits) -> float:
    """What a loop takes in one turn, besides what it takes in and gives."""
    habits = dataclasses.replace(habits, ahead=0.0)
    if op.name == "scan":
        body, before = op.params["jaxpr"].jaxpr, op.params["num_consts"] + op.params["num_carry"]
        # What a turn hands on is written where the loop's results lie, which count outside.
        return peak(body, habits, lambda i: habits.slices if i >= before else 0.0, lambda i, size: 0.0).bytes
    inner = [op.params[key] for key in ("body_jaxpr",) if key in op.params] + list(op.params.get("branches", ()))
    return max((peak(getattr(j, "jaxpr", j), habits, result=lambda i, size: 0.0).bytes for j in inner), default=0.0)
