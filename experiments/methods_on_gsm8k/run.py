"""Every method on gsm8k's answers with a small decoder, on one budget. See README.md beside this file."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import tuning  # noqa: E402
from experiments.e2e.run import train_tokenizer  # noqa: E402
from experiments.methods_on_sst2 import trials  # noqa: E402
from experiments.methods_on_sst2.trials import Plan, Row, shared  # noqa: E402
from tuning.api import evaluate  # noqa: E402

SHAPE = dict(width=96, layers=3, heads=3, kv_heads=3, head_dim=32, hidden=256, max_length=512)
MIDDLE, HIGH, HIGHEST = (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1), (1e-2, 3e-2, 1e-1, 3e-1)
NEW = "0123456789<>=*/+-#."  # what answers are full of: their tokens learn under `tokens`

ROWS = (
    shared("full", (3e-4, 1e-3, 3e-3, 1e-2)),
    Row("partial: norms", dict(name="partial", parts=("norms",)), HIGHEST),
    shared("partial: last layer", MIDDLE),
    shared("lora", MIDDLE),
    shared("lora, dora", MIDDLE),
    shared("lora, pissa", MIDDLE),
    shared("lora, nf4 base", MIDDLE, quantise="nf4", quantise_block=32),
    shared("adalora", MIDDLE),
    shared("vera", HIGHEST),
    shared("loha", HIGH),
    shared("lokr", HIGH),
    shared("ia3", HIGHEST),
    shared("bottleneck, houlsby", HIGH),
    shared("bottleneck, pfeiffer", HIGH),
    shared("bottleneck, parallel", HIGH),
    shared("prompt", HIGHEST),
    shared("p_tuning", MIDDLE),
    shared("prefix", HIGHEST),
    Row("tokens: digits and signs", dict(name="tokens"), HIGH),
)


def prepare(data: Path, home: Path) -> None:
    """text.jsonl without any answer, a tokenizer of it; train.jsonl and eval.jsonl of questions with answers, one in fifty held out."""
    home.mkdir(parents=True)
    rows = [json.loads(line) for line in (data / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
    parts = {"train": [row for i, row in enumerate(rows) if i % 50], "eval": rows[::50]}
    parts["text"] = [{"text": text} for text in [*other(data), *(row["question"] for row in parts["train"])]]
    for name, some in parts.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    train_tokenizer([row["text"] for row in parts["text"]], home / "tokenizer")


def other(data: Path) -> Iterator[str]:
    """Text that has nothing to do with sums."""
    with (data / "e2e" / "devset.csv").open(encoding="utf-8", newline="") as stream:
        yield from (f"{row['mr']}\n{row['ref']}" for row in csv.DictReader(stream))
    plays = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    yield from filter(None, map(str.strip, plays.split("\n\n")))


def pretrain(home: Path, steps: int) -> dict[str, float]:
    """A small Llama-shaped base model of the text, in home/base/exports/hf."""
    config = {
        "model": dict(name="decoder", tokenizer=str(home / "tokenizer"), **SHAPE),
        "method": dict(name="full"),
        "optimizer": dict(learning_rate=3e-3, b2=0.98, weight_decay=0.1, schedule=dict(name="cosine", warmup_steps=steps // 20)),
        "data": dict(train=dict(path=str(home / "text.jsonl"), length=256)),
        "train": dict(steps=steps, batch_size=8, log_every=50),
    }
    final = tuning.train(config, home / "base")
    tuning.load(home / "base", checkpoint="last").export(home / "base" / "exports" / "hf")
    return final


def plan(home: Path, steps: int, batch_size: int, length: int) -> Plan:
    words = json.loads((home / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]

    def config(row: Row) -> dict[str, Any]:
        room = length + (row.method["length"] if row.method["name"] in ("prompt", "p_tuning") else 0)  # a prompt takes no token's place
        most = SHAPE["max_length"] - (row.method["length"] if row.method["name"] == "prefix" else 0)  # which stands before the rows
        ids = dict(ids=tuple(words[sign] for sign in NEW)) if row.method["name"] == "tokens" else {}
        return {
            "model": {"path": str(home / "base" / "exports" / "hf"), **row.model},
            "method": {**row.method, **ids},
            "optimizer": dict(name="adamw", schedule=dict(name="linear", warmup_steps=steps // 10)),
            "data": {
                "train": dict(
                    path=str(home / "train.jsonl"), length=room, pack=False, overlong="drop",
                    format=dict(name="pairs", prompt="{question}\n", completion="{answer}"),
                ),
                "eval": dict(path=str(home / "eval.jsonl"), pack=True, length=most),
            },
            "train": dict(steps=steps, batch_size=batch_size),
            "eval": dict(batch_size=4),
        }  # fmt: skip

    return Plan(ROWS, config, "loss", higher=False)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder with gsm8k/train.jsonl, e2e/devset.csv and tinyshakespeare/input.txt")
    p.add_argument("--pretraining_steps", type=int, default=800)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--batch_size", type=int, default=4)
    p.add_argument("--length", type=int, default=160, help="tokens; longer training pairs are left out")
    p.add_argument("--only", default="", help="a regular expression: rows to run; those made before stay in the table")
    p.add_argument("--out", type=Path, default=Path("runs/methods_on_gsm8k"))
    args = p.parse_args()
    home = args.out / "home"
    if not (home / "base" / "exports" / "hf" / "config.json").exists():
        shutil.rmtree(home, ignore_errors=True)
        prepare(args.data, home)
        pretrain(home, args.pretraining_steps)
    asked = plan(home, args.steps, args.batch_size, args.length)
    records = trials.run(asked, args.out, args.only)
    untuned = evaluate(tuning.load(home / "base", checkpoint="last"), asked.config(ROWS[0]))
    print(f"The base, untuned: {untuned['loss']:.3f} on {untuned['tokens']:,} tokens of answers.")
    print(trials.table(asked, records, lambda x: f"{x:.3f}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
