"""The feed-forward layer: gated (Shazeer, 2020, arXiv:2002.05202) or plain."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import keys
from tuning.nn.dropout import dropout
from tuning.nn.linear import Linear
from tuning.nn.sites import Site, Sites


def gelu(x: jax.Array) -> jax.Array:
    """x times the share of a normal distribution that is below x, by erf in float32, as PyTorch has it.

    jax.nn.gelu has it by erfc, which XLA's CPU code makes of an exponential and two polynomials.
    """
    x_32 = x.astype(jnp.float32)
    return (0.5 * x_32 * (1 + jax.lax.erf(x_32 * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or without a gate down(activation(up(x))).

    fused    gate and up are one kernel, the gate's half first
    dropout  between activation and `down`, while training
    """

    def __init__(
        self, width: int, hidden: int, activation: str, *, gated: bool, fused: bool, bias: bool, dropout: float,
        prefix: str, layers: range, sites: Sites, rngs: nnx.Rngs,
    ):  # fmt: skip
        make = functools.partial(Linear, sites=sites, rngs=rngs, bias=bias)
        into = lambda name, size: make(Site(f"{prefix}mlp/{name}", (width, size), ("embed", "mlp"), layers))  # noqa: E731
        self.gate_up = into("gate_up", 2 * hidden) if fused else None
        self.gate = into("gate", hidden) if gated and not fused else None
        self.up = None if fused else into("up", hidden)
        self.down = make(Site(f"{prefix}mlp/down", (hidden, width), ("mlp", "embed"), layers))
        self.activation, self.dropout = activation, dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if self.gate_up is not None:
            parts = jnp.split(self.gate_up(x, keys.fold(key, "mlp/gate_up")), 2, axis=-1)
        else:
            named = {"mlp/gate": self.gate, "mlp/up": self.up}
            parts = [project(x, keys.fold(key, name)) for name, project in named.items() if project is not None]
        # Made again in the backward pass: cheaper than keeping what lies between.
        act = lambda first, *up: ACTIVATIONS[self.activation](first) * up[0] if up else ACTIVATIONS[self.activation](first)  # noqa: E731
        hidden = jax.checkpoint(act, prevent_cse=False)(*parts)
        return self.down(dropout(hidden, self.dropout, keys.fold(key, "mlp")), keys.fold(key, "mlp/down"))
