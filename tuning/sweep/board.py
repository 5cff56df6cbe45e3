"""What a person sees while a sweep goes on: a table that is drawn anew on a terminal, a line for each change in a log file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.live import Live
from rich.table import Table

from tuning.sweep import states
from tuning.sweep.states import State
from tuning.training import workdir
from tuning.training.progress import console

ROWS = 20
TAIL = 4096  # bytes; a line of metrics has a few hundred


class Board:
    """Shows how the runs of a sweep stand; `say` gets the lines where there is no terminal."""

    def __init__(self, directory: Path, say: Callable[[str], None]):
        self._directory, self._say, self._before = directory, say, {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, standing: Mapping[str, State]) -> None:
        if self._live:
            self._live.update(self._table(standing), refresh=True)
            return
        counts = self._counts(standing)
        for name, state in standing.items():
            if state.state != self._before.get(name, states.WAITING):
                self._say(f"{state.state:<8}{name}  {outcome(state)}  ({counts})")
        self._before = {name: state.state for name, state in standing.items()}

    def _counts(self, standing: Mapping[str, State]) -> str:
        every = [state.state for state in standing.values()]
        return ", ".join(f"{every.count(state)} {state}" for state in states.STATES if state in every)

    def _table(self, standing: Mapping[str, State]) -> Table:
        """Those that are running and those that ended last, as many as a screen holds."""
        table = Table("run", "state", "worker", "step", "", title=self._counts(standing))
        ended = sorted((name for name in standing if standing[name].ended), key=lambda name: standing[name].ended or 0)
        running = [name for name, state in standing.items() if state.state == states.RUNNING]
        shown = {name: None for name in (*ended[-max(ROWS - len(running), 0) :], *running)}
        for name in list(shown)[-ROWS:]:
            state = standing[name]
            on = state.state == states.RUNNING
            table.add_row(name, state.state, state.worker, progress(self._directory, name) if on else "", "" if on else outcome(state))
        return table


def outcome(state: State) -> str:
    """What came of a run: its error, or its losses."""
    losses = (f"{name} {value:.4f}" for name, value in state.final.items() if name in ("train/loss", "eval/loss") and value is not None)
    return state.error or ", ".join(losses)


def progress(directory: Path, name: str) -> str:
    """`step/steps` of a run, out of its last line of metrics."""
    run = directory / "runs" / name
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
            line = file.read().splitlines()[-1]
        return f"{json.loads(line)['step']}/{workdir.read_config(run)['train']['steps']}"
    except (OSError, ValueError, IndexError):
        return "0"  # not begun, or in the middle of a line
