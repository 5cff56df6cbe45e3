"""Speed and memory of the same tuning job here and in transformers + peft + torch, the two taking turns on one machine.

python -m experiments.speed_vs_peft.run --shape=22m --method=both
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.speed_vs_peft.job import SHAPES, Job, write_weights

NAMES = {"ours": "tuning", "theirs": "transformers + peft", "compiled": "transformers + peft, torch.compile"}
ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A side in a process of its own, that makes steps when asked and otherwise sleeps."""

    def __init__(self, side: str, job: Job, weights: Path, caches: Path):
        self.began = time.perf_counter()
        # Compiled programs of earlier runs must not count, those of an earlier round shall: the first round starts cold.
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(caches / "xla"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "experiments.speed_vs_peft.worker", side, json.dumps(dataclasses.asdict(job)), str(weights)]
        self.side = side
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)

    def steps(self, count: int) -> dict[str, Any]:
        """{loss, seconds, tokens, peak (bytes)} of the next steps. RuntimeError if the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(count, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The side {self.side!r} ended with code {self.process.wait()}; its error stands above.")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def one_round(sides: Sequence[str], job: Job, weights: Path, caches: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """{side: its first step and its bursts}; the sides live together and take turns, or live one after the other."""
    found: dict[str, dict[str, Any]] = {}
    groups = [[side] for side in sides] if args.apart else [list(sides)]
    for group in groups:
        with contextlib.ExitStack() as stack:
            workers = []
            for side in group:
                worker = stack.enter_context(Worker(side, job, weights, caches))
                first = worker.steps(1)
                found[side] = dict(first_step_seconds=time.perf_counter() - worker.began, first_loss=first["loss"], bursts=[])
                workers.append(worker)
            for turn in range(args.bursts + 1):
                for worker in workers:
                    burst = worker.steps(args.steps)
                    if turn:  # turn 0 warms up
                        found[worker.side]["bursts"].append(burst)
    return found


def summarise(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """{side: medians over all bursts of all rounds}; ratios are medians over pairs of neighbouring bursts."""
    rows = {}
    for side in rounds[0]:
        bursts = [burst for one in rounds for burst in one[side]["bursts"]]
        pairs = [pair for one in rounds for pair in zip(one["ours"]["bursts"], one[side]["bursts"], strict=True)]
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        firsts = [one[side]["first_step_seconds"] for one in rounds]
        rows[side] = dict(
            tokens_per_second=statistics.median(b["tokens"] / b["seconds"] for b in bursts),
            peak_mib=max(b["peak"] for b in bursts) / 2**20,
            first_step_seconds_cold=firsts[0],
            first_step_seconds_again=statistics.median(firsts[1:] or firsts),
            ours_over_this=statistics.median(ratios),
            lowest_ratio=min(ratios),
            highest_ratio=max(ratios),
            first_loss=rounds[0][side]["first_loss"],
        )
    return rows


def table(job: Job, rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of one job."""
    lines = [
        f"{job.method}, {job.shape}, {job.dtype}, {job.rows} x {job.length} tokens, {job.threads} threads{', remat' if job.remat else ''}",
        "",
        "| | tokens/s | peak MiB | first step, cold / again (s) | tuning's speed over this (range) | loss at step 1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for side, row in rows.items():
        first = f"{row['first_step_seconds_cold']:.1f} / {row['first_step_seconds_again']:.1f}"
        ratio = f"{row['ours_over_this']:.2f} ({row['lowest_ratio']:.2f} - {row['highest_ratio']:.2f})"
        lines.append(
            f"| {NAMES[side]} | {row['tokens_per_second']:,.0f} | {row['peak_mib']:,.0f} | {first} | {ratio} | {row['first_loss']:.6f} |"
        )
    return "\n".join(lines)


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    gpu = has_gpu()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="1b" if gpu else "22m")
    p.add_argument("--method", choices=("lora", "full", "both"), default="both")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    p.add_argument("--rows", type=int, default=8 if gpu else 4, help="sequences of a batch")
    p.add_argument("--length", type=int, default=2048 if gpu else 256, help="tokens of a sequence")
    p.add_argument("--steps", type=int, default=10 if gpu else 2, help="steps of a turn")
    p.add_argument("--bursts", type=int, default=5, help="turns of each side in a round, one more for warming up not counted")
    p.add_argument("--rounds", type=int, default=3, help="fresh processes of each side")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU cores of each side")
    p.add_argument("--remat", action="store_true", help="recompute each layer in the backward pass, on both sides")
    p.add_argument("--compile", action="store_true", help="torch.compile as a third side")
    p.add_argument("--apart", action=argparse.BooleanOptionalAction, default=gpu, help="the sides one after the other, not by turns")
    p.add_argument("--json", type=Path, default=Path("runs/speed_vs_peft.json"), help="where every number goes")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sides = ["ours", "theirs", *(["compiled"] if args.compile else [])]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        write_weights(args.shape, args.dtype, weights)
        for method in ("lora", "full") if args.method == "both" else (args.method,):
            job = Job(args.shape, method, args.dtype, args.rows, args.length, args.threads, args.remat)
            rounds = [one_round(sides, job, weights, Path(folder) / "caches", args) for _ in range(args.rounds)]
            rows = summarise(rounds)
            results.append(dict(job=dataclasses.asdict(job), summary=rows, rounds=rounds))
            print(table(job, rows), end="\n\n", flush=True)
    machine = dict(machine=platform.machine(), python=platform.python_version(), cores=os.cpu_count(), time=time.strftime("%Y-%m-%d %H:%M"))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(dict(machine=machine, results=results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
