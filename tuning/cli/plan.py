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
  Memory is estimated from the traced step; --compile compiles the real one, on any machine (pip install 'tuning[tpu]', for GPUs
  'tuning[cuda-compiler]'), and its figure decides. Times stand on published throughputs of the same device, or on a run of yours
  (--measured); what has no source is said to be unknown. Costs stand on your own table of prices: copy tuning/plan/prices.json, fill
  it in, and give it as --prices.

examples:
  tuning plan --config=configs/llama8b.py:lora --topology=v5e:16x16
  tuning plan --config=configs/llama8b.py:full,v5p:4x4x4 --topology=v5p:4x4x4 --compile
  tuning plan --config=configs/llama8b.py:lora,h100:8 --topology=h100:8 --compile
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
    p.add_argument("--search", nargs="?", const="fastest", choices=("fastest", "smallest", "cheapest"),
                   help="the fastest plan that fits (default), the smallest slice or host of that kind, or the cheapest")  # fmt: skip
    p.add_argument("--storage", default="", metavar="KIND,...", help="search over kernels kept as nf4 or int8 too: results change a little")
    p.add_argument("--optimizer", default="", metavar="NAME,...", help="also search over these optimizers, which changes results")
    p.add_argument("--methods", action="store_true", help="what can be tuned there: a table of all methods")
    p.add_argument("--tokens", type=int, metavar="N", help="with --methods, of the data that is gone through once")
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
    if args.search or args.methods:
        return choices(config, where, args)
    plan = made(config, where, args)
    if args.json:
        print(json.dumps(plan, indent=2))
        return 0 if plan["fits"] is not False else 1
    show(plan, topology.described(where))
    if plan["fits"] is False:
        advise(config, where)
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


def choices(config: Any, where: Topology, args: argparse.Namespace) -> int:
    """Prints what a search found, or the table of methods; 1 if nothing fits."""
    import dataclasses

    from tuning.plan import chooser, search, speed
    from tuning.training.progress import console

    prices = speed.read_prices(Path(args.prices)) if args.prices else None
    if args.methods:
        rows = chooser.choose(config, where, tokens=args.tokens, prices=prices)
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2)) if args.json else console.print(methods(rows, where.name))
        return 0 if any(row.fits for row in rows) else 1
    listed = lambda text: tuple(filter(None, text.split(",")))  # noqa: E731
    found = search.search(config, where, args.search, storages=listed(args.storage), optimizers=listed(args.optimizer), prices=prices)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0 if found.candidates else 1
    for number, one in enumerate(found.candidates, 1):
        console.print(f"{number}. {one.topology}: {one.memory.total / 2**30:.2f} GiB of each device. {one.why}", markup=False)
        console.print(f"   {' '.join(one.flags)}", markup=False)
        for change in one.alters:
            console.print(f"   {change}", markup=False)
    for name, why in found.refused.items():
        console.print(f"{name}: {why}", markup=False)
    return 0 if found.candidates else 1


def methods(rows: Any, name: str) -> Table:
    """What can be tuned on a topology."""
    from rich.table import Table

    table = Table(f"on {name}", "fits", "trainable", "GiB of a device", "FLOPs of full", "checkpoint, MiB", "hours", "why not")
    for row in rows:
        if row.memory is None:
            table.add_row(row.name, *[""] * 6, row.reason)
            continue
        hours = row.times.hours if row.times else None
        table.add_row(
            row.name, "yes" if row.fits else "no", f"{row.trainable:,}", f"{row.memory.total / 2**30:,.2f}", f"{row.relative_flops:.0%}",
            f"{row.checkpoint_bytes / 2**20:,.0f}", "?" if hours is None else f"{hours:,.2f}", row.reason,
        )  # fmt: skip
    return table


def advise(config: Any, where: Topology) -> None:
    """Prints what would make the run fit, the cheapest change first."""
    from tuning.plan import remedies
    from tuning.training.progress import console

    advice = remedies.remedies(config, where)
    for one in advice.found:
        console.print(f"It would fit with {one}", markup=False)
        console.print(f"   {' '.join(one.flags)}", markup=False)
    if advice.otherwise:
        console.print(advice.otherwise, markup=False)


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
    units["cost"] = plan["currency"] or "cost"
    for source in dict.fromkeys(sources[name] for name in units):  # figures that stand on the same, or are unknown for the same reason
        told = [f"{unit} {'unknown' if plan[n] is None else f'{plan[n]:,.4g}'}" for n, unit in units.items() if sources[n] == source]
        console.print(f"{', '.join(told)}: {source}", markup=False)
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
