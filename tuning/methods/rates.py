"""Learning rates by rule: discriminative fine-tuning (Howard and Ruder, 2018, arXiv:1801.06146) by the names of leaves."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from tuning.core import parts, tree
from tuning.core.parts import Part
from tuning.methods.method import Method, Pace
from tuning.nn.sites import Outline


def rated(part: Part) -> Part:
    """The method with a further key, `rates`: `regex=factor`, as in ("^head/=10", "/adapter/b$=16"), multiplies the learning rate of the
    leaves so named; the first match counts. Whether each names a leaf that learns, build.model checks."""

    @functools.wraps(part)
    def method(outline: Outline, *, rates: tuple[str, ...] = (), **settings: Any) -> Method:
        made, factors = part(outline, **settings), dict(map(_factor, rates))

        def pace(name: str) -> Pace:
            own, factor = made.pace(name), next((factor for pattern, factor in factors.items() if tree.matches(pattern, name)), 1.0)
            rate = tuple(factor * rate for rate in own.rate) if isinstance(own.rate, tuple) else factor * own.rate
            return own._replace(rate=rate)

        return dataclasses.replace(made, pace=pace, rated=tuple(factors), loose=(*made.loose, "rates"))

    return parts.extended(part, method, "rates", "tuple[str, ...]")


def _factor(entry: str) -> tuple[str, float]:
    pattern, _, text = entry.rpartition("=")
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not pattern or not 0 < factor < math.inf:
        raise ValueError(f"method.rates: {entry!r} is not a regular expression and a positive factor; write for example '^head/=10'.")
    return pattern, factor
