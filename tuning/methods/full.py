"""Full tuning: every leaf learns."""

from __future__ import annotations

from tuning.methods.method import Method
from tuning.nn.sites import Outline


def full(outline: Outline) -> Method:
    """Nothing is added and nothing is frozen; there is nothing to set."""
    return Method(tuned=lambda name: True)
