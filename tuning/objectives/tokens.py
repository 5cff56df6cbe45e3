"""Next-token cross-entropy, in chunks of time: no array [batch, time, vocabulary] ever exists.

The gradient with respect to hidden states and head is computed along with the loss, chunk by chunk, so the logits are computed once.
Shapes: B sequences, T tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tuning.core import mesh
from tuning.core.types import Batch, Forward, Head, Loss, Mean


def next_token(*, label_smoothing: float = 0.0, z_loss: float = 0.0, balance: float = 0.001, chunk: int = 128) -> Loss:
    """Mean over the weighted targets of -log p(target).

    label_smoothing  share of the target's probability that is spread over the vocabulary (Szegedy et al., 2016, arXiv:1512.00567)
    z_loss           weight of logsumexp(logits)^2, which keeps logits from drifting (Chowdhery et al., 2022, arXiv:2204.02311)
    balance          weight of the load-balancing loss (Fedus et al., 2021, arXiv:2101.03961), which mixtures of experts have
    chunk            tokens of each sequence whose logits exist at a time; at most half a sequence
    Returns the measures `loss` (what is lowered), `nll` (nats per target, without the terms above), `accuracy`, and those of
    the model itself, such as `balance`.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"objective.label_smoothing={label_smoothing}: it lies in [0, 1).")
    if z_loss < 0 or balance < 0 or chunk < 1:
        raise ValueError(f"objective: z_loss={z_loss} and balance={balance} must not be negative, chunk={chunk} must be at least 1.")

    def loss(forward: Forward, batch: Batch) -> dict[str, Mean]:
        hidden_BTD, head, aux = forward(batch)
        sums: dict[str, jax.Array] = sum_losses((label_smoothing, z_loss, chunk), head, hidden_BTD, batch.targets, batch.weights)  # pyright: ignore
        count = batch.weights.sum()
        if balance and "balance" in aux:
            sums = {**sums, "loss": sums["loss"] + balance * aux["balance"].value * count}
        return {**{name: Mean(total, count) for name, total in sums.items()}, **aux}

    return loss


def token_losses(head: Head, hidden: jax.Array, targets: jax.Array, smoothing: float, z: float) -> dict[str, jax.Array]:
    """Per token, float32 with the shape of targets: loss, nll (nats) and accuracy (1 where the target has the largest logit)."""
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
    return {"loss": loss, "nll": nll, "accuracy": (own >= peak).astype(jnp.float32)}


def token_nll(head: Head, hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int = 128) -> jax.Array:
    """-log p(target) of every position, [B, T] in nats, computed in chunks."""

    def step(_, piece):
        hidden, targets = piece
        return None, token_losses(head, hidden, targets, 0.0, 0.0)["nll"]

    _, nll = jax.lax.scan(step, None, _chunks(chunk, hidden_BTD, targets_BT))
    return jnp.moveaxis(nll, 0, 1).reshape(hidden_BTD.shape[0], -1)[:, : hidden_BTD.shape[1]]


def _weighted(settings, head, hidden, targets, weights):
    smoothing, z, _ = settings
    sums = {name: (value * weights).sum() for name, value in token_losses(head, hidden, targets, smoothing, z).items()}
    return sums["loss"], sums


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
def sum_losses(settings, head: Head, hidden_BTD, targets_BT, weights_BT) -> dict[str, jax.Array]:
    """Weighted sums over all tokens; only `loss` has a gradient, with respect to head and hidden."""

    def local(head, hidden, targets, weights):
        def step(sums, piece):
            return jax.tree.map(jnp.add, sums, _weighted(settings, head, *piece)[1]), None

        zero = dict.fromkeys(("loss", "nll", "accuracy"), jnp.float32(0))
        return jax.lax.scan(step, zero, _chunks(settings[2], hidden, targets, weights))[0], ()

    return mesh.by_rows(local)(head, hidden_BTD, targets_BT, weights_BT)[0]


def _forward(settings, head, hidden_BTD, targets_BT, weights_BT):
    learns = any(leaf.perturbed for leaf in jax.tree.leaves(head, is_leaf=lambda x: hasattr(x, "perturbed")))
    head, hidden_BTD, targets_BT, weights_BT = jax.tree.map(
        lambda x: x.value, (head, hidden_BTD, targets_BT, weights_BT), is_leaf=lambda x: hasattr(x, "perturbed")
    )

    def local(head, hidden, targets, weights):
        def step(carry, piece):
            sums, d_head = carry
            grad = jax.grad(functools.partial(_weighted, settings), argnums=(0, 1) if learns else (1,), has_aux=True)
            grads, new = grad(head, *piece)
            if learns:
                d_head = jax.tree.map(lambda total, g: total + g.astype(total.dtype), d_head, grads[0])
            return (jax.tree.map(jnp.add, sums, new), d_head), grads[-1]

        zero = dict.fromkeys(("loss", "nll", "accuracy"), jnp.float32(0))
        d_head = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head) if learns else None
        (sums, d_head), d_hidden = jax.lax.scan(step, (zero, d_head), _chunks(settings[2], hidden, targets, weights))
        d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
        return (sums, d_head), (d_hidden,)

    (sums, d_head), (d_hidden,) = mesh.by_rows(local)(head, hidden_BTD, targets_BT, weights_BT)
    return sums, (head, d_head, d_hidden)


def _backward(settings, residuals, cotangents):
    head, d_head, d_hidden = residuals
    scale = cotangents["loss"]
    if d_head is None:  # the head does not learn, and nobody reads this
        d_head = head
    d_head = jax.tree.map(lambda g, x: (scale * g).astype(x.dtype), d_head, head)
    return d_head, (scale * d_hidden).astype(d_hidden.dtype), None, None


sum_losses.defvjp(_forward, _backward, symbolic_zeros=True)
