"""Causal self-attention with grouped queries.

Shapes: B sequences, T queries, S keys, D width, N query heads, K key-value heads, G query heads per key, M = G T, H head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys, mesh
from tuning.nn import rotary
from tuning.nn.linear import Linear
from tuning.nn.norm import RMSNorm
from tuning.nn.sites import Site, Sites

# store(k, v) of the new tokens -> (k, v) of all tokens that can be seen; writes into a cache on the way
Store = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes and variations of an attention layer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None  # a token sees itself and the window - 1 before it
    bias: bool  # on q, k and v
    out_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before the rotation
    eps: float
    precision: str  # of float32 matmuls on GPU and TPU, "highest" or "default"


class Context:
    """What all layers of one forward pass share: who sees whom, and the rotation angles. Computed once, outside the scan."""

    def __init__(self, positions_BT, segments_BT, freqs, seen_positions_BS, seen_segments_BS):
        self.cos, self.sin = rotary.angles(positions_BT, freqs)
        same = segments_BT[:, :, None] == seen_segments_BS[:, None, :]
        self._distance = positions_BT[:, :, None] - seen_positions_BS[:, None, :]
        self._visible = same & (self._distance >= 0) & (seen_segments_BS != 0)[:, None, :]
        self._masks: dict[int | None, jax.Array] = {}

    def prepare(self, window: int | None) -> None:
        """Computes the mask of a window now, so that a scan closes over it rather than computing it in every layer."""
        near = self._visible if window is None else self._visible & (self._distance < window)
        self._masks[window] = near[:, None]

    def mask(self, window: int | None) -> jax.Array:
        """[B, 1, T, S], true where a query may look."""
        return self._masks[window]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_B1TS: jax.Array, precision: str) -> jax.Array:
    """softmax(q k / sqrt(H)) v over what the mask allows, [B, T, N, H]; a query that may see nothing gets 0.

    The G = N / K queries that share a key stand under one another, so that every product is a plain batch of matrices. The softmax is
    computed in float32. The backward pass makes the scores again, from each row's logarithm of its sum (Dao et al., 2022,
    arXiv:2205.14135), instead of keeping them: no array [T, S] lives on from the forward pass.
    """
    return _attend(q_BTNH, k_BSKH, v_BSKH, mask_B1TS, precision)[0]


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an attention pass with the matmul precision that is its last argument, also where the caller's setting does not reach:
    the backward pass is traced after the forward pass has returned."""

    @functools.wraps(function)
    def run(*args):
        *arrays, precision = args
        with jax.default_matmul_precision(precision):
            return function(*arrays)

    return run


@_exactly
def _attend(q_BTNH, k_BSKH, v_BSKH, mask_B1TS):
    q, k, v = _matrices(q_BTNH, k_BSKH.shape[2]), k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    scores = _scores(q, k, mask_B1TS)
    peak = scores.max(-1, keepdims=True)
    shares = _seen(jnp.exp(scores - peak), mask_B1TS)
    total = jnp.maximum(shares.sum(-1, keepdims=True), 1e-30)
    y = jnp.einsum("bkms,bksh->bkmh", shares.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    y = y.astype(q.dtype)
    return _heads(y, q_BTNH.shape), (q, k, v, mask_B1TS, y, peak + jnp.log(total))


@_exactly
def _attend_backward(kept, dy_BTNH):
    q, k, v, mask_B1TS, y, log_total = kept
    dy = _matrices(dy_BTNH, k.shape[1])
    shares = _seen(jnp.exp(_scores(q, k, mask_B1TS) - log_total), mask_B1TS)
    dv = jnp.einsum("bkms,bkmh->bksh", shares.astype(dy.dtype), dy)
    d_shares = jnp.einsum("bkmh,bksh->bkms", dy, v, preferred_element_type=jnp.float32)
    mean = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    d_scores = (shares * (d_shares - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bkms,bksh->bkmh", d_scores, k)
    dk = jnp.einsum("bkms,bkmh->bksh", d_scores, q)
    return _heads(dq, dy_BTNH.shape), dk.transpose(0, 2, 1, 3), dv.transpose(0, 2, 1, 3), None


attend.defvjp(_attend, lambda precision, kept, dy_BTNH: _attend_backward(kept, dy_BTNH, precision))


def _matrices(x_BTNH: jax.Array, K: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)


def _heads(x_BKMH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    B, T, N, H = shape
    K = x_BKMH.shape[1]
    return x_BKMH.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(shape)


def _scores(q_BKMH: jax.Array, k_BKSH: jax.Array, mask_B1TS: jax.Array) -> jax.Array:
    scores = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * q_BKMH.shape[-1] ** -0.5
    return _seen(scores, mask_B1TS, -1e30)


def _seen(x_BKMS: jax.Array, mask_B1TS: jax.Array, otherwise: float = 0.0) -> jax.Array:
    B, K, M, S = x_BKMS.shape
    T = mask_B1TS.shape[2]
    return jnp.where(mask_B1TS[:, :, None], x_BKMS.reshape(B, K, M // T, T, S), otherwise).reshape(B, K, M, S)


class Attention(nnx.Module):
    def __init__(self, shape: Shape, layers: tuple[int, int], sites: Sites, rngs: nnx.Rngs):
        self.shape = shape
        D, query, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        make = functools.partial(Linear, sites=sites, rngs=rngs)
        self.q = make(Site("attn/q", (D, query), ("embed", "heads"), layers), bias=shape.bias)
        self.k = make(Site("attn/k", (D, kv), ("embed", "kv_heads"), layers), bias=shape.bias)
        self.v = make(Site("attn/v", (D, kv), ("embed", "kv_heads"), layers), bias=shape.bias)
        self.o = make(Site("attn/o", (query, D), ("heads", "embed"), layers), bias=shape.out_bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_dim, shape.eps) if shape.qk_norm else None

    def __call__(self, x_BTD: jax.Array, context: Context, key: jax.Array | None, store: Store | None) -> jax.Array:
        B, T, _ = x_BTD.shape
        split = lambda y, heads: y.reshape(B, T, heads, self.shape.head_dim)  # noqa: E731
        q = split(self.q(x_BTD, keys.fold(key, "attn/q")), self.shape.heads)
        k = split(self.k(x_BTD, keys.fold(key, "attn/k")), self.shape.kv_heads)
        v = split(self.v(x_BTD, keys.fold(key, "attn/v")), self.shape.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary.rotate(q, context.cos, context.sin), rotary.rotate(k, context.cos, context.sin)
        q, k, v = (mesh.constrain(y, "batch", None, axis, None) for y, axis in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads")))
        if store is not None:
            k, v = store(k, v)
        y: Any = attend(q, k.astype(q.dtype), v.astype(q.dtype), context.mask(self.shape.window), self.shape.precision)
        return self.o(y.reshape(B, T, -1), keys.fold(key, "attn/o"))
