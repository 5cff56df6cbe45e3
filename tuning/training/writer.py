"""What a run reports: metrics.jsonl, one line per step that is written, and the same numbers as TensorBoard events or elsewhere.

A line is `{"step": 40, "loss": 1.25, ...}`: plain floats, and null for a value that is not finite, since JSON has no NaN. Names that
start with `time/` or `memory/` vary from run to run; all others are the same whenever the run is the same.

The run's config goes to TensorBoard's HPARAMS tab from here, not from a comparison afterwards: then the tab shows any runs, also while they
go on, and by itself those keys first that differ among them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tuning.core import config as configs
from tuning.training import sinks

METRICS, TEXTS, SINKS = "metrics.jsonl", "texts.jsonl", "sinks.json"
VOLATILE = ("time/", "memory/")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """config.log.

    to  where metrics go besides metrics.jsonl: tensorboard, wandb (Weights & Biases), mlflow; the last two are extras of these names
    """

    to: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self):
        known = ("tensorboard", *sinks.SINKS)
        if wrong := [name for name in self.to if name not in known]:
            raise ValueError(f"log.to has {wrong[0]!r}, which is not one of {', '.join(known)}.")
        if missing := [name for name in self.to if name in sinks.SINKS and importlib.util.find_spec(name) is None]:
            raise ValueError(
                f"log.to has {missing[0]!r}, which is not installed. It comes with an extra: pip install 'tuning[{missing[0]}]'."
            )


class Writer:
    """Writes into a run's directory, from the first process only; on the others every method does nothing.

    after   the step that a resumed run starts from (-1 for a run that starts over): later lines are removed and later TensorBoard events
            hidden. None keeps everything.
    to      names of sinks, as config.log has them
    config  what TensorBoard's HPARAMS tab and the sinks show as this run's settings
    As a context it knows at its end whether the run came to its own.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        after: int | None = None,
        to: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
    ):
        self._metrics = self._texts = None
        self._sinks: list[sinks.Sink] = []
        if jax.process_index() != 0:
            return
        root = pathlib.Path(workdir)
        root.mkdir(parents=True, exist_ok=True)
        cut(root, after)
        self._metrics, self._texts = (open(root / name, "a", encoding="utf-8") for name in (METRICS, TEXTS))  # noqa: SIM115
        known = json.loads((root / SINKS).read_text()) if after != -1 and (root / SINKS).exists() else {}
        if "tensorboard" in to:
            self._sinks.append(TensorBoard(root / "tensorboard", config or {}, after))
        started = {name: sinks.SINKS[name](root, config or {}, known.get(name)) for name in to if name != "tensorboard"}
        self._sinks += started.values()
        if started:
            (root / SINKS).write_text(json.dumps({**known, **{name: sink.identity for name, sink in started.items()}}))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close(done=kind is None)

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
        for sink in self._sinks:
            sink.write(int(step), values)

    def text(self, step: int, name: str, text: str) -> None:
        """A text, a generated sample say: a line of texts.jsonl and an event."""
        if self._texts is None:
            return
        self._texts.write(json.dumps({"step": int(step), "name": name, "text": text}, ensure_ascii=False) + "\n")
        self._texts.flush()
        for sink in self._sinks:
            sink.text(int(step), name, text)

    def close(self, done: bool = False) -> None:
        for file in (self._metrics, self._texts):
            if file is not None:
                file.close()
        for sink in self._sinks:
            sink.close(done)
        self._metrics = self._texts = None
        self._sinks = []


class TensorBoard:
    """Events in a folder of the run, among them its config as a session of the HPARAMS tab."""

    identity = ""

    def __init__(self, folder: pathlib.Path, config: Mapping[str, Any], after: int | None):
        from tensorboardX import SummaryWriter
        from tensorboardX.summary import hparams

        again = after is not None and folder.exists()
        self._events = SummaryWriter(str(folder), purge_step=after + 1 if again and after is not None else None)
        # Without a list of columns (the first of the three) the tab makes one of all sessions, what differs among them first.
        _, begin, self._end = hparams({key: _plain(value) for key, value in configs.flat(config).items()}, {})
        self._file: Any = self._events.file_writer
        self._shown = bool(config)
        if self._shown:
            self._file.add_summary(begin)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._events.add_text(name, text, step)

    def close(self, done: bool) -> None:
        # Of several ends the tab reads the first, so a run that will go on has none.
        if self._shown and done:
            self._file.add_summary(self._end)
        self._events.close()


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


def _plain(value: Any) -> Any:
    """What the HPARAMS tab can show: numbers, texts and booleans; lists as text."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if value is None or (isinstance(value, (bool, int, float, str)) and finite) else str(value)


def _step(path: pathlib.Path, number: int, line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}, line {number} is not a line of metrics: {line.strip()[:80]!r}. Repair or remove it.") from None
