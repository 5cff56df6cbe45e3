"""Every method on SST-2 with a published sentence encoder, on one budget. See README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.methods_on_sst2 import trials  # noqa: E402
from experiments.methods_on_sst2.trials import Plan, Row, shared  # noqa: E402
from experiments.sst2.run import PUBLISHED, installed  # noqa: E402

LOW, MIDDLE, HIGH, HIGHEST = (1e-4, 3e-4, 1e-3, 3e-3), (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1)

ROWS = (
    Row("head alone", dict(name="partial", parts=("head",)), HIGH),
    shared("full", (3e-5, *LOW[:3])),
    Row("partial: biases (BitFit)", dict(name="partial", parts=("biases",)), HIGH),
    shared("partial: last layer", LOW),
    shared("lora", MIDDLE),
    shared("lora, dora", MIDDLE),
    shared("lora, pissa", LOW),
    shared("lora, nf4 base", MIDDLE, quantise="nf4"),
    shared("adalora", MIDDLE),
    shared("vera", HIGHEST),
    shared("loha", HIGH),
    shared("lokr", HIGH),
    shared("ia3", HIGH),
    shared("bottleneck, houlsby", MIDDLE),
    shared("bottleneck, pfeiffer", MIDDLE),
    shared("bottleneck, parallel", MIDDLE),
    shared("prompt", HIGH),
    shared("p_tuning", MIDDLE),
    shared("prefix", HIGH),
)


def plan(data: Path, model: Path, steps: int, batch_size: int, length: int) -> Plan:
    def config(row: Row) -> dict[str, Any]:
        room = length + (row.method["length"] if row.method["name"] in ("prompt", "p_tuning") else 0)  # a prompt takes no token's place
        return {
            "model": {**PUBLISHED, "path": str(model), "dropout": 0.0, **row.model},
            "method": row.method,
            "objective": dict(name="labels"),
            "optimizer": dict(name="adamw", schedule=dict(name="linear", warmup_steps=steps // 10)),
            "data": {
                "train": dict(
                    path=str(data / "train.tsv"), columns=("text", "label"), length=room, pack=False, overlong="drop",
                    format=dict(name="labels"),
                ),
                "eval": dict(path=str(data / "dev.tsv"), pack=True, length=128),
            },
            "train": dict(steps=steps, batch_size=batch_size),
            "eval": dict(batch_size=8),
        }  # fmt: skip

    return Plan(ROWS, config, "accuracy", higher=True)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv: sentence TAB label, no header")
    p.add_argument("--model", type=Path, help="folder of a sentence encoder; by default that of the installed package")
    p.add_argument("--steps", type=int, default=128)
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--length", type=int, default=24, help="tokens; longer training sentences are left out")
    p.add_argument("--only", default="", help="a regular expression: rows to run; those made before stay in the table")
    p.add_argument("--out", type=Path, default=Path("runs/methods_on_sst2"))
    args = p.parse_args()
    asked = plan(args.data, args.model or installed(), args.steps, args.batch_size, args.length)
    records = trials.run(asked, args.out, args.only)
    print(trials.table(asked, records, lambda x: f"{100 * x:.1f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
