"""Directories as runs leave them, without any training: what a comparison reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuning.core import config as configs

LORA = {"method": {"name": "lora", "rank": 8, "targets": ["all"]}, "optimizer": {"learning_rate": 0.01}}
IA3 = {"method": {"name": "ia3", "targets": []}, "optimizer": {"learning_rate": 0.01}}


def config(base: dict[str, Any], seed: int, **changes: Any) -> dict[str, Any]:
    """A run's config; `changes` are dotted keys with `__` for the dots."""
    made = json.loads(json.dumps(base)) | {"seed": seed, "train": {"steps": 20, "log_every": 10}, "eval": {"every": 10, "patience": 0}}
    for key, value in changes.items():
        configs.put(made, key.replace("__", "."), value)
    return made


def lines(losses: list[float | None]) -> list[dict[str, Any]]:
    """Every 10 steps of 100 tokens and 0.5 seconds each, an evaluation of 2 seconds; one before the first step."""
    found: list[dict[str, Any]] = []
    for i, loss in enumerate(losses):
        if i:
            found.append({"step": 10 * i, "train/loss": 1.0 / i, "time/seconds_per_step": 0.5, "time/tokens_per_second": 200.0})
        found.append({"step": 10 * i, "eval/loss": loss, "time/eval_seconds": 2.0, "memory/host_peak_gib": 1.0 + i})
    return found


def write(path: Path, settings: dict[str, Any], metrics: list[dict[str, Any]], params: int | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "provenance.json").write_text("{}")
    (path / "config.json").write_text(json.dumps(settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if params is not None:
        said = f"trainable params: {params:,} || all params: 9,000 || trainable%: 1\n"
        (path / "texts.jsonl").write_text(json.dumps({"step": 0, "name": "summary", "text": said}) + "\n")
    return path


def seeds(root: Path, name: str, base: dict[str, Any], losses: list[float], **changes: Any) -> None:
    """A finished run for each loss, with seeds from 0 on."""
    for seed, loss in enumerate(losses):
        write(root / f"{name},seed={seed}", config(base, seed, **changes), lines([3.0, 2.5, loss]), params=1234)
