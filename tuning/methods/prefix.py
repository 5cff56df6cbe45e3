"""Prefix tuning: keys and values that stand before the sequence in every layer (Li and Liang, 2021, arXiv:2101.00190).

Shapes: n prefix positions, K key-value heads, H head width.
"""

from __future__ import annotations

import jax
from flax import nnx

from tuning.methods.method import Method, added
from tuning.nn.sites import Outline, Site, Sites


class Prefix(nnx.Module):
    """Keys and values of one layer; they are not rotated."""

    def __init__(self, site: Site, length: int, scale: float, rngs: nnx.Rngs):
        make = lambda: jax.random.normal(rngs.params(), (length, *site.shape)) * scale  # noqa: E731
        self.keys = nnx.Param(make(), out_sharding=(None, *site.axes))
        self.values = nnx.Param(make(), out_sharding=(None, *site.axes))

    def __call__(self) -> tuple[jax.Array, jax.Array]:
        return self.keys[...], self.values[...]


def prefix(outline: Outline, *, length: int = 10, scale: float = 0.02) -> Method:
    """A prefix of `length` keys and values in each layer, which learns; nothing else does. Tokens take the positions after it.
    The paper has 10 of them for texts from tables, 200 for summaries.

    scale  standard deviation of its start. The paper reads the prefix out of a larger network while training, which PEFT leaves out by
           default; here it is learned as it is.
    """
    if length < 1:
        raise ValueError(f"method.length={length}: a prefix has at least one position.")
    if not outline.memories:
        raise ValueError(
            "Prefix tuning needs attention whose positions are rotary or learned; this model's has none, or a bias by distance."
        )
    memory = lambda site, rngs: Prefix(site, length, scale, rngs)  # noqa: E731
    return Method(tuned=added, sites=Sites(memory=memory, offset=length), fold=None, loose=("scale",))
