"""A transformer layer: attention and feed-forward, normalised and added to the residual stream in the family's order.

Shapes: B sequences, T tokens, S keys, D width, N heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from tuning.core import keys
from tuning.nn.attention import Attention, Seen, Shape, Store
from tuning.nn.dropout import dropout
from tuning.nn.mlp import MLP
from tuning.nn.moe import MoE
from tuning.nn.norm import Norm
from tuning.nn.sites import Site, Sites

# Where a sublayer f is normalised, x being what came in:
#   before         x + f(norm(x))
#   after          norm(x + f(x))
#   around         x + norm(f(norm(x)))
#   within         x + norm(f(x))
#   parallel       x + attention(norm(x)) + mlp(norm'(x))
#   parallel_one   the same with one norm for both
ORDERS = ("before", "after", "around", "within", "parallel", "parallel_one")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells a layer from others of its network.

    window     a token sees itself and the window - 1 before it (and after it, where attention is not causal); None for all
    rope       "global" or "local", which of the network's rotary frequencies it uses; "" for no rotation
    routed     its feed-forward layer is a mixture of experts
    attn_norm  it normalises before attention (a first layer may follow a norm already)
    """

    window: int | None = None
    rope: str = "global"
    routed: bool = False
    attn_norm: bool = True


@dataclasses.dataclass(frozen=True)
class Layer:
    """The sizes and variations that all layers of a stack share.

    hidden   width of the feed-forward layer; expert_hidden, that of each of the `experts`, of which a token uses `per_token`
    normalize_experts  whether the chosen experts' shares are made to sum to 1
    cross    whether there is attention to an encoder's output between the two sublayers
    dropout  of what the sublayers add that `dropped` names; mlp_dropout, inside the feed-forward layer; both while training
    prefix   of the sites' roles
    """

    attention: Shape
    order: str
    norm: str
    eps: float
    hidden: int
    activation: str
    gated: bool
    fused_mlp: bool
    mlp_bias: bool
    dropout: float
    mlp_dropout: float
    dropped: tuple[str, ...] = ("attn", "mlp")
    cross: bool = False
    experts: int = 0
    per_token: int = 0
    expert_hidden: int = 0
    normalize_experts: bool = True
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers of one forward pass share.

    seen    who sees whom, for each kind of layer
    real    [B, T], true where a token is no padding
    cross   who sees whom in an encoder's output, and that output [B, S, D] (None where its keys and values are in the cache)
    """

    seen: dict[Kind, Seen]
    real: jax.Array
    cross: Seen | None = None
    source: jax.Array | None = None


class Block(nnx.Module):
    """One layer; `layers` are those that are stacked with it."""

    def __init__(self, layer: Layer, kind: Kind, layers: range, sites: Sites, rngs: nnx.Rngs):
        c, width = layer, layer.attention.width
        norm = lambda there: Norm(c.norm, width, c.eps) if there else None  # noqa: E731
        self.attn_norm = norm(c.order != "within" and kind.attn_norm)
        self.attn = Attention(c.attention, f"{c.prefix}attn", layers, sites, rngs)
        branch = lambda name: Branch(Site(f"{c.prefix}{name}", (width, width), ("embed", "norm"), layers), sites, rngs)  # noqa: E731
        self.attn_branch, self.mlp_branch = branch("attn"), branch("mlp")
        self.attn_out_norm = norm(c.order in ("around", "within"))
        self.cross_norm = norm(c.cross)
        self.cross = Attention(c.attention, f"{c.prefix}cross", layers, sites, rngs) if c.cross else None
        self.mlp_norm = norm(c.order not in ("within", "parallel_one"))
        if kind.routed:
            self.mlp = MoE(width, c.expert_hidden, c.experts, c.per_token, c.activation, c.normalize_experts, layers, rngs)
        else:
            self.mlp = MLP(
                width, c.hidden, c.activation, gated=c.gated, fused=c.fused_mlp, bias=c.mlp_bias, dropout=c.mlp_dropout,
                prefix=c.prefix, layers=layers, sites=sites, rngs=rngs,
            )  # fmt: skip
        self.mlp_out_norm = norm(c.order in ("around", "within"))
        self.order, self.dropout, self.dropped = c.order, c.dropout, c.dropped

    def __call__(
        self, x_BTD: jax.Array, context: Context, kind: Kind, key: jax.Array | None, store: Store | None, memory: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(x_BTD, sums that the layer measures). store: writes into a cache; memory: an encoder's (keys, values), None to compute them."""
        seen = context.seen[kind]
        if self.order in ("parallel", "parallel_one"):
            normed = _maybe(self.attn_norm, x_BTD)
            added = self.attn(normed, seen, key, store)
            up, measured = self._mlp(normed if self.mlp_norm is None else self.mlp_norm(x_BTD), context, key)
            return x_BTD + (self._change("attn", x_BTD, added, None, key) + self._change("mlp", x_BTD, up, None, key)), measured
        before = self.order in ("before", "around")
        added = self.attn(_maybe(self.attn_norm, x_BTD) if before else x_BTD, seen, key, store)
        x_BTD = self._add("attn", x_BTD, _maybe(self.attn_out_norm, added), self.attn_norm, key)
        if self.cross is not None:
            assert context.cross is not None and self.cross_norm is not None
            source: Any = context.source
            k, v = self.cross.memory(source, key) if memory is None else memory
            across = self.cross.across(self.cross_norm(x_BTD), k, v, context.cross, key)
            x_BTD = x_BTD + dropout(across, self.dropout, keys.fold(key, "add/cross"))
        up, measured = self._mlp(_maybe(self.mlp_norm, x_BTD) if before else x_BTD, context, key)
        return self._add("mlp", x_BTD, _maybe(self.mlp_out_norm, up), self.mlp_norm, key), measured

    def _change(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array, norm: Norm | None, key: jax.Array | None) -> jax.Array:
        """What a sublayer that read x and said y adds to the residual stream; norm follows the sum."""
        y_BTD = dropout(y_BTD, self.dropout if name in self.dropped else 0.0, keys.fold(key, f"add/{name}"))
        branch: Branch = self.attn_branch if name == "attn" else self.mlp_branch
        return branch(x_BTD, y_BTD, norm, keys.fold(key, f"branch/{name}"))

    def _add(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array, norm: Norm | None, key: jax.Array | None) -> jax.Array:
        norm = norm if self.order == "after" else None
        return _maybe(norm, x_BTD + self._change(name, x_BTD, y_BTD, norm, key))

    def _mlp(self, x_BTD: jax.Array, context: Context, key: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.mlp(x_BTD, context.real, key) if isinstance(self.mlp, MoE) else (self.mlp(x_BTD, key), {})


class Branch(nnx.Module):
    """Where a method may change what a sublayer adds."""

    def __init__(self, site: Site, sites: Sites, rngs: nnx.Rngs):
        self.adapter = sites.branch(site, rngs)

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array, norm: Norm | None, key: jax.Array | None) -> jax.Array:
        return y_BTD if self.adapter is None else self.adapter(x_BTD, y_BTD, norm, key)


def _maybe(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
