"""Attention in blocks of queries: exact, on any device, with everything that a network may ask of attention.

Shapes: B sequences, T queries, S keys, N query heads, K key-value heads, G query heads per key, H head width; P blocks of C queries each,
M = G C.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tuning.core import mesh

QUERIES, SCORES = 128, 512 * 512  # of one head, that there are at most at a time
EVERYWHERE = -1  # the segment of keys that all queries see


class Marks(NamedTuple):
    """Where tokens belong, [B, T] int32 each: their segment, 0 for padding, and their position in it."""

    segments: Any
    positions: Any


class How(NamedTuple):
    """What attention does that is no array.

    causal  a query sees no key with a later position
    window  nor one whose position is that far away, or farther; None for all
    """

    scale: float
    softcap: float = 0.0
    dropout: float = 0.0
    precision: str = "highest"
    causal: bool = False
    window: int | None = None


def visible(how: How, queries: Marks, keys: Marks) -> jax.Array:
    """[B, T, S], true where a query may look: at its own segment, and at keys that are seen everywhere."""
    segments_BT1, segments_B1S = queries.segments[:, :, None], keys.segments[:, None, :]
    seen_BTS = (segments_BT1 == segments_B1S) & (segments_B1S != 0) | (segments_B1S == EVERYWHERE)
    distance_BTS = queries.positions[:, :, None] - keys.positions[:, None, :]
    if how.causal:
        seen_BTS = seen_BTS & (distance_BTS >= 0)
    return seen_BTS if how.window is None else seen_BTS & (abs(distance_BTS) < how.window)


def attend(
    how: How, q_BTNH, k_BSKH, v_BSKH, queries: Marks, keys: Marks, bias: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:  # fmt: skip
    """softmax(q k scale + bias) v over what is visible, [B, T, N, H]; a query that may see nothing gets 0.

    bias  [N, T, S] float32, added to the scores, or [B, N, 1, S] where only the key matters, or None
    key   turns on dropout
    The G = N / K queries that share a key stand under one another, so that every product is a plain batch of matrices. The softmax is
    computed in float32. The backward pass makes the scores again, from each row's logarithm of its sum (Dao et al., 2022,
    arXiv:2205.14135), instead of keeping them. Both take one block of queries after another (Rabe and Staats, 2021, arXiv:2112.05682):
    of each head QUERIES at most, and no more than make SCORES scores. On a mesh that splits sequences, a device does so with the queries
    that it has.
    """
    here, given = mesh.here(), (q_BTNH, k_BSKH, v_BSKH, queries, keys, bias)
    if here.empty or (split := mesh.spec(queries.segments.shape[1:], ("sequence",), here)) == P(None):
        return _blocks(how, *given, key)

    def local(key, *given):
        return _blocks(how, *given, None if key is None else jax.random.fold_in(key, jax.lax.axis_index(split[0])))

    rows, whole, along = P(None, *split), P(), None if bias is None else P(None, *split) if bias.ndim == 3 else P()
    specs = (whole, rows, whole, whole, rows, whole, along)
    run = jax.shard_map(local, in_specs=specs, out_specs=rows, axis_names=set(split), check_vma=False)
    return run(key, *given)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(how, q_BTNH, k_BSKH, v_BSKH, queries, keys, bias, key) -> jax.Array:
    return _attend(how, q_BTNH, k_BSKH, v_BSKH, queries, keys, bias, key)[0]


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an attention pass with its own matmul precision, also where the caller's setting does not reach: the backward pass is traced
    after the forward pass has returned."""

    @functools.wraps(function)
    def run(how: How, *args):
        with jax.default_matmul_precision(how.precision):
            return function(how, *args)

    return run


@_exactly
def _attend(how, q_BTNH, k_BSKH, v_BSKH, queries, keys, bias, key):
    B, T, N, H = q_BTNH.shape
    k, v = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    count = -(-T // max(1, min(QUERIES, SCORES // k.shape[2])))
    # Rows that fill up the last block belong to no segment and see at most what is seen everywhere; what they say is cut off.
    blocks = (jnp.arange(count), _matrices(q_BTNH, k.shape[1], count), jax.tree.map(lambda x: _rows(x, 1, count), queries))
    blocks += (_rows(bias, 1, count) if bias is not None and bias.ndim == 3 else None,)
    if count > 1:  # all of a block is to depend on the queries: jax makes what does not for all blocks at once, before the loop over layers
        blocks = jax.lax.optimization_barrier(blocks)

    def block(_, part):
        index, q, queries, own = part
        mask_BCS = visible(how, queries, keys)
        scores, _ = _scores(how, q, k, mask_BCS, bias if own is None else own)
        peak = scores.max(-1, keepdims=True)
        shares = _seen(jnp.exp(scores - peak), mask_BCS)
        total = jnp.maximum(shares.sum(-1, keepdims=True), 1e-30)
        kept = shares * _dropped(how, key, index, shares.shape)
        y = jnp.einsum("bkms,bksh->bkmh", kept.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
        return None, (y.astype(q.dtype), peak + jnp.log(total))

    _, (y, log_total) = jax.lax.scan(block, None, blocks)
    return _heads(y, (B, T, N, H)), (blocks, k, v, keys, bias, key, y, log_total)


@_exactly
def _attend_backward(how, kept, dy_BTNH):
    blocks, k, v, keys, bias, key, y, log_total = kept

    def block(sums, part):
        (index, q, queries, own), dy, y, log_total = part
        mask_BCS = visible(how, queries, keys)
        scores, slope = _scores(how, q, k, mask_BCS, bias if own is None else own)
        shares = _seen(jnp.exp(scores - log_total), mask_BCS)
        dropped = _dropped(how, key, index, shares.shape)
        dv = jnp.einsum("bkms,bkmh->bksh", (shares * dropped).astype(dy.dtype), dy, preferred_element_type=jnp.float32)
        d_shares = jnp.einsum("bkmh,bksh->bkms", dy, v, preferred_element_type=jnp.float32) * dropped
        mean = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
        d_scores = shares * (d_shares - mean)
        d_products = (d_scores * slope * how.scale).astype(q.dtype)
        dq = jnp.einsum("bkms,bksh->bkmh", d_products, k)
        dk = jnp.einsum("bkms,bkmh->bksh", d_products, q, preferred_element_type=jnp.float32)
        d_bias = None
        if bias is not None:
            d_scores_BNCS = d_scores.reshape(_by_head(d_scores, bias))
            d_bias = d_scores_BNCS.sum(0) if bias.ndim == 3 else d_scores_BNCS.sum(2, keepdims=True)
        return jax.tree.map(jnp.add, sums, (dk, dv)), (dq, d_bias)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (k, v))
    parts = (blocks, _matrices(dy_BTNH, k.shape[1], y.shape[0]), y, log_total)
    (dk, dv), (dq, d_bias) = jax.lax.scan(block, zeros, parts)
    dk, dv = (sum_BKSH.transpose(0, 2, 1, 3).astype(k.dtype) for sum_BKSH in (dk, dv))
    if bias is not None and d_bias is not None:
        joined = lambda x_PNCS: jnp.moveaxis(x_PNCS, 0, 1).reshape(bias.shape[0], -1, bias.shape[2])[:, : bias.shape[1]]  # noqa: E731
        d_bias = (joined(d_bias) if bias.ndim == 3 else d_bias.sum(0)).astype(bias.dtype)
    return _heads(dq, dy_BTNH.shape), dk, dv, None, None, d_bias, None


_blocks.defvjp(_attend, _attend_backward)


def _rows(x: jax.Array, axis: int, count: int) -> jax.Array:
    """[..., T, ...] -> [P, ..., C, ...], filled up with zeros."""
    size = -(-x.shape[axis] // count)
    x = jnp.pad(x, [(0, count * size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _matrices(x_BTNH: jax.Array, K: int, count: int) -> jax.Array:
    """[P, B, K, M, H]"""
    x_PBCNH = _rows(x_BTNH, 1, count)
    P, B, C, N, H = x_PBCNH.shape
    return x_PBCNH.reshape(P, B, C, K, N // K, H).transpose(0, 1, 3, 4, 2, 5).reshape(P, B, K, N // K * C, H)


def _heads(x_PBKMH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, T, N, H]"""
    B, T, N, H = shape
    P, _, K, M, _ = x_PBKMH.shape
    x_BPCKGH = x_PBKMH.reshape(P, B, K, N // K, M * K // N, H).transpose(1, 0, 4, 2, 3, 5)
    return x_BPCKGH.reshape(B, -1, N, H)[:, :T]


def _scores(how: How, q_BKMH, k_BKSH, mask_BCS, bias) -> tuple[jax.Array, jax.Array | float]:
    """(scores [B, K, M, S] float32, their slope with respect to the scaled products)."""
    scores = jnp.einsum("bkmh,bksh->bkms", q_BKMH, k_BKSH, preferred_element_type=jnp.float32) * how.scale
    slope = 1.0
    if how.softcap:
        bent = jnp.tanh(scores / how.softcap)
        scores, slope = how.softcap * bent, 1 - jnp.square(bent)
    if bias is not None:
        scores = (scores.reshape(_by_head(scores, bias)) + bias.reshape(-1, *bias.shape[-3:])).reshape(scores.shape)
    return _seen(scores, mask_BCS, -1e30), slope


def _by_head(scores_BKMS: jax.Array, bias: jax.Array) -> tuple[int, int, int, int]:
    """[B, N, C, S], from the shapes of the scores and of what is added to them."""
    B, K, M, S = scores_BKMS.shape
    N = bias.shape[-3]
    return B, N, K * M // N, S


def _seen(x_BKMS: jax.Array, mask_BCS: jax.Array, otherwise: float = 0.0) -> jax.Array:
    B, K, M, S = x_BKMS.shape
    C = mask_BCS.shape[1]
    return jnp.where(mask_BCS[:, None, None], x_BKMS.reshape(B, K, M // C, C, S), otherwise).reshape(B, K, M, S)


def _dropped(how: How, key: jax.Array | None, block: jax.Array, shape: tuple[int, ...]) -> jax.Array | float:
    """What the shares are multiplied by: 0 for those that are dropped. The same key gives the backward pass the same ones."""
    if not how.dropout or key is None:
        return 1.0
    return jax.random.bernoulli(jax.random.fold_in(key, block), 1 - how.dropout, shape) / jnp.float32(1 - how.dropout)
