"""Normalisation of activations, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.nn.sites import along_last


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size), out_sharding=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        def normed(x, scale):
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
            return along_last(scale, x) * y.astype(x.dtype)

        # Made again in the backward pass: cheaper than keeping what lies between.
        return jax.checkpoint(normed, prevent_cse=False)(x, self.scale[...])
