"""LoRA: the change of a kernel as a product of two thin matrices (Hu et al., 2021, arXiv:2106.09685), and its variants.

Shapes: L layers of a segment, D input width, F output width, R rank, H = R / 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods import kernels
from tuning.methods.kernels import Leaves
from tuning.methods.method import Method, Pace, added
from tuning.nn.dropout import dropout as drop
from tuning.nn.sites import Outline, Project, Site, along_last, matmul

Pair = tuple[jax.Array, jax.Array]  # A [D, R] and B [R, F]


def _default(key: jax.Array, D: int, F: int, R: int) -> Pair:
    return kernels.uniform(key, (D, R)), jnp.zeros((R, F))


def _gaussian(key: jax.Array, D: int, F: int, R: int) -> Pair:
    return jax.random.normal(key, (D, R)) / R, jnp.zeros((R, F))


def _orthogonal(key: jax.Array, D: int, F: int, R: int) -> Pair:
    for_a, for_b, turn = jax.random.split(key, 3)
    q_RR, _ = jnp.linalg.qr(jax.random.normal(turn, (R, R)))
    a_DH, b_HF = jax.random.normal(for_a, (D, R // 2)) / 10, jax.random.normal(for_b, (R // 2, F)) / 10
    with jax.default_matmul_precision("highest"):
        return a_DH @ q_RR[0::2], q_RR[1::2].T @ b_HF


def _pissa(kernel_DF: jax.Array, rank: int, scale: float) -> Pair:
    u_DK, s_K, v_KF = jnp.linalg.svd(kernel_DF, full_matrices=False)
    root_R = jnp.sqrt(s_K[:rank] / scale)
    return u_DK[:, :rank] * root_R[None], root_R[:, None] * v_KF[:rank]


def _olora(kernel_DF: jax.Array, rank: int, scale: float) -> Pair:
    q_FK, r_KD = jnp.linalg.qr(kernel_DF.T)
    return r_KD[:rank].T, q_FK[:, :rank].T


DRAWN: dict[str, Callable[[jax.Array, int, int, int], Pair]] = {
    "default": _default, "gaussian": _gaussian, "orthogonal": _orthogonal,
}  # fmt: skip
FROM_KERNEL: dict[str, Callable[[jax.Array, int, float], Pair]] = {"pissa": _pissa, "olora": _olora}


class LowRank(nnx.Module):
    """x W + b + scale * (dropout(x) A B - x A0 B0); with a magnitude, the columns of the whole kernel have these lengths instead.

    A0 and B0, where A and B start from the kernel, are what they started from, so that the network starts exactly at its base. PEFT takes
    A0 B0 out of the kernel, which is the same in exact arithmetic. Here the base stays what was published, in any dtype: whoever loads a
    run finds A0 and B0 in its checkpoint, and needs no decomposition, which would come out otherwise in another dtype.
    """

    def __init__(self, site: Site, rank: int, scale: float, dropout: float, init: str, dora: bool, rngs: nnx.Rngs):
        a_DR, b_RF = DRAWN.get(init, _default)(rngs.params(), *site.shape, rank)
        into, out = (site.axes[0], "rank"), ("rank", site.axes[1])
        self.a, self.b = nnx.Param(a_DR, out_sharding=into), nnx.Param(b_RF, out_sharding=out)
        self.a0 = nnx.Param(jnp.zeros_like(a_DR), out_sharding=into) if init in FROM_KERNEL else None
        self.b0 = nnx.Param(jnp.zeros_like(b_RF), out_sharding=out) if init in FROM_KERNEL else None
        self.magnitude = nnx.Param(jnp.ones(site.shape[1]), out_sharding=site.axes[1:]) if dora else None
        self.scale, self.dropout = scale, dropout

    def __call__(self, x: jax.Array, project: Project, key: jax.Array | None) -> jax.Array:
        z = drop(x, self.dropout, key)
        own = {name: leaf[...] for name in LEAVES if (leaf := getattr(self, name)) is not None}
        own |= {name: jax.lax.stop_gradient(own[name]) for name in FIXED if name in own}
        through = lambda v, a, b: matmul(matmul(v, own[a]) * self.scale, own[b])  # noqa: E731
        taken = lambda v: through(v, "a0", "b0") if "a0" in own else 0  # noqa: E731
        change = through(z, "a", "b")
        if self.magnitude is None:
            return project(x) + (change - taken(x))
        lengths_F = jax.lax.stop_gradient(lengths(project.kernel, own, self.scale))  # constant, as section 4.3 of the paper has it
        gain = along_last(self.magnitude[...] / lengths_F, x)
        # Without dropout z is x, and XLA computes their products once.
        return project(x) + (gain - 1) * (matmul(z, project.kernel) - taken(z)) + (gain * change - taken(x))


LEAVES, FIXED = ("a", "b", "a0", "b0"), ("a0", "b0")


def whole(kernel: jax.Array, own: Leaves, scale: float) -> jax.Array:
    """The kernel [..., D, F] with its change, before its columns are scaled; float32."""
    factors = {name: own[name].astype(jnp.float32) for name in LEAVES if name in own}
    change = factors["a"] @ factors["b"] - (factors["a0"] @ factors["b0"] if "a0" in factors else 0)
    return kernel.astype(jnp.float32) + scale * change


def lengths(kernel: jax.Array, own: Leaves, scale: float) -> jax.Array:
    """[..., F], of the columns of that."""
    return jnp.linalg.norm(whole(kernel, own, scale), axis=-2)


def lora(
    outline: Outline,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: tuple[str, ...] = ("all",),
    ranks: tuple[str, ...] = (),
    alphas: tuple[str, ...] = (),
    rank_stabilized: bool = False,
    dora: bool = False,
    init: str = "default",
    b_rate: float = 1.0,
) -> Method:
    """Low-rank updates at the sites that `targets` name: roles (`q`, `mlp/down`), regular expressions for whole roles, or `all`.

    The update is scaled by alpha / rank, or by alpha / sqrt(rank) if rank-stabilised (Kalajdzievski, 2023, arXiv:2312.03732).

    ranks   `target=rank`, as in ("attn/q=4", "mlp/.*=16"): the rank of the sites so named, if it is not `rank`; the first match counts
    alphas  the same for alpha
    dora    lengths and directions of the kernel's columns learn apart (DoRA: Liu et al., 2024, arXiv:2402.09353)
    b_rate  B's learning rate is so many times A's (LoRA+: Hayou et al., 2024, arXiv:2402.12354)
    init    "default"     A uniform and B zero, so that the network starts exactly at its base
            "gaussian"    A normal with deviation 1 / rank, and B zero
            "orthogonal"  A and B normal with deviation sqrt(1/200), in halves of the R dimensions that are orthogonal: A B is zero, to
                          rounding, though neither is, and both learn from the first step on
            "pissa"       the kernel's first singular vectors, without which it stays behind (Meng et al., 2024, arXiv:2404.02948)
            "olora"       the first part of the kernel's QR decomposition, likewise (Büyükakyüz, 2024, arXiv:2406.01775)
    """
    kernels.check(rank=rank, alpha=alpha, dropout=dropout)
    sites = kernels.chosen(outline, targets)
    rank_of = kernels.by_role("ranks", rank, ranks, sites, int)
    alpha_of = kernels.by_role("alphas", alpha, alphas, sites)
    scale_of = {role: alpha_of[role] / (math.sqrt(r) if rank_stabilized else r) for role, r in rank_of.items()}
    if not 0 < b_rate < math.inf:
        raise ValueError(f"method.b_rate={b_rate}: it multiplies the learning rate, and is positive.")
    _check_init(init, rank_of, sites)

    def make(site: Site, rngs: nnx.Rngs) -> LowRank:
        return LowRank(site, rank_of[site.role], scale_of[site.role], dropout, init, dora, rngs)

    def adapted(role: str, kernel_LDF: jax.Array, own: Leaves) -> jax.Array:
        whole_LDF = whole(kernel_LDF, own, scale_of[role])
        return whole_LDF * (own["magnitude"] / jnp.linalg.norm(whole_LDF, axis=1))[:, None] if dora else whole_LDF

    def pace(name: str) -> Pace:
        return Pace(rate={"b": b_rate, "a0": 0.0, "b0": 0.0}.get(name.rpartition("/adapter/")[2], 1.0))

    return Method(
        tuned=added,
        sites=kernels.answered(sites, make),
        start=functools.partial(_start, init, dora, scale_of) if dora or init in FROM_KERNEL else Method.start,
        fold=functools.partial(kernels.fold, adapted=adapted),
        pace=pace,
    )


def _check_init(init: str, rank_of: dict[str, int], sites: tuple[Site, ...]) -> None:
    if init not in (*DRAWN, *FROM_KERNEL):
        raise ValueError(f"method.init={init!r} is not one of {', '.join([*DRAWN, *FROM_KERNEL])}.")
    for site in sites:
        rank = rank_of[site.role]
        if init == "orthogonal" and rank % 2:
            raise ValueError(f"method.init='orthogonal' halves the rank, and that of {site.role} is {rank}: set an even one.")
        if init in FROM_KERNEL and rank > min(site.shape):
            raise ValueError(f"method.init={init!r}: a kernel {site.shape} ({site.role}) has no {rank} directions. Lower method.rank.")


def _start(init: str, dora: bool, scale_of: dict[str, float], params: Tree) -> Tree:
    """The parameters with A and B made from the kernels where `init` says so, and the lengths of the kernels' columns as magnitudes."""
    leaves = tree.flatten(params)

    def one(scale: float, layer: tuple[jax.Array, Leaves]) -> Leaves:
        kernel, own = layer
        new = dict(own)
        with jax.default_matmul_precision("highest"):
            if init in FROM_KERNEL:
                a, b = FROM_KERNEL[init](kernel.astype(jnp.float32), own["a"].shape[-1], scale)
                new |= {"a": a, "b": b, "a0": a, "b0": b}
            if dora:
                new["magnitude"] = lengths(kernel, new, scale)
        return {name: new[name].astype(x.dtype) for name, x in own.items()}

    for place, role, own in kernels.adapters(leaves):
        run = jax.jit(  # layer by layer: a decomposition needs several times its kernel
            lambda stacked, scale=scale_of[role]: jax.lax.map(functools.partial(one, scale), stacked),
            out_shardings={name: x.sharding for name, x in own.items()},
        )
        leaves |= {f"{place}/adapter/{name}": x for name, x in run((leaves[f"{place}/kernel"], own)).items()}
    return tree.unflatten(leaves)
