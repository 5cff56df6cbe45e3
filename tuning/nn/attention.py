"""Attention with grouped queries: causal or two-sided, to its own sequence or to an encoder's.

Shapes: B sequences, T queries, S keys, D width, N query heads, K key-value heads, G query heads per key, M = G T, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.nn import rotary
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


@dataclasses.dataclass(frozen=True)
class Seen:
    """Who sees whom in one kind of layer, and how positions enter.

    mask     [B, 1, T, S], true where a query may look; S counts the keys of a prefix, which come first
    bias     [N, T, S] float32, added to the scores, or [B, N, 1, S] where only the key matters, or None
    angles   (cos, sin) of the tokens' positions, or None without rotation
    """

    mask: jax.Array
    bias: jax.Array | None = None
    angles: tuple[jax.Array, jax.Array] | None = None


class How(NamedTuple):
    """What `attend` does that is no array."""

    scale: float
    softcap: float
    dropout: float
    precision: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(how: How, q_BTNH, k_BSKH, v_BSKH, mask_B1TS, bias: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
    """softmax(q k scale + bias) v over what the mask allows, [B, T, N, H]; a query that may see nothing gets 0.

    The G = N / K queries that share a key stand under one another, so that every product is a plain batch of matrices. The softmax is
    computed in float32. The backward pass makes the scores again, from each row's logarithm of its sum (Dao et al., 2022,
    arXiv:2205.14135), instead of keeping them: no array [T, S] lives on from the forward pass. `key` turns on dropout.
    """
    return _attend(how, q_BTNH, k_BSKH, v_BSKH, mask_B1TS, bias, key)[0]


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an attention pass with its own matmul precision, also where the caller's setting does not reach: the backward pass is traced
    after the forward pass has returned."""

    @functools.wraps(function)
    def run(how: How, *args):
        with jax.default_matmul_precision(how.precision):
            return function(how, *args)

    return run


@_exactly
def _attend(how, q_BTNH, k_BSKH, v_BSKH, mask_B1TS, bias, key):
    q, k, v = _matrices(q_BTNH, k_BSKH.shape[2]), k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores, _ = _scores(how, q, k, mask_B1TS, bias)
    peak = scores.max(-1, keepdims=True)
    shares = _seen(jnp.exp(scores - peak), mask_B1TS)
    total = jnp.maximum(shares.sum(-1, keepdims=True), 1e-30)
    kept = shares * _dropped(how, key, shares.shape)
    y = jnp.einsum("bkms,bksh->bkmh", kept.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    y = y.astype(q.dtype)
    return _heads(y, q_BTNH.shape), (q, k, v, mask_B1TS, bias, key, y, peak + jnp.log(total))


@_exactly
def _attend_backward(how, kept, dy_BTNH):
    q, k, v, mask_B1TS, bias, key, y, log_total = kept
    dy = _matrices(dy_BTNH, k.shape[1])
    scores, slope = _scores(how, q, k, mask_B1TS, bias)
    shares = _seen(jnp.exp(scores - log_total), mask_B1TS)
    dropped = _dropped(how, key, shares.shape)
    dv = jnp.einsum("bkms,bkmh->bksh", (shares * dropped).astype(dy.dtype), dy)
    d_shares = jnp.einsum("bkmh,bksh->bkms", dy, v, preferred_element_type=jnp.float32) * dropped
    mean = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = shares * (d_shares - mean)
    d_bias = None
    if bias is not None:
        d_scores_BNTS = d_scores.reshape(_by_head(d_scores, bias))
        d_bias = (d_scores_BNTS.sum(0) if bias.ndim == 3 else d_scores_BNTS.sum(2, keepdims=True)).astype(bias.dtype)
    d_products = (d_scores * slope * how.scale).astype(q.dtype)
    dq = jnp.einsum("bkms,bksh->bkmh", d_products, k)
    dk = jnp.einsum("bkms,bkmh->bksh", d_products, q)
    return _heads(dq, dy_BTNH.shape), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None, d_bias, None


attend.defvjp(_attend, _attend_backward)


def _matrices(x_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)


def _heads(x_BKMH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    B, T, N, H = shape
    K = x_BKMH.shape[1]
    return x_BKMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(shape)


def _scores(how: How, q_BKMH, k_BKSH, mask_B1TS, bias) -> tuple[jax.Array, jax.Array | float]:
    """(scores [B, K, M, S] float32, their slope with respect to the scaled products)."""
    scores = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * how.scale
    slope = 1.0
    if how.softcap:
        bent = jnp.tanh(scores / how.softcap)
        scores, slope = how.softcap * bent, 1 - jnp.square(bent)
    if bias is not None:
        scores = (scores.reshape(_by_head(scores, bias)) + bias.reshape(-1, *bias.shape[-3:])).reshape(scores.shape)
    return _seen(scores, mask_B1TS, -1e30), slope


def _by_head(scores_BKMS: jax.Array, bias: jax.Array) -> tuple[int, int, int, int]:
    """[B, N, T, S], from the shapes of the scores and of what is added to them."""
    B, K, M, S = scores_BKMS.shape
    N = bias.shape[-3]
    return B, N, K * M // N, S


def _seen(x_BKMS: jax.Array, mask_B1TS: jax.Array, otherwise: float = 0.0) -> jax.Array:
    B, K, M, S = x_BKMS.shape
    T = mask_B1TS.shape[2]
    return jnp.where(mask_B1TS[:, :, None], x_BKMS.reshape(B, K, M // T, T, S), otherwise).reshape(B, K, M, S)


def _dropped(how: How, key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | float:
    """What the shares are multiplied by: 0 for those that are dropped. The same key gives the backward pass the same ones."""
    if not how.dropout or key is None:
        return 1.0
    return jax.random.bernoulli(key, 1 - how.dropout, shape) / jnp.float32(1 - how.dropout)


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
        q, k, v = (mesh.constrain(y, "batch", None, axis, None) for y, axis in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
        if store is not None:
            k, v = store(k, v)
        if self.adapter is not None:
            k, v = _before(self.adapter(), k, v)
        return self._attend(q, k, v, seen, key)

    def memory(self, source_BSD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of what cross attention looks at."""
        return self._one("k", source_BSD, key), self._one("v", source_BSD, key)

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
        how = How(s.scale, s.softcap, s.dropout, s.precision)
        chance = keys.fold(key, self.role) if s.dropout else None
        y: Any = attend(how, q, k.astype(q.dtype), v.astype(q.dtype), seen.mask, seen.bias, chance)
        return self.o(y.reshape(*y.shape[:2], -1), keys.fold(key, f"{self.role}/o"))


def _before(memory_nKH: tuple[jax.Array, jax.Array], k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, n + S, K, H], with those of a memory before them."""
    each = lambda part, y: jnp.broadcast_to(part[None].astype(y.dtype), (y.shape[0], *part.shape))  # noqa: E731
    k, v = (jnp.concatenate([each(part, y), y], axis=1) for part, y in zip(memory_nKH, (k_BSKH, v_BSKH), strict=True))
    return k, v
