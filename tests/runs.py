"""What tests of whole runs share: a home with a tiny published model and data, configs for it, processes that run them."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import checkpoints, devices
from tests import words as words_of

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "hears",
    "one",
    "two",
    "three",
    "and",
    "then",
    "quickly",
    "slowly",
    "far",
    "near",
]


def make_home(path: Path) -> Path:
    """PATH/model (with tokenizer), PATH/train.jsonl and PATH/eval.jsonl of prompt and completion."""
    rng = random.Random(0)
    sentence = lambda n: " ".join(rng.choice(WORDS) for _ in range(n))  # noqa: E731
    for name, count in (("train", 60), ("eval", 12)):
        rows = []
        for _ in range(count):
            prompt = sentence(rng.randint(3, 8))
            rows.append({"prompt": prompt + " :", "completion": " " + " ".join(reversed(prompt.split()))})
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = words_of.gpt([json.loads(line)["prompt"] for line in (path / "train.jsonl").open()])
    checkpoints.tiny(
        "llama2", path / "model", vocab_size=len(words), num_hidden_layers=2, bos_token_id=None, eos_token_id=0, pad_token_id=1
    )
    words.save_pretrained(path / "model")
    return path


def config(home: Path, **changes: Any) -> dict[str, Any]:
    """A LoRA run of 6 steps that evaluates every 3; `changes` are dotted keys with `__` for the dots."""
    from tuning.core import config as configs

    made = {
        "model": {"name": "pretrained", "path": str(home / "model")},
        "method": {"name": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": {"path": str(home / "train.jsonl"), "length": 32}, "eval": {"path": str(home / "eval.jsonl")}},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "mesh": {"data": 1, "fsdp": 8},
        "train": {"steps": 6, "batch_size": 8, "log_every": 1},
        "eval": {"every": 3},
        "checkpoint": {"every": 2},
    }
    made = copy.deepcopy(made)
    for key, value in changes.items():
        configs.put(made, key.replace("__", "."), value)
    return made


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """A config file for the command line."""
    path.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config(arg=None):\n    return ConfigDict({values!r})\n")
    return path


def environment(count: int = 8, **more: str) -> dict[str, str]:
    return {**os.environ, **devices.environment(count), "PYTHONPATH": str(ROOT), **more}


def start(*args: str, **env: Any) -> subprocess.Popen:
    """`python -m tuning ARGS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuning", *args],
        env=environment(**env),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
