"""IA3: a learned factor for each channel of keys, values and the feed-forward layer's inside (Liu et al., 2022, arXiv:2205.05638).

Shapes: D input width, F output width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods import kernels
from tuning.methods.method import Method, added
from tuning.nn.sites import Outline, Project, Site, along_last
from tuning.nn.weight import value

DEFAULT = ("k", "v", "qkv", "down")


def inside(role: str) -> bool:
    """Whether what the projection reads is scaled, and not what it says."""
    return role.endswith("mlp/down")


class Factors(nnx.Module):
    """project(x) * s, or project(x * s) on the feed-forward layer's way down. s starts at one, so the network starts at its base."""

    def __init__(self, site: Site):
        self.inside = inside(site.role)
        side = 0 if self.inside else 1
        self.scale = nnx.Param(jnp.ones(site.shape[side]), out_sharding=(site.axes[side],))

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        if self.inside:
            return project(x * along_last(self.scale[...], x))
        y = project(x)
        return y * along_last(self.scale[...], y)


def ia3(outline: Outline, *, targets: tuple[str, ...] = ()) -> Method:
    """Factors at the sites that `targets` name, as for LoRA: on what a projection says or, on the feed-forward layer's way down, on what it
    reads. By default keys, values (all of a fused `qkv`) and the way down, as published (with Adafactor at 3e-3)."""
    sites = kernels.chosen(outline, targets or [t for t in DEFAULT if any(site.matches(t) for site in outline.sites)])

    def fold(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        for place, role, own in kernels.adapters(leaves):
            scale = own["scale"]
            factors = {"kernel": scale[..., :, None]} if inside(role) else {"kernel": scale[..., None, :], "bias": scale}
            for leaf, factor in ((f"{place}/{part}", factor) for part, factor in factors.items() if f"{place}/{part}" in leaves):
                whole = value(leaves[leaf])
                leaves[leaf] = (whole.astype(jnp.float32) * factor).astype(whole.dtype)
        return tree.unflatten({name: leaf for name, leaf in leaves.items() if not added(name)})

    return Method(tuned=added, sites=kernels.answered(sites, lambda site, rngs: Factors(site)), fold=fold)
