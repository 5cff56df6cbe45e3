"""How positions enter attention other than by rotation: as a bias on its scores.

Shapes: B sequences, T queries, S keys, N heads, P buckets.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tuning.nn.linear import small


class RelativeBias(nnx.Module):
    """A learned number for each head and bucket of distances, shared by all layers of a stack (Raffel et al., 2020, arXiv:1910.10683).

    causal  all buckets are for what lies before; otherwise half of them are for what follows
    """

    def __init__(self, buckets: int, longest: int, heads: int, causal: bool, rngs: nnx.Rngs):
        exact = (buckets if causal else buckets // 2) // 2
        if not 0 < exact < longest:
            raise ValueError(
                f"A relative bias of {buckets} buckets has {exact} for single distances: there must be one, and longest={longest} lie "
                "beyond them. Set relative to more buckets, or to a longer distance."
            )
        self.table = nnx.Param(small(rngs.params(), (buckets, heads)), out_sharding=(None, "heads"))
        self.buckets, self.longest, self.causal = buckets, longest, causal

    def __call__(self, distance_TS: jax.Array) -> jax.Array:
        """[N, T, S] float32; a distance is the query's place less the key's.

        Chosen bucket by bucket, which compilers fuse: rows of heads that are looked up for T S distances are filled up to 128 on a TPU.
        """
        bucket_TS = self.bucket(distance_TS)
        chosen = (jnp.where(bucket_TS == p, own_N[:, None, None], 0) for p, own_N in enumerate(self.table[...].astype(jnp.float32)))
        return functools.reduce(jnp.add, chosen)

    def bucket(self, distance: jax.Array) -> jax.Array:
        """One bucket for each short distance; those beyond are logarithmic, and the last one takes all from `longest` on."""
        count = self.buckets if self.causal else self.buckets // 2
        exact = count // 2
        away = np.arange(self.longest + 1)
        # Every step rounded to float32: where two buckets meet, a rounding decides. The logarithms of numpy and torch for float32 are not
        # exact, and differ by processor.
        share = np.maximum(away, 1).astype(np.float32) / np.float32(exact)
        far = np.log(share.astype(np.float64)).astype(np.float32) / np.float32(math.log(self.longest / exact)) * np.float32(count - exact)
        table = np.where(away < exact, away, np.minimum(exact + far.astype(np.int32), count - 1))
        back = jnp.maximum(distance, 0) if self.causal else jnp.abs(distance)
        side = 0 if self.causal else jnp.where(distance < 0, count, 0)
        return side + jnp.asarray(table, jnp.int32)[jnp.minimum(back, self.longest)]


def alibi(heads: int, distance_TS: jax.Array) -> jax.Array:
    """[N, T, S] float32: a head's slope times the distance, negative (Press et al., 2021, arXiv:2108.12409)."""
    return distance_TS.astype(jnp.float32)[None] * -slopes(heads).reshape(-1, 1, 1)


def alibi_of_keys(heads: int, positions_BS: jax.Array) -> jax.Array:
    """[B, N, 1, S] float32: a head's slope times the key's position, slope, position and product rounded to bfloat16.

    But for the rounding, which depends on the position, the softmax makes the same of it as of `alibi`.
    """
    rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)  # a cast there and back may be optimised away
    return rounded(rounded(slopes(heads)).reshape(1, -1, 1, 1) * rounded(positions_BS.astype(jnp.float32))[:, None, None])


def slopes(heads: int) -> np.ndarray:
    """[N] float32: ALiBi's slopes, which fall geometrically; where heads are no power of two, some lie between."""
    whole = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2.0 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return np.array([*first, *between], np.float32)
