"""Next-token cross-entropy: worked values, gradients against a plain reference, and no array of all logits."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tuning.core.types import Batch, Mean
from tuning.objectives.tokens import next_token, sum_losses, token_losses, token_nll


def head_of(kernel_DV):
    return jax.tree_util.Partial(_project, kernel_DV)


def _project(kernel, x):
    return jnp.einsum("...d,dv->...v", x, kernel)


def test_worked_values():
    logits = jnp.array([[[2.0, 1.0, 0.0]]])
    identity, target = head_of(jnp.eye(3)), jnp.array([[0]])
    loss = lambda smoothing, z: float(token_losses(identity, logits, target, smoothing, z)["loss"][0, 0])  # noqa: E731
    assert loss(0.0, 0.0) == pytest.approx(0.407606, abs=1e-6)
    assert loss(0.1, 0.0) == pytest.approx(0.507606, abs=1e-6)
    assert loss(0.0, 1e-4) - loss(0.0, 0.0) == pytest.approx(5.796566e-4, abs=1e-7)


def random_case(B=4, T=11, D=16, V=40):
    keys = jax.random.split(jax.random.key(0), 4)
    weights = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)
    return (
        jax.random.normal(keys[0], (D, V)), jax.random.normal(keys[1], (B, T, D)), jax.random.randint(keys[2], (B, T), 0, V), weights,
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 3, 4, 128])
def test_chunked_loss_and_gradients_are_those_of_the_whole(chunk):
    kernel, hidden, targets, weights = random_case()

    def ours(kernel, hidden):
        return 3.0 * sum_losses((0.1, 1e-2, chunk), head_of(kernel), hidden, targets, weights)["loss"]

    def plain(kernel, hidden):
        return 3.0 * (token_losses(head_of(kernel), hidden, targets, 0.1, 1e-2)["loss"] * weights).sum()

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(kernel, hidden)
    expected, expected_grads = jax.jit(jax.value_and_grad(plain, (0, 1)))(kernel, hidden)
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * float(jnp.abs(want).max()))
    only_hidden = jax.jit(jax.grad(ours, 1))(kernel, hidden)
    np.testing.assert_allclose(only_hidden, expected_grads[1], atol=1e-6 * float(jnp.abs(expected_grads[1]).max()))


def test_a_frozen_head_costs_no_weight_gradient():
    kernel, hidden, targets, weights = random_case()
    loss = lambda kernel, hidden: sum_losses((0.0, 0.0, 4), head_of(kernel), hidden, targets, weights)["loss"]  # noqa: E731
    dots = lambda argnums: jax.jit(jax.grad(loss, argnums)).lower(kernel, hidden).compile().as_text().count(" dot(")  # noqa: E731
    assert dots(1) == 2 and dots((0, 1)) == 3


def test_no_array_of_all_logits_exists_in_the_compiled_gradient():
    B, T, V = 4, 24, 67
    net = tiny.build()
    params, batch = tiny.init(net), tiny.batch(B, T, V)
    loss = next_token()

    def total(params, batch):
        return loss(functools.partial(net.apply, params), batch)["loss"].total

    text = jax.jit(jax.grad(total)).lower(params, batch).compile().as_text()
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    largest = max(math.prod(shape) for shape in shapes if V in shape)
    assert B * T * V / 2 <= largest < B * T * V  # half a sequence at a time: the chunk, and nothing larger


def test_the_mean_is_over_learned_targets_only():
    net = tiny.build()
    params, batch = tiny.init(net), tiny.batch()
    means = next_token()(functools.partial(net.apply, params), batch)
    hidden, head, _ = net.apply(params, batch)
    log_p = jax.nn.log_softmax(head(hidden))
    nll = -np.take_along_axis(np.asarray(log_p), np.asarray(batch.targets)[..., None], -1)[..., 0]
    assert float(means["loss"].value) == pytest.approx(float((nll * batch.weights).sum() / batch.weights.sum()), rel=1e-6)
    assert float(means["loss"].weight) == batch.weights.sum()
    np.testing.assert_allclose(token_nll(head, hidden, batch.targets, 5), nll, atol=1e-5)
    changed = Batch(batch.tokens, np.where(batch.weights > 0, batch.targets, 0), batch.weights, batch.segments, batch.positions)
    assert float(next_token()(functools.partial(net.apply, params), changed)["loss"].total) == float(means["loss"].total)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        next_token(label_smoothing=1.0)
    with pytest.raises(ValueError, match="chunk=0"):
        next_token(chunk=0)


def test_a_routers_imbalance_is_lowered_too():
    batch = tiny.batch(rows=2)
    aux = {"balance": Mean(jnp.float32(6.0), jnp.float32(2.0))}
    forward = lambda batch: (jnp.zeros((2, 16, 8)), head_of(jnp.ones((8, 67))), aux)  # noqa: E731
    plain, more = (next_token(balance=weight)(forward, batch) for weight in (0.0, 0.5))
    assert float(more["loss"].value) == pytest.approx(float(plain["loss"].value) + 1.5, rel=1e-6)
    assert float(more["nll"].value) == pytest.approx(float(plain["nll"].value)) and float(more["balance"].value) == 3
