"""A plan as one nested dict of plain numbers: what a run is, what it takes of a device, how long it takes and what it costs.

What is not known is None, and `sources` says why; of every figure that is not counted from the config it says what it stands on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tuning import build
from tuning.core import tree
from tuning.plan import cost, memory, speed, variants
from tuning.plan.compile import Compiled, Refused
from tuning.plan.speed import Estimate
from tuning.plan.topology import Topology
from tuning.plan.variants import gib
from tuning.training import flops


def report(
    parts: build.Parts,
    topology: Topology,
    *,
    prices: Path | None = None,
    measured: Path | None = None,
    compiled: Compiled | Refused | None = None,
) -> dict[str, Any]:
    """The plan of a run on a topology.

    prices    a price table (see prices.json); measured, a run of ours whose utilisation counts in place of published ones
    compiled  what the compiler said of its train step: its figure then decides whether the run fits
    """
    used = memory.estimate(parts)
    per_token, tokens = cost.flops_per_token(parts), parts.settings.batch_size * parts.train.length
    table = speed.read_prices(prices) if prices else None
    timed = variants.timed(parts, topology, table, measured=measured) or unknown(topology)
    room = topology.memory_bytes
    needs = used.total if compiled is None else compiled.hbm_bytes if isinstance(compiled, Compiled) else None
    fits = None if room is None else isinstance(compiled, Refused) is False and needs is not None and needs <= variants.MARGIN * room
    return {
        "parameters": parameters(parts),
        "flops_per_token": per_token,
        "bytes_per_device": {**vars(used), "total": used.total},
        "device": {
            "name": topology.name, "count": topology.devices, "hbm_bytes": room,
            "peak_flops": topology.chip.peak_flops if topology.chip else None,
        },
        "attention": build.attention(parts.model.source, parts.model.method, parts.model.mesh, parts.train.length)[0],
        "mesh": {axis: size for axis, size in parts.model.mesh.shape.items() if size > 1},
        "fits": fits,
        "spare": None if room is None or needs is None else 1 - needs / room,
        "tokens_per_step": tokens,
        **vars(timed),
        "compiled": None if compiled is None else said(compiled),
    }  # fmt: skip


def parameters(parts: build.Parts) -> dict[str, int]:
    """How many there are, how many learn, and how many multiply a token: of experts those that it is routed to."""
    m = parts.model
    tuned, _ = tree.split(m.layout, lambda name: m.tuned(name) and m.moves(name))
    shapes = {name: leaf.shape for name, leaf in tree.flatten(m.layout).items()}
    multiply = flops.flops_per_token(shapes, lambda name: False, 0.0, cost.passes(parts)) / 2
    return {"total": tree.size(m.layout), "tuned": tree.size(tuned), "matmul": round(multiply)}


def said(compiled: Compiled | Refused) -> dict[str, Any]:
    """What the compiler says, as plain values."""
    if isinstance(compiled, Refused):
        return {"refused": compiled.message, "needed_bytes": compiled.needed_bytes, "available_bytes": compiled.available_bytes,
                "peak_bytes": None, "hbm_bytes": None, "seconds": compiled.seconds, "collectives": None}  # fmt: skip
    names = ("peak_bytes", "hbm_bytes", "argument_bytes", "output_bytes", "alias_bytes", "temporary_bytes", "seconds", "collectives")
    largest = [{"bytes": size, "type": kind, "source": source} for size, kind, source in compiled.largest]
    return {**{name: getattr(compiled, name) for name in names}, "largest": largest}


def unknown(topology: Topology) -> Estimate:
    """What is known of the time on a device that nothing is on file of."""
    names = ("seconds_per_step", "tokens_per_second", "hours", "cost", "kilowatt_hours")
    return Estimate(None, None, None, None, None, None, dict.fromkeys(names, f"nothing is on file of {topology.name}"))


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, in a sentence."""
    room, name = plan["device"]["hbm_bytes"], plan["device"]["name"].partition(":")[0]
    if room is None:
        return "Whether it fits is not known: nothing is on file of the device."
    compiled = plan["compiled"]
    if compiled and compiled.get("refused"):
        needs = f"needs {gib(compiled['needed_bytes'])} for temporaries" if compiled["needed_bytes"] else "found no room"
        return f"DOES NOT FIT: the compiler {needs}, and a device of {name} has {gib(room)}."
    needs, by = (compiled["hbm_bytes"], "compiled") if compiled else (plan["bytes_per_device"]["total"], "estimated")
    if plan["fits"]:
        return f"FITS with {plan['spare']:.0%} to spare: {gib(needs)} ({by}) of {gib(room)} on each device."
    return f"DOES NOT FIT: {gib(needs)} ({by}), and a plan may fill {gib(variants.MARGIN * room)} of {name}'s {gib(room)}."
