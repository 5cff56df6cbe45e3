"""What can be tuned on a device: for every method whether it fits, and what it would cost.

Each method is laid out as small as it gets: all devices split the weights, rows come one at a time, and only layers' inputs are kept. A
method that fits may fit faster; tuning.plan.search says how.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tuning.core import tree
from tuning.methods import METHODS
from tuning.plan import cost
from tuning.plan import search as searches
from tuning.plan import variants as variant
from tuning.plan.memory import Memory
from tuning.plan.speed import Estimate, Prices
from tuning.plan.topology import Topology
from tuning.plan.variants import Changes, Variants
from tuning.training import state

# What a method is tried with besides its own defaults; a method that is not here is tried with those alone.
SETTINGS: dict[str, Changes] = {"partial": {"method.last_layers": 4}, "tokens": {"method.ids": tuple(range(16))}}
VARIATIONS: dict[str, tuple[str, Changes]] = {
    "full, adafactor": ("full", {"optimizer.name": "adafactor"}),
    "lora over int8": ("lora", {"model.quantise": "int8"}),
    "lora over nf4": ("lora", {"model.quantise": "nf4"}),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on a topology; where it is not for the model, `reason` says why, and the figures are None.

    trainable         parameters that learn
    memory            bytes of one device; fits, whether that leaves enough of it free
    relative_flops    model FLOPs per token over those of full tuning, and of hardware with what is computed again
    checkpoint_bytes  of what is saved to go on from: the leaves that learn and the optimizer's state, of all devices together
    steps, hours, cost   to go once through the data; None where the time, or the price, is not known
    """

    name: str
    changes: Changes
    trainable: int | None = None
    memory: Memory | None = None
    fits: bool | None = None
    relative_flops: float | None = None
    checkpoint_bytes: int | None = None
    steps: int | None = None
    times: Estimate | None = None
    reason: str = ""


def choose(
    config: Mapping[str, Any] | Variants, where: Topology, *, examples: int | None = None, tokens: int | None = None,
    prices: Prices | None = None,
) -> list[Row]:  # fmt: skip
    """All methods for the model, the rows and the batch of a config, in the order of METHODS, each followed by its variations.

    examples, tokens  what there is to go through once: examples that take a row each, or tokens that fill rows; without, train.steps
    ValueError for both at once, and a device of unknown memory.
    """
    if examples is not None and tokens is not None:
        raise ValueError(f"examples={examples} and tokens={tokens} say the same thing twice. Give one of them.")
    run = config if isinstance(config, Variants) else Variants(config)
    train, length = run.config["train"], run.config["data"]["train"]["length"]
    rows = examples if tokens is None else math.ceil(tokens / length)
    steps = train["steps"] if rows is None else max(1, math.ceil(rows / train["batch_size"]))
    return [row(run, where, name, changes, steps, prices) for name, changes in listed(run)]


def listed(run: Variants) -> list[tuple[str, Changes]]:
    """(what it is called, its changes) of every row of the table."""
    found = []
    for method in METHODS:
        plain = {**({"model.quantise": ""} if "quantise" in run.config["model"] else {}), "method.name": method, **SETTINGS.get(method, {})}
        # The user's own keys stay where the method is the user's.
        plain = plain if method != run.config["method"]["name"] else {k: v for k, v in plain.items() if not k.startswith("method.")}
        found.append((method, plain))
        for name, (of, more) in VARIATIONS.items():
            if of == method:
                found.append((name, {**plain, **more, **(run.optimizer(more["optimizer.name"]) if "optimizer.name" in more else {})}))
    return found


def row(run: Variants, where: Topology, name: str, changes: Changes, steps: int, prices: Prices | None) -> Row:
    try:
        own = {**changes, "model.remat": "full"}
        small = {**own, **_smallest(run, own, where)}
        parts = run.parts(small, where)
        used = run.memory(parts)
    except ValueError as error:
        return Row(name, run.changed(changes), reason=str(error))
    m = parts.model
    start = state.abstract(m.layout, m.tuned, parts.optimizer.transform, m.mesh)
    moving, _ = tree.split(m.layout, m.moves)
    return Row(
        name, run.changed(small), tree.size(moving), used, used.total <= variant.room(where),
        cost.flops_per_token(parts) / cost.flops_per_token(parts, full=True), tree.nbytes(start.tuned) + tree.nbytes(start.optimizer),
        steps, variant.timed(parts, where, prices, steps),
    )  # fmt: skip


def _smallest(run: Variants, changes: Changes, where: Topology) -> Changes:
    """The mesh that splits the most, and one row at a time."""
    parts = run.parts({**changes, "train.accumulate": 1, **searches.undivided(where)}, where)
    made = variant.meshes_for(parts, where)
    if not made:
        raise ValueError(searches.nothing(run, where, []))
    size = lambda mesh: (mesh["mesh.fsdp"] * mesh["mesh.expert"] * mesh["mesh.tensor"], mesh["mesh.fsdp"])  # noqa: E731
    mesh = max(made, key=size)
    rows = where.slices * mesh["mesh.data"] * mesh["mesh.fsdp"] * mesh["mesh.expert"]
    return {**mesh, "train.accumulate": parts.settings.batch_size // rows}
