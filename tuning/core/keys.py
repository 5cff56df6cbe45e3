"""Random keys as a function of (seed, step, purpose): no key is carried in any state, so resuming costs nothing."""

from __future__ import annotations

import zlib

import jax


def fold(key: jax.Array | None, purpose: str) -> jax.Array | None:
    """A key for one purpose (the name of a site, say) out of a key for many. None, which means no randomness, stays None."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(purpose.encode()))


def at(seed: int | jax.Array, step: jax.Array | int, purpose: str) -> jax.Array:
    """The key of one step; both numbers may be traced."""
    key = fold(jax.random.key(seed), purpose)
    assert key is not None
    return jax.random.fold_in(key, step)
