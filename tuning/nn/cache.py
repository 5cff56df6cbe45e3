"""The key-value cache of generation.

Shapes: L layers of a segment, B sequences, S cache slots, K key-value heads, H head width.
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

    keys, values  {segment of the stack: [L, B, S, K, H]}
    segments      [B, S] int32, 0 where a slot holds padding or nothing yet
    positions     [B, S] int32
    length        int32 scalar, slots in use
    """

    keys: dict[str, Any]
    values: dict[str, Any]
    segments: Any
    positions: Any
    length: Any

    def extend(self, segments_BT: jax.Array, positions_BT: jax.Array) -> Cache:
        """Notes what the next T slots hold; the layers then write their keys and values there."""
        put = lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (0, self.length))  # noqa: E731
        return dataclasses.replace(self, segments=put(self.segments, segments_BT), positions=put(self.positions, positions_BT))


def write(whole: jax.Array, part_BTKH: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
    """The stacked cache with one layer's new slots, written in place when the buffer is donated or carried."""
    return jax.lax.dynamic_update_slice(whole, part_BTKH[None].astype(whole.dtype), (layer, 0, at, 0, 0))


def empty(layers: dict[str, int], batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> Cache:
    """A cache with nothing in it; `layers` gives the number of layers of each segment."""
    shape = (batch, slots, kv_heads, head_dim)
    zeros = lambda: {name: jnp.zeros((count, *shape), dtype) for name, count in layers.items()}  # noqa: E731
    marks = jnp.zeros((batch, slots), jnp.int32)
    return Cache(zeros(), zeros(), marks, marks, jnp.int32(0))
