"""What a runner is: a function that starts workers on a sweep's directory, here or elsewhere, and knows nothing else of the sweep.

    def somewhere(job: Job, *, partition: str = "", hours: int = 4) -> int

Its keyword-only parameters are its options (`--runner.partition=gpu` on the command line) and hold the only defaults. Every runner
starts one command, `Job.command`; which run a worker takes is settled in the sweep's directory (states.py). It returns an exit status: 0
where the workers are done or were handed over to whoever schedules them, 128 + n after signal n. A mistake in the options is a ValueError
before anything is started; a dry run comes first, with nobody listening, to find it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tuning.core import parts

Runner = Callable[..., int]


@dataclasses.dataclass(frozen=True)
class Job:
    """What a runner is asked for.

    directory  of the sweep, absolute; it exists unless this is a dry run
    workers    how many; each takes one run after the other until none waits
    say        shows a line of text
    dry_run    whether only to say, exactly, what would be executed and which files would be written; nothing is touched then
    """

    directory: Path
    workers: int
    say: Callable[[str], None]
    dry_run: bool = False

    def command(self, *flags: str, python: str = sys.executable) -> list[str]:
        """What a worker is: `tuning work DIR`, with flags such as --worker=ID, or --distributed for one of the processes of a pod."""
        return [python, "-m", "tuning", "work", str(self.directory), *flags]

    def log(self, worker: str) -> Path:
        """Where a worker's output belongs."""
        return self.directory / "workers" / f"{worker}.log"


def bound(table: Mapping[str, Runner], name: str, options: Mapping[str, str]) -> Callable[[Job], int]:
    """The runner of this name with its options, given as text. ValueError for one that it does not have, or of another type."""
    runner = parts.pick(table, name, "runner")
    settings = parts.complete(runner, {key: _value(runner, key, text) for key, text in options.items()}, "runner")
    if missing := [key for key, value in settings.items() if isinstance(value, parts.Required)]:
        raise ValueError(f"The runner {name} needs {' '.join(f'--runner.{key}=VALUE' for key in missing)}.")
    return functools.partial(runner, **settings)


def _value(runner: Runner, key: str, text: str) -> object:
    if key not in parts.schema(runner) or (kind := parts.kind(runner, key)) is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"--runner.{key}={text} is not of type {kind.__name__}.")
    return value
