"""Cross-entropy over the classes of a head: of a whole text at the token that is read for it, or of every token.

Shapes: B sequences, T tokens, D width, C classes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from tuning.core.types import Batch, Forward, Loss, Mean
from tuning.objectives import base as bases


def labels(*, label_smoothing: float = 0.0, class_weights: tuple[float, ...] = (), base_kl: float = 0.0) -> Loss:
    """Mean over the weighted targets of -log p(class).

    label_smoothing  share of the target's probability that is spread over the classes (Szegedy et al., 2016, arXiv:1512.00567)
    class_weights    how much each class counts, as the `weight` of PyTorch's cross_entropy; empty for all alike
    base_kl          weight of KL(base || tuned) in nats, which counts as much as the target's class (see base.py); for methods that leave
                     every weight of the base as it is
    Returns the measures `loss` (what is lowered), `nll` (nats per target, without those above), `accuracy`, `base_kl` if that has a weight
    and, if there are two classes, `f1` of the second. ValueError, when it is first called, for a head over one class, and for another
    number of weights than classes.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"objective.label_smoothing={label_smoothing}: it lies in [0, 1).")
    if class_weights and not (all(0 <= weight < math.inf for weight in class_weights) and any(class_weights)):
        raise ValueError(f"objective.class_weights={class_weights}: they are finite, not negative, and not all zero.")
    bases.check(base_kl)

    def loss(forward: Forward, batch: Batch, base: Forward | None = None) -> dict[str, Mean]:
        hidden_BTD, head, aux = forward(batch)
        log_p_BTC = jax.nn.log_softmax(head(hidden_BTD))
        classes = log_p_BTC.shape[-1]
        if classes < 2:
            raise ValueError(f"A head over {classes} classes has nothing to tell apart. Set model.classes to two names or more.")
        if len(class_weights) not in (0, classes):
            raise ValueError(f"objective.class_weights has {len(class_weights)} numbers, and the model {classes} classes.")
        weight_C = jnp.array(class_weights or (1.0,) * classes, jnp.float32)
        own_BTC = jax.nn.one_hot(batch.targets, classes)
        nll_BT = -(log_p_BTC * own_BTC).sum(-1)
        spread_BT = -jnp.einsum("btc,c->bt", log_p_BTC, weight_C, precision="highest") / classes
        share_BT = jnp.einsum("btc,c->bt", own_BTC, weight_C, precision="highest")
        loss_BT = (1 - label_smoothing) * share_BT * nll_BT + label_smoothing * spread_BT
        before = bases.before(base_kl, base, batch)
        kl_BT = bases.divergence(before[0](before[1]), log_p_BTC) if before else None
        loss_BT = loss_BT if kl_BT is None else loss_BT + base_kl * share_BT * kl_BT
        chosen_BT = log_p_BTC.argmax(-1)
        count = batch.weights.sum()
        measures = {
            "loss": Mean((loss_BT * batch.weights).sum(), (share_BT * batch.weights).sum()),
            "nll": Mean((nll_BT * batch.weights).sum(), count),
            "accuracy": Mean(((chosen_BT == batch.targets) * batch.weights).sum(), count),
        }
        if kl_BT is not None:
            measures["base_kl"] = Mean((kl_BT * batch.weights).sum(), count)
        if classes == 2:
            both = (chosen_BT * batch.targets * batch.weights).sum()  # 2 TP + FP + FN is what was called positive and what is
            measures["f1"] = Mean(2 * both, ((chosen_BT + batch.targets) * batch.weights).sum())
        return {**measures, **aux}

    return loss
