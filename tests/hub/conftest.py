"""What the tests of the hub share: tiny checkpoints, written once per session, and our network read from them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import checkpoints
from tuning.core import mesh, tree
from tuning.core.types import Batch
from tuning.hub import checkpoint, families
from tuning.models import network
from tuning.nn.sites import NOTHING


class Ours:
    """A checkpoint as our network: config, network, params, and its logits."""

    def __init__(self, directory: Path, sites=NOTHING, cuts=(), where=None, **changes: Any):
        self.raw = checkpoint.read_config(directory)
        self.table = families.table(self.raw)
        self.config = families.config_from(self.raw).replace(**changes)
        self.network = network.build(self.config.construct(sites, cuts))
        base, self.extra = tree.split(self.network.abstract, lambda name: "/adapter/" not in name and not name.endswith("/added"))
        axes, _ = tree.split(self.network.axes, lambda name: name in tree.flatten(base))
        where = where or mesh.over(jax.devices()[:1])
        self.params = checkpoint.load(directory, base, mesh.shardings(base, axes, where), lambda name: jnp.float32, self.raw)

    def logits(self, tokens, mask=None, params=None) -> np.ndarray:
        batch = make_batch(tokens, mask)
        return np.asarray(_logits(self.network.apply, self.params if params is None else params, batch))


def make_batch(tokens: np.ndarray, mask: np.ndarray | None = None) -> Batch:
    tokens = jnp.asarray(tokens, jnp.int32)
    segments = jnp.ones_like(tokens) if mask is None else jnp.asarray(mask, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Batch(tokens, jnp.roll(tokens, -1, 1), segments.astype(jnp.float32), segments, positions)


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply, params, batch):
    hidden, head, _ = apply(params, batch)
    return head(hidden)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """family -> the directory of its tiny checkpoint."""
    return functools.cache(lambda family: checkpoints.tiny(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def ours_of(checkpoint_of):
    return functools.cache(lambda family: Ours(checkpoint_of(family)))


@pytest.fixture(scope="session")
def reference_of(checkpoint_of):
    auto = lambda family: checkpoints.FAMILIES[family].get("auto", "CausalLM")  # noqa: E731
    return functools.cache(lambda family: checkpoints.reference(checkpoint_of(family), auto(family)))


@pytest.fixture(scope="session")
def ours():
    """(directory, sites, cuts, where, **changes to the config) -> our network with the directory's parameters."""
    return Ours


@pytest.fixture(scope="session")
def batch_of():
    return make_batch
