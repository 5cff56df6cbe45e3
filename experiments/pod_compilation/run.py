"""What the TPU compiler takes of memory for every shipped config, and for random ones, beside the plan's estimate. See README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.pod_compilation.draw import draw  # noqa: E402
from tuning import build  # noqa: E402
from tuning.plan import assigned, compile, memory, topology  # noqa: E402

GIB = 2**30
SHIPPED = ("llama8b", "llama70b", "qwen30b_moe", "mixtral", "gemma27b", "bert", "t5")
Case = tuple[str, str, dict[str, Any]]  # name, topology, config


def shipped(gpus: bool = False) -> Iterator[Case]:
    """Every plan of the configs that is for TPUs, or for GPUs."""
    for name in SHIPPED:
        spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for plan in module.PLANS:
            where = plan.partition(",")[2]
            if topology.parse(where).gpu == gpus:
                yield f"{name}:{plan}", where, module.get_config(plan).to_dict()


def drawn(numbers: range, least: int, folder: Path) -> Iterator[Case]:
    """Random runs that take `least` bytes of a device by the estimate, and fit it."""
    for number in numbers:
        where, config = draw(number, folder)
        used = memory.estimate(build.parts(config, sketch=topology.parse(where).absent)).total
        if least <= used <= 0.95 * (topology.parse(where).memory_bytes or 0):
            yield f"draw {number}", where, config


def measure(name: str, where: str, config: dict[str, Any], whole: bool) -> dict[str, Any]:
    """A row: bytes of a device by the estimate and by the compiler, exchanges, seconds."""
    place = topology.parse(where)
    used = memory.estimate(build.parts(config, sketch=place.absent))
    began = time.process_time()
    made = compile.compile(build.parts(config, sketch=place.targets())) if whole or place.gpu else assigned.assigned(config, place)
    seconds = time.process_time() - began if whole else made.seconds
    if isinstance(made, compile.Refused):
        return {"name": name, "topology": where, "refused": made.message}
    room = place.memory_bytes or 0
    return {
        "name": name, "topology": where, "estimated": used.total, "compiled": made.hbm_bytes, "error": used.total / made.hbm_bytes - 1,
        "spare": 1 - made.hbm_bytes / room, "seconds": seconds, "collectives": made.collectives, "whole": whole,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "refused" in row:
        return f"| {row['name']} | {row['topology']} | refused: {row['refused'].splitlines()[0]} |"
    sent = ", ".join(f"{kind} {x['count']:,}: {x['bytes'] / GIB:,.2f}" for kind, x in sorted(row["collectives"].items()))
    return (
        f"| {row['name']} | {row['topology']} | {row['compiled'] / GIB:.2f} | {row['estimated'] / GIB:.2f} | {100 * row['error']:+.1f} % "
        f"| {100 * row['spare']:.0f} % | {row['seconds']:.0f} | {sent} |"
    )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    p.add_argument("--draws", default="", metavar="A:B", help="random runs of these numbers in place of the shipped configs")
    p.add_argument("--gpus", action="store_true", help="the shipped configs for GPUs, which are compiled to the end")
    p.add_argument("--whole", action="store_true", help="compile to the end, minutes for each: the seconds are then all of the processor's")
    p.add_argument("--out", type=Path, default=Path("runs/pod_compilation"))
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder, (args.out / "rows.jsonl").open("a") as file:
        cases = drawn(range(*map(int, args.draws.split(":"))), GIB, Path(folder)) if args.draws else shipped(args.gpus)
        for case in cases:
            if re.search(args.only, case[0]):
                rows.append(measure(*case, args.whole))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                print(line(rows[-1]), flush=True)
    errors = sorted(abs(row["error"]) for row in rows if "error" in row)
    if errors:
        print(f"{len(errors)} estimates: median {100 * errors[len(errors) // 2]:.1f} %, largest {100 * errors[-1]:.1f} %")
    return int(any("refused" in row or row["spare"] < 0.05 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
