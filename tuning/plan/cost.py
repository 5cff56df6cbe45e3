"""What a step of a run computes, and what its devices can compute at most."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax.sharding import Mesh

from tuning import build
from tuning.core import tree
from tuning.methods.method import added
from tuning.training import flops


def flops_per_token(parts: build.Parts, full: bool = False) -> float:
    """Model FLOPs of one trained token, attention counted over whole rows; `full` gives those of full tuning."""
    m, through = parts.model, passes(parts)
    shapes = {name: leaf.shape for name, leaf in tree.flatten(m.layout).items()}
    lengths = [length for length in (parts.train.length, parts.train.input_length) if length]
    attention = m.source.config.attention_flops(*lengths)
    of_base = functools.partial(flops.flops_per_token, {n: x for n, x in shapes.items() if not added(n)})
    if full:
        return of_base(lambda name: True, attention, through)
    compared = of_base(lambda name: False, attention, through) if parts.base else 0.0
    return flops.flops_per_token(shapes, m.tuned, attention, through) + compared


def passes(parts: build.Parts) -> Callable[[str], float]:
    """How many times a token passes through the leaf of a name; see flops.flops_per_token."""
    m = parts.model
    shapes = {name: leaf.shape for name, leaf in tree.flatten(m.layout).items()}

    def through(name: str) -> float:
        if tree.matches(flops.INPUTS, name):
            inputs, tokens = (
                sum(share * getattr(rows.report, key) / len(rows) for _, rows, share in parts.sources) for key in ("input_tokens", "tokens")
            )
            return inputs / tokens
        routed = name.endswith("kernel") and len(shapes[name]) == 4
        return m.source.config.per_token / m.source.config.experts if routed else 1.0

    return through


def peak_flops(where: Mesh) -> float | None:
    """bf16 peak of all devices of the mesh, FLOP/s; None where it is not known."""
    one = flops.peak_flops(where.devices.flat[0])
    return None if one is None else one * where.size
