"""Leaves of the base that learn beside what a method adds: PEFT's `modules_to_save`, by the names that leaves have here."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tuning.core import parts, tree
from tuning.core.parts import Part
from tuning.methods.method import Method, Pace, added
from tuning.nn.sites import Outline


def beside(part: Part) -> Part:
    """The method with a further key, `also`: regular expressions for names of leaves of the base, which learn as well."""

    @functools.wraps(part)
    def method(outline: Outline, *, also: tuple[str, ...] = (), **settings: Any) -> Method:
        made = part(outline, **settings)
        for pattern in also:
            if not any(tree.matches(pattern, name) for name in outline.leaves):
                raise ValueError(f"method.also: {pattern!r} matches no leaf. There are: {tree.listing(outline.leaves, 40)}.")
        chosen = lambda name: not added(name) and any(tree.matches(pattern, name) for pattern in also)  # noqa: E731
        return dataclasses.replace(
            made, tuned=lambda name: made.tuned(name) or chosen(name), pace=lambda name: Pace() if chosen(name) else made.pace(name)
        )

    return parts.extended(part, method, "also", "tuple[str, ...]")
