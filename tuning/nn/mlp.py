"""The gated feed-forward layer (Shazeer, 2020, arXiv:2002.05202)."""

from __future__ import annotations

import functools

import jax
from flax import nnx

from tuning.core import keys
from tuning.nn.linear import Linear
from tuning.nn.sites import Site, Sites

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool, layers: tuple[int, int], sites: Sites, rngs: nnx.Rngs):
        make = functools.partial(Linear, sites=sites, rngs=rngs, bias=bias)
        self.gate = make(Site("mlp/gate", (width, hidden), ("embed", "mlp"), layers))
        self.up = make(Site("mlp/up", (width, hidden), ("embed", "mlp"), layers))
        self.down = make(Site("mlp/down", (hidden, width), ("mlp", "embed"), layers))
        self.activation = activation

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        gate, up = self.gate(x, keys.fold(key, "mlp/gate")), self.up(x, keys.fold(key, "mlp/up"))
        # Made again in the backward pass: cheaper than keeping what lies between.
        gated = jax.checkpoint(lambda gate, up: ACTIVATIONS[self.activation](gate) * up, prevent_cse=False)
        return self.down(gated(gate, up), keys.fold(key, "mlp/down"))
