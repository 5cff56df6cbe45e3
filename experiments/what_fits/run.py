"""Which devices hold a 70B model for LoRA, in which bits.

python -m experiments.what_fits.run
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed, whatever devices are here

from configs import llama70b
from tuning.core import tree
from tuning.nn.stack import layer_range
from tuning.plan import search, topology
from tuning.plan.variants import Variants, label, room

CARDS = (
    "rtx4090:1", "rtx4090:2", "rtx4090:4", "rtx4090:8", "l40s:1", "l40s:2", "a100-40:1", "a100-40:2", "a100-40:4", "a100-80:1", "a100-80:2",
    "h100:1", "h100:2", "h100:4", "h200:1", "h200:2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5p:2x2x1", "v6e:2x2", "v6e:2x4",
    "v6e:4x4", "tpu7x:2x2x1",
)  # fmt: skip
BITS = ("", "int8", "nf4")
GIB = 2**30


def main() -> None:
    for bits in BITS:
        print(f"\n{bits or 'bfloat16'}:\n\n| devices | GiB to fill | weights on each | needs | layout |\n|---|---:|---:|---:|---|")
        run = Variants(config(bits))
        for name in CARDS:
            print(row(run, topology.parse(name)), flush=True)
    offloaded()


def config(bits: str) -> dict[str, Any]:
    """LoRA over a base that is kept in these bits."""
    made = llama70b.get_config("qlora,h200:1").to_dict()
    return {**made, "model": {**made["model"], "quantise": bits}}


def row(run: Variants, where: topology.Topology) -> str:
    """What is the fastest that fits on a topology, or why nothing does."""
    found = search.search(run, where, count=1)
    there = f"| {where.name} | {room(where) / GIB:,.1f} |"
    if not found.candidates:
        weights = run.least(run.parts({"mesh.fsdp": where.devices, "mesh.tensor": 1, "train.accumulate": 1}, where)).weights
        return f"{there} {weights / GIB:,.1f} | - | no: {found.refused[where.name].partition(', ')[2]} |"
    best = found.candidates[0]
    return f"{there} {best.memory.weights / GIB:,.1f} | {best.memory.total / GIB:,.1f} | {label(best.changes) or 'as configured'} |"


def offloaded() -> None:
    """What a trainer that kept weights and optimiser state on the host would have to move, in arithmetic; this one does not."""
    print("\n| kept as | weights on the host, GiB | adapter and optimizer, GiB | moved for a microbatch, GiB | for an update of 16, GiB |")
    print("|---|---:|---:|---:|---:|")
    where = topology.parse("h200:1")
    for bits in BITS:
        run = Variants(config(bits))
        parts = run.parts({}, where)
        stack = {name: leaf for name, leaf in tree.flatten(parts.model.layout).items() if layer_range(name) and not parts.model.tuned(name)}
        held, kept = sum(map(tree.nbytes, stack.values())), run.least(parts)
        learns = kept.masters + kept.optimizer
        # Forward and backward read every layer once each; the optimizer reads its state and writes it back.
        sizes = (held, learns, 2 * held, 16 * 2 * held + 2 * learns)
        print(f"| {bits or 'bfloat16'} | " + " | ".join(f"{size / GIB:,.1f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
