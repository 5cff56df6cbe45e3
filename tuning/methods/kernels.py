"""What methods that change the kernels of projections share: which sites they choose, settings by role, and folding.

Shapes: L layers of a segment, D input width, F output width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import tree
from tuning.core.types import Tree
from tuning.methods.method import added
from tuning.nn import stack
from tuning.nn.sites import Outline, Site, Sites
from tuning.nn.weight import value

Leaves = dict[str, jax.Array]  # an adapter's, by the last part of their names
# (role, kernel [L, D, F], its adapter's leaves [L, ...]) -> the kernel that gives the same outputs without an adapter; all float32.
# Outside the layers there is no L.
Adapted = Callable[[str, jax.Array, Leaves], jax.Array]


def chosen(outline: Outline, targets: Sequence[str], outside: Sequence[Site] = ()) -> tuple[Site, ...]:
    """The sites that targets name: roles (`q`, `mlp/down`), regular expressions for whole roles, or `all`. ValueError if one names none.

    outside  further sites, which their own roles choose, but neither `all` nor a regular expression
    """
    named = tuple(site for site in outside if site.role in targets)
    inside = [".*" if target == "all" else target for target in targets if target not in {site.role for site in named}]
    roles = outline.chosen(inside) if inside or not named else ()
    return (*(site for site in outline.sites if site.role in roles), *named)


def answered(sites: Sequence[Site], make: Callable[[Site, nnx.Rngs], nnx.Module]) -> Sites:
    """What `make` makes at the chosen sites."""
    roles = {site.role for site in sites}
    answer = lambda site, rngs: make(site, rngs) if site.role in roles else None  # noqa: E731
    return Sites(weight=answer, embed=answer, head=answer)


def by_role(key: str, default: float, said: Sequence[str], sites: Sequence[Site], kind: type = float) -> dict[str, Any]:
    """{role: value}: that of the first `pattern=value` in `said` whose pattern names a site of this role as a target does, or the default.

    ValueError, naming the config's key, for what has another form, names none of the sites, or is not positive.
    """
    roles = ", ".join(dict.fromkeys(site.role for site in sites))
    pairs = []
    for entry in said:
        pattern, _, text = entry.rpartition("=")
        try:
            pairs.append((pattern, kind(text)))
        except ValueError:
            raise ValueError(f"method.{key}: {entry!r} is not a role and a number; write for example {sites[0].role}=8.") from None
        if not any(site.matches(pattern) for site in sites):
            raise ValueError(f"method.{key}: {pattern!r} names none of the sites that method.targets choose: {roles}.")
    values = {site.role: next((value for pattern, value in pairs if site.matches(pattern)), default) for site in sites}
    if bad := {role: value for role, value in values.items() if not 0 < value < math.inf}:
        raise ValueError(f"method.{key} gives {bad}, and must be positive everywhere.")
    return values


def ranks_and_scales(
    sites: Sequence[Site], rank: int, alpha: float, ranks: Sequence[str], alphas: Sequence[str], rank_stabilized: bool
) -> tuple[dict[str, int], dict[str, float]]:
    """LoRA's ranks and scales by role, from its config."""
    rank_of, alpha_of = by_role("ranks", rank, ranks, sites, int), by_role("alphas", alpha, alphas, sites)
    return rank_of, {role: alpha_of[role] / (math.sqrt(r) if rank_stabilized else r) for role, r in rank_of.items()}


def uniform(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """PEFT's start of a factor [in, out]: Kaiming uniform with a = sqrt 5."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def check(*, rank: int, alpha: float = 1.0, dropout: float = 0.0) -> None:
    """ValueError for a value that no method can have."""
    if rank < 1:
        raise ValueError(f"method.rank={rank}: a rank is at least 1.")
    if not 0 < alpha < math.inf:
        raise ValueError(f"method.alpha={alpha}: the scale of the change is positive.")
    if not 0 <= dropout < 1:
        raise ValueError(f"method.dropout={dropout}: a dropout rate lies in [0, 1).")


def kernel_of(place: str) -> str:
    """The leaf that an adapter at this place changes."""
    return f"{place}/table" if place == "embed" else f"{place}/kernel"


def adapters(leaves: dict[str, Any]) -> Iterator[tuple[str, str, Leaves]]:
    """(name of the projection, its role, leaves of its adapter) of every projection that has one, from the network's leaves by name."""
    for place in dict.fromkeys(name.partition("/adapter/")[0] for name in leaves if added(name)):
        start = f"{place}/adapter/"
        yield place, stack.apart(place)[0], {n.removeprefix(start): x for n, x in leaves.items() if n.startswith(start)}


def fold(params: Tree, adapted: Adapted) -> Tree:
    """The parameters with every adapter folded into its kernel, computed in float32."""
    leaves = tree.flatten(params)
    for place, role, own in adapters(leaves):
        kernel = value(leaves[kernel_of(place)])
        own = {name: x.astype(jnp.float32) for name, x in own.items()}
        with jax.default_matmul_precision("highest"):
            leaves[kernel_of(place)] = adapted(role, kernel.astype(jnp.float32), own).astype(kernel.dtype)
    return tree.unflatten({name: leaf for name, leaf in leaves.items() if not added(name)})
