"""tuning compare: runs side by side, as tables, curves and a page."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tuning.cli import common

COLUMNS = 5  # of settings

EPILOG = """rows:
  Runs with the same settings but for the seed are one row: mean, standard error, 95% confidence interval, and a paired t test over
  the seeds against the best row, corrected for the number of tests (Holm). Runs that are unfinished, failed or not finite are listed
  and are in no mean. A directory may be a run's, a sweep's, or any that has runs below it.

examples:
  tuning compare runs/*
  tuning compare sweeps/first --by=method --metric=eval/accuracy --out=report
  tuning compare runs/* --format=latex > table.tex

--out=DIR writes comparison.csv, .md, .tex and .html (one file, works without a network), runs.csv, and curves as PNG (with the extra
`report`). The runs' settings are in TensorBoard's HPARAMS tab without this command: tensorboard --logdir=runs
"""


def main(argv: list[str]) -> int:
    p = common.parser("compare", "Compare runs over their seeds.", EPILOG)
    p.add_argument("runs", nargs="+", metavar="DIR", help="runs, or directories that hold some")
    p.add_argument("--by", default="", metavar="KEY", help="a config key or section: compare the best settings of each of its values")
    p.add_argument("--metric", default="eval/loss", help="what is compared (default: eval/loss)")
    p.add_argument("--goal", default="", choices=("min", "max"), help="which way is better; known for losses, accuracy and F1")
    p.add_argument("--at", default="last", choices=("last", "best"), help="which value of a run counts (default: last)")
    p.add_argument(
        "--against", default="", metavar="ROW", help="the row that others are tested against, as 'method=lora, rank=8' (default: the best)"
    )
    p.add_argument("--format", default="table", choices=("table", "csv", "markdown", "latex"), help="of what is printed (default: table)")
    p.add_argument("--out", metavar="DIR", help="where to write files")
    args = p.parse_args(argv)
    from tuning.sweep import compare, tables
    from tuning.sweep import runs as records

    found, without = records.find(args.runs)
    c = compare.compare(found, metric=args.metric, goal=args.goal, at=args.at, by=args.by, against=args.against)
    if args.format == "table":
        show(c, without)
    else:
        print({"csv": tables.csv, "markdown": tables.markdown, "latex": tables.latex}[args.format](c), end="")
    if args.out:
        write(c, Path(args.out), f"{c.metric} of {len(found)} runs" + (f", by {c.by}" if c.by else ""))
    return 0


def show(c, without: list[Path]) -> None:
    """The tables on the terminal."""
    from rich.table import Table
    from rich.text import Text

    from tuning.sweep import tables
    from tuning.training.progress import console

    for table in map(narrow, tables.tables(c)):
        drawn = Table(title=table.title, title_justify="left", title_style="bold")
        for i, name in enumerate(table.header):
            drawn.add_column(name, justify="left" if i < table.words else "right", no_wrap=i >= table.words, overflow="fold")
        for row in table.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
    for note in [*tables.notes(c), *(f"No run in {path}." for path in without)]:
        console.print(note, markup=False)


def narrow(table):
    """The table with all settings in one column, where there are more of them than a terminal has room for."""
    from tuning.sweep import tables

    n, names = table.words, table.header
    if n <= COLUMNS:
        return table
    together = lambda row: ", ".join(f"{names[i]}={row[i]}" for i in range(n) if row[i] != tables.NONE)  # noqa: E731
    rows = [[together(row), *row[n:]] for row in table.rows]
    return dataclasses.replace(table, header=["settings", *table.header[n:]], rows=rows, words=1)


def write(c, out: Path, title: str) -> None:
    """All files of a comparison."""
    from tuning.sweep import curves, page, tables
    from tuning.training.progress import console

    out.mkdir(parents=True, exist_ok=True)
    texts = {"comparison.csv": tables.csv, "runs.csv": tables.runs_csv, "comparison.md": tables.markdown, "comparison.tex": tables.latex}
    files = {name: make(c) for name, make in texts.items()} | {"comparison.html": page.page(c, title)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    if curves.drawable():
        there = {name for run in c.runs for name in run.metrics}
        for metric in [name for name in dict.fromkeys([c.metric, "train/loss"]) if name in there]:
            name = f"{metric.replace('/', '_')}.png"
            curves.png(c, metric, out / name)
            files[name] = ""
    else:
        console.print("No PNG of the curves: matplotlib is not installed (pip install 'tuning[report]').", markup=False)
    console.print(f"Written to {out}: {', '.join(files)}.", markup=False)
