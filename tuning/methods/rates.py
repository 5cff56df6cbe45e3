"""Learning rates by rule: discriminative fine-tuning (Howard and Ruder, 2018, arXiv:1801.06146) by the names of leaves."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from tuning.core import parts
from tuning.core.parts import Part
from tuning.methods.method import Method
from tuning.nn.sites import Outline


def rated(part: Part) -> Part:
    """The method with a further key, `rates`: `regex=factor`, as in ("^head/=10", "/adapter/b$=16"), multiplies the learning rate of the
    leaves so named; the first match counts. ValueError for what has another form."""

    @functools.wraps(part)
    def method(outline: Outline, *, rates: tuple[str, ...] = (), **settings: Any) -> Method:
        made = part(outline, **settings)
        return dataclasses.replace(made, rates=tuple(map(_rule, rates)), loose=(*made.loose, "rates"))

    return parts.extended(part, method, "rates", "tuple[str, ...]")


def _rule(entry: str) -> tuple[str, float]:
    pattern, _, text = entry.rpartition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not pattern or not 0 < factor < math.inf:
        raise ValueError(f"method.rates: {entry!r} is not a regular expression and a positive factor; write for example '^head/=10'.")
    return pattern, factor
