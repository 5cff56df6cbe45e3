"""Tiny recurrent networks and random batches, for tests of several rooms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tuning.core import tree
from tuning.core.types import Batch
from tuning.models import network
from tuning.models.heads import HeadConfig
from tuning.models.recurrent import RecurrentConfig
from tuning.nn.sites import NOTHING

V = 37
LM = RecurrentConfig(vocab_size=V, width=12, hidden=16, layers=2)
GRU = dataclasses.replace(LM, cell="gru")
TAGS = HeadConfig(output="classes", classes=tuple("abcde"), bias=True)
BOTH = dataclasses.replace(LM, bidirectional=True, head=TAGS)
BOTH_GRU = dataclasses.replace(BOTH, cell="gru")
CONFIGS = {"lstm": LM, "gru": GRU, "lstm both ways": BOTH, "gru both ways": BOTH_GRU}


@functools.cache
def build(config, sites=NOTHING, cuts=()):
    return network.build(config.construct(sites, cuts))


@functools.cache
def outline(config):
    return network.outline(config.construct, config.layers)


@functools.cache
def init(net, scale=1.0):
    """Random in every leaf, biases and adapters included; a `scale` above 1 makes for livelier answers."""
    rng = np.random.default_rng(0)

    def leaf(name, abstract):
        size = {"table": 1.0, "bias": 0.3, "a": 0.1, "b": 0.1}.get(name.rsplit("/", 1)[-1]) or abstract.shape[-2] ** -0.5
        return jnp.asarray(scale * size * rng.normal(size=abstract.shape), jnp.float32)

    return tree.map_named(leaf, net.abstract)


@jax.jit(static_argnums=0)
def outputs(net, params, batch, key=None):
    """(hidden_BTD, logits)"""
    hidden, head, _ = net.apply(params, batch, key)
    return hidden, head(hidden)


def one_segment(tokens, real=None):
    real = np.ones_like(tokens) if real is None else real
    return Batch(tokens, np.roll(tokens, -1, 1), real.astype(np.float32), real, np.maximum(real.cumsum(1) - 1, 0))


def tokens_of(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, length)).astype(np.int32)


def packed(rows=8, length=16, seed=0, classes=V):
    """Two segments per row, padding between them and at the end."""
    tokens = tokens_of(rows, length, seed)
    segments = np.zeros_like(tokens)
    for row in range(rows):
        segments[row, : 3 + row % 4] = 1
        segments[row, 4 + row % 4 : length - row % 3] = 2
    positions = np.where(segments == 2, np.arange(length)[None] - (segments != 2).argmin(1)[:, None], np.arange(length)[None])
    targets = np.roll(tokens, -1, 1) % classes
    return Batch(tokens, targets, (segments != 0).astype(np.float32), segments, (positions * (segments != 0)).astype(np.int32))


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1.0, np.abs(theirs).max()))
