"""LoHa: the change of a kernel as the elementwise product of two low-rank matrices (Hyeon-Woo et al., 2021, arXiv:2108.06098).

The product of two matrices of rank R can have rank R^2. Shapes: L layers of a segment, D input width, F output width, R rank.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.methods import kernels
from tuning.methods.kernels import Leaves
from tuning.methods.method import Method, added
from tuning.nn.sites import Outline, Project, Site
from tuning.nn.weight import matmul


class Hadamard(nnx.Module):
    """x W + b + scale * x ((W1b W1a) * (W2b W2a)); each leaf is the transpose of PEFT's of its name. W2b starts at zero."""

    def __init__(self, site: Site, rank: int, scale: float, rngs: nnx.Rngs):
        (D, F), (into, out) = site.shape, site.axes
        factor = lambda shape, axes: nnx.Param(kernels.uniform(rngs.params(), shape), out_sharding=axes)  # noqa: E731
        self.w1_a = factor((rank, F), ("rank", out))
        self.w1_b = factor((D, rank), (into, "rank"))
        self.w2_a = factor((rank, F), ("rank", out))
        self.w2_b = nnx.Param(jnp.zeros((D, rank)), out_sharding=(into, "rank"))
        self.scale = scale

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        leaves = {name: getattr(self, name)[...] for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return project(x) + matmul(x, self.scale * change(leaves))


def change(own: Leaves) -> jax.Array:
    """[..., D, F], before it is scaled."""
    return (own["w1_b"] @ own["w1_a"]) * (own["w2_b"] @ own["w2_a"])


def loha(outline: Outline, *, rank: int = 8, alpha: float = 8.0, targets: tuple[str, ...] = ("all",)) -> Method:
    """Hadamard products of low-rank matrices, scaled by alpha / rank, at the sites that `targets` name (as LoRA's do).

    A site has twice the parameters of a LoRA of the same rank. Rank and alpha are by default PEFT's.
    """
    kernels.check(rank=rank, alpha=alpha)
    scale = alpha / rank
    sites = kernels.answered(kernels.chosen(outline, targets), lambda site, rngs: Hadamard(site, rank, scale, rngs))

    def adapted(role: str, kernel_LDF: jax.Array, own: Leaves) -> jax.Array:
        return kernel_LDF + scale * change(own)

    gain = lambda name: scale if name.endswith("/adapter/w2_b") else 1.0  # noqa: E731
    return Method(tuned=added, sites=sites, fold=functools.partial(kernels.fold, adapted=adapted), gain=gain, loose=("rank", "alpha"))
