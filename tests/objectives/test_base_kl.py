"""The divergence from the base: value and gradient against the plain formula, in chunks, and nothing of it where it has no weight."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.objectives.test_tokens import head_of, random_case
from tuning.core.types import Batch
from tuning.objectives.labels import labels
from tuning.objectives.tokens import Terms, next_token, sum_losses

WEIGHT = 0.7


def plain(base_logits, logits, targets, weights, per_class=None):
    """Sum of weights * (nll + WEIGHT * KL(base || tuned)), and of weights * KL, with whole arrays and probabilities."""
    p, q = (jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True) for x in (base_logits, logits))
    kl = (p * jnp.log(p / q)).sum(-1)
    nll = -jnp.log(jnp.take_along_axis(q, targets[..., None], -1)[..., 0])
    counts = weights if per_class is None else weights * jnp.asarray(per_class)[targets]
    return (counts * (nll + WEIGHT * kl)).sum(), (weights * kl).sum()


def case():
    """(base kernel, base hidden, kernel, hidden, targets, weights)"""
    kernel, hidden, targets, weights = random_case()
    keys = jax.random.split(jax.random.key(9), 2)
    return (
        kernel + 0.3 * jax.random.normal(keys[0], kernel.shape), hidden + 0.3 * jax.random.normal(keys[1], hidden.shape),
        kernel, hidden, targets, weights,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [3, 128])
def test_value_and_gradient_are_those_of_whole_logits(chunk):
    base_kernel, base_hidden, kernel, hidden, targets, weights = case()

    def ours(kernel, hidden):
        before = head_of(base_kernel), base_hidden
        sums = sum_losses(Terms(0.0, 0.0, chunk, WEIGHT), head_of(kernel), hidden, targets, weights, before)
        return sums["loss"], sums["base_kl"]

    def whole(kernel, hidden):
        return plain(base_hidden @ base_kernel, hidden @ kernel, targets, weights)

    (value, kl), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(kernel, hidden)
    (expected, expected_kl), expected_grads = jax.jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(kernel, hidden)
    assert float(value) == pytest.approx(float(expected), rel=1e-6) and float(kl) == pytest.approx(float(expected_kl), rel=1e-5)
    assert float(kl) > 1
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * max(1, float(jnp.abs(want).max())))


def test_the_base_has_no_gradient_and_a_frozen_head_costs_one_product_more():
    base_kernel, base_hidden, kernel, hidden, targets, weights = case()

    def loss(weight, base_kernel, base_hidden, hidden):
        before = (head_of(base_kernel), base_hidden) if weight else ()
        return sum_losses(Terms(0.0, 0.0, 4, weight), head_of(kernel), hidden, targets, weights, before)["loss"]

    grads = jax.grad(functools.partial(loss, WEIGHT), (0, 1))(base_kernel, base_hidden, hidden)
    assert not any(np.asarray(grad).any() for grad in grads)
    dots = [
        jax.jit(jax.grad(functools.partial(loss, weight), 2)).lower(base_kernel, base_hidden, hidden).compile().as_text().count(" dot(")
        for weight in (0.0, WEIGHT)
    ]
    assert dots == [2, 3]


def lowered(loss, base, B=4, T=24):
    """The gradient of a tiny decoder's loss, its base being the same network with other parameters."""
    net, batch = tiny.build(), tiny.batch(B, T)

    def total(params, others, batch):
        return loss(functools.partial(net.apply, params), batch, functools.partial(net.apply, others) if base else None)["loss"].total

    return jax.jit(jax.grad(total)).lower(tiny.init(net), tiny.init(net, 1), batch)


def test_without_a_weight_nothing_of_the_base_is_in_the_program():
    assert lowered(next_token(), base=True).as_text() == lowered(next_token(), base=False).as_text()
    assert lowered(next_token(base_kl=0.1), base=True).as_text() != lowered(next_token(), base=True).as_text()


def test_no_array_of_all_logits_exists_for_either_model():
    B, T, V = 4, 24, 67
    text = lowered(next_token(base_kl=0.1), True, B, T).compile().as_text()
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(math.prod(shape) for shape in shapes if V in shape) == B * T * V / 2


@pytest.mark.parametrize("per_class", [(), (0.5, 2.0, 1.0)])
def test_a_classifiers_divergence_is_that_of_the_formula(per_class):
    base_kernel, base_hidden, kernel, hidden, targets, weights = case()
    kernel, base_kernel, targets = kernel[:, :3], base_kernel[:, :3], targets % 3
    batch = Batch(targets, targets, weights, targets, targets)
    loss = labels(base_kl=WEIGHT, class_weights=per_class)

    def ours(kernel):
        means = loss(lambda _: (hidden, head_of(kernel), {}), batch, lambda _: (base_hidden, head_of(base_kernel), {}))
        return means["loss"].total, means["base_kl"].total

    def whole(kernel):
        return plain(base_hidden @ base_kernel, hidden @ kernel, targets, weights, per_class or None)

    (value, kl), grad = jax.value_and_grad(ours, has_aux=True)(kernel)
    (expected, expected_kl), expected_grad = jax.value_and_grad(whole, has_aux=True)(kernel)
    assert float(value) == pytest.approx(float(expected), rel=1e-5) and float(kl) == pytest.approx(float(expected_kl), rel=1e-5)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-5 * max(1, float(jnp.abs(expected_grad).max())))


@pytest.mark.parametrize("objective", [next_token, labels])
def test_a_weight_that_cannot_be_and_a_base_that_is_missing_are_refused(objective):
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"base_kl={weight} weighs a divergence"):
            objective(base_kl=weight)
    net = tiny.build()
    with pytest.raises(ValueError, match=r"base_kl=0\.1 compares with the base, and this step has none"):
        objective(base_kl=0.1)(functools.partial(net.apply, tiny.init(net)), tiny.batch())
