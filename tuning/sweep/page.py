"""A comparison as one HTML page that needs nothing else: tables to sort and filter, curves, parallel coordinates."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from tuning.sweep import compare, curves, runs, tables
from tuning.sweep.compare import Comparison, Row
from tuning.training import writer

TEMPLATE = Path(__file__).with_name("page.html")
POINTS = 200  # of a curve


def page(c: Comparison, title: str) -> str:
    """The page. What the runs say stands in it as data only: the template shows it as text, never as markup."""
    text = json.dumps(_finite(_data(c, title)), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)


def _data(c: Comparison, title: str) -> dict[str, Any]:
    """What the template reads. Rows are all settings; `best` are the numbers of those among them that a comparison by a section is of."""
    tested = {json.dumps(row.settings): row for row in c.best}
    rows = [tested.get(json.dumps(row.settings), row) for row in c.rows]
    place = {run.path: i for i, row in enumerate(rows) for run in row.every}
    why = {run.path: reason for run, reason in c.left}
    metrics = sorted({name for run in c.runs for name in run.metrics if not name.startswith(writer.VOLATILE)})
    return {
        "title": title, "metric": c.metric, "goal": c.goal, "by": c.by, "digits": tables.digits(rows), "notes": tables.notes(c),
        "keys": [{"key": key, "short": name} for key, name in c.keys.items()],
        "rows": [_row(c, row, json.dumps(row.settings) in tested) for row in rows],
        "runs": [
            {"name": run.name, "row": place[run.path], "state": run.state, "why": why.get(run.path, ""), "seed": run.seed,
             "value": None if run.path in why else rows[place[run.path]].values[run.seed], **dataclasses.asdict(runs.cost(run))}
            for run in sorted(c.runs, key=lambda run: (place[run.path], run.seed))
        ],
        "curves": {metric: [_curve(row, metric) for row in rows] for metric in metrics},
    }  # fmt: skip


def _row(c: Comparison, row: Row, best: bool) -> dict[str, Any]:
    s, t, cost = row.summary, row.test, row.cost
    return {
        "label": compare.label(row.settings, c.keys), "best": best, "of": len(row.every), "n": len(row.counted),
        "settings": {key: value if isinstance(value, (int, float)) else compare.shown(value) for key, value in row.settings.items()},
        **{name: getattr(s, name, None) for name in ("mean", "error", "low", "high")},
        **{name: getattr(cost, name, None) for name in tables.COSTS},
        "difference": getattr(t, "difference", None), "pairs": getattr(t, "n", None), "p": getattr(t, "p", None),
        "holm": getattr(t, "adjusted", None),
    }  # fmt: skip


def _curve(row: Row, metric: str) -> list[list[float]]:
    """[steps, means, errors], thinned to POINTS with the last step kept."""
    whole = curves.curve(list(row.counted.values()), metric)
    every = max(1, math.ceil(len(whole.steps) / POINTS))
    kept = [i for i in range(len(whole.steps)) if (len(whole.steps) - 1 - i) % every == 0]
    return [[column[i] for i in kept] for column in (whole.steps, whole.means, whole.errors)]


def _finite(value: Any) -> Any:
    """JSON has no NaN; figures beyond the seventh are not seen."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return (float(f"{value:.7g}") if math.isfinite(value) else None) if isinstance(value, float) else value
