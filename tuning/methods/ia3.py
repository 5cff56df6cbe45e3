"""IA3: a learned factor for each channel of keys, values and the feed-forward layer's inside (Liu et al., 2022, arXiv:2205.05638).

Shapes: D input width, F output width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods.method import Method
from tuning.nn.sites import Outline, Project, Site, Sites, along_last

DEFAULT = ("k", "v", "qkv", "down")


class Factors(nnx.Module):
    """project(x) * s, or project(x * s) on the feed-forward layer's way down. s starts at one, so the network starts at its base."""

    def __init__(self, site: Site):
        self.inside = site.role.endswith("mlp/down")
        side = 0 if self.inside else 1
        self.scale = nnx.Param(jnp.ones(site.shape[side]), out_sharding=(site.axes[side],))

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        if self.inside:
            return project(x * along_last(self.scale[...], x))
        y = project(x)
        return y * along_last(self.scale[...], y)


def ia3(outline: Outline, *, targets: tuple[str, ...] = ()) -> Method:
    """Factors at the sites that `targets` name, as for LoRA: on what a projection says or, on the feed-forward layer's way down, on what it
    reads. By default keys, values (all of a fused `qkv`) and the way down, as published."""
    roles = outline.chosen(targets or [t for t in DEFAULT if any(site.matches(t) for site in outline.sites)])

    def fold(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        for name in [n for n in leaves if n.endswith("/adapter/scale")]:
            place, scale = name.removesuffix("/adapter/scale"), leaves.pop(name)
            inside = place.endswith("mlp/down")
            factors = {"kernel": scale[..., :, None]} if inside else {"kernel": scale[..., None, :], "bias": scale}
            for leaf, factor in ((f"{place}/{part}", factor) for part, factor in factors.items() if f"{place}/{part}" in leaves):
                leaves[leaf] = (leaves[leaf].astype(jnp.float32) * factor).astype(leaves[leaf].dtype)
        return tree.unflatten(leaves)

    weight = lambda site, rngs: Factors(site) if site.role in roles else None  # noqa: E731
    return Method(tuned=lambda name: "/adapter/" in name, sites=Sites(weight=weight), fold=fold)
