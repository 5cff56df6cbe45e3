"""A sweep that is interrupted and goes on, and the same one as two programs: are they the same runs? See README.md beside this file."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from experiments.sst2.run import installed  # noqa: E402
from experiments.sweep_on_sst2.sweep import STEPS  # noqa: E402
from tuning.sweep import states, sweep  # noqa: E402
from tuning.training import writer  # noqa: E402

BOUNDS = {1: 1e-5, 50: 1e-3, STEPS: float("inf")}  # relative differences of a loss up to these steps


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv: sentence TAB label, no header")
    p.add_argument("--model", type=Path, help="folder of a sentence encoder; by default that of the installed package")
    p.add_argument("--out", type=Path, default=Path("runs/sweep_on_sst2"))
    args = p.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    alone, together = (args.out.absolute() / name for name in ("alone", "together"))
    command = [
        sys.executable, "-m", "tuning", "sweep", f"--sweep={ROOT / 'experiments/sweep_on_sst2/sweep.py'}",
        f"--config.model.path={args.model or installed()}", f"--config.data.train.path={args.data / 'train.tsv'}",
        f"--config.data.eval.path={args.data / 'dev.tsv'}",
    ]  # fmt: skip
    run([*command, f"--dir={alone}", "--workers=2"], alone, after=4)
    print(f"Interrupted: {standing(alone)}")
    run([*command, f"--dir={alone}", "--workers=2"], alone)
    print(f"Gone on: {standing(alone)}")
    run([*command, f"--dir={together}", "--vectorize=auto"], together)
    print(f"Together: {standing(together)}")
    broken = compare(alone, together)
    runs = sorted(map(str, (alone / "runs").iterdir()))
    shown = subprocess.run(
        [sys.executable, "-m", "tuning", "compare", *runs, "--metric=eval/accuracy", "--goal=max", f"--out={args.out / 'report'}"]
    )
    return int(broken or shown.returncode != 0)


def run(command: list[str], directory: Path, after: int = 0) -> None:
    """The command up to its end; Ctrl-C comes once `after` runs are done."""
    process = subprocess.Popen(command, cwd=ROOT)
    while after and process.poll() is None:
        if (directory / "sweep.json").exists() and standing(directory).get("done", 0) >= after:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.5)
    status = process.wait()
    assert status == (130 if after else 0), f"exit status {status}"


def standing(directory: Path) -> dict[str, int]:
    found = [state.state for state in states.survey(directory, sweep.load(directory).points).values()]
    return {name: found.count(name) for name in states.STATES if name in found}


def compare(alone: Path, together: Path) -> bool:
    """Whether a loss of some run is farther apart than its bound."""
    worst = dict.fromkeys(BOUNDS, 0.0)
    for name in sweep.load(alone).points:
        pairs = zip(*(writer.read(where / "runs" / name / "metrics.jsonl") for where in (alone, together)), strict=True)
        for one, other in pairs:
            for loss in ("train/loss", "eval/loss"):
                if loss in one:
                    bound = next(step for step in BOUNDS if one["step"] <= step)
                    worst[bound] = max(worst[bound], abs(one[loss] - other[loss]) / abs(one[loss]))
    print("\n".join(f"largest difference up to step {step}: {gap:.1e} (bound {BOUNDS[step]:.0e})" for step, gap in worst.items()))
    return any(gap > BOUNDS[step] for step, gap in worst.items())


if __name__ == "__main__":
    sys.exit(main())
