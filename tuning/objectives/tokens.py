"""Next-token cross-entropy, in chunks of time: no array [batch, time, vocabulary] ever exists.

The gradient with respect to hidden states and head is computed along with the loss, chunk by chunk, so the logits are computed once;
those of the model's base, where the loss compares with them, too.
Shapes: B sequences, T tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tuning.core import mesh
from tuning.core.types import Batch, Forward, Head, Loss, Mean
from tuning.objectives import base as bases
from tuning.objectives.base import Before


class Terms(NamedTuple):
    """What a token's loss is made of, and the chunk; see `next_token`."""

    smoothing: float
    z: float
    chunk: int
    base_kl: float = 0.0


def next_token(
    *, label_smoothing: float = 0.0, z_loss: float = 0.0, balance: float = 0.001, base_kl: float = 0.0, chunk: int = 128
) -> Loss:
    """Mean over the weighted targets of -log p(target).

    label_smoothing  share of the target's probability that is spread over the vocabulary (Szegedy et al., 2016, arXiv:1512.00567)
    z_loss           weight of logsumexp(logits)^2, which keeps logits from drifting (Chowdhery et al., 2022, arXiv:2204.02311)
    balance          weight of the load-balancing loss (Fedus et al., 2021, arXiv:2101.03961), which mixtures of experts have
    base_kl          weight of KL(base || tuned) in nats per target (see base.py), at the cost of a forward pass of the base; for methods
                     that leave every weight of the base as it is
    chunk            tokens of each sequence whose logits exist at a time; at most half a sequence
    Returns the measures `loss` (what is lowered), `nll` (nats per target, without the terms above), `accuracy`, `base_kl` if that has a
    weight, and those of the model itself, such as `balance`.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"objective.label_smoothing={label_smoothing}: it lies in [0, 1).")
    if z_loss < 0 or balance < 0 or chunk < 1:
        raise ValueError(f"objective: z_loss={z_loss} and balance={balance} must not be negative, chunk={chunk} must be at least 1.")
    bases.check(base_kl)
    terms = Terms(label_smoothing, z_loss, chunk, base_kl)

    def loss(forward: Forward, batch: Batch, base: Forward | None = None) -> dict[str, Mean]:
        hidden_BTD, head, aux = forward(batch)
        before = bases.before(base_kl, base, batch)
        sums: dict[str, jax.Array] = sum_losses(terms, head, hidden_BTD, batch.targets, batch.weights, before)  # pyright: ignore
        count = batch.weights.sum()
        if balance and "balance" in aux:
            sums = {**sums, "loss": sums["loss"] + balance * aux["balance"].value * count}
        return {**{name: Mean(total, count) for name, total in sums.items()}, **aux}

    return loss


def token_losses(
    head: Head, hidden: jax.Array, targets: jax.Array, smoothing: float, z: float, base_kl: float = 0.0, before: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Per token, float32 with the shape of targets: loss, nll (nats), accuracy (1 where the target has the largest logit) and, with the
    base's logits `before`, base_kl (nats)."""
    logits = head(hidden)
    peak = jax.lax.stop_gradient(logits.max(-1))
    log_total = jnp.log(jnp.exp(logits - peak[..., None]).sum(-1)) + peak
    # A sum over a one-hot choice, not a gather: it stays in place when the vocabulary is split over devices.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    own = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
    nll = log_total - own
    loss = nll
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (log_total - logits.mean(-1))
    if z:
        loss = loss + z * jnp.square(log_total)
    each = {"loss": loss, "nll": nll, "accuracy": (own >= peak).astype(jnp.float32)}
    if before is None:
        return each
    kl = bases.divergence(before, logits)
    return each | {"loss": loss + base_kl * kl, "base_kl": kl}


def token_nll(head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int = 128) -> jax.Array:
    """-log p(target) of every position, [B, T] in nats, computed in chunks."""

    def step(_, piece):
        hidden, targets = piece
        return None, token_losses(head, hidden, targets, 0.0, 0.0)["nll"]

    _, nll = jax.lax.scan(step, None, _chunks(chunk, hidden_BTD, targets_BT))
    return jnp.moveaxis(nll, 0, 1).reshape(hidden_BTD.shape[0], -1)[:, : hidden_BTD.shape[1]]


def _weighted(settings, base_head, head, hidden, targets, weights, *base_hidden):
    terms = Terms(*settings)
    before = base_head[0](base_hidden[0]) if base_head else None
    each = token_losses(head, hidden, targets, terms.smoothing, terms.z, terms.base_kl, before)
    sums = {name: (value * weights).sum() for name, value in each.items()}
    return sums["loss"], sums


def _zeros(base_head) -> dict[str, jax.Array]:
    return {name: jnp.zeros((), jnp.float32) for name in ("loss", "nll", "accuracy", *(["base_kl"] if base_head else []))}


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, T, ...] -> [chunks, B, C, ...], padded with zeros; at least two chunks."""
    length = arrays[0].shape[1]
    size = min(chunk, -(-length // 2))
    count = -(-length // size)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_losses(settings, head: Head, hidden_BTD, targets_BT, weights_BT, before: Before = ()) -> dict[str, jax.Array]:
    """Weighted sums over all tokens; only `loss` has a gradient, with respect to head and hidden."""

    def local(heads, *rows):
        head, *base_head = heads

        def step(sums, piece):
            return jax.tree.map(jnp.add, sums, _weighted(settings, base_head, head, *piece)[1]), None

        return jax.lax.scan(step, _zeros(base_head), _chunks(settings[2], *rows))[0], ()

    return mesh.by_rows(local)((head, *before[:1]), hidden_BTD, targets_BT, weights_BT, *before[1:])[0]


def _is_marked(x) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _forward(settings, head, hidden_BTD, targets_BT, weights_BT, before):
    marked, structure = jax.tree.flatten(head, is_leaf=_is_marked)
    # Only those leaves of the head get a gradient that learn: an adapter's, and not the kernel under it.
    own, rest = ([x.value if x.perturbed is learns else None for x in marked] for learns in (True, False))
    join = lambda own, rest: structure.unflatten([b if a is None else a for a, b in zip(own, rest, strict=True)])  # noqa: E731
    hidden_BTD, targets_BT, weights_BT, before = jax.tree.map(
        lambda x: x.value, (hidden_BTD, targets_BT, weights_BT, before), is_leaf=_is_marked
    )

    def local(heads, hidden, *rows):
        own, rest, *base_head = heads

        def step(carry, piece):
            sums, d_own = carry
            weighted = lambda own, *piece: _weighted(settings, base_head, join(own, rest), *piece)  # noqa: E731
            (d_piece, d_hidden), new = jax.grad(weighted, argnums=(0, 1), has_aux=True)(own, *piece)
            d_own = jax.tree.map(lambda total, g: total + g.astype(total.dtype), d_own, d_piece)
            return (jax.tree.map(jnp.add, sums, new), d_own), d_hidden

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), own)
        (sums, d_own), d_hidden = jax.lax.scan(step, (_zeros(base_head), zero), _chunks(settings[2], hidden, *rows))
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
        return (sums, d_own), (d_hidden,)

    heads = (own, rest, *before[:1])
    (sums, d_own), (d_hidden,) = mesh.by_rows(local)(heads, hidden_BTD, targets_BT, weights_BT, *before[1:])
    return sums, (structure.unflatten(own), structure.unflatten(d_own), d_hidden)


def _backward(settings, residuals, cotangents):
    own, d_own, d_hidden = residuals
    scale = cotangents["loss"]
    d_head = jax.tree.map(lambda g, x: (scale * g).astype(x.dtype), d_own, own)  # None for a leaf that does not learn
    return d_head, (scale * d_hidden).astype(d_hidden.dtype), None, None, None


sum_losses.defvjp(_forward, _backward, symbolic_zeros=True)
