"""A run's directory: config.json, provenance.json, metrics.jsonl, tensorboard/, checkpoints/, exports/. It holds one run only."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tuning.core import config as configs

# Keys that a run may change when it goes on.
FREE = ("train.steps", "eval", "checkpoint", "log")


def is_run(path: Path) -> bool:
    """Whether a directory is a run's (a published checkpoint has a config.json too)."""
    return (path / "provenance.json").is_file()


def read_config(path: Path) -> dict[str, Any]:
    """The resolved config of the run in this directory."""
    return json.loads((path / "config.json").read_text())


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a crash leaves the old file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def check_data(path: Path, digests: Mapping[str, str]) -> None:
    """ValueError if a data file is not the one that the run in this directory began with."""
    before = json.loads((path / "provenance.json").read_text())["data"]
    if changed := [name for name, digest in digests.items() if before.get(name) not in (None, digest)]:
        raise ValueError(
            f"data.{changed[0]} has changed since {path} began (its SHA-256 was {before[changed[0]][:12]}, it is "
            f"{digests[changed[0]][:12]}), so the run cannot go on as the same one. Restore the file, or choose another --workdir."
        )


def claim(path: Path, config: Mapping[str, Any]) -> IO[str]:
    """Makes the directory this run's own; the returned file holds the lock as long as it is open.

    ValueError if another config's run lives there (names the first difference), or if another process is running in it.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        raise ValueError(
            f"{path} is in use by another run (process {lock.read().strip() or 'unknown'}). Choose another --workdir."
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    difference = configs.first_difference(config, read_config(path), FREE) if (path / "config.json").exists() else ""
    if difference:
        lock.close()
        raise ValueError(
            f"{path} holds another run: {difference}. Choose another --workdir, or remove that one. "
            f"(Only {', '.join(FREE)} may change when a run goes on.)"
        )
    return lock
