"""Bottleneck adapters: a narrow network after, or beside, a sublayer (Houlsby et al., 2019, arXiv:1902.00751).

Shapes: B sequences, T tokens, D width, M width of the adapter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.methods.method import Method, added
from tuning.nn.linear import fan_in
from tuning.nn.mlp import ACTIVATIONS
from tuning.nn.norm import Norm
from tuning.nn.sites import Outline, Site, Sites, along_last
from tuning.nn.weight import matmul

PLACES = ("houlsby", "pfeiffer", "parallel")


class Adapter(nnx.Module):
    """up(activation(down(x))), added to what the sublayer says. `up` starts at zero, so the network starts at its base."""

    def __init__(self, site: Site, width: int, place: str, activation: str, scale: float, rngs: nnx.Rngs):
        D = site.shape[0]
        self.down = nnx.Param(fan_in(rngs.params(), (D, width)), out_sharding=("embed", None))
        self.down_bias = nnx.Param(jnp.zeros(width), out_sharding=(None,))
        self.up = nnx.Param(jnp.zeros((width, D)), out_sharding=(None, "embed"))
        self.up_bias = nnx.Param(jnp.zeros(D), out_sharding=("norm",))
        self.place, self.activation, self.scale = place, activation, scale

    def __call__(self, residual_BTD: jax.Array, y_BTD: jax.Array, norm: Norm | None, key: jax.Array | None) -> jax.Array:
        if self.place == "houlsby":
            x_BTD = y_BTD
        elif self.place == "parallel":
            x_BTD = residual_BTD
        else:
            x_BTD = residual_BTD + y_BTD
            x_BTD = x_BTD if norm is None else norm(x_BTD)
        inside = matmul(x_BTD, self.down[...])
        inside = ACTIVATIONS[self.activation](inside + along_last(self.down_bias[...], inside))
        out_BTD = matmul(inside, self.up[...])
        return y_BTD + self.scale * (out_BTD + along_last(self.up_bias[...], out_BTD))


def bottleneck(outline: Outline, *, width: int = 64, place: str = "pfeiffer", activation: str = "relu", scale: float = 1.0) -> Method:
    """Adapters of `width` in every layer (64 is in the middle of what Houlsby et al. tried); they cannot be folded into the base.

    place  "houlsby": after attention and after the feed-forward layer, reading what the sublayer says. "pfeiffer": after the feed-forward
           layer only, reading the residual stream with it (Pfeiffer et al., 2021, arXiv:2005.00247). "parallel": beside the feed-forward
           layer, reading what went into it (He et al., 2022, arXiv:2110.04366, who scale by 4)
    """
    if width < 1:
        raise ValueError(f"method.width={width}: an adapter is at least 1 wide.")
    if place not in PLACES or activation not in ACTIVATIONS:
        raise ValueError(
            f"method.place={place!r} is one of {', '.join(PLACES)}, method.activation={activation!r} of {', '.join(ACTIVATIONS)}."
        )
    if not outline.branches:
        raise ValueError("This network offers no place for bottleneck adapters: it has no attention or feed-forward layers.")

    def branch(site: Site, rngs: nnx.Rngs) -> Adapter | None:
        there = place == "houlsby" or site.role.endswith("mlp")
        return Adapter(site, width, place, activation, scale, rngs) if there else None

    gain = lambda name: scale if name.endswith(("/adapter/up", "/adapter/up_bias")) else 1.0  # noqa: E731
    return Method(tuned=added, sites=Sites(branch=branch), fold=None, gain=gain, loose=("scale",))
