"""Runs put side by side: which settings differ, what each of them reached over its seeds, and whether that is more than chance.

Runs with the same settings but for the seed are one row. Only runs that came to their end with a finite metric count; the others are
listed. A row says of how many runs it is the mean, and is compared with the best row by a paired t test over the seeds that both have.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tuning.core.parts import suggestion
from tuning.sweep import runs as records
from tuning.sweep import states, statistics
from tuning.sweep.runs import Cost, Run
from tuning.sweep.statistics import PairedTest, Summary

ASIDE = ("log.", "checkpoint.", "eval.batch_size", "eval.prompts", "eval.max_new_tokens")  # change no metric: no settings of a row
GOALS = {"loss": "min", "nll": "min", "perplexity": "min", "accuracy": "max", "f1": "max"}  # by a metric's last word


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one setting.

    settings  of the keys that differ among all compared runs; without those that its runs do not have
    every     all of its runs; `counted` those that the numbers are of, by seed
    test      against the row that the comparison is against
    chosen    how many settings it was the best of, in a comparison by a section
    """

    settings: dict[str, Any]
    every: list[Run]
    counted: dict[int, Run]
    values: dict[int, float]
    summary: Summary | None
    cost: Cost | None
    test: PairedTest | None = None
    chosen: int = 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is reported.

    keys     that differ, with their short names
    rows     of all settings, the best first
    best     with `by`: of each of its values the best setting; else empty
    against  the settings of the row that others are compared with, among `best` or `rows`
    left     (run, why it is in no mean)
    """

    metric: str
    goal: str
    at: str
    by: str
    keys: dict[str, str]
    runs: list[Run]
    rows: list[Row]
    best: list[Row]
    against: dict[str, Any] | None
    left: list[tuple[Run, str]]


def compare(
    runs: Sequence[Run], *, metric: str = "eval/loss", goal: str = "", at: str = "last", by: str = "", against: str = ""
) -> Comparison:
    """Groups runs and tests the groups.

    goal     min or max; may be left out for the usual metrics
    at       last takes a run's last value of the metric, best its best one
    by       a key or a section: of each of its values only the best setting is compared
    against  the name of the row to compare with, as `label` gives it; the best one if left out
    ValueError for names that no run has.
    """
    goal = goal or _goal(metric)
    if goal not in ("min", "max") or at not in ("last", "best"):
        raise ValueError(f"goal={goal!r} is min or max, and at={at!r} last or best.")
    there = sorted({name for run in runs for name in run.metrics})
    if metric not in there:
        raise ValueError(f"No run has a metric {metric!r}.{suggestion(metric, there)} There are: {', '.join(there) or 'none yet'}.")
    keys = short(differing(runs))
    counted, left = _sort_out(runs, metric)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_chosen(run, keys)), []).append(run)
    counts = {id(run) for run in counted}
    rows = [_row(group, [run for run in group if id(run) in counts], keys, metric, goal, at) for group in groups.values()]
    rows, best = _ranked(rows, goal), []
    if by:
        best = _ranked([_best_of(some, goal) for some in _by(rows, keys, by, runs).values()], goal)
    compared = best or rows
    reference = _reference(compared, against, keys, goal)
    compared = _tested(compared, reference)
    rows, best = (rows, compared) if by else (compared, [])
    return Comparison(metric, goal, at, by, keys, list(runs), rows, best, reference.settings if reference else None, left)


def differing(runs: Sequence[Run]) -> list[str]:
    """The keys of which two runs have different values, section by section.

    A key that some runs do not have tells nothing by that: the name of their method does. Nor does one whose value follows from the name
    of its section's part, or from an earlier key of the same last name, as data.eval.length follows data.train.length.
    """
    columns: dict[str, dict[int, str]] = {}
    for i, run in enumerate(runs):
        for key, value in run.settings.items():
            if key != "seed" and not key.startswith(ASIDE):
                columns.setdefault(key, {})[i] = json.dumps(value)
    sections = list(dict.fromkeys(key.split(".")[0] for key in columns))
    found: list[str] = []
    for key in sorted(columns, key=lambda key: sections.index(key.split(".")[0])):
        parents = [f"{key.rpartition('.')[0]}.name", *(name for name in found if _last(name) == _last(key) != "name")]
        follows = any(key != name and name in columns and _follows(columns[key], columns[name]) for name in parents)
        if len(set(columns[key].values())) > 1 and not follows:
            found.append(key)
    return found


def _follows(column: Mapping[int, str], other: Mapping[int, str]) -> bool:
    """Whether runs with equal values of the other key have equal values of this one."""
    seen: dict[str | None, str] = {}
    return all(seen.setdefault(other.get(i), value) == value for i, value in column.items())


def short(keys: Sequence[str]) -> dict[str, str]:
    """{key: its shortest last part that no other key has}; what a section's part is called has the name of the section."""
    words = {key: key.removesuffix(".name").split(".") for key in keys}
    ends = lambda key, n: ".".join(words[key][-n:])  # noqa: E731
    return {key: next((ends(key, n) for n in range(1, len(words[key]) + 1) if sum(ends(k, n) == ends(key, n) for k in keys) == 1), key)
            for key in keys}  # fmt: skip


def label(settings: Mapping[str, Any], keys: Mapping[str, str]) -> str:
    """`method=lora, rank=8`."""
    return ", ".join(f"{keys[key]}={shown(value)}" for key, value in settings.items()) or "all runs"


def shown(value: Any) -> str:
    """A setting as a table has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(shown, value)) if isinstance(value, list) else str(value)


def value(run: Run, metric: str, goal: str, at: str) -> float:
    """What counts of a run's metric."""
    series = [x for _, x in run.series(metric)]
    return series[-1] if at == "last" else (min if goal == "min" else max)(x for x in series if not math.isnan(x))


def _goal(metric: str) -> str:
    if goal := GOALS.get(_last(metric.replace("/", "."))):
        return goal
    raise ValueError(f"Is a low {metric} good or bad? Set --goal=min or --goal=max.")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _sort_out(runs: Sequence[Run], metric: str) -> tuple[list[Run], list[tuple[Run, str]]]:
    """The runs that count, and the others with what is wrong with them."""
    counted, left, seen = [], [], {}
    for run in runs:
        series = run.series(metric)
        same = json.dumps([x for x in sorted(run.settings.items()) if not x[0].startswith(ASIDE)])
        if run.state != states.DONE:
            why = f"{run.state}: {run.note}"
        elif not series:
            why = f"has no {metric}"
        elif not math.isfinite(series[-1][1]):
            why = f"{metric} is not finite at step {series[-1][0]}"
        elif same in seen:
            why = f"is the same run as {seen[same]}, seed and all; counted once"
        else:
            counted.append(run)
            seen[same] = run.name
            continue
        left.append((run, why))
    return counted, left


def _chosen(run: Run, keys: Mapping[str, str]) -> dict[str, Any]:
    return {key: run.settings[key] for key in keys if key in run.settings}


def _row(every: list[Run], counted: list[Run], keys: Mapping[str, str], metric: str, goal: str, at: str) -> Row:
    values = {run.seed: value(run, metric, goal, at) for run in counted}
    summary = statistics.summarise(list(values.values())) if values else None
    cost = _mean([records.cost(run) for run in counted]) if counted else None
    return Row(_chosen(every[0], keys), every, {run.seed: run for run in counted}, values, summary, cost)


def _mean(costs: Sequence[Cost]) -> Cost:
    mean = lambda name: math.fsum(getattr(cost, name) for cost in costs) / len(costs)  # noqa: E731
    params = None if any(cost.params is None for cost in costs) else mean("params")
    return Cost(mean("steps"), mean("tokens"), mean("seconds"), mean("gib"), params)


def _ranked(rows: list[Row], goal: str) -> list[Row]:
    """The best mean first, rows without one last."""
    sign = 1 if goal == "min" else -1
    return sorted(rows, key=lambda row: (row.summary is None, sign * row.summary.mean if row.summary else 0))


def _best_of(rows: list[Row], goal: str) -> Row:
    """The best mean among those of most seeds: where some runs of a setting failed, the others may have been lucky."""
    most = max(len(row.values) for row in rows)
    first = _ranked([row for row in rows if len(row.values) == most], goal)[0]
    return dataclasses.replace(first, chosen=len(rows))


def _by(rows: list[Row], keys: Mapping[str, str], by: str, runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Rows with the same values of a key or of a section's keys."""
    of = lambda names: [key for key in names if key == by or key.startswith(f"{by}.")]  # noqa: E731
    known = sorted({key for run in runs for key in run.settings})
    if not of(known):
        sections = sorted({".".join(key.split(".")[:n]) for key in known for n in range(1, key.count(".") + 2)})
        raise ValueError(f"--by={by} is no key or section of these runs' configs.{suggestion(by, sections)}")
    if not of(keys):
        raise ValueError(f"--by={by}: all runs have the same. What differs: {', '.join(keys) or 'the seed alone'}.")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps({key: row.settings.get(key) for key in of(keys)}), []).append(row)
    return groups


def _reference(rows: list[Row], against: str, keys: Mapping[str, str], goal: str) -> Row | None:
    if not against:
        return _best_of(rows, goal) if any(row.summary for row in rows) else None
    labels = {label(row.settings, keys): row for row in rows}
    if against not in labels:
        raise ValueError(f"--against={against} is not one of: {'; '.join(labels)}.{suggestion(against, labels)}")
    return labels[against]


def _tested(rows: list[Row], reference: Row | None) -> list[Row]:
    """The rows with their tests against one of them."""
    if reference is None:
        return rows
    same = lambda row: row.settings == reference.settings  # noqa: E731
    tests = statistics.holm([None if same(row) else statistics.paired(row.values, reference.values) for row in rows])
    return [dataclasses.replace(row, test=test) for row, test in zip(rows, tests, strict=True)]
