"""What to change about a run that does not fit, the cheapest change first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from tuning import build
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.nn.stack import REMAT
from tuning.plan import cost
from tuning.plan import search as searches
from tuning.plan import variants as variant
from tuning.plan.memory import Memory
from tuning.plan.topology import Topology
from tuning.plan.variants import Changes, Variants, label

SHORTEST = 256  # tokens: a row that is cut further is no remedy
SAME, LITTLE, OTHER = "results stay the same", "results change a little", "another run: results change"
KINDS = {
    "microbatches": SAME, "rematerialisation": SAME, "mesh": SAME, "storage": LITTLE, "optimizer": OTHER, "method": OTHER, "rows": OTHER,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Remedy:
    """Changes that make a run fit.

    kinds     of KINDS, what is changed
    memory    bytes of one device then
    flops     per token, over those without the changes; what is computed again counted
    results   what becomes of the results
    """

    kinds: tuple[str, ...]
    changes: Changes
    memory: Memory
    flops: float
    results: str

    @property
    def flags(self) -> list[str]:
        return configs.flags(self.changes)

    def __str__(self) -> str:
        return f"{label(self.changes)}: {variant.gib(self.memory.total)}, {self.flops:.2f} x the FLOPs per token, {self.results}"


@dataclasses.dataclass(frozen=True)
class Remedies:
    """fits: the run fits as it is, in `memory`. Otherwise `found` are single changes that suffice or, where none does, several together;
    or there are none, and `otherwise` says where it would fit."""

    fits: bool
    memory: Memory
    found: list[Remedy]
    otherwise: str = ""


def remedies(config: Mapping[str, Any] | Variants, where: Topology) -> Remedies:
    """What makes a run fit on a topology. ValueError for a config that is no run there, and a device of unknown memory."""
    run = config if isinstance(config, Variants) else Variants(config)
    now = run.memory(run.parts({}, where))
    if run.fits(run.parts({}, where), where):
        return Remedies(True, now, [])
    single = [{kind: change} for kind in KINDS if (change := _gentlest(run, where, {}, kind)) is not None]
    found = [_remedy(run, where, chosen) for chosen in single or _together(run, where)]
    return Remedies(False, now, found, "" if found else elsewhere(run, where))


def options(run: Variants, where: Topology, kind: str, before: Changes) -> Iterator[Changes]:
    """The changes of a kind, the gentlest first, on top of those before."""
    config = configs.override(build.SECTIONS, run.config, before)
    model, method, train = config["model"], config["method"], config["train"]
    if kind == "microbatches":
        yield from ({"train.accumulate": n} for n in variant.divisors(train["batch_size"]) if n > train["accumulate"])
    elif kind == "rematerialisation":
        yield from ({"model.remat": policy} for policy in tuple(REMAT)[tuple(REMAT).index(model["remat"]) + 1 :])
    elif kind == "mesh":
        yield from _meshes(run, where, before, train["accumulate"])
    elif kind == "storage" and not model.get("quantise", "?"):
        yield from ({"model.quantise": name} for name in ("int8", "nf4"))
    elif kind == "optimizer":
        yield from [run.optimizer("adafactor")] if config["optimizer"]["name"] != "adafactor" else []
    elif kind == "method":
        yield from [{"method.name": "lora"}] if method["name"] != "lora" else []
    elif kind == "rows":
        halves = (config["data"]["train"]["length"] >> n for n in range(1, 64))
        yield from ({"data.train.length": length} for length in itertools.takewhile(lambda length: length >= SHORTEST, halves))


def _meshes(run: Variants, where: Topology, before: Changes, microbatches: int) -> list[Changes]:
    """All meshes, those that exchange the least first, with as many microbatches as before or as there are rows for."""
    alone = {**before, "train.accumulate": 1}
    made = []
    for mesh in variant.meshes_for(run.parts({**alone, **searches.undivided(where)}, where), where):
        parts = run.parts({**alone, **mesh}, where)
        rows = parts.settings.batch_size // meshes.row_count(parts.model.mesh)
        pieces = max(n for n in variant.divisors(rows) if n <= microbatches)
        made.append((cost.exchanged_bytes(parts), {**mesh, "train.accumulate": pieces}))
    return [change for _, change in sorted(made, key=lambda pair: pair[0])]


def _gentlest(run: Variants, where: Topology, before: Changes, kind: str) -> Changes | None:
    """The gentlest change of a kind that the run fits with, on top of those before; None if none does."""
    if kind == "microbatches":
        least = before.get("train.accumulate", run.config["train"]["accumulate"]) + 1
        found = run.fewest(before, where, least) if _possible(run, where, before) else None
        return None if found is None else {"train.accumulate": found}
    return next((change for change in options(run, where, kind, before) if _fits(run, where, {**before, **change})), None)


def _together(run: Variants, where: Topology) -> list[dict[str, Changes]]:
    """Changes of several kinds with which the run fits, if there are any: the cheapest kinds, and of each the gentlest."""
    chosen: dict[str, Changes] = {}
    for kind in KINDS:
        before = _merged(chosen)
        there = [change for change in options(run, where, kind, before) if _possible(run, where, {**before, **change})]
        strongest = min(there if kind == "mesh" else there[-1:], key=lambda c: _needs(run, where, {**before, **c}), default=None)
        if strongest is None or _needs(run, where, {**before, **strongest}) >= _needs(run, where, before):
            continue
        chosen[kind] = strongest
        if _fits(run, where, {**before, **strongest}):
            return [_relaxed(run, where, chosen)]
    return []


def _relaxed(run: Variants, where: Topology, chosen: dict[str, Changes]) -> dict[str, Changes]:
    """Each left out if the others suffice, and otherwise as gentle as they let it be; the costliest first."""
    for kind in reversed(list(chosen)):
        others = _merged({k: change for k, change in chosen.items() if k != kind})
        gentler = {} if _fits(run, where, others) else _gentlest(run, where, others, kind)
        chosen = {**chosen, kind: chosen[kind] if gentler is None else gentler}
    return {kind: change for kind, change in chosen.items() if change}


def _merged(chosen: Mapping[str, Changes]) -> Changes:
    return {key: value for changes in chosen.values() for key, value in changes.items()}


def _possible(run: Variants, where: Topology, changes: Changes) -> bool:
    """Whether it is a run at all: its batch can be split so, its method leaves something to quantise, ..."""
    try:
        run.parts(changes, where)
    except ValueError:
        return False
    return True


def _fits(run: Variants, where: Topology, changes: Changes) -> bool:
    return _possible(run, where, changes) and run.fits(run.parts(changes, where), where)


def _needs(run: Variants, where: Topology, changes: Changes) -> int:
    return run.memory(run.parts(changes, where)).total


def _remedy(run: Variants, where: Topology, chosen: Mapping[str, Changes]) -> Remedy:
    changes = _merged(chosen)
    after = run.parts(changes, where)
    flops = cost.hardware_flops_per_token(after) / cost.hardware_flops_per_token(run.parts({}, where))
    results = max((KINDS[kind] for kind in chosen), key=(SAME, LITTLE, OTHER).index)
    return Remedy(tuple(chosen), run.changed(changes), run.memory(after), flops, results)


def elsewhere(run: Variants, where: Topology) -> str:
    """The smallest topology of this kind that the run fits on, its results left as they are."""
    if where.chip is None:
        return "nothing here fits"
    found = searches.search(run, where, "smallest", count=1)
    if not found.candidates:
        return f"nothing here fits, and of {where.chip.name} nothing up to {list(found.refused)[-1]} does"
    best = found.candidates[0]
    return f"nothing here fits; the smallest that does: {best.topology} with {' '.join(best.flags) or 'no change'}"
