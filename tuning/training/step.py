"""One train step for every method and objective.

loss over the tuned leaves -> sums of gradients and weights over microbatches -> one division -> optax -> new state
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import optax

from tuning.core import keys, tree
from tuning.core.types import Batch, Forward, Loss, Mean, Means, TrainState, Tree

Apply = Callable[..., tuple]  # apply(params, batch, key) -> hidden, head, measures


def train_step(
    apply: Apply, loss: Loss, transform: optax.GradientTransformation, *, accumulate: int, clip_norm: float | jax.Array,
    seed: int | jax.Array,
    begun: Callable[[Tree, jax.Array], Tree] = lambda gradients, step: gradients, penalty: Callable[[Tree], jax.Array] | None = None,
    base: Apply | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Means]]:  # fmt: skip
    """(state, batch) -> (state after one update, measures); to be jitted with the state donated.

    accumulate  microbatches per update; the update is that of the whole batch
    clip_norm   largest global norm of the gradient of the tuned leaves; 0 leaves it alone. Traced, it is not 0
    begun       (gradients, step) -> the gradients, 0 where a leaf does not learn yet: those count for no norm
    penalty     (tuned leaves) -> what is added to the loss that is lowered; reported apart, as `penalty`
    base        (parameters, batch) -> what the model said before it was tuned, from the leaves that do not learn alone
    Measures besides the objective's: grad_norm (before clipping), tokens (padding not counted), and finite: 0 for a step whose loss or
    gradient is not finite, which changes nothing but the step counter.
    """

    def sums(tuned: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[Tree, Means]:
        def total(tuned):
            means = loss(lambda piece: apply(tree.merge(tuned, frozen), piece, key), batch, _bound(base, frozen))
            if penalty is None:
                return means["loss"].total, means
            share = Mean(penalty(tuned) * (weight := means["loss"].weight), weight)
            return means["loss"].total + share.total, {**means, "penalty": share}

        return jax.grad(total, has_aux=True)(tuned)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Means]:
        key = keys.at(seed, state.step, "train")

        def one(carry, index_and_piece):
            index, piece = index_and_piece
            new = sums(state.tuned, state.frozen, piece, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, carry, new), None

        if accumulate == 1:
            grads, means = sums(state.tuned, state.frozen, batch, jax.random.fold_in(key, 0))
        else:
            pieces = microbatches(batch, accumulate)
            shapes = jax.eval_shape(sums, state.tuned, state.frozen, jax.tree.map(lambda x: x[0], pieces), key)
            zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, means), _ = jax.lax.scan(one, zero, (jnp.arange(accumulate), pieces))

        weight = means["loss"].weight
        grads = begun(jax.tree.map(lambda g: g / jnp.where(weight == 0, 1, weight), grads), state.step)
        norm = optax.global_norm(grads)
        if isinstance(clip_norm, jax.Array) or clip_norm:
            grads = jax.tree.map(lambda g: g * jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)), grads)
        updates, optimizer = transform.update(grads, state.optimizer, state.tuned)
        tuned = optax.apply_updates(state.tuned, updates)
        finite = jnp.isfinite(norm) & jnp.isfinite(means["loss"].total)
        tuned, optimizer = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (tuned, optimizer), (state.tuned, state.optimizer))
        one_of = lambda x: Mean(jnp.asarray(x, jnp.float32), jnp.float32(1))  # noqa: E731
        tokens = (batch.segments != 0).sum()
        measures = {**means, "grad_norm": one_of(norm), "finite": one_of(finite), "tokens": one_of(tokens)}
        return TrainState(state.step + 1, tuned, state.frozen, optimizer), measures

    return step


def microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...]. Every device's rows are dealt out over all microbatches, so no row moves between devices."""

    def deal(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(deal, batch)


def eval_step(apply: Apply, loss: Loss, base: Apply | None = None) -> Callable[[Tree, Batch], Means]:
    """(params, batch) -> measures, without dropout; sums that may be added over batches."""

    def step(params: Tree, batch: Batch) -> Means:
        return loss(lambda piece: apply(params, piece, None), batch, _bound(base, params))

    return step


def _bound(base: Apply | None, params: Tree) -> Forward | None:
    return None if base is None else functools.partial(base, params)


def totals(step: Callable[[Tree, Batch], Means], params: Tree, batches: Iterable[Batch]) -> dict[str, Mean]:
    """The measures over all batches, on this host. ValueError if no target has a weight."""
    total: dict[str, Mean] | None = None
    for batch in batches:
        means = dict(step(params, batch))
        total = means if total is None else jax.tree.map(jnp.add, total, means)
    total = jax.device_get(total)
    if total is None or not total["loss"].weight.any():
        raise ValueError("The evaluation data holds no learned token: there is nothing to average over.")
    return total


def evaluate(step: Callable[[Tree, Batch], Means], params: Tree, batches: Iterable[Batch]) -> dict[str, float]:
    """The means of the same."""
    return {name: float(mean.value) for name, mean in totals(step, params, batches).items()}


def jit(step: Callable, state: TrainState, batch: Batch):
    """The train step compiled for this state and batch, the state donated and kept where it is."""
    return lower(step, state, batch).compile()


def lower(step: Callable, state: TrainState, batch: Batch):
    """The same before it is compiled; state and batch may be abstract, on devices that are not here."""
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(state, batch)
