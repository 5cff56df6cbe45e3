"""What a run reports: metrics.jsonl, one line per step that is written, and the same numbers as TensorBoard events.

A line is `{"step": 40, "loss": 1.25, ...}`: plain floats, and null for a value that is not finite, since JSON has no NaN. Names that
start with `time/` or `memory/` vary from run to run; all others are the same whenever the run is the same.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

METRICS, TEXTS = "metrics.jsonl", "texts.jsonl"
VOLATILE = ("time/", "memory/")


class Writer:
    """Writes into a run's directory, from the first process only; on the others every method does nothing.

    after        the step that a resumed run starts from (-1 for a run that starts over): later lines are removed and later TensorBoard
                 events hidden. None keeps everything.
    tensorboard  whether to write events, into the directory's folder `tensorboard`
    """

    def __init__(self, workdir: str | os.PathLike[str], *, after: int | None = None, tensorboard: bool = True):
        self._metrics = self._texts = self._events = None
        if jax.process_index() != 0:
            return
        root = pathlib.Path(workdir)
        root.mkdir(parents=True, exist_ok=True)
        cut(root, after)
        self._metrics, self._texts = (open(root / name, "a", encoding="utf-8") for name in (METRICS, TEXTS))  # noqa: SIM115
        if tensorboard:
            from tensorboardX import SummaryWriter

            folder = root / "tensorboard"
            again = after is not None and folder.exists()
            self._events = SummaryWriter(str(folder), purge_step=after + 1 if again and after is not None else None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One line, on disk when this returns. ValueError for a metric that is called `step` or is not a number."""
        if self._metrics is None:
            return
        if "step" in metrics:
            raise ValueError("A metric may not be called 'step': every line has the step it belongs to under that name. Rename it.")
        values = {name: _number(name, value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.write(json.dumps({"step": int(step), **finite}) + "\n")
        self._metrics.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, int(step))

    def text(self, step: int, name: str, text: str) -> None:
        """A text, a generated sample say: a line of texts.jsonl and an event."""
        if self._texts is None:
            return
        self._texts.write(json.dumps({"step": int(step), "name": name, "text": text}, ensure_ascii=False) + "\n")
        self._texts.flush()
        if self._events is not None:
            self._events.add_text(name, text, int(step))

    def close(self) -> None:
        for sink in (self._metrics, self._texts, self._events):
            if sink is not None:
                sink.close()
        self._metrics = self._texts = self._events = None


def cut(workdir: str | os.PathLike[str], step: int | None) -> None:
    """Removes the lines after a step (None: no step), and a last line that a killed process left unfinished. All or nothing."""
    for path in (pathlib.Path(workdir) / name for name in (METRICS, TEXTS)):
        if not path.exists():
            continue
        before = path.read_text(encoding="utf-8", errors="replace")
        whole = before[: before.rfind("\n") + 1].splitlines(keepends=True)
        after = "".join(line for number, line in enumerate(whole, 1) if step is None or _step(path, number, line) <= step)
        if after != before:
            new = path.with_name(path.name + ".new")
            with new.open("w", encoding="utf-8") as file:
                file.write(after)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def comparable(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what varies between two runs that are the same."""
    return [{name: value for name, value in line.items() if not name.startswith(VOLATILE)} for line in read(path)]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"Metric {name}={value!r} is not a number. Text goes to Writer.text.") from None


def _step(path: pathlib.Path, number: int, line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}, line {number} is not a line of metrics: {line.strip()[:80]!r}. Repair or remove it.") from None
