"""The attention layer: grouped queries, causal or two-sided, to its own sequence or to an encoder's.

Shapes: B sequences, T queries, S keys, D width, N query heads, K key-value heads, G query heads per key, H head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.nn import blockwise, kernels, rotary
from tuning.nn.blockwise import How, Marks
from tuning.nn.linear import Linear
from tuning.nn.norm import Norm
from tuning.nn.sites import Site, Sites

# store(k, v) of the new tokens -> (k, v) of all tokens that can be seen; writes into a cache on the way
Store = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
FUSED = ("", "parts", "groups")  # three kernels; one, its columns q | k | v; one, its columns [K, (G queries, k, v), H]
QK_NORMS = ("", "head", "whole")  # none, over each head, over all heads at once


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes and variations of an attention layer.

    bias, out_bias  on q, k and v; on the way out
    fused           one of FUSED
    qk_norm         one of QK_NORMS: RMSNorm of q and k before the rotation
    scale           of the products of queries and keys
    softcap         scores are cap * tanh(score / cap); 0 for none
    dropout         of the attention shares, while training
    precision       of float32 matmuls on GPU and TPU, "highest" or "default"
    form            how a whole sequence attends to itself, one of tuning.nn.kernels.MULTIPLES; all else is computed blockwise
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    out_bias: bool
    fused: str
    qk_norm: str
    norm: str
    eps: float
    scale: float
    softcap: float
    dropout: float
    precision: str
    form: str


@dataclasses.dataclass(frozen=True)
class Seen:
    """Who sees whom in one kind of layer, and how positions enter.

    queries, keys  where the tokens belong, [B, T] and [B, S]; S counts the keys of a prefix, which come first
    causal   a query sees no key with a later position
    window   nor one whose position is that far away, or farther; None for all
    own      the keys are those of the queries' tokens, in the same places
    bias     [N, T, S] float32, added to the scores, or [B, N, 1, S] where only the key matters, or None
    angles   (cos, sin) of the tokens' positions, or None without rotation
    """

    queries: Marks
    keys: Marks
    causal: bool = False
    window: int | None = None
    own: bool = False
    bias: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None


class Attention(nnx.Module):
    """role: its place in a layer, `attn` or `cross`; what cross attention looks at comes from an encoder."""

    def __init__(self, shape: Shape, role: str, layers: range, sites: Sites, rngs: nnx.Rngs):
        self.shape, self.role = shape, role
        D, query, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

        def make(name: str, size: int, axis: str) -> Linear:
            return Linear(Site(f"{role}/{name}", (D, size), ("embed", axis), layers), sites, rngs, bias=shape.bias)

        self.qkv = make("qkv", query + 2 * kv, "heads") if shape.fused else None
        self.q = None if shape.fused else make("q", query, "heads")
        self.k = None if shape.fused else make("k", kv, "kv_heads")
        self.v = None if shape.fused else make("v", kv, "kv_heads")
        if self.q is not None and shape.scale == 1:  # products that are not scaled start as small as those that are (T5's start)
            self.q.kernel[...] = self.q.kernel[...] * shape.head_dim**-0.5
        self.o = Linear(Site(f"{role}/o", (query, D), ("heads", "embed"), layers), sites, rngs, bias=shape.out_bias)
        sizes = {"": (0, 0), "head": (shape.head_dim,) * 2, "whole": (query, kv)}[shape.qk_norm]
        self.q_norm = Norm(shape.norm, sizes[0], shape.eps) if shape.qk_norm else None
        self.k_norm = Norm(shape.norm, sizes[1], shape.eps) if shape.qk_norm else None
        own = not role.endswith("cross")
        self.adapter = sites.memory(Site(role, (shape.kv_heads, shape.head_dim), ("kv_heads", "norm"), layers), rngs) if own else None

    def __call__(self, x_BTD: jax.Array, seen: Seen, key: jax.Array | None, store: Store | None = None) -> jax.Array:
        """Attention of a sequence to itself."""
        q, k, v = self._project(x_BTD, key)
        if seen.angles is not None:
            q, k = rotary.rotate(q, *seen.angles), rotary.rotate(k, *seen.angles)
        q = mesh.constrain(q, "batch", "sequence", "heads", None)
        k, v = (mesh.constrain(y, "batch", None, "kv_heads", None) for y in (k, v))
        if store is not None:
            k, v = store(k, v)
        if self.adapter is not None:
            k, v = _before(self.adapter(), k, v)
        return self._attend(q, k, v, seen, key)

    def memory(self, source_BSD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of what cross attention looks at."""
        k, v = (mesh.constrain(self._one(name, source_BSD, key), "batch", None, "kv_heads", None) for name in "kv")
        return k, v

    def across(self, x_BTD: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, seen: Seen, key: jax.Array | None) -> jax.Array:
        """Cross attention to a memory."""
        return self._attend(self._one("q", x_BTD, key), k_BSKH, v_BSKH, seen, key)

    def _one(self, name: str, x: jax.Array, key: jax.Array | None) -> jax.Array:
        y = getattr(self, name)(x, keys.fold(key, f"{self.role}/{name}"))
        return y.reshape(*x.shape[:2], -1, self.shape.head_dim)

    def _project(self, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        s = self.shape
        if self.qkv is None:
            q, k, v = (self._one(name, x_BTD, key) for name in "qkv")
        elif s.fused == "parts":
            q, k, v = jnp.split(self._one("qkv", x_BTD, key), [s.heads, s.heads + s.kv_heads], axis=2)
        else:
            B, T, G = *x_BTD.shape[:2], s.heads // s.kv_heads
            grouped = self._one("qkv", x_BTD, key).reshape(B, T, s.kv_heads, G + 2, s.head_dim)
            q, k, v = grouped[..., :G, :].reshape(B, T, s.heads, s.head_dim), grouped[..., G, :], grouped[..., G + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            whole = lambda norm, y: norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape) if s.qk_norm == "whole" else norm(y)  # noqa: E731
            q, k = whole(self.q_norm, q), whole(self.k_norm, k)
        return q, k, v

    def _attend(self, q, k, v, seen: Seen, key: jax.Array | None) -> jax.Array:
        s = self.shape
        how, (k, v) = How(s.scale, s.softcap, s.dropout, s.precision, seen.causal, seen.window), (x.astype(q.dtype) for x in (k, v))
        if seen.own and kernels.takes(s.form, q.shape[1]):
            y: Any = kernels.attend(kernels.Settings(s.form, how), q, k, v, seen.queries)
        else:
            y = blockwise.attend(how, q, k, v, seen.queries, seen.keys, seen.bias, keys.fold(key, self.role) if s.dropout else None)
        return self.o(y.reshape(*y.shape[:2], -1), keys.fold(key, f"{self.role}/o"))


def _before(memory_nKH: tuple[jax.Array, jax.Array], k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, n + S, K, H], with those of a memory before them."""
    each = lambda part, y: jnp.broadcast_to(part[None].astype(y.dtype), (y.shape[0], *part.shape))  # noqa: E731
    k, v = (jnp.concatenate([each(part, y), y], axis=1) for part, y in zip(memory_nKH, (k_BSKH, v_BSKH), strict=True))
    return k, v
