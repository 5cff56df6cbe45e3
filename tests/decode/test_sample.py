"""Choosing tokens: top-k and top-p against brute force and against transformers, and draws that follow the odds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tuning.decode import sample


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 2, (5, 40)).astype(np.float32)


def nucleus(logits_V, p):
    """The shortest prefix of the tokens, most probable first, whose probability reaches p."""
    probs = np.exp(logits_V.astype(np.float64))
    probs /= probs.sum()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    return set(next(order[:n] for n in range(1, len(order) + 1) if n == len(order) or probs[order[:n]].sum() >= p))


def kept(logits):
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(logits)]


@pytest.mark.parametrize("k", [1, 3, 40, 1000])
def test_top_k_keeps_the_k_highest_as_transformers_does(logits, k):
    ours = np.asarray(sample.keep_top_k(jnp.asarray(logits), k))
    assert kept(ours) == [set(np.argsort(-row)[:k].tolist()) for row in logits]
    np.testing.assert_array_equal(ours, TopKLogitsWarper(k)(None, torch.tensor(logits)).numpy())


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_nucleus_as_transformers_does(logits, p):
    ours = np.asarray(sample.keep_top_p(jnp.asarray(logits), p))
    assert kept(ours) == [nucleus(row, p) for row in logits]
    np.testing.assert_array_equal(ours, TopPLogitsWarper(p)(None, torch.tensor(logits)).numpy())


def test_the_nucleus_is_smallest_even_among_equals():
    assert kept(sample.keep_top_p(jnp.zeros((1, 8)), 0.5)) == [{0, 1, 2, 3}]


def test_the_order_is_temperature_then_top_k_then_top_p(logits):
    temperature, k, p = 1.7, 6, 0.8
    warped = torch.tensor(logits)
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        warped = warper(None, warped)
    draw = jax.jit(lambda keys_B: sample.choose(jnp.asarray(logits), keys_B, temperature=temperature, top_k=k, top_p=p))
    drawn = np.stack([draw(sample.token_keys(seed, jnp.zeros(5, jnp.int32))) for seed in range(300)])
    assert [set(column.tolist()) for column in drawn.T] == kept(warped.numpy())


def test_draws_have_the_odds_that_the_temperature_gives_them():
    odds = np.array([0.1, 0.2, 0.7])
    rows = 4000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(odds, jnp.float32))[None], (rows, 3))
    keys_B = sample.token_keys(0, jnp.zeros(rows, jnp.int32))
    for temperature in (1.0, 0.5):
        tokens = sample.choose(logits, keys_B, temperature=temperature, top_k=0, top_p=1.0)
        expected = odds ** (1 / temperature) / (odds ** (1 / temperature)).sum()
        np.testing.assert_allclose(np.bincount(tokens, minlength=3) / rows, expected, atol=4 * 0.5 / rows**0.5)


def test_temperature_zero_is_greedy_whatever_the_key(logits):
    tokens = sample.choose(jnp.asarray(logits), sample.token_keys(3, jnp.arange(5)), temperature=0.0, top_k=0, top_p=1.0)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_no_two_draws_of_a_run_share_a_key():
    keys = [jax.random.key_data(sample.token_keys(seed, jnp.full(4, position))) for seed in range(3) for position in range(5)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * 5 * 4


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
    ids=str,
)
def test_a_setting_out_of_its_range_is_named_with_its_value(setting):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=rf"^{name}={value} must .* Set "):
        sample.check(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | setting)
