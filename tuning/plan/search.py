"""The fastest way to run a config on a topology, the smallest topology that it fits on, or the cheapest.

What the user asked for stays: the batch, the rows, the method. A search changes how a run is laid out (mesh, microbatches,
rematerialisation), and what its numbers hang on (how frozen kernels are kept, the optimizer) only where that was allowed.

Fast is what computes the fewest FLOPs per token, those computed again counted; of equals what changes no results, and of those what
exchanges the fewest bytes. No bandwidth and no overlap is made up, so layouts of one topology have no times of their own: published
utilisations do not say what was rematerialised, and stand for all of them.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core.chips import Chip
from tuning.nn.stack import REMAT
from tuning.plan import cost, topology
from tuning.plan import variants as variant
from tuning.plan.memory import Memory
from tuning.plan.speed import Estimate, Prices
from tuning.plan.topology import TPUS, Topology
from tuning.plan.variants import Changes, Variants, gib, label

GOALS = ("fastest", "smallest", "cheapest")
FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # slices that the TPU compiler knows, of v5e and v6e
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
STORED = "kernels that do not learn are kept as {}: every loss is a little off"
OPTIMISED = "another optimizer ({}): another run, whose rate is to be chosen anew"

Rank = tuple[float, int, float]  # FLOPs per token, how far down the list of allowed alterations, bytes exchanged


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run that fits.

    changes   dotted keys of the config; flags, the same for `tuning train`
    memory    bytes of one device, of `room` that a plan may fill
    flops_per_token, hardware_flops_per_token   of the model, and with what is computed again
    exchanged_bytes   that a device receives in an update; see cost.exchanged_bytes
    times     None where nothing is on file of the device
    alters    what of the results it changes; empty if nothing
    why       what was too big in those that would be faster
    """

    topology: str
    changes: Changes
    memory: Memory
    room: int
    flops_per_token: float
    hardware_flops_per_token: float
    exchanged_bytes: float
    times: Estimate | None
    alters: list[str]
    why: str

    @property
    def flags(self) -> list[str]:
        return configs.flags(self.changes)


@dataclasses.dataclass(frozen=True)
class Found:
    """candidates, the best first; refused, {topology: why nothing fits there, or why it cannot be compared}."""

    goal: str
    candidates: list[Candidate]
    refused: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A layout that does not fit, and what it takes at least."""

    rank: Rank
    changes: Changes
    least: Memory


def search(
    config: Mapping[str, Any] | Variants, where: Topology | Sequence[Topology], goal: str = "fastest", *, storages: Sequence[str] = (),
    optimizers: Sequence[str] = (), count: int = 3, prices: Prices | None = None,
) -> Found:  # fmt: skip
    """The best ways to run a config: on one topology up to `count` of them, of several the best on each.

    where       for smallest and cheapest, one topology stands for all slices and hosts of its kind
    storages    ways to keep frozen kernels that may be taken too: int8, nf4. They change results a little
    optimizers  others that may be taken, the best liked first. They change results
    prices      for cheapest
    ValueError for a goal that there is not, a device of unknown memory, and prices that are missing.
    """
    if goal not in GOALS:
        raise ValueError(f"goal={goal!r} is not one of {', '.join(GOALS)}.")
    if goal == "cheapest" and prices is None:
        raise ValueError("What is cheapest hangs on prices: give a table of them (--prices=FILE; tuning/plan/prices.json is an empty one).")
    run = config if isinstance(config, Variants) else Variants(config)
    alone = isinstance(where, Topology)
    places = list(where) if not alone else [where] if goal == "fastest" or where.chip is None else ladder(where.chip)
    every, refused = [], {}
    for place in sorted(places, key=lambda place: place.devices * variant.room(place)):
        failed: list[Refusal] = []
        found = list(itertools.islice(candidates(run, place, storages, optimizers, failed, prices), count if len(places) == 1 else 1))
        every += found
        if not found:
            refused[place.name] = nothing(run, place, failed)
        elif goal == "smallest":
            break
    if goal == "cheapest":
        refused |= {c.topology: f"cost unknown: {unpriced(c)}" for c in every if _paid(c) == math.inf}
        every = sorted((c for c in every if _paid(c) < math.inf), key=_paid)
    elif goal == "fastest" and len(places) > 1:
        every.sort(key=lambda c: c.times.seconds_per_step if c.times and c.times.seconds_per_step else math.inf)
    return Found(goal, every, refused)


def ladder(chip: Chip) -> list[Topology]:
    """The slices or hosts of a chip, the smallest first."""
    sizes = ("1",) if chip.name == "cpu" else ("1", "2", "4", "8")
    if chip.name in TPUS:
        sizes = FLAT if chip.name in ("v5e", "v6e") else DEEP
    return [topology.parse(f"{chip.name}:{size}") for size in sizes]


def candidates(
    run: Variants, where: Topology, storages: Sequence[str], optimizers: Sequence[str], failed: list[Refusal], prices: Prices | None = None
) -> Iterator[Candidate]:
    """The layouts that fit, the best first, each tried when it is its turn; those before it that do not fit are put to `failed`."""
    queue: list[tuple[Rank, int, int | None, Changes]] = []
    number = itertools.count()
    for depth, altered in enumerate(alterations(run, where, storages, optimizers)):
        for mesh in variant.meshes_for(run.parts({**altered, **undivided(where)}, where), where):
            parts = run.parts({**altered, **mesh, "train.accumulate": 1}, where)
            exchanged = cost.exchanged_bytes(parts)
            for remat in REMAT:
                rank = cost.hardware_flops_per_token(parts, remat), depth, exchanged
                heapq.heappush(queue, (rank, next(number), None, {**altered, **mesh, "model.remat": remat}))
    while queue:
        rank, turn, microbatches, changes = heapq.heappop(queue)
        if microbatches is None:  # not tried yet; what it exchanges with one microbatch is the least
            if (microbatches := run.fewest(changes, where)) is None:
                failed.append(Refusal(rank, changes, _smallest(run, changes, where)))
                continue
            changes = {**changes, "train.accumulate": microbatches}
            rank = *rank[:2], cost.exchanged_bytes(run.parts(changes, where))
            heapq.heappush(queue, (rank, turn, microbatches, changes))
            continue
        parts = run.parts(changes, where)
        yield Candidate(
            where.name, run.changed(changes), run.memory(parts), variant.room(where), cost.flops_per_token(parts), rank[0], rank[2],
            variant.timed(parts, where, prices), altered_results(run, changes), explained(run, where, changes, rank, failed),
        )  # fmt: skip


def alterations(run: Variants, where: Topology, storages: Sequence[str], optimizers: Sequence[str]) -> list[Changes]:
    """What the user allows to change of the numbers, nothing first. Storages that the method has no use for are left out."""
    found = []
    for name in dict.fromkeys((run.config["optimizer"]["name"], *optimizers)):
        for kind in dict.fromkeys((run.config["model"].get("quantise", ""), *storages)):
            changes = run.optimizer(name) | ({"model.quantise": kind} if "quantise" in run.config["model"] else {})
            try:
                run.parts({**changes, **undivided(where)}, where)
            except ValueError:
                if not found:
                    raise
                continue
            found.append(changes)
    return found


def altered_results(run: Variants, changes: Mapping[str, Any]) -> list[str]:
    """What of the results these changes change, in words."""
    changed = run.changed(changes)
    stored = [STORED.format(changed["model.quantise"])] if changed.get("model.quantise") else []
    return stored + ([OPTIMISED.format(changed["optimizer.name"])] if "optimizer.name" in changed else [])


def explained(run: Variants, where: Topology, changes: Changes, rank: Rank, failed: Sequence[Refusal]) -> str:
    """Why this layout, and none that would be faster: of each kind of those that do not fit, the closest."""
    closest: dict[str, Refusal] = {}
    for other in (other for other in failed if other.rank < rank):
        kind = _kind(run, other.changes)
        if kind not in closest or other.least.total < closest[kind].least.total:
            closest[kind] = other
    said = [too_big(run, other) for other in closest.values()]
    rows = meshes.row_count(run.parts(changes, where).model.mesh)
    fewer = [n for n in variant.divisors(run.config["train"]["batch_size"] // rows) if n < changes["train.accumulate"]]
    if fewer:
        least = run.least(run.parts({**changes, "train.accumulate": fewer[-1]}, where))
        said.append(f"accumulate={fewer[-1]} takes {gib(least.total)} or more")
    return f"of {gib(variant.room(where))}: " + ("; ".join(said) if said else "nothing faster is known")


def too_big(run: Variants, other: Refusal) -> str:
    mesh = label({key: size for key, size in other.changes.items() if key.startswith("mesh.") and size > 1}) or "one device"
    return f"{_kind(run, other.changes)} takes {gib(other.least.total)} or more, on {mesh} ({variant.largest(other.least)})"


def nothing(run: Variants, where: Topology, failed: Sequence[Refusal]) -> str:
    """Why no layout of a topology fits."""
    if failed:
        return f"of {gib(variant.room(where))}, {too_big(run, min(failed, key=lambda other: other.least.total))}"
    return (
        f"train.batch_size={run.config['train']['batch_size']} rows cannot be split over {where.devices} devices, of which 8 at most share "
        f"a row, as far as they divide the heads. Take fewer devices, or a multiple of {where.devices} rows."
    )


def unpriced(c: Candidate) -> str:
    return c.times.sources["cost"] if c.times else f"nothing is on file of {c.topology}"


def _paid(c: Candidate) -> float:
    return c.times.cost if c.times and c.times.cost is not None else math.inf


def _kind(run: Variants, changes: Changes) -> str:
    """What it is besides its mesh and microbatches, in short."""
    told = {"model.remat", *run.changed(changes)}
    return label({key: changes[key] for key in ("optimizer.name", "model.quantise", "model.remat") if key in told})


def undivided(where: Topology) -> Changes:
    """A mesh that a batch of any size lies on, to see whether a run is one at all."""
    return {"mesh.dcn": where.slices, "mesh.data": 1, "mesh.fsdp": 1, "mesh.expert": 1, "mesh.tensor": -1}


def _smallest(run: Variants, changes: Changes, where: Topology) -> Memory:
    """What a layout takes at least, with as many microbatches as can be."""
    one = run.parts({**changes, "train.accumulate": 1}, where)
    most = one.settings.batch_size // meshes.row_count(one.model.mesh)
    return run.least(run.parts({**changes, "train.accumulate": most}, where))
