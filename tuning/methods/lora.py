"""LoRA: the change of a kernel as a product of two thin matrices (Hu et al., 2021, arXiv:2106.09685).

Shapes: L layers of a segment, D input width, F output width, R rank.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods.method import Method
from tuning.nn.dropout import dropout
from tuning.nn.sites import Outline, Project, Site, Sites, matmul


class LowRank(nnx.Module):
    """x W + b + scale * dropout(x) A B. B starts at zero, so the network starts exactly at its base."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(site.shape[0])  # PEFT's start: Kaiming uniform with a = sqrt 5
        a_DR = jax.random.uniform(rngs.params(), (site.shape[0], rank), minval=-bound, maxval=bound)
        self.a = nnx.Param(a_DR, out_sharding=(site.axes[0], "rank"))
        self.b = nnx.Param(jnp.zeros((rank, site.shape[1])), out_sharding=("rank", site.axes[1]))
        self.scale, self.dropout = scale, dropout

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        z = dropout(x, self.dropout, key)
        return project(x) + matmul(matmul(z, self.a[...]) * self.scale, self.b[...])


def lora(
    outline: Outline,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all",),
    rank_stabilized: bool = False,
) -> Method:
    """Low-rank updates at the sites that `targets` name: roles (`q`, `mlp/down`), regular expressions for whole roles, or `all`.

    The update is scaled by alpha / rank, or by alpha / sqrt(rank) if rank-stabilised (Kalajdzievski, 2023, arXiv:2312.03732).
    """
    if rank < 1:
        raise ValueError(f"method.rank={rank}: a rank is at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"method.dropout={dropout}: a dropout rate lies in [0, 1).")
    roles = dict.fromkeys(site.role for site in outline.sites)
    for target in targets or ("",):
        if target != "all" and not any(site.matches(target) for site in outline.sites):
            raise ValueError(f"method.targets: {target!r} matches no site of this model. There are: {', '.join(roles)}.")
    scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)

    def weight(site: Site, rngs: nnx.Rngs) -> LowRank | None:
        chosen = "all" in targets or any(site.matches(target) for target in targets)
        return LowRank(site, rank, scale, dropout, rngs) if chosen else None

    def fold(params: Tree) -> Tree:
        leaves = tree.flatten(params)
        for name in [n for n in leaves if n.endswith("/adapter/a")]:
            place = name.removesuffix("/adapter/a")
            kernel, a, b = leaves[f"{place}/kernel"], leaves.pop(name), leaves.pop(f"{place}/adapter/b")
            update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
            leaves[f"{place}/kernel"] = (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)
        return tree.unflatten(leaves)

    return Method(tuned=lambda name: "/adapter/" in name, sites=Sites(weight=weight), fold=fold)
