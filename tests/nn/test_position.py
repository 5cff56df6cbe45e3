"""Biases on attention's scores: ALiBi as transformers computes it, and gradients of a bias of either shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tuning.nn import position
from tuning.nn.attention import How, attend


@pytest.mark.parametrize("heads", [1, 12, 32, 71, 128])
def test_the_bias_of_keys_is_rounded_as_falcon_rounds_it(heads):
    torch = pytest.importorskip("torch")
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    mask = torch.ones(2, 2100, dtype=torch.long)
    theirs = build_alibi_tensor(mask, heads, torch.float32).reshape(2, heads, 1, -1).numpy()
    positions = jnp.broadcast_to(jnp.arange(2100), (2, 2100))
    ours = jax.jit(position.alibi_of_keys, static_argnums=0)(heads, positions)
    assert np.array_equal(ours, theirs)
    plain = position.slopes(heads).reshape(-1, 1, 1) * np.arange(2100, dtype=np.float32)
    assert np.abs(plain - theirs[0]).max() > 0.5  # what the rounding changes


@pytest.mark.parametrize("shape", [(4, 5, 7), (2, 4, 1, 7)])
def test_a_bias_and_its_gradient_are_those_of_the_plain_formula(shape):
    draw = np.random.default_rng(0).normal
    q, k, v, dy = (draw(size=(2, length, heads, 8)).astype(np.float32) for length, heads in ((5, 4), (7, 2), (7, 2), (5, 4)))
    bias, mask = jnp.asarray(draw(size=shape), jnp.float32), np.random.default_rng(1).random((2, 1, 5, 7)) < 0.8

    def plain(bias):
        scores = jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, 5, 2, 2, 8), k).reshape(2, 4, 5, 7) / 3
        shares = jax.nn.softmax(jnp.where(mask, scores + bias.reshape(-1, *shape[-3:]), -1e30)).reshape(2, 2, 2, 5, 7)
        return jnp.einsum("bkgts,bskh->btkgh", shares, v).reshape(2, 5, 4, 8)

    ours = lambda bias: attend(How(1 / 3, 0.0, 0.0, "highest"), *map(jnp.asarray, (q, k, v, mask)), bias)  # noqa: E731
    assert np.abs(ours(bias) - plain(bias)).max() < 1e-5
    gradients = [jax.grad(lambda bias, f=f: (f(bias) * dy).sum())(bias) for f in (ours, plain)]
    assert gradients[0].shape == shape and np.abs(gradients[0] - gradients[1]).max() < 1e-5 * np.abs(gradients[1]).max()
