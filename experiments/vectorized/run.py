"""Eight LoRA runs one after the other, and the same eight in one program: time with start-up and compilation, steps per second, results.

python -m experiments.vectorized.run --data=FOLDER. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# BERT's smaller shapes (Turc et al., 2019, arXiv:1908.08962).
SHAPES = {
    "tiny": dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
    "mini": dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024),
}
RATES, SEEDS = (1e-4, 3e-4, 1e-3, 3e-3), (0, 1)
VOCABULARY = 8192
WARM = 20  # steps at the start of a run that do not count for its speed
BOUNDS = {10: 1e-5, 50: 1e-3}  # how far losses of a step may be apart, relative
# Freed memory stays with the process. By default glibc gives what is larger than 32 MiB back after every step, and asks for it again.
MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=8000000000:glibc.malloc.top_pad=67108864"


def write_model(data: Path, folder: Path, shape: str) -> None:
    """A checkpoint of this shape with random weights, and a tokenizer of the data's words."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    words = BertWordPieceTokenizer()
    words.train_from_iterator((data / "train.tsv").read_text(encoding="utf-8").splitlines(), vocab_size=VOCABULARY, show_progress=False)
    folder.mkdir(parents=True)
    words.save_model(str(folder))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig.from_dict(dict(vocab_size=VOCABULARY, **SHAPES[shape]))).save_pretrained(folder)


def config(data: Path, model: Path, rate: float, seed: int, steps: int, rows: int, length: int) -> dict[str, Any]:
    return {
        "model": dict(path=str(model), head="sequence_classification", classes=("negative", "positive"), dropout=0.0),
        "method": dict(name="lora", rank=8, alpha=16.0),
        "objective": dict(name="labels"),
        "optimizer": dict(learning_rate=rate, schedule=dict(name="linear", warmup_steps=steps // 10)),
        "data": {
            "train": dict(
                path=str(data / "train.tsv"),
                columns=("text", "label"),
                length=length,
                pack=False,
                overlong="drop",
                format=dict(name="labels"),
            ),
        },
        "train": dict(steps=steps, batch_size=rows, log_every=10),
        "seed": seed,
    }


def work(configs: Sequence[dict[str, Any]], folders: Sequence[str]) -> None:
    """What a process does: one run as `tuning train` has it, or several in one program."""
    from tuning import api
    from tuning.sweep import vectorized

    outcomes = [api.train(configs[0], folders[0])] if len(configs) == 1 else vectorized.train_many(configs, folders)
    if failed := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
        raise failed[0]


def timed(configs: Sequence[dict[str, Any]], folders: Sequence[Path], caches: Path) -> tuple[float, float]:
    """Seconds of a process of its own that does so, from its start to its end, and of processor time."""
    asked = json.dumps([list(configs), list(map(str, folders))])
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(caches), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": MEMORY}
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "experiments.vectorized.run", "--work"], input=asked, text=True, env=env, cwd=ROOT, check=True)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic() - began, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def per_second(folder: Path) -> float:
    """Steps of a run per second, by the median."""
    found = [line["time/seconds_per_step"] for line in lines(folder) if line["step"] > WARM and "train/loss" in line]
    return 1 / statistics.median(found)


def apart(one: Path, other: Path, step: int) -> float:
    """How far the losses of a step are apart, relative."""
    a, b = (next(line["train/loss"] for line in lines(folder) if line["step"] == step and "train/loss" in line) for folder in (one, other))
    return abs(a - b) / abs(a)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, help="folder with train.tsv: sentence TAB label, no header")
    p.add_argument("--shape", choices=SHAPES, default="tiny")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--rows", type=int, default=8, help="sentences of a batch")
    p.add_argument("--length", type=int, default=24, help="tokens; longer training sentences are left out")
    p.add_argument("--only", choices=["both", "alone", "together"], default="both")
    p.add_argument("--out", type=Path, default=Path("runs/vectorized"))
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        work(*json.load(sys.stdin))
        return 0
    shutil.rmtree(args.out, ignore_errors=True)
    write_model(args.data, model := args.out.absolute() / "model", args.shape)
    configs = [config(args.data.absolute(), model, r, s, args.steps, args.rows, args.length) for s in SEEDS for r in RATES]
    alone, together = ([args.out.absolute() / way / str(i) for i in range(len(configs))] for way in ("alone", "together"))
    found: dict[str, Any] = {}
    if args.only != "alone":
        found["together, s"], found["together, CPU s"] = timed(configs, together, args.out.absolute() / "caches" / "together")
        found["together, steps/s over all runs"] = len(configs) * per_second(together[0])
    if args.only != "together":
        caches = args.out.absolute() / "caches" / "alone"
        each = [timed([c], [folder], caches) for c, folder in zip(configs, alone, strict=True)]
        found["alone, s"], found["alone, CPU s"] = map(sum, zip(*each, strict=True))
        found["alone, steps/s"] = statistics.median(map(per_second, alone))
    held = True
    if args.only == "both":
        found["times less"] = found["alone, s"] / found["together, s"]
        for step, bound in {**BOUNDS, args.steps: math.inf}.items():
            far = max(apart(a, b, step) for a, b in zip(alone, together, strict=True))
            found[f"losses apart at step {step}, relative"] = far
            held &= far <= bound
    print(json.dumps(found, indent=2))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
