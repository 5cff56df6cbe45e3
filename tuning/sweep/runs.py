"""Runs as a comparison reads them, from their directories alone: settings, how they stand, metrics, cost."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tuning.core import config as configs
from tuning.sweep import states
from tuning.training import workdir, writer

UNFINISHED = "unfinished"  # of a run outside of any sweep: whether a process goes on with it is not known


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's directory, read once.

    name      its path below what all compared runs share
    settings  {dotted key: value} of its whole config, as JSON has the values
    lines     of metrics.jsonl
    state     one of sweep.states.STATES, or UNFINISHED
    note      how far it came, or why it failed
    """

    path: Path
    name: str
    settings: dict[str, Any]
    lines: list[dict[str, Any]]
    state: str
    note: str

    @property
    def seed(self) -> int:
        return self.settings.get("seed", 0)

    @property
    def metrics(self) -> list[str]:
        return sorted({name for line in self.lines for name in line} - {"step"})

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of each line that has the metric; NaN for what was not finite."""
        return [(line["step"], math.nan if line[metric] is None else line[metric]) for line in self.lines if metric in line]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run took, or several on average.

    steps, tokens  made and read; what was lost in a kill and made again counts once
    seconds        of steps and evaluations, without start-up, compilation and saving; the run's share where several are one program
    gib            peak of the device or, where the device does not tell, of the whole process
    params         that learn; None where the run does not say
    """

    steps: float
    tokens: float
    seconds: float
    gib: float
    params: float | None


def cost(run: Run) -> Cost:
    steps, tokens, seconds, gib = 0.0, 0.0, 0.0, 0.0
    for line in run.lines:
        sharing = line.get("time/runs_sharing", 1)
        if "time/seconds_per_step" in line:
            spent = (line["step"] - steps) * line["time/seconds_per_step"]
            tokens, seconds, steps = tokens + spent * line.get("time/tokens_per_second", 0.0), seconds + spent / sharing, line["step"]
        seconds += line.get("time/eval_seconds", 0.0) / sharing
        gib = max(gib, line.get("memory/device_peak_gib", line.get("memory/host_peak_gib", 0.0)))
    texts = run.path / writer.TEXTS
    said = re.search(r"trainable params: ([\d,]+)", texts.read_text(encoding="utf-8", errors="replace")) if texts.exists() else None
    return Cost(steps, tokens, seconds, gib, int(said[1].replace(",", "")) if said else None)


def find(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Run], list[Path]]:
    """The runs that paths name, each a run's directory or one that holds runs at any depth, and the paths that have none.

    ValueError if there is no run at all.
    """
    found: dict[Path, tuple[str, str] | None] = {}  # a run's directory -> (state, error) where a sweep tells
    without = []
    for path in dict.fromkeys(map(Path, paths)):
        begun, within = _below(path)
        above = {run.parents[1] for run in begun if len(run.parents) > 1 and (run.parents[1] / "sweep.json").exists()}
        for sweep in sorted({*within, *above}):
            begun |= {run: told for run, told in _told(sweep).items() if run in begun or sweep in within}
        found |= begun
        without += [] if begun else [path]
    if not found:
        raise ValueError(f"There is no run in {', '.join(map(str, paths))}. A run's directory has config.json and metrics.jsonl.")
    shared = os.path.commonpath([path.absolute().parent for path in found])
    return [_read(path, os.path.relpath(path.absolute(), shared), told) for path, told in found.items()], without


def _below(path: Path) -> tuple[dict[Path, Any], list[Path]]:
    """The directories of runs and those of sweeps at and below a path."""
    begun, sweeps = [], []
    for root, folders, files in os.walk(path):
        begun += [Path(root)] if {"provenance.json", "config.json"} <= {*files} else []
        sweeps += [Path(root)] if "sweep.json" in files else []
        folders[:] = [] if "provenance.json" in files else sorted(folders)  # a run holds many files and no other run
    return dict.fromkeys(begun), sweeps


def _told(sweep: Path) -> dict[Path, tuple[str, str]]:
    """{a run's directory: (state, error)} of all runs of a sweep, also of those that have not begun."""
    names = sorted(file.stem for file in (sweep / "configs").glob("*.json"))
    return {sweep / "runs" / name: (state.state, state.error) for name, state in states.survey(sweep, names).items()}


def _read(path: Path, name: str, told: tuple[str, str] | None) -> Run:
    begun = (path / "config.json").exists()
    given = workdir.read_config(path) if begun else json.loads((path.parents[1] / "configs" / f"{path.name}.json").read_text())
    settings, lines = configs.flat(configs.plain(given)), _lines(path / writer.METRICS)
    at, steps = max([line["step"] for line in lines], default=0), settings.get("train.steps")
    ended, (state, error) = finished(settings, lines), told or ("", "")
    if state in (states.FAILED, states.PRUNED):
        note = f"{error or 'by the search'} (step {at} of {steps})"
    elif ended:
        state, note = states.DONE, "" if at == steps else f"stopped early, at step {at} of {steps}"
    else:
        state, note = (UNFINISHED if state in ("", states.DONE) else state), f"step {at} of {steps}"
    return Run(path, name, settings, lines, state, note)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are complete."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def finished(settings: dict[str, Any], lines: Sequence[dict[str, Any]]) -> bool:
    """Whether a run made all its steps and its last evaluation, or stopped as eval.patience says."""
    last, best, worse = settings.get("train.steps"), math.inf, 0
    for line in lines:
        if "eval/loss" in line:
            better = line["eval/loss"] is not None and line["eval/loss"] < best
            best, worse = (line["eval/loss"], 0) if better else (best, worse + 1)
    evaluates = any("eval/loss" in line for line in lines)
    whole = any(line["step"] == last and ("eval/loss" in line or not evaluates) for line in lines)
    return whole or bool(0 < settings.get("eval.patience", 0) <= worse)
