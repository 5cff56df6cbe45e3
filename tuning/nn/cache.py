"""The key-value cache of generation.

Shapes: L layers that are stacked, B sequences, S cache slots or tokens of an encoder, K key-value heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of what was read so far.

    layers     {layers of the stack, by name: (keys, values), each [L, B, S, K, H]}
    segments   [B, S] int32, 0 where a slot holds padding or nothing yet
    positions  [B, S] int32
    length     int32 scalar, slots in use
    memory     the same as `layers` for what cross attention looks at; None without an encoder
    memory_segments  [B, S] int32, or None
    """

    layers: dict[str, tuple[Any, Any]]
    segments: Any
    positions: Any
    length: Any
    memory: dict[str, tuple[Any, Any]] | None = None
    memory_segments: Any = None

    def extend(self, segments_BT: jax.Array, positions_BT: jax.Array) -> Cache:
        """Notes what the next T slots hold; the layers then write their keys and values there."""
        put = lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (0, self.length))  # noqa: E731
        return dataclasses.replace(self, segments=put(self.segments, segments_BT), positions=put(self.positions, positions_BT))

    def advance(self, layers: dict[str, tuple[Any, Any]], count: int) -> Cache:
        """The cache after `count` more slots were written."""
        return dataclasses.replace(self, layers=layers, length=self.length + count)


def write(whole: jax.Array, part_BTKH: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """The stacked cache with one layer's new slots, written in place when the buffer is donated or carried."""
    return jax.lax.dynamic_update_slice(whole, part_BTKH[None].astype(whole.dtype), (layer, 0, at, 0, 0))


def empty(layers: dict[str, range], batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> Cache:
    """A cache with nothing in it."""
    shape = (batch, slots, kv_heads, head_dim)
    pairs = {name: (jnp.zeros((len(span), *shape), dtype), jnp.zeros((len(span), *shape), dtype)) for name, span in layers.items()}
    marks = jnp.zeros((batch, slots), jnp.int32)
    return Cache(pairs, marks, marks, jnp.int32(0))
