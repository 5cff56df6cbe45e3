"""Meaning representations to sentences (E2E), from nothing: an encoder-decoder and a decoder. See README.md beside this file."""

from __future__ import annotations

import argparse
import csv
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

SHAPE = dict(width=128, heads=4, head_dim=32, hidden=384)
MODELS = {
    "encoder-decoder": (dict(name="encoder_decoder", layers=2, **SHAPE), dict(name="pairs", prompt="mr", completion="ref")),
    "decoder": (
        dict(name="decoder", layers=4, kv_heads=4, max_length=256, **SHAPE),
        dict(name="pairs", prompt="{mr}\n", completion="ref"),
    ),
}


def prepare(source: Path, out: Path) -> None:
    """train.jsonl and eval.jsonl, split so that no meaning stands in both; and a tokenizer of the training text."""
    with source.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    meanings = list(dict.fromkeys(row["mr"] for row in rows))
    held_out = set(meanings[::10])
    out.mkdir(parents=True)
    parts = {"train": [r for r in rows if r["mr"] not in held_out], "eval": [r for r in rows if r["mr"] in held_out]}
    for name, some in parts.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    train_tokenizer([text for row in parts["train"] for text in row.values()], out / "tokenizer")


def train_tokenizer(texts: list[str], directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(directory)


def config(home: Path, model: dict, format: dict, steps: int, seed: int) -> dict:
    return {
        "model": model | {"tokenizer": str(home / "tokenizer")},
        "method": dict(name="full"),
        "optimizer": dict(learning_rate=2e-3, schedule=dict(name="cosine", warmup_steps=steps // 10)),
        "data": {
            "train": dict(path=str(home / "train.jsonl"), length=256, format=format),
            "eval": dict(path=str(home / "eval.jsonl")),
        },
        "train": dict(steps=steps, batch_size=8, log_every=20),
        "seed": seed,
    }


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="a csv file with the columns mr and ref")
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("runs/e2e"))
    args = p.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    prepare(args.data, args.out / "data")
    held_out = [json.loads(line) for line in (args.out / "data" / "eval.jsonl").open(encoding="utf-8")]
    prompts = list(dict.fromkeys(row["mr"] for row in held_out))[:3]
    table, said = Table("", "held-out loss", "exact tokens", "parameters", "seconds"), {}
    for name, (model, format) in MODELS.items():
        c, began = config(args.out / "data", model, format, args.steps, args.seed), time.monotonic()
        tuning.train(c, args.out / name)
        seconds, tuned = time.monotonic() - began, tuning.load(args.out / name, checkpoint="last")
        score = evaluate(tuned, c)
        table.add_row(name, f"{score['loss']:.3f}", f"{score['accuracy']:.1%}", f"{tree.size(tuned.model.layout):,}", f"{seconds:.0f}")
        texts = prompts if name == "encoder-decoder" else [prompt + "\n" for prompt in prompts]
        said[name] = tuned.generate(texts, max_new_tokens=64)
    console.print(table)
    for i, prompt in enumerate(prompts):
        console.print(f"{prompt}\n" + "".join(f"  {name}: {texts[i]}\n" for name, texts in said.items()), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
