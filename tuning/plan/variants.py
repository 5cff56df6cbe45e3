"""Variants of one run on topologies that need not be here: what each takes of a device, with as little tracing as will do.

What a layout holds between steps is counted from its shards. What a step takes besides is traced once for all layouts that give a device
the same work, and it does not shrink with more rows: so most layouts that do not fit are known not to without a trace of their own.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuning import build
from tuning.core import config as configs
from tuning.core import mesh as meshes
from tuning.core import tree
from tuning.plan import cost, memory, speed
from tuning.plan.liveness import Peak
from tuning.plan.memory import Memory
from tuning.plan.speed import Estimate, Prices
from tuning.plan.topology import Topology

MARGIN = 0.95  # the share of a device's memory that a plan may fill
Changes = dict[str, Any]  # dotted keys of a config, with their values
COMPONENTS = tuple(field.name for field in dataclasses.fields(Memory) if field.name != "cache")


class Variants:
    """A run with some of its keys changed, in many ways; `traces` counts the steps that were traced so far."""

    def __init__(self, config: Mapping[str, Any]):
        to_dict = getattr(config, "to_dict", None)
        self.given = to_dict() if to_dict else config
        self.config = build.resolve(self.given)
        self.traces = 0
        self._built: dict[str, build.Parts] = {}
        self._traced: dict[str, dict[int, Peak]] = {}

    def parts(self, changes: Mapping[str, Any], where: Topology) -> build.Parts:
        """The parts of the run with these changes. ValueError where it is none."""
        config = configs.override(build.SECTIONS, self.given, changes)
        network = repr((config.get("model"), config.get("method")))
        made = build.parts(config, like=self._built.get(network), sketch=where.absent)
        self._built.setdefault(network, made)
        return made

    def memory(self, parts: build.Parts) -> Memory:
        """What the run takes of a device."""
        known, rows = self._known(parts), _rows(parts)
        if rows not in known:
            known[rows] = memory.temporaries(parts)
            self.traces += 1
        return memory.estimate(parts, known[rows])

    def least(self, parts: build.Parts) -> Memory:
        """What it takes at least, by what is known without another trace."""
        known = self._known(parts)
        fewer = [rows for rows in known if rows <= _rows(parts)]
        return memory.estimate(parts, known[max(fewer)] if fewer else Peak(0, 0))

    def fits(self, parts: build.Parts, where: Topology) -> bool:
        """Whether that leaves enough of the device free."""
        return self.least(parts).total <= room(where) and self.memory(parts).total <= room(where)

    def fewest(self, changes: Mapping[str, Any], where: Topology, least: int = 1) -> int | None:
        """The number of microbatches, from `least` on, that an update of these changes fits with; None if even single rows do not fit.

        One microbatch has no second copy of the gradients, so that it may fit where two do not.
        """
        rows = meshes.row_count(self.parts({**changes, "train.accumulate": 1}, where).model.mesh)
        counts = [n for n in divisors(self.config["train"]["batch_size"] // rows) if n >= least]
        fits = lambda n: self.fits(self.parts({**changes, "train.accumulate": n}, where), where)  # noqa: E731
        possible = bool(counts) and fits(counts[-1])
        if counts and fits(counts[0]):
            return counts[0]
        return counts[bisect.bisect_left(counts, True, 1, len(counts) - 1, key=fits)] if possible else None

    def changed(self, changes: Mapping[str, Any]) -> Changes:
        """Those that the config does not say already. Another name empties its section, so what goes with it is said again."""
        same = lambda key, value: configs.plain(configs.dig(self.config, key)) == configs.plain(value)  # noqa: E731
        emptied = tuple(key.removesuffix("name") for key, value in changes.items() if key.endswith(".name") and not same(key, value))
        return {key: value for key, value in changes.items() if key.startswith(emptied) or not same(key, value)}

    def optimizer(self, name: str) -> Changes:
        """Changes to another optimizer with the same schedule, and the same rate where its steps are of the same size."""
        now = self.config["optimizer"]
        if name == now["name"]:
            return {}
        alike = {name, now["name"]} <= {"adamw", "adafactor", "muon"}
        kept = {"learning_rate": now["learning_rate"]} if alike else {}
        return {f"optimizer.{key}": value for key, value in configs.flat({"name": name, **kept, "schedule": now["schedule"]}).items()}

    def _known(self, parts: build.Parts) -> dict[int, Peak]:
        """What was traced of the same work, by rows that a device has at a time.

        Into how many pieces fsdp splits the weights does not matter once each layer gathers them, but for what compilers do with them then,
        unless they have gradients; and whether one microbatch is all, to what the head's comes to.
        """
        m = parts.model
        sizes = dict(m.mesh.shape)
        pieces = (sizes["fsdp"], parts.settings.accumulate > 1) if build.base_leaves(m) else memory.habits(parts)
        shared = {key: parts.config[key] for key in ("model", "method", "objective", "data")}
        work = configs.plain(shared), meshes.device(m.mesh).device_kind, sizes["tensor"], sizes["expert"], sizes["context"], pieces
        return self._traced.setdefault(repr(work), {})


def _rows(parts: build.Parts) -> int:
    """That a device has at a time."""
    return parts.settings.batch_size // parts.settings.accumulate // meshes.row_count(parts.model.mesh)


def room(where: Topology) -> int:
    """Bytes of a device that a plan may fill. ValueError where its memory is not known."""
    if where.memory_bytes is None:
        raise ValueError(f"--topology={where.name}: its memory is not on file, so nothing can be said to fit. Plan for a known device.")
    return int(MARGIN * where.memory_bytes)


def meshes_for(parts: build.Parts, where: Topology) -> list[Changes]:
    """The meshes of a topology on which the run's batch can be split.

    tensor divides the heads and is 8 at most, a host's or a slice's: what it exchanges is waited for in every layer. Next to an expert axis
    there are no copies along data.
    """
    config, settings = parts.model.source.config, parts.settings
    blocks = config.decoder if hasattr(config, "decoder") else config
    heads = blocks.heads if hasattr(blocks, "heads") else 1
    experts = blocks.experts if hasattr(blocks, "experts") else 0
    devices, found = where.devices // where.slices // parts.config["mesh"]["context"], []
    for tensor in (n for n in divisors(devices) if n <= 8 and heads % n == 0):
        for expert in (n for n in divisors(devices // tensor) if n == 1 or (experts and experts % n == 0)):
            for fsdp in divisors(devices // tensor // expert):
                data = devices // tensor // expert // fsdp
                rows = where.slices * data * fsdp * expert
                if settings.batch_size % rows == 0 and parts.evaluation.batch_size % rows == 0 and (expert == 1 or data == 1):
                    sizes = {"dcn": where.slices, "data": data, "fsdp": fsdp, "expert": expert, "tensor": tensor}
                    found.append({f"mesh.{axis}": size for axis, size in sizes.items()})
    return found


def timed(
    parts: build.Parts, where: Topology, prices: Prices | None = None, steps: int | None = None, measured: Path | None = None
) -> Estimate | None:  # fmt: skip
    """Time, money and energy of so many updates, by default the run's; None for a device that nothing is on file of. `measured` is a run
    of ours whose utilisation counts in place of published ones."""
    if where.chip is None:
        return None
    config, per_token = parts.model.source.config, cost.flops_per_token(parts)
    like = "full" if per_token / cost.flops_per_token(parts, full=True) > 5 / 6 else "lora"
    routed = hasattr(config, "experts") and config.experts > 0
    size = tree.size(parts.model.layout)
    found = speed.efficiency(where.chip, size, like, parts.train.length, where.devices, routed)
    found = speed.measured(measured, where.chip) if measured else found
    tokens = parts.settings.batch_size * parts.train.length
    return speed.estimate(per_token * tokens, tokens, steps or parts.settings.steps, where.chip, where.devices, found, prices)


def largest(used: Memory) -> str:
    """The component that takes the most, and how much: `activations 12.3 GiB`."""
    name = max(COMPONENTS, key=lambda name: getattr(used, name))
    return f"{name} {gib(getattr(used, name))}"


def label(changes: Mapping[str, Any]) -> str:
    """Changes in short: `fsdp=8 accumulate=4`."""
    short = lambda key: key.removesuffix(".name").rpartition(".")[2]  # noqa: E731
    return " ".join(f"{short(key)}={value}" for key, value in changes.items())


def gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
