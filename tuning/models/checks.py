"""What the configs of all networks are checked for when they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tuning.nn.stack import REMAT

COMPUTES = {"dtype": ("float32", "bfloat16"), "precision": ("highest", "default"), "remat": tuple(REMAT)}


def check(config: Any, sizes: Sequence[str], choices: Mapping[str, Sequence[str]]) -> None:
    """ValueError for a size below 1, for a value that is none of its choices (or of COMPUTES), and for added tokens beyond a gap."""
    if low := [f"{name}={getattr(config, name)}" for name in sizes if getattr(config, name) < 1]:
        raise ValueError(f"A network's sizes are positive; {', '.join(low)}.")
    for name, known in {**COMPUTES, **choices}.items():
        if getattr(config, name) not in known:
            named = ", ".join(value or "''" for value in known)
            raise ValueError(f"model.{name}={getattr(config, name)!r} is not one of {named}.")
    if config.added[1] and config.added[0] > config.vocab_size:
        raise ValueError(f"added={config.added} leaves a gap behind the {config.vocab_size} rows of the table.")
