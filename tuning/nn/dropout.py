"""Dropout (Srivastava et al., 2014, JMLR 15): zeroes a share of the activations while training, and scales the others up."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x itself without a key, which is how a model is used outside training."""
    if not rate or key is None:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
