"""tuning plan: before a run, whether it fits, how fast it goes and what it costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuning.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from tuning.plan.topology import Topology

EPILOG = """No weights and no data are read, and no device is needed: of the model its config.json is enough, from a folder, the hub,
or one of those that are known (tuning/hub/known.py). Rows of data count as full.

topologies:
  v5e:16x16  v5p:4x4x4  v6e:8x8  tpu7x:4x4x4   a TPU slice; 2*v5e:16x16 is two of them, joined by mesh.dcn=2
  h100:8  h200:1  a100-40:4  a100-80:1  rtx4090:1  l40s:2  ...   GPUs of one host (tuning/core/chips.py)
  cpu:8                            this machine's processor, as 8 devices
  Without --topology the plan is for the devices that are here.

what it stands on:
  Memory is estimated from the traced step; --compile compiles the real one, for TPUs on any machine (pip install 'tuning[tpu]'), and its
  figure decides. Times stand on published throughputs of the same device, or on a run of yours (--measured); what has no source is said
  to be unknown. Costs stand on your own table of prices: copy tuning/plan/prices.json, fill it in, and give it as --prices.

examples:
  tuning plan --config=configs/llama8b.py:lora --topology=v5e:16x16
  tuning plan --config=configs/llama8b.py:full,v5p:4x4x4 --topology=v5p:4x4x4 --compile
  tuning plan --config=configs/lora.py --config.model.path=meta-llama/Llama-3.1-8B --topology=rtx4090:1 --search
  tuning plan --config=configs/lora.py --config.model.path=meta-llama/Llama-3.1-8B --topology=rtx4090:1 --methods
"""


def main(argv: list[str]) -> int:
    p = common.parser("plan", "Before a run: whether it fits, how fast it goes and what it costs.", EPILOG)
    p.add_argument("--topology", metavar="NAME", help="what to plan for (default: the devices that are here)")
    p.add_argument("--compile", nargs="?", const="whole", choices=("whole", "memory"), help="compile the real train step for it; "
                   "memory: for TPUs, until the compiler has decided on memory, in a tenth of the time")  # fmt: skip
    p.add_argument("--save", metavar="FILE", help="keep the compiled step, for tuning train --compiled=FILE")
    p.add_argument("--prices", metavar="FILE", help="a table of prices as JSON")
    p.add_argument("--measured", metavar="RUN", help="a run on such devices, whose utilisation counts")
    p.add_argument("--json", action="store_true", help="the plan as one JSON object")
    if "-h" in argv or "--help" in argv:
        p.parse_args(argv)
    from tuning.cli import flags

    path, overrides, rest = flags.split(argv)
    args = p.parse_args(rest)
    if path is None:
        raise ValueError("plan needs --config=FILE.py; configs/ has examples.")
    if args.save and args.compile != "whole":
        raise ValueError(f"--save={args.save} keeps a step that is compiled. Add --compile.")
    from tuning.plan import topology

    where = begin(args.topology)
    config = flags.merge(flags.read(path), overrides)
    plan = made(config, where, args)
    if args.json:
        print(json.dumps(plan, indent=2))
    else:
        show(plan, topology.described(where))
    return 0 if plan["fits"] is not False else 1


def begin(name: str | None) -> Topology:
    """The topology, with jax set up for it: what is planned for a device elsewhere is planned on this machine's processor."""
    import jax

    from tuning.plan import topology

    if name is None:
        return topology.local()
    found = topology.parse(name)
    if found.chip and found.chip.name == "cpu":
        jax.config.update("jax_num_cpu_devices", found.devices)
    if found.tpu or (found.chip and found.chip.name == "cpu"):
        jax.config.update("jax_platforms", "cpu")
    return found


def made(config: Any, where: Topology, args: argparse.Namespace) -> dict[str, Any]:
    """The plan of a config, compiled if that was asked for."""
    from tuning import build
    from tuning.plan import assigned, compile, report, stored

    if args.compile == "memory" and not where.tpu:
        raise ValueError(f"--compile=memory is for TPUs, and the plan is for {where.name}. Use --compile.")
    parts = build.parts(config, sketch=where.targets() if args.compile == "whole" else where.absent)
    makers = {"memory": lambda: assigned.assigned(config, where), "whole": lambda: compile.compile(parts)}
    compiled = makers[args.compile]() if args.compile else None
    if args.save and isinstance(compiled, compile.Compiled):
        stored.save(Path(args.save), parts, compiled)
    prices, measured = (Path(text) if text else None for text in (args.prices, args.measured))
    return report.report(parts, where, prices=prices, measured=measured, compiled=compiled)


def show(plan: dict[str, Any], device: str) -> None:
    """Prints the plan as tables, its verdict last."""
    from tuning.plan import report
    from tuning.training.progress import console

    n, sources = plan["parameters"], plan["sources"]
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "one device"
    console.print(f"{device}; mesh {mesh}; attention {plan['attention'] or 'none'}", markup=False)
    console.print(f"parameters: {n['total']:,} || that learn: {n['tuned']:,} || that multiply a token: {n['matmul']:,}")
    console.print(f"FLOPs per token: {plan['flops_per_token'] / 1e9:,.2f} G (causal attention; what is computed again is not counted)")
    console.print(memory(plan))
    units = {"seconds_per_step": "s per step", "tokens_per_second": "tokens/s", "hours": "hours", "kilowatt_hours": "kWh"}
    for name, unit in units.items():
        value = plan[name]
        console.print(f"{unit}: {'unknown' if value is None else f'{value:,.4g}'} ({sources[name]})", markup=False)
    money = "unknown" if plan["cost"] is None else f"{plan['cost']:,.2f} {plan['currency']}"
    console.print(f"cost: {money} ({sources['cost']})", markup=False)
    if plan["compiled"] and plan["compiled"]["collectives"] is not None:
        console.print(f"compiled in {plan['compiled']['seconds']:.0f} s")
        for table in programs(plan["compiled"]):
            console.print(table)
    console.print(report.verdict(plan), markup=False)


def memory(plan: dict[str, Any]) -> Table:
    """Bytes of one device, by component, and what the compiler says."""
    from rich.table import Table

    table = Table("on each device", "GiB", title_justify="left")
    for name, size in plan["bytes_per_device"].items():
        if name != "total" and size:
            table.add_row(name + (" (not during a step)" if name == "cache" else ""), f"{size / 2**30:,.3f}")
    table.add_row("total, estimated", f"{plan['bytes_per_device']['total'] / 2**30:,.3f}", style="bold")
    if plan["compiled"] and plan["compiled"]["hbm_bytes"] is not None:
        table.add_row("total, compiled", f"{plan['compiled']['hbm_bytes'] / 2**30:,.3f}", style="bold")
    return table


def programs(compiled: dict[str, Any]) -> list[Table]:
    """The largest buffers, and what is exchanged."""
    from rich.table import Table

    buffers = Table("largest buffers", "MiB", "of")
    for row in compiled["largest"][:8]:
        buffers.add_row(row["type"], f"{row['bytes'] / 2**20:,.1f}", row["source"][-90:])
    exchanged = Table("exchanges in a step", "number", "MiB on each device")
    for kind, row in sorted(compiled["collectives"].items()):
        exchanged.add_row(kind, f"{row['count']:,}", f"{row['bytes'] / 2**20:,.1f}")
    return [buffers, exchanged]
