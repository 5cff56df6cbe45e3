"""What a person sees while a run goes on: a progress bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# In a log file, where nobody knows the width, tables are as wide as they need to be.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
SECONDS_BETWEEN_LINES = 20.0


class Display:
    """A bar over `total` steps, `done` of which are behind us. Silent where `show` is False (all processes but the first)."""

    def __init__(self, title: str, total: int, done: int, show: bool):
        self._title, self._total, self._show = title, total, show
        self._live = show and console.is_terminal
        self._last = time.monotonic()
        if self._live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar: Any = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(title, total=total, completed=done, note="compiling")

    def __enter__(self) -> Display:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._bar.stop()

    def advance(self, step: int) -> None:
        if self._live:
            self._bar.update(self._task, completed=step)

    def note(self, step: int, values: dict[str, float]) -> None:
        """Shows the latest measures; in a log file a line every SECONDS_BETWEEN_LINES, and one at the end."""
        parts = [f"loss {values['train/loss']:.4f}", f"{values.get('time/tokens_per_second', 0):,.0f} tok/s"]
        if "time/mfu" in values:
            parts.append(f"MFU {values['time/mfu']:.1%}")
        text = "  ".join(parts)
        if self._live:
            self._bar.update(self._task, completed=step, note=text)
        elif self._show and (step == self._total or time.monotonic() - self._last > SECONDS_BETWEEN_LINES):
            self._last = time.monotonic()
            left = values.get("time/seconds_left", 0.0)
            console.print(f"{self._title} {step}/{self._total}  {text}  {left:.0f} s left")

    def say(self, text: str) -> None:
        if self._show:
            console.print(text)


class Voice(Display):
    """One of several runs that share a display: what it says bears its name, and the bar shows the first of them that still goes on."""

    def __init__(self, shared: Display, name: str):
        self._shared, self._name = shared, name

    def advance(self, step: int) -> None:
        self._shared.advance(step)

    def note(self, step: int, values: dict[str, float]) -> None:
        self._shared.note(step, values)

    def say(self, text: str) -> None:
        self._shared.say(f"{self._name}: {text}")
