"""A run once more: its config, data and seed from its directory, what is different by now, and whether the metrics are the same."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tuning import build
from tuning.core import config as configs
from tuning.core.config import Config
from tuning.training import provenance, workdir, writer

ANYHOW = ("time", "command")  # of the provenance, what no two runs share


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is made of again.

    data         {name of a data source: digest}, the same now as then
    differences  from what was recorded, one line each
    """

    config: Config
    data: dict[str, str]
    differences: list[str]


def recipe(run: Path) -> Recipe:
    """ValueError if the directory is no run's, if its config cannot be built any more, or if its data are not the same."""
    if not workdir.is_run(run):
        raise ValueError(f"{run} is not a run's directory: it has no provenance.json.")
    recorded, before = workdir.read_config(run), json.loads((run / "provenance.json").read_text())
    try:
        parts = build.parts(recorded)
    except ValueError as error:
        at = before.get("git", {}).get("commit")
        raise ValueError(
            f"{error} {run} was trained with tuning {before['packages'].get('tuning')}{f', commit {at}' if at else ''}."
        ) from None
    data = {name: rows.digest for name, rows, _ in parts.sources} | {name: rows.digest for name, rows in parts.held_out.items()}
    workdir.check_data(run, data)
    now = provenance.collect([], data)
    known = configs.flat(recorded)
    new = {key: value for key, value in configs.flat(configs.plain(parts.config)).items() if key not in known}
    added = [f"config.{key}: not known then, {value!r} now" for key, value in new.items()]
    return Recipe(parts.config, data, differences(before, now) + added)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What one provenance says otherwise than another."""
    a, b = (configs.flat({key: value for key, value in facts.items() if key not in ANYHOW}) for facts in (before, now))
    said = [f"{key}: {a.get(key, 'absent')} then, {b.get(key, 'absent')} now" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    if a.get("git.dirty"):
        said.append("git: the recorded checkout had changes that no commit holds")
    return said


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`lines` of metrics that are equal from the first on, and what is said of the first that is not; "" if all of the run's are."""

    lines: int
    unequal: str


def verdict(run: Path, again: Path) -> Verdict:
    """Compares the metrics of a run with those of its reproduction, without what varies between runs that are the same."""
    ours, theirs = (writer.comparable(path / writer.METRICS) for path in (again, run))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            name = next(name for name in [*b, *a] if a.get(name) != b.get(name))
            apart = f"{name} was {b.get(name)} and is {a.get(name)}"
            return Verdict(i, f"At step {b['step']}, {apart}. {_farthest(ours[i:], theirs[i:])}")
    if len(ours) < len(theirs):
        return Verdict(len(ours), f"{run} has {len(theirs)} lines of metrics, {again} has {len(ours)}.")
    return Verdict(len(theirs), "")


def _farthest(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> str:
    """Which value is farthest off, relative to its size."""
    found = (0.0, "", 0)
    for a, b in zip(ours, theirs, strict=False):
        for name in a.keys() & b.keys() - {"step"}:
            if a[name] is not None and b[name] is not None and a[name] != b[name]:
                found = max(found, (abs(a[name] - b[name]) / max(abs(a[name]), abs(b[name])), name, b["step"]))
    share, name, step = found
    return f"Farthest off is {name} at step {step}, by {share:.1e} of its size." if name else ""
