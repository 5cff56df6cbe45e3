"""Trainable tokens: some rows of the embedding learn, and no others (as PEFT's `TrainableTokensConfig` has it).

Shapes: B sequences, T tokens, n rows that learn, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods.method import Method
from tuning.nn.sites import Outline, Site, Sites, along_last

LEAF = "embed/adapter/rows"


class Rows(nnx.Module):
    """The tokens `ids` get the rows, the others what the table has for them."""

    def __init__(self, site: Site, ids: tuple[int, ...]):
        self.rows = nnx.Param(jnp.zeros((len(ids), site.shape[1])), out_sharding=(None, "embed"))
        self.ids, self.scale = ids, site.scale

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None, lookup: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x_BTD = lookup(tokens_BT)
        same_BTn = tokens_BT[..., None] == jnp.array(self.ids).reshape(1, 1, -1)
        rows_BTD = jnp.take(self.rows[...].astype(x_BTD.dtype), same_BTn.argmax(-1), axis=0) * jnp.asarray(self.scale, x_BTD.dtype)
        return jnp.where(same_BTn.any(-1, keepdims=True), rows_BTD, x_BTD)

    def output(self, x_MD: jax.Array, project: Any, key: jax.Array | None) -> jax.Array:
        where, y = jnp.array(self.ids), project(x_MD)
        own = jnp.matmul(x_MD, self.rows[...].T.astype(x_MD.dtype), preferred_element_type=y.dtype)
        return y.at[:, where].set(own if project.bias is None else own + along_last(project.bias[where], own))


def tokens(outline: Outline, *, ids: tuple[int, ...] = ()) -> Method:
    """The rows of the tokens `ids` learn, in a tied output too; tokens that the model does not have yet are `model.added_tokens`."""
    if not outline.embeds:
        raise ValueError("This network offers no rows of an embedding.")
    rows = outline.embeds[0].shape[0]
    if not ids or len(set(ids)) < len(ids) or not all(0 <= i < rows for i in ids):
        raise ValueError(f"method.ids={tuple(ids)} are ids of tokens, each once, from 0 to {rows - 1}; at least one.")
    where = jnp.array(ids)

    def start(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        rows_nD = leaves["embed/table"][where].astype(leaves[LEAF].dtype)
        return tree.unflatten({**leaves, LEAF: jax.device_put(rows_nD, leaves[LEAF].sharding)})

    def fold(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        rows_nD, table_VD = leaves.pop(LEAF), leaves["embed/table"]
        return tree.unflatten({**leaves, "embed/table": table_VD.at[where].set(rows_nD.astype(table_VD.dtype))})

    embed = lambda site, rngs: Rows(site, tuple(ids))  # noqa: E731
    return Method(tuned=lambda name: name == LEAF, sites=Sites(embed=embed), start=start, fold=fold)
