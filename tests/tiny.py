"""A tiny decoder and random batches, for tests of every room."""

import functools

import jax
import numpy as np

from tuning.core.types import Batch
from tuning.models import network
from tuning.models.transformer import TransformerConfig
from tuning.nn.sites import NOTHING

CONFIG = TransformerConfig(vocab_size=67, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, hidden=48, max_length=64)


# Cached, so that one network is compiled once for all tests of a process.
@functools.cache
def build(config=CONFIG, sites=NOTHING, cuts=()):
    return network.build(config.construct(sites, cuts))


@functools.cache
def outline(config=CONFIG):
    return network.outline(config.construct, config.layers)


@functools.cache
def init(net, seed=0):
    return jax.jit(net.init)(jax.random.key(seed))


@jax.jit(static_argnums=0)
def logits(net, params, batch, key=None):
    """[B, T, V]"""
    hidden, head, _ = net.apply(params, batch, key)
    return head(hidden)


def batch(rows=8, length=16, vocab=67, seed=0, learned=0.7) -> Batch:
    """Two packed segments per row and some padding at its end; a share of the targets counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    first = rng.integers(2, length - 4, (rows, 1))
    last = rng.integers(length - 3, length + 1, (rows, 1))
    at = np.arange(length)[None]
    segments = np.where(at < first, 1, 2) * (at < last)
    positions = np.where(at < first, at, at - first) * (at < last)
    inside = (segments > 0) & (at != first - 1) & (at < last - 1)
    weights = (rng.random((rows, length)) < learned) * inside
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), segments.astype(np.int32), positions.astype(np.int32))
