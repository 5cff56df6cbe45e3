"""LoKr: the change of a kernel as a Kronecker product (Yeh et al., 2023, arXiv:2309.14859; Edalati et al., 2022, arXiv:2212.10650).

Shapes: L layers of a segment, D = M N input width, F = P Q output width, R rank.
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


class Kronecker(nnx.Module):
    """x W + b + scale * x (W1 kron W2), W1 [M, P] and W2 [N, Q]; a factor of low rank is W1b W1a, or W2b W2a.

    Each leaf is the transpose of PEFT's of its name. W1 starts at zero.
    """

    def __init__(self, site: Site, rank: int, scale: float, factor: int, both: bool, rngs: nnx.Rngs):
        (M, N), (P, Q) = (split(width, factor) for width in site.shape)
        leaf = lambda shape: nnx.Param(kernels.uniform(rngs.params(), shape), out_sharding=(None, None))  # noqa: E731
        zero = lambda shape: nnx.Param(jnp.zeros(shape), out_sharding=(None, None))  # noqa: E731
        thin_1, thin_2 = both and rank < max(M, P) / 2, rank < max(N, Q) / 2
        self.w1 = None if thin_1 else zero((M, P))
        self.w1_a = zero((rank, P)) if thin_1 else None
        self.w1_b = leaf((M, rank)) if thin_1 else None
        self.w2 = None if thin_2 else leaf((N, Q))
        self.w2_a = leaf((rank, Q)) if thin_2 else None
        self.w2_b = leaf((N, rank)) if thin_2 else None
        self.scale = scale

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        own = {name: leaf[...] for name in LEAVES if (leaf := getattr(self, name)) is not None}
        w1_MP, w2_NQ = factors(own)
        y = matmul(x.reshape(*x.shape[:-1], w1_MP.shape[0], w2_NQ.shape[0]), w2_NQ * self.scale)  # [..., M, Q]
        y = matmul(y.swapaxes(-1, -2), w1_MP).swapaxes(-1, -2)  # [..., P, Q]
        return project(x) + y.reshape(*x.shape[:-1], -1)


LEAVES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def factors(own: Leaves) -> tuple[jax.Array, jax.Array]:
    """W1 [..., M, P] and W2 [..., N, Q]."""
    w1, w2 = (own[w] if w in own else own[f"{w}_b"] @ own[f"{w}_a"] for w in ("w1", "w2"))
    return w1, w2


def split(width: int, factor: int) -> tuple[int, int]:
    """(small, large), whose product is the width; PEFT's choice.

    The factor and the rest, where it divides the width; else the divisors that are nearest to each other, of which the smaller one is not
    above the factor (-1: no bound).
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    bound = width if factor == -1 else factor
    small = max(m for m in range(1, width + 1) if width % m == 0 and m * m <= width and m <= bound)
    return small, width // small


def lokr(
    outline: Outline,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    targets: tuple[str, ...] = ("all",),
    factor: int = -1,
    decompose_both: bool = False,
) -> Method:
    """Kronecker products, scaled by alpha / rank, at the sites that `targets` name (as LoRA's do).

    rank, alpha     by default PEFT's
    factor          how widths are split into two: into this many pieces, or, with -1, as evenly as possible
    decompose_both  whether the first factor, too, is a product of rank `rank`; a factor is one only where that is less than half its width
    """
    kernels.check(rank=rank, alpha=alpha)
    if factor < 1 and factor != -1:
        raise ValueError(f"method.factor={factor}: it is a number of pieces, at least 1, or -1 to split widths as evenly as possible.")
    scale = alpha / rank
    make = lambda site, rngs: Kronecker(site, rank, scale, factor, decompose_both, rngs)  # noqa: E731
    sites = kernels.answered(kernels.chosen(outline, targets), make)

    def adapted(role: str, kernel_LDF: jax.Array, own: Leaves) -> jax.Array:
        w1_LMP, w2_LNQ = factors(own)
        return kernel_LDF + scale * jnp.einsum("lmp,lnq->lmnpq", w1_LMP, w2_LNQ).reshape(kernel_LDF.shape)

    gain = lambda name: scale if name.endswith(("/adapter/w1", "/adapter/w1_a")) else 1.0  # noqa: E731
    return Method(tuned=added, sites=sites, fold=functools.partial(kernels.fold, adapted=adapted), gain=gain, loose=("alpha",))
