"""Metrics over steps: the mean of a row's seeds with a band of its standard error, and the same as PNG."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tuning.sweep import compare, statistics
from tuning.sweep.compare import Comparison
from tuning.sweep.runs import Run

SHOWN = 10  # as many as the colours that are told apart


@dataclasses.dataclass(frozen=True)
class Curve:
    """Steps, means and standard errors (0 for one seed); only the steps that all runs have, so that no mean is of other runs than its
    neighbours."""

    steps: list[int]
    means: list[float]
    errors: list[float]


def curve(runs: Sequence[Run], metric: str) -> Curve:
    series = [dict(run.series(metric)) for run in runs]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    columns = [[values[step] for values in series] for step in steps]
    means = [sum(column) / len(column) for column in columns]
    return Curve(steps, means, [statistics.standard_error(column) or 0.0 for column in columns])


def drawable() -> bool:
    """Whether PNGs can be made."""
    return importlib.util.find_spec("matplotlib") is not None


def png(c: Comparison, metric: str, path: Path) -> None:
    """Curves of the compared rows, of the SHOWN best ones if there are more."""
    from matplotlib.figure import Figure

    compared = [row for row in c.best or c.rows if row.counted]
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for row in compared[:SHOWN]:
        drawn, name = curve(list(row.counted.values()), metric), compare.label(row.settings, c.keys).replace("$", r"\$")
        (line,) = axes.plot(drawn.steps, drawn.means, label=f"{name} ({len(row.counted)})")
        low, high = ([m + sign * e for m, e in zip(drawn.means, drawn.errors, strict=True)] for sign in (-1, 1))
        axes.fill_between(drawn.steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel=metric)
    more = f"; the best {SHOWN} of {len(compared)}" if len(compared) > SHOWN else ""
    axes.set_title(f"mean over seeds (their number in brackets), band: ± standard error{more}", fontsize="small", loc="left")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower left", ncols=2)
    figure.savefig(path)
