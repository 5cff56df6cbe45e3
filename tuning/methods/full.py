"""Full tuning: every leaf learns."""

from __future__ import annotations

from tuning.methods.method import Method
from tuning.nn.sites import Outline


def full(outline: Outline) -> Method:
    return Method(tuned=lambda name: True)
