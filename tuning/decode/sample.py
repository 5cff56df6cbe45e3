"""The next token from logits: temperature first, then top-k, then top-p, each over what the one before it has left.

The order is that of `transformers`. Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from tuning.core import keys


def check(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError for settings that no distribution has."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature} must be finite and not negative. Set 0 for greedy, 1 for the model's own odds.")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative. Set the number of tokens to choose from, or 0 for all.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]. Set the probability to choose from, or 1 for all.")


def token_keys(seed: int, positions_B: jax.Array) -> jax.Array:
    """A random key for each sequence's next token, [B], from (seed, sequence index, the token's position) alone; `seed` may be traced."""
    sequences_B = jnp.arange(positions_B.shape[0])
    return jax.vmap(lambda index, position: jax.random.fold_in(keys.at(seed, index, "decode"), position))(sequences_B, positions_B)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """-inf for all but the k highest logits (and those equal to the k-th); a k beyond the vocabulary keeps all."""
    kth_B1 = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """-inf outside the nucleus, the smallest set of tokens whose probability reaches p (Holtzman et al., 2020, arXiv:1904.09751).

    It takes the most probable tokens, at least one; among equals the lower id comes first.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probs_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.pad(jnp.cumsum(probs_BV[:, :-1], axis=-1), ((0, 0), (1, 0)))  # the probability of all that stand higher
    keep_BV = jnp.put_along_axis(jnp.zeros_like(order_BV, bool), order_BV, before_BV < p, axis=-1, inplace=False)
    return jnp.where(keep_BV, logits_BV, -jnp.inf)


def choose(logits_BV: jax.Array, keys_B: jax.Array, *, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """The next tokens, [B] int32, from float32 logits: the most probable ones at temperature 0, else drawn with one key each."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    if top_k:
        logits_BV = keep_top_k(logits_BV, top_k)
    if top_p < 1:
        logits_BV = keep_top_p(logits_BV, top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
