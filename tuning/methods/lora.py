"""LoRA: the change of a kernel as a product of two thin matrices (Hu et al., 2021, arXiv:2106.09685), and its variants.

Shapes: L layers of a segment, D input width, F output width, R rank, H = R / 2; B sequences, T tokens, M rows of hidden states, V
vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods import kernels
from tuning.methods.kernels import Leaves
from tuning.methods.method import Method, Pace, added
from tuning.nn import stack
from tuning.nn.dropout import dropout as drop
from tuning.nn.sites import Outline, Project, Site, along_last
from tuning.nn.weight import Stored, matmul, value

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
INITS = (*DRAWN, *FROM_KERNEL, "loftq")


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
        return project(x) + (gain - 1) * (project.times(z) - taken(z)) + (gain * change - taken(x))


class Rows(nnx.Module):
    """Embedded tokens with their rows of scale * A B; where the embedding is the output too, the logits change with them.

    A [V, R] starts at zero and B [R, D] normal, as PEFT's do. Nothing is dropped.
    """

    def __init__(self, site: Site, rank: int, scale: float, rngs: nnx.Rngs):
        (V, D), (vocab, width) = site.shape, site.axes
        self.a = nnx.Param(jnp.zeros((V, rank)), out_sharding=(vocab, "rank"))
        self.b = nnx.Param(jax.random.normal(rngs.params(), (rank, D)), out_sharding=("rank", width))
        self.scale, self.looked_up = scale, scale * site.scale

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None, lookup: Callable[[jax.Array], jax.Array]) -> jax.Array:
        x_BTD = lookup(tokens_BT)
        return x_BTD + matmul(jnp.take(self.a[...], tokens_BT, axis=0).astype(x_BTD.dtype) * self.looked_up, self.b[...])

    def output(self, x_MD: jax.Array, project: Callable[[jax.Array], jax.Array], key: jax.Array | None) -> jax.Array:
        return project(x_MD) + matmul(matmul(x_MD, self.b[...].T) * self.scale, self.a[...].T)


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

    Two further roles are chosen by name alone: `embed`, the embedding (and the output, where they are tied), and `head`, the output.
    By default at all projections (Dettmers et al., 2023, arXiv:2305.14314), alpha twice the rank (Biderman et al., 2024, arXiv:2405.09673).
    The update is scaled by alpha / rank, or by alpha / sqrt(rank) if rank-stabilised (Kalajdzievski, 2023, arXiv:2312.03732).

    ranks   `target=rank`, as in ("attn/q=4", "mlp/.*=16"): the rank of the sites so named, if it is not `rank`; the first match counts
    alphas  the same for alpha
    dora    lengths and directions of the kernel's columns learn apart (DoRA: Liu et al., 2024, arXiv:2402.09353)
    b_rate  B's learning rate is so many times A's (LoRA+: Hayou et al., 2024, arXiv:2402.12354, who take 16)
    init    "default"     A uniform and B zero, so that the network starts exactly at its base; "gaussian": A normal with deviation 1 / rank
            "orthogonal"  A and B normal with deviation sqrt(1/200), in halves of the R dimensions that are orthogonal: A B is zero, to
                          rounding, though neither is, and both learn from the first step on
            "pissa"       the kernel's first singular vectors, without which it stays behind (Meng et al., 2024, arXiv:2404.02948)
            "olora"       the first part of the kernel's QR decomposition, likewise (Büyükakyüz, 2024, arXiv:2406.01775)
            "loftq"       the first singular vectors of what quantising takes from the kernel, so that the network starts closer to what was
                          published (LoftQ: Li et al., 2023, arXiv:2310.08659, with one iteration, which leaves the codes as they are)

    Adam's first steps follow signs, so they make more of what meshes round otherwise. "default" and "orthogonal" are robust: in float32
    A B of different meshes was within 6e-6 of its size after 12 steps; "gaussian" within 4e-5, an A at zero (not offered) within 4e-3.
    """
    kernels.check(rank=rank, alpha=alpha, dropout=dropout)
    sites = _chosen(outline, targets, init, dora)
    rank_of, scale_of = kernels.ranks_and_scales(sites, rank, alpha, ranks, alphas, rank_stabilized)
    if not 0 < b_rate < math.inf:
        raise ValueError(f"method.b_rate={b_rate}: it multiplies the learning rate, and is positive.")
    _check_init(init, rank_of, sites)

    def make(site: Site, rngs: nnx.Rngs) -> nnx.Module:
        rank, scale = rank_of[site.role], scale_of[site.role]
        return Rows(site, rank, scale, rngs) if site.role == "embed" else LowRank(site, rank, scale, dropout, init, dora, rngs)

    def adapted(role: str, kernel_LDF: jax.Array, own: Leaves) -> jax.Array:
        whole_LDF = whole(kernel_LDF, own, scale_of[role])
        return whole_LDF * (own["magnitude"] / jnp.linalg.norm(whole_LDF, axis=-2))[..., None, :] if dora else whole_LDF

    return Method(
        tuned=added,
        sites=kernels.answered(sites, make),
        start=functools.partial(_start, init, dora, scale_of) if dora or init in FROM_KERNEL else Method.start,
        fold=functools.partial(kernels.fold, adapted=adapted),
        residual=functools.partial(_residual, rank_of, scale_of) if init == "loftq" else None,
        pace=lambda name: Pace(rate={"b": b_rate, "a0": 0.0, "b0": 0.0}.get(name.rpartition("/adapter/")[2], 1.0)),
        gain=functools.partial(_gain, scale_of),
        loose=("rank", "ranks", "alpha", "alphas", "rank_stabilized", "init", "b_rate"),
    )


def _gain(scale_of: Mapping[str, float], name: str) -> float:
    place, _, leaf = name.rpartition("/adapter/")
    return scale_of[stack.apart(place)[0]] if leaf in ("b", "b0") else 1.0


def _chosen(outline: Outline, targets: tuple[str, ...], init: str, dora: bool) -> tuple[Site, ...]:
    if "head" in targets and not outline.heads:
        raise ValueError(
            "method.targets: 'head' is an output over the vocabulary with a kernel of its own, which this model does not have. Where it is "
            "tied to the embedding, name 'embed', which changes both."
        )
    sites = kernels.chosen(outline, targets, (*outline.embeds, *outline.heads))
    if any(site.role == "embed" for site in sites):
        if dora or init not in ("default", "gaussian"):
            raise ValueError(
                f"method.targets: 'embed' with method.dora={dora} and method.init={init!r}: the rows of an embedding change by A B alone, "
                "A starting at zero. Leave 'embed' out, or set dora=False and init='default'."
            )
        if "embed/added" in outline.leaves:
            raise ValueError("method.targets: 'embed' and model.added_tokens: the rows of new tokens learn whole. Leave one of them out.")
    return sites


def _check_init(init: str, rank_of: dict[str, int], sites: tuple[Site, ...]) -> None:
    if init not in INITS:
        raise ValueError(f"method.init={init!r} is not one of {', '.join(INITS)}.")
    for site in sites:
        rank = rank_of[site.role]
        if init == "orthogonal" and rank % 2:
            raise ValueError(f"method.init='orthogonal' halves the rank, and that of {site.role} is {rank}: set an even one.")
        if init not in DRAWN and rank > min(site.shape):
            raise ValueError(f"method.init={init!r}: a kernel {site.shape} ({site.role}) has no {rank} directions. Lower method.rank.")


def _residual(rank_of: dict[str, int], scale_of: dict[str, float], role: str, error_LDF: jax.Array) -> Leaves:
    if role not in rank_of:
        return {}
    with jax.default_matmul_precision("highest"):
        a, b = jax.lax.map(lambda error: _pissa(error, rank_of[role], scale_of[role]), error_LDF)
    return {"a": a, "b": b}


def _start(init: str, dora: bool, scale_of: dict[str, float], params: Tree) -> Tree:
    """The parameters with A and B made from the kernels where `init` says so, and the lengths of the kernels' columns as magnitudes."""
    leaves = tree.flatten(params)

    def one(scale: float, layer: tuple[Stored, Leaves]) -> Leaves:
        kernel, own = value(layer[0]), layer[1]
        new = dict(own)
        with jax.default_matmul_precision("highest"):
            if init in FROM_KERNEL:
                a, b = FROM_KERNEL[init](kernel.astype(jnp.float32), own["a"].shape[-1], scale)
                new |= {"a": a, "b": b, "a0": a, "b0": b}
            if dora:
                new["magnitude"] = lengths(kernel, new, scale)
        return {name: new[name].astype(x.dtype) for name, x in own.items()}

    for place, role, own in kernels.adapters(leaves):
        kernel, run = leaves[f"{place}/kernel"], functools.partial(one, scale_of[role])
        if len(kernel.shape) > 2:  # layer by layer: a decomposition needs several times its kernel
            run = functools.partial(jax.lax.map, run)
        made = jax.jit(run, out_shardings={name: x.sharding for name, x in own.items()})((kernel, own))
        leaves |= {f"{place}/adapter/{name}": x for name, x in made.items()}
    return tree.unflatten(leaves)
