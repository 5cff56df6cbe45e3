"""P-tuning: a prompt that a small network says while training (Liu et al., 2021, arXiv:2103.10385).

Shapes: B sequences, T tokens, n prompt positions, D width, M width of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods import prompt
from tuning.methods.method import Method
from tuning.nn.linear import fan_in
from tuning.nn.sites import Outline, Site, Sites, along_last
from tuning.nn.weight import matmul

PREFIX = "embed/adapter/"


class Encoder(nnx.Module):
    """Three projections with ReLUs between them, over a table of n rows; as PEFT has it; the paper's reads the table with an LSTM."""

    def __init__(self, site: Site, length: int, hidden: int, rngs: nnx.Rngs):
        D = site.shape[1]
        self.table = nnx.Param(jax.random.normal(rngs.params(), (length, D)), out_sharding=(None, "embed"))
        for i, (into, out) in enumerate(((D, hidden), (hidden, hidden), (hidden, D))):
            setattr(self, f"kernel_{i}", nnx.Param(fan_in(rngs.params(), (into, out)), out_sharding=(None, None)))
            setattr(self, f"bias_{i}", nnx.Param(jnp.zeros(out), out_sharding=(None,)))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None, lookup: Callable[[jax.Array], jax.Array]) -> jax.Array:
        leaves = {name: getattr(self, name)[...] for name in NAMES}
        return prompt.put(said(leaves), tokens_BT, positions_BT, lookup)

    def output(self, x_MD: jax.Array, project: Callable[[jax.Array], jax.Array], key: jax.Array | None) -> jax.Array:
        return project(x_MD)


NAMES = ("table", *(f"{part}_{i}" for i in range(3) for part in ("kernel", "bias")))


def said(leaves: dict[str, Any]) -> jax.Array:
    """The prompt [n, D] that the network says."""
    x = leaves["table"]
    for i in range(3):
        x = matmul(jax.nn.relu(x) if i else x, leaves[f"kernel_{i}"])
        x = x + along_last(leaves[f"bias_{i}"], x)
    return x


def p_tuning(outline: Outline, *, length: int = 9, hidden: int = 0) -> Method:
    """A prompt of `length` vectors out of a network of width `hidden` (0: the model's width), which learns; nothing else does.

    By default as many as the paper has around subject and object, three times three. Once trained, the prompt alone is needed.
    """
    prompt.check(outline, length)

    def bare(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        network = {name: leaves.pop(PREFIX + name) for name in NAMES}
        return tree.unflatten({**leaves, prompt.LEAF: said(network)})

    embed = lambda site, rngs: Encoder(site, length, hidden or site.shape[1], rngs)  # noqa: E731
    return Method(tuned=lambda name: name.startswith(PREFIX), sites=Sites(embed=embed), bare=bare, fold=None, slots=length)
