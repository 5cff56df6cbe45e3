"""Trees of leaves by name: a leaf's name is its path, such as `blocks/0-15/attn/q/kernel`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from tuning.core.types import Tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{name: leaf} in sorted order; every value that is not a mapping is a leaf."""
    leaves = {}
    for key in sorted(tree):
        name = f"{prefix}/{key}" if prefix else key
        leaves.update(flatten(tree[key], name) if isinstance(tree[key], Mapping) else {name: tree[key]})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def map_named(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """`function(name, leaf, *leaves of the others)` at every leaf."""
    flat_others = [flatten(other) for other in others]
    return unflatten({n: function(n, x, *(o[n] for o in flat_others)) for n, x in flatten(tree).items()})


def split(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """(leaves whose name is chosen, the others)."""
    leaves = flatten(tree)
    yes = {name: leaf for name, leaf in leaves.items() if chosen(name)}
    return unflatten(yes), unflatten({name: leaf for name, leaf in leaves.items() if name not in yes})


def merge(*trees: Tree) -> Tree:
    """One tree out of trees that share no leaf."""
    return unflatten({name: leaf for tree in trees for name, leaf in flatten(tree).items()})


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression matches anywhere in a leaf's name (`^` and `$` anchor it)."""
    return re.search(pattern, name) is not None


def size(tree: Tree) -> int:
    """Number of elements in all leaves; of a kernel in codes, those of the kernel."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape")))


def nbytes(tree: Tree) -> int:
    """Bytes of all leaves, over all devices, replicas counted once."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def difference(expected: Tree, given: Tree, limit: int = 8, shapes: bool = True) -> str:
    """What stands between two trees of arrays, as text: missing, unexpected and, unless `shapes` do not count, misshaped leaves; "" if
    nothing does."""
    want, have = flatten(expected), flatten(given)
    both = [n for n in want if n in have and shapes]
    misshaped = [f"{n} {have[n].shape}, expected {want[n].shape}" for n in both if have[n].shape != want[n].shape]
    kinds = [("missing", [n for n in want if n not in have]), ("unexpected", [n for n in have if n not in want])]
    return "; ".join(f"{kind}: {listing(names, limit)}" for kind, names in [*kinds, ("wrong shape", misshaped)] if names)


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
