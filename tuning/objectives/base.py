"""How far a model has gone from its base: from what it said before it was tuned.

Learning without forgetting (Li and Hoiem, 2016, arXiv:1606.09282) holds a model near its old answers on the new text, at the temperature 1
here. The direction is KL(base || tuned): the tuned model pays where it no longer gives what its base gave, not for what it adds.
Shapes: V classes or tokens, "..." any leading axes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from tuning.core.types import Batch, Forward, Head

Before = tuple[()] | tuple[Head, jax.Array]  # the base's head and hidden states; empty where nothing compares with them


def check(weight: float) -> None:
    """ValueError for a weight that the divergence cannot have."""
    if not 0 <= weight < math.inf:
        raise ValueError(f"objective.base_kl={weight} weighs a divergence, and is not negative. Set it to 0 for none.")


def before(weight: float, base: Forward | None, batch: Batch) -> Before:
    """What the base makes of a batch; nothing is computed where its divergence has no weight."""
    if not weight:
        return ()
    if base is None:
        raise ValueError(f"objective.base_kl={weight} compares with the base, and this step has none. Set it to 0.")
    hidden, head, _ = base(batch)
    return head, hidden


def divergence(before: jax.Array, now: jax.Array) -> jax.Array:
    """KL(base || tuned) in nats, [...], of logits [..., V]. Its gradient is that of the tuned logits: softmax(now) - softmax(before)."""
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(before))
    return (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(now))).sum(-1)
