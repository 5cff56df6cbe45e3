"""A comparison as tables: texts for people, numbers in full for programs; csv, Markdown, LaTeX."""

from __future__ import annotations

import csv as csvs
import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

from tuning.sweep import compare, runs, statistics
from tuning.sweep.compare import Comparison, Row

NONE = "–"
COSTS = {"steps": "{:,.0f}", "tokens": "{:,.0f}", "seconds": "{:,.1f}", "gib": "{:.2f}", "params": "{:,.0f}"}
COST_NAMES = {"gib": "peak GiB", "params": "trainable"}


@dataclasses.dataclass(frozen=True)
class Table:
    """`words` is the number of columns, the first ones, that hold no measured number."""

    title: str
    header: list[str]
    rows: list[list[str]]
    words: int


def tables(c: Comparison) -> list[Table]:
    """What is compared, what it took and, in a comparison by a section, all settings after it."""
    compared, title = (c.best, f"the best settings by {c.by}") if c.by else (c.rows, "all settings")
    whole = [_results(c, c.rows, "all settings", tested=False)] if c.by else []
    return [_results(c, compared, title, tested=True), _costs(c, compared), *whole]


def notes(c: Comparison) -> list[str]:
    """What the numbers mean, and which runs are in none of them."""
    compared = c.best or c.rows
    better = "lower" if c.goal == "min" else "higher"
    when = "at a run's last step" if c.at == "last" else "at each run's own best step"
    costs = [runs.cost(run) for run in c.runs]
    spent = {name: sum(getattr(cost, name) for cost in costs) for name in ("steps", "tokens", "seconds")}
    said = [
        f"{c.metric} {when}, {better} is better: mean, standard error and {statistics.CONFIDENCE:.0%} confidence interval (Student's t) "
        "over seeds.",
        "Costs are means per run, without start-up, compilation and saving. All runs together, finished or not: "
        + ", ".join(f"{total:,.0f} {name}" for name, total in spent.items())
        + ".",
    ]
    tests = [row.test for row in compared if row.test is not None and row.test.p is not None]
    if tests and c.against is not None:
        other = compare.label(c.against, c.keys)
        said.append(
            f"p: two-sided paired t test against {other} over the seeds that both have (their number in brackets); "
            f"p Holm: corrected for {len(tests)} comparison{'s' if len(tests) > 1 else ''} by Holm's procedure."
        )
    elif len(compared) > 1:
        said.append("No p values: a paired test needs two seeds or more that two rows share, and differences that vary.")
    if c.by:
        said.append("Each of the best was chosen by the same runs that it is shown with: the more settings, the more that flatters.")
    if c.left:
        said.append(f"{len(c.left)} of {len(c.runs)} runs {'is' if len(c.left) == 1 else 'are'} in no mean:")
        said += [f"  {run.name}: {why}" for run, why in c.left]
    return said


def _results(c: Comparison, rows: Sequence[Row], title: str, tested: bool) -> Table:
    keys, places = _keys(c, rows), digits(rows)
    number = lambda x, sign="": NONE if x is None else f"{x:{sign}.{places}f}"  # noqa: E731
    texts = []
    for row in rows:
        s, t, n = row.summary, row.test, len(row.counted)
        cells = [*_settings(row, keys), str(n) if n == len(row.every) else f"{n} of {len(row.every)}"]
        if s is None:
            cells += [NONE] * 3
        else:
            cells += [number(s.mean), number(s.error), NONE if s.low is None else f"{number(s.low)} to {number(s.high)}"]
        if tested:
            cells += [NONE] * 3 if t is None else [f"{number(t.difference, '+')} ({t.n})", chance(t.p), chance(t.adjusted)]
        texts.append(cells)
    header = [*(c.keys[key] for key in keys), "n", c.metric, "± error", "95% interval"]
    return Table(title, header + (["difference", "p", "p Holm"] if tested else []), texts, len(keys))


def _costs(c: Comparison, rows: Sequence[Row]) -> Table:
    keys, texts = _keys(c, rows), []
    for row in rows:
        costs = {} if row.cost is None else dataclasses.asdict(row.cost)
        cells = [NONE if costs.get(name) is None else form.format(costs[name]) for name, form in COSTS.items()]
        texts.append([*_settings(row, keys), *cells])
    header = [*(c.keys[key] for key in keys), *(COST_NAMES.get(name, name) for name in COSTS)]
    return Table("cost of a run", header, texts, len(keys))


def _keys(c: Comparison, rows: Sequence[Row]) -> list[str]:
    return [key for key in c.keys if any(key in row.settings for row in rows)]


def _settings(row: Row, keys: Sequence[str]) -> list[str]:
    return [compare.shown(row.settings[key]) if key in row.settings else NONE for key in keys]


def chance(p: float | None) -> str:
    """A p value as a text."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def digits(rows: Sequence[Row]) -> int:
    """Decimals that show two figures of the median standard error; else five figures of the largest mean."""
    errors = sorted(row.summary.error for row in rows if row.summary and row.summary.error)
    means = [abs(row.summary.mean) for row in rows if row.summary and row.summary.mean]
    wanted = 1 - math.floor(math.log10(errors[len(errors) // 2])) if errors else 4 - math.floor(math.log10(max(means))) if means else 4
    return min(max(wanted, 0), 8)


def markdown(c: Comparison) -> str:
    """The tables with their notes."""
    parts = []
    for table in tables(c):
        rule = ["---" if i < table.words else "---:" for i in range(len(table.header))]
        lines = [[_escape_markdown(cell) for cell in row] for row in [table.header, *table.rows]]
        parts.append(f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], rule, *lines[1:]]))
    return "\n\n".join([*parts, "\n".join(_escape_markdown(note) + "  " for note in notes(c))]) + "\n"


def latex(c: Comparison) -> str:
    """The tables as tabular environments that need no package; the notes are comments."""
    parts = []
    for table in tables(c):
        lines = [" & ".join(map(_escape_latex, row)) + r" \\" for row in [table.header, *table.rows]]
        columns = "l" * table.words + "r" * (len(table.header) - table.words)
        body = ["\\hline", lines[0], "\\hline", *lines[1:], "\\hline"]
        parts.append("\n".join([f"% {table.title}", f"\\begin{{tabular}}{{{columns}}}", *body, "\\end{tabular}"]))
    return "\n\n".join([*parts, "\n".join(f"% {note}" for note in notes(c))]) + "\n"


def csv(c: Comparison) -> str:
    """A line for each row that is compared, numbers in full; settings have their keys' whole names."""
    lines = []
    for row in c.best or c.rows:
        s, t, cost = row.summary, row.test, row.cost
        line: dict[str, Any] = {key: row.settings.get(key) for key in c.keys}
        line |= {"metric": c.metric, "n": len(row.counted), "runs": len(row.every), "settings_tried": row.chosen}
        line |= {name: getattr(s, name, None) for name in ("mean", "error", "low", "high")}
        line |= {"pairs": getattr(t, "n", None), **{name: getattr(t, name, None) for name in ("difference", "t", "p")}}
        line |= {"p_holm": getattr(t, "adjusted", None), **{name: getattr(cost, name, None) for name in COSTS}}
        lines.append(line)
    return _csv(lines)


def runs_csv(c: Comparison) -> str:
    """A line for each run."""
    why = {id(run): reason for run, reason in c.left}
    values = {id(run): row.values[seed] for row in c.rows for seed, run in row.counted.items()}
    lines = []
    for run in c.runs:
        line: dict[str, Any] = {"run": run.name, "state": run.state, "left_out": why.get(id(run), ""), "seed": run.seed}
        line |= {key: run.settings.get(key) for key in c.keys} | {c.metric: values.get(id(run))}
        lines.append(line | dataclasses.asdict(runs.cost(run)))
    return _csv(lines)


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csvs.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(value) for name, value in line.items()} for line in lines)
    return text.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", text)


SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
           "±": r"$\pm$", NONE: "--"}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(SPECIAL.get(letter) or (f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)
