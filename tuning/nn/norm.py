"""Normalisation of activations, computed in float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.nn.sites import along_last

# rms: x / rms(x) * scale (Zhang and Sennrich, 2019, arXiv:1910.07467). rms_plus_one: the same, with 1 + scale (Gemma).
# layer: (x - mean) / deviation * scale + bias (Ba et al., 2016, arXiv:1607.06450). layer_unbiased: the same without a bias.
NORMS = ("rms", "rms_plus_one", "layer", "layer_unbiased")


class Norm(nnx.Module):
    """One of NORMS over the last axis."""

    def __init__(self, kind: str, size: int, eps: float):
        start = jnp.zeros(size) if kind == "rms_plus_one" else jnp.ones(size)
        self.scale = nnx.Param(start, out_sharding=("norm",))
        self.bias = nnx.Param(jnp.zeros(size), out_sharding=("norm",)) if kind == "layer" else None
        self.kind, self.eps = kind, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        # Made again in the backward pass: cheaper than keeping what lies between.
        return jax.checkpoint(functools.partial(normalise, self.kind, self.eps), prevent_cse=False)(x, *self.weights)

    @property
    def weights(self) -> tuple[jax.Array, jax.Array | None]:
        return self.scale[...], None if self.bias is None else self.bias[...]


def normalise(kind: str, eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x [..., D] normalised over its last axis, in x's dtype."""
    y = x.astype(jnp.float32)
    if kind.startswith("layer"):
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    if kind == "rms":
        return along_last(scale, x) * y.astype(x.dtype)
    factor = along_last(scale, y)  # in float32 before 1 is added: a scale may be kept in bfloat16
    y = y * (factor + 1 if kind == "rms_plus_one" else factor)
    return (y if bias is None else y + along_last(bias, y)).astype(x.dtype)
