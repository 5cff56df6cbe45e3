"""Projections and the token embedding.

Shapes: B sequences, T tokens, D width, V vocabulary, N added tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import mesh
from tuning.nn.sites import Project, Site, Sites

fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
small = nnx.initializers.normal(0.02)


class Linear(nnx.Module):
    """x W + b with W [in, out], stored in any way; or what the method answers in its place."""

    def __init__(self, site: Site, sites: Sites, rngs: nnx.Rngs, *, bias: bool = False):
        self.kernel = nnx.Param(fan_in(rngs.params(), site.shape), out_sharding=site.axes)
        self.bias = nnx.Param(jnp.zeros(site.shape[1]), out_sharding=site.axes[1:]) if bias else None
        self.adapter, self.axes = sites.weight(site, rngs), site.axes

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        project = Project(self.kernel.get_value(), None if self.bias is None else self.bias[...], self.axes)
        return project(x) if self.adapter is None else self.adapter(x, project, key)


class Embedding(nnx.Module):
    """Token ids to vectors, or what the method answers. The rows of `added` tokens, which always learn, are a leaf of their own: ids
    [first, first + N)."""

    def __init__(self, vocab_size: int, width: int, sites: Sites, rngs: nnx.Rngs, *, added: tuple[int, int], scale: float = 1.0):
        site = Site("embed", (vocab_size, width), ("vocab", "embed"), scale=scale)
        self.table = nnx.Param(small(rngs.params(), site.shape), out_sharding=site.axes)
        self.adapter = sites.embed(site, rngs)
        self.scale, (self.first, count) = scale, added
        self.added = nnx.Param(jnp.zeros((count, width)), out_sharding=(None, "embed")) if count else None

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        lookup = lambda tokens: self._lookup(tokens, dtype) * jnp.asarray(self.scale, dtype)  # noqa: E731
        return lookup(tokens_BT) if self.adapter is None else self.adapter(tokens_BT, positions_BT, lookup)

    def _lookup(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        table_VD = self.table[...]
        x_BTD = jnp.take(table_VD, jnp.minimum(tokens_BT, table_VD.shape[0] - 1), axis=0).astype(dtype)
        if mesh.here().shape.get("expert", 1) == 1:
            # A device looks its columns up for all rows that share them, and they are dealt out. Left to itself, the compiler may send all
            # rows to all devices.
            x_BTD = mesh.constrain(x_BTD, "copies", "sequence", "embed")
        if self.added is None:
            return x_BTD
        added_ND = self.added[...].astype(dtype)
        slot_BT = tokens_BT - self.first
        ours_BT = (slot_BT >= 0) & (slot_BT < added_ND.shape[0])
        return jnp.where(ours_BT[..., None], jnp.take(added_ND, slot_BT.clip(0, added_ND.shape[0] - 1), axis=0), x_BTD)


class Table(nnx.Module):
    """Rows that are looked up and learned: positions, token types."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.table = nnx.Param(small(rngs.params(), (rows, width)), out_sharding=(None, "embed"))

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.table[...], ids_BT, axis=0).astype(dtype)
