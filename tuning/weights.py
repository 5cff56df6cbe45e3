"""The parameters that training starts from: read from the published checkpoint, or made where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tuning import build
from tuning.build import ADDED
from tuning.core import tree
from tuning.core.types import Tree
from tuning.hub import adapters, checkpoint, peft_saved
from tuning.methods.method import added
from tuning.nn import stack
from tuning.nn import storage as storages
from tuning.nn.quantised import Quantised, dequantise
from tuning.source import Source
from tuning.training import state

Begun = dict[str, list[jax.Array]]


def base_params(m: build.Model, wanted: Callable[[str], bool], seed: int, begun: Begun | None = None) -> Tree:
    """The wanted leaves as they are before any tuning: read from the checkpoint or, where there is none, initialised.

    `begun`, if given, is filled with what leaves start from that start from what quantising takes away, by name, some layers at a time.
    """
    leaves = tree.flatten(m.layout)
    new = {*ADDED, *absent(m.source)}
    published = {n: x for n, x in leaves.items() if m.source.directory and not (added(n) or n in new)}
    made = {n: x for n, x in leaves.items() if wanted(n) and n not in published and (m.source.directory is None or n not in ADDED)}
    params = state.fresh(m.network.init, tree.unflatten(made), seed)
    if m.source.directory is not None and any(map(wanted, published)):
        places, dtypes = ({n: getattr(x, what) for n, x in published.items()} for what in ("sharding", "dtype"))
        raw: Any = m.source.published
        inside = tree.unflatten(published), tree.unflatten(places), dtypes.__getitem__, raw
        store = lambda name: _store(m, name, published[name], begun)  # noqa: E731
        params = tree.merge(params, checkpoint.load(m.source.directory, *inside, wanted, store))
    rows = {n: _mean_rows(m, params, n) for n in ADDED if n in leaves and wanted(n) and n not in made}
    return tree.merge(params, tree.unflatten(rows))


def absent(source: Source) -> set[str]:
    """The leaves of a head that the checkpoint does not have; others may count as new because an adapter brought them along."""
    if source.directory is None or not source.fresh:
        return set()
    raw: Any = source.published
    there = checkpoint.opened(source.directory, raw)
    return {leaf for leaf in source.fresh if not any(tensor in there for tensor in peft_saved.published(leaf, source.table))}


def _store(m: build.Model, name: str, like: Any, begun: Begun | None) -> Callable[[jax.Array], Quantised] | None:
    """What some layers of a published kernel are made into; None for the array that they are."""
    quantise, residual = storages.into(like), m.method.residual
    if quantise is None or residual is None or begun is None:
        return quantise
    place = name.removesuffix("/kernel")
    start = jax.jit(lambda kernel, q: residual(stack.apart(place)[0], kernel.astype(jnp.float32) - dequantise(q, jnp.float32)))

    def store(kernel: jax.Array) -> Quantised:
        q = quantise(kernel)
        for leaf, part in start(kernel, q).items():
            begun.setdefault(f"{place}/adapter/{leaf}", []).append(part)
        return q

    return store


def start_params(m: build.Model, seed: int) -> Tree:
    """All leaves as training starts from them: base, method's start, and the adapter given in model.adapter."""
    begun: Begun = {}
    params = tree.flatten(base_params(m, lambda name: True, seed, begun))
    for name, parts in begun.items():
        params[name] = jax.device_put(jnp.concatenate(parts).astype(params[name].dtype), params[name].sharding)
    params = m.method.start(tree.unflatten(params))
    if m.source.adapter is not None:
        params = with_adapter(m, params, m.source.adapter)
    return params


def with_adapter(m: build.Model, params: Tree, directory: Path) -> Tree:
    """The parameters with the values of a PEFT directory in the adapter's leaves, and in those that learned beside it."""
    saved = adapters.saved(directory, m.source.table, tree.flatten(m.layout))
    there = tree.flatten(params)
    of_base = lambda leaf: there[leaf] if leaf in there else tree.flatten(base_params(m, lambda name: name == leaf, 0))[leaf]  # noqa: E731
    adapters.check_base(directory, m.source.table, tree.flatten(m.layout), of_base)
    wanted = {n: x for n, x in tree.flatten(m.layout).items() if added(n) or n in ADDED or n in saved}
    values = tree.flatten(adapters.read(directory, tree.unflatten(wanted), m.source.table))
    placed = {name: jax.device_put(values[name], leaf.sharding) for name, leaf in wanted.items()}
    return tree.unflatten({**tree.flatten(params), **placed})


def _mean_rows(m: build.Model, params: Tree, name: str) -> jax.Array:
    """New tokens start at the mean of the rows before them (as a sensible direction and length for a token without a meaning yet)."""
    like, first = tree.flatten(m.layout)[name], m.source.config.added[0]

    def rows(leaf):
        known_VD = (leaf if name == "embed/added" else leaf.T)[:first].astype(jnp.float32)
        return jnp.broadcast_to(known_VD.mean(0), like.shape).astype(like.dtype)

    leaf = params["embed"]["table"] if name == "embed/added" else params["head"]["kernel"]
    return jax.jit(rows, out_shardings=like.sharding)(leaf)
