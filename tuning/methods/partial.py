"""Partial tuning: some leaves learn, the others stay as they are.

Biases alone are BitFit (Ben Zaken et al., 2022, arXiv:2106.10199): leaves="bias$". The head alone: leaves="^head/".
"""

from __future__ import annotations

from tuning.core import tree
from tuning.methods.method import Method
from tuning.nn.sites import Outline
from tuning.nn.stack import counted_layers


def partial(outline: Outline, *, leaves: str = "", last_layers: int = 0) -> Method:
    """The leaves whose name the regular expression `leaves` matches, and all leaves of the last `last_layers` layers.

    Layers below the first one that learns cost no backward pass: the stack is cut there.
    """
    if not 0 <= last_layers <= outline.layers:
        raise ValueError(f"method.last_layers={last_layers}: the model has {outline.layers} layers.")
    if not leaves and not last_layers:
        raise ValueError("Partial tuning of nothing: set method.leaves (a regular expression) or method.last_layers.")
    if leaves and not any(tree.matches(leaves, name) for name in outline.leaves):
        hint = " This model's head is tied to embed/table." if leaves.startswith("^head") else ""
        raise ValueError(f"method.leaves={leaves!r} matches no leaf.{hint} There are: {tree.listing(outline.leaves, 40)}.")
    first = outline.layers - last_layers

    def tuned(name: str) -> bool:
        span = counted_layers(name)
        return bool(leaves and tree.matches(leaves, name)) or (last_layers > 0 and span is not None and span.start >= first)

    return Method(tuned=tuned, cuts=(first,) if last_layers else ())
