"""Several adapters as one LoRA adapter: weighted sums of their factors or of their whole changes, pruned, with elected signs.

TIES (Yadav et al., 2023, arXiv:2306.01708) keeps the largest values of each adapter and, of these, at each place those of the sign that
prevails there. DARE (Yu et al., 2023, arXiv:2311.03099) keeps random values and enlarges them. Both are arithmetic on a layer's tensor.
The kinds have PEFT's names and, but for what DARE draws, its results, with two exceptions: PEFT takes "linear" for a single adapter,
whatever it is told, and multiplies by the root of the rank once more if the first adapter's scale is rank-stabilised.

Shapes: L layers of a segment, D input width, F output width, R rank, N adapters; a kernel's leading axes may be more than L, or none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tuning.core import keys
from tuning.methods import kernels
from tuning.nn.sites import Outline


class Low(NamedTuple):
    """The change scale * A B of a kernel; A [L, D, R] and B [L, R, F]."""

    a: jax.Array
    b: jax.Array
    scale: float


Pair = tuple[jax.Array, jax.Array]  # A [L, D, R] and B [L, R, F]
Change = Low | jax.Array  # of a kernel; where it is no such product, the whole of it [L, D, F]


class Kind(NamedTuple):
    """A way to combine.

    of     what is summed: "factors" (A and B, each by itself), "ranks" (nothing: the factors stand side by side), or the whole "change",
           of which the first singular vectors are kept
    prune  which values count: "" (all), the "largest" or "random" ones
    elect  whether only those of the prevailing sign do
    """

    of: str
    prune: str = ""
    elect: bool = False


KINDS = {
    "linear": Kind("factors"),
    "ties": Kind("factors", "largest", elect=True),
    "dare_linear": Kind("factors", "random"),
    "dare_ties": Kind("factors", "random", elect=True),
    "magnitude_prune": Kind("factors", "largest"),
    "cat": Kind("ranks"),
    "svd": Kind("change"),
    "ties_svd": Kind("change", "largest", elect=True),
    "dare_linear_svd": Kind("change", "random"),
    "dare_ties_svd": Kind("change", "random", elect=True),
    "magnitude_prune_svd": Kind("change", "largest"),
}
MAJORITIES = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How adapters are combined.

    how                   one of KINDS. "cat" and, where the rank suffices, "svd" give the weighted sum of the changes; "linear" sums A and
                          B, so that its change also has products of one adapter's A with another one's B
    density               the share of values that count, in (0, 1]; of the kinds that prune
    majority_sign_method  which sign prevails: that of the values' sum ("total"), or that of more values ("frequency")
    svd_rank              of the result, of the kinds that end in svd
    seed                  of what DARE draws

    ValueError for what the kind has no use for.
    """

    how: str = "svd"
    density: float | None = None
    majority_sign_method: str = "total"
    svd_rank: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.how not in KINDS:
            raise ValueError(f"how={self.how!r} is not one of {', '.join(KINDS)}.")
        if self.majority_sign_method not in MAJORITIES:
            raise ValueError(f"majority_sign_method={self.majority_sign_method!r} is not one of {', '.join(MAJORITIES)}.")
        if self.density is None and self.kind.prune:
            raise ValueError(f"how={self.how!r} prunes: give density, the share of values that it keeps.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density}: the share of values to keep lies in (0, 1].")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank={self.svd_rank}: a rank is at least 1.")
        useless = {
            "density": self.density is not None and not self.kind.prune,
            "majority_sign_method": self.majority_sign_method != "total" and not self.kind.elect,
            "svd_rank": self.svd_rank is not None and self.kind.of != "change",
        }
        if found := [key for key, given in useless.items() if given]:
            raise ValueError(f"how={self.how!r} has no use for {' and '.join(found)}. Leave that out, or choose another kind.")

    @property
    def kind(self) -> Kind:
        return KINDS[self.how]


def combine(place: str, changes: Sequence[Change], weights: Sequence[float], recipe: Recipe, rank: int) -> Pair:
    """A [L, D, R] and B [L, R, F], float32, whose product is the change of one projection that several adapters make together.

    place  the projection's name, which with the recipe's seed fixes what is drawn
    rank   of a result that is truncated; D or F, if they are less
    ValueError for changes that are no products, or of different ranks, where the kind needs that.
    """
    kind, low = recipe.kind, [c for c in changes if isinstance(c, Low)]
    with jax.default_matmul_precision("highest"):
        if kind.of == "change" and (kind.prune or len(low) < len(changes)):
            parts = [(c.a, c.b * c.scale) if isinstance(c, Low) else c for c in changes]
            return _by_layer(f"{place}/kernel", parts, weights, recipe, rank)
        if len(low) < len(changes):
            raise ValueError(f"Not every adapter changes {place} by a product A B alone. Use a kind that ends in svd, with svd_rank.")
        scaled = [weight * c.scale for c, weight in zip(low, weights, strict=True)]
        if kind.of != "factors":
            a_LDR = jnp.concatenate([c.a * x for c, x in zip(low, scaled, strict=True)], axis=-1)
            b_LRF = jnp.concatenate([c.b for c in low], axis=-2)
            return _truncated(a_LDR, b_LRF, rank) if kind.of == "change" else (a_LDR, b_LRF)
        if len(ranks := {c.a.shape[-1] for c in low}) > 1:
            raise ValueError(f"how={recipe.how!r} needs adapters of one rank, and at {place} they have {sorted(ranks)}. Use cat or svd.")
        roots = [math.sqrt(abs(x)) for x in scaled]  # half of a weight for A and half for B, and its sign for A
        signed = [math.copysign(root, x) for root, x in zip(roots, scaled, strict=True)]
        a_LDR = _by_layer(f"{place}/a", [c.a for c in low], signed, recipe)
        return a_LDR, _by_layer(f"{place}/b", [c.b for c in low], roots, recipe)


def scales(
    outline: Outline, *, rank: int, alpha: float, targets: Sequence[str], ranks: Sequence[str] = (), alphas: Sequence[str] = (),
    rank_stabilized: bool = False, **others: Any,
) -> dict[str, float]:  # fmt: skip
    """{role: scale} of LoRA with these settings."""
    sites = kernels.chosen(outline, targets, (*outline.embeds, *outline.heads))
    return kernels.ranks_and_scales(sites, rank, alpha, ranks, alphas, rank_stabilized)[1]


def layer_keys(seed: int, adapter: int, leaf: str, layers: int) -> jax.Array:
    """What the values of one adapter that count are drawn by, a key for each layer."""
    return jax.random.split(keys.at(seed, adapter, leaf), layers)


def _by_layer(leaf: str, parts: Sequence[Any], weights: Sequence[float], recipe: Recipe, rank: int | None = None) -> Any:
    """The sum of N tensors [L, x, y] or, with a rank, the factors of the sum of N changes: pairs A and B, or whole."""
    lead = jax.tree.leaves(parts)[0].shape[:-2]
    layers = math.prod(lead)
    flat = jax.tree.map(lambda x: x.astype(jnp.float32).reshape(layers, *x.shape[-2:]), parts)
    drawn = [layer_keys(recipe.seed, n, leaf, layers) for n in range(len(parts))]
    made = _mapped(flat, drawn, jnp.array(weights, jnp.float32), recipe, rank)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[-2:]), made)


@jax.jit(static_argnums=(3, 4))
def _mapped(parts: list[Any], drawn: list[jax.Array], weights_N: jax.Array, recipe: Recipe, rank: int | None) -> Any:
    """Layer by layer, because of the size of whole changes and of their decompositions."""

    def one(layer: tuple[list[Any], list[jax.Array]]) -> Any:
        tensors = [x[0] @ x[1] if isinstance(x, tuple) else x for x in layer[0]]
        total = _sum(tensors, layer[1], weights_N, recipe)
        return total if rank is None else _first(total, rank)

    return jax.lax.map(one, (parts, drawn))


def _sum(tensors: list[jax.Array], drawn: list[jax.Array], weights_N: jax.Array, recipe: Recipe) -> jax.Array:
    """The weighted sum of a layer's tensors or, where signs are elected, at each place the weighted mean of the values of its sign."""
    prune = PRUNE[recipe.kind.prune]
    kept_Nxy = jnp.stack([prune(x, recipe.density or 1.0, key) for x, key in zip(tensors, drawn, strict=True)])
    weighted_Nxy = kept_Nxy * weights_N[:, None, None]
    if not recipe.kind.elect:
        return weighted_Nxy.sum(0)
    sign_Nxy = jnp.sign(kept_Nxy)
    balance_xy = (kept_Nxy if recipe.majority_sign_method == "total" else sign_Nxy).sum(0)
    prevails_Nxy = sign_Nxy == jnp.where(balance_xy >= 0, 1.0, -1.0)[None]
    return (weighted_Nxy * prevails_Nxy).sum(0) / jnp.maximum(prevails_Nxy.sum(0), 1)


def _largest(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    _, at = jax.lax.top_k(jnp.abs(x).reshape(-1), int(density * x.size))
    return jnp.zeros(x.size).at[at].set(x.reshape(-1)[at]).reshape(x.shape)


def _random(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0.0)


PRUNE = {"": lambda x, density, key: x, "largest": _largest, "random": _random}


def _first(change_DF: jax.Array, rank: int) -> Pair:
    """The factors of the nearest change of this rank."""
    u_DK, s_K, v_KF = jnp.linalg.svd(change_DF, full_matrices=False)
    return u_DK[..., :rank], (s_K[..., None] * v_KF)[..., :rank, :]


def _truncated(a_LDR: jax.Array, b_LRF: jax.Array, rank: int) -> Pair:
    """The same of A B, by decompositions of A, of B and of a small matrix: the whole change is never made."""
    qa_LDR, ra_LRR = jnp.linalg.qr(a_LDR)
    qb_LFR, rb_LRR = jnp.linalg.qr(jnp.swapaxes(b_LRF, -1, -2))
    u_LRK, v_LKR = _first(ra_LRR @ jnp.swapaxes(rb_LRR, -1, -2), rank)
    return qa_LDR @ u_LRK, v_LKR @ jnp.swapaxes(qb_LFR, -1, -2)
