"""Adapters over one base: read from PEFT directories, combined, and put on the base's weights, which are in memory once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tuning import build, weights
from tuning.core import mesh, tree
from tuning.core.types import Tree
from tuning.hub import adapters, files
from tuning.methods import METHODS, combine, kernels
from tuning.methods.combine import Low, Recipe
from tuning.methods.method import Method, added
from tuning.nn.weight import value
from tuning.source import Source, pretrained

Leaves = dict[str, Any]  # by name
BARE = {"name": "full"}


class Adapted(NamedTuple):
    """A model with what an adapter adds to its base.

    method  the config of the adapter's method, with its name
    own     the adapter's leaves, and those of new rows, heads and what else learned with it; all others are the base's
    fresh   the leaves, apart from the adapter's, that the base's checkpoint does not have
    """

    model: build.Model
    method: dict[str, Any]
    own: Leaves
    fresh: frozenset[str]


def bare(source: Source, where: Mesh) -> Adapted:
    """The base alone, of which nothing learns, so that its kernels may be in codes."""
    m = build.model(source, Method(tuned=lambda name: False), where, masters=source.config.dtype)
    return Adapted(m, dict(BARE), {}, source.fresh)


def read(source: Source, directory: Path, where: Mesh, like: Iterable[Adapted] = ()) -> Adapted:
    """The adapter of a PEFT directory over the model of `source`; of the base no weight is read.

    like  others over the same base; one with the same settings shares its model, and so its compiled programs
    ValueError if the directory does not fit, or if a head that the base lacks is not in it.
    """
    over = _with_head(source, adapters.head(directory))
    outline = build.outline(over)
    method, rows, saved = adapters.settings(directory, over.table, outline)
    if missing := over.fresh.intersection(outline.leaves).difference(saved):
        raise ValueError(f"Neither {source.path} nor the adapter in {directory} has the head's {', '.join(sorted(missing))}.")
    m = _model(dataclasses.replace(over, config=over.config.replace(added=rows)), method, where, like)
    own = tree.flatten(weights.with_adapter(m, {}, directory))
    if saved:  # the head is no longer the checkpoint's
        m = dataclasses.replace(m, source=dataclasses.replace(m.source, fresh=frozenset(saved)))
    return Adapted(m, method, own, over.fresh)


def _with_head(source: Source, brought: tuple[str, int] | None) -> Source:
    """The source with the head that an adapter brings along, if any; its classes are numbered where the checkpoint names others."""
    if brought is None:
        return source
    head, count = brought
    named = source.config.head.classes
    classes = () if head == "question_answering" else named if len(named) == count else tuple(f"LABEL_{i}" for i in range(count))
    return pretrained(path=source.path, revision=source.revision, head=head, classes=classes, dtype=source.config.dtype)


def _model(source: Source, method: Mapping[str, Any], where: Mesh, like: Iterable[Adapted] = ()) -> build.Model:
    computes = lambda settings: {**settings, "dropout": 0.0}  # noqa: E731
    for other in like:
        if (other.model.source, computes(other.method)) == (source, computes(method)):
            return other.model
    settings = {key: value for key, value in method.items() if key != "name"}
    return build.model(source, METHODS[method["name"]](build.outline(source), **settings), where, masters=source.config.dtype)


def params(one: Adapted, base: Leaves) -> Tree:
    """The model's parameters: its own, and those of the base; `base` holds what was read of that, and gets what was not."""
    names = [name for name in tree.flatten(one.model.layout) if name not in one.own]
    _fill(one, base, names)
    return tree.unflatten({**{name: base[name] for name in names}, **one.own})


def _fill(one: Adapted, base: Leaves, names: Iterable[str]) -> None:
    missing = set(names) - base.keys()
    m = dataclasses.replace(one.model, source=dataclasses.replace(one.model.source, fresh=one.fresh))
    base |= tree.flatten(weights.base_params(m, missing.__contains__, 0))


def combined(
    source: Source, parts: Sequence[Adapted], weights: Sequence[float], recipe: Recipe, base: Leaves, like: Iterable[Adapted] = ()
) -> Adapted:
    """One LoRA adapter over the model of `source` out of several; `base` and `like` as in `params` and `read`.

    Where a projection is not in all of them, it is combined from those that have it. Of DoRA, of factors that began at the kernel's own and
    of other methods, the change of the kernel itself is taken, which the kinds that end in svd can combine.

    ValueError for adapters that change more than kernels.
    """
    if not parts or not all(abs(weight) < float("inf") for weight in weights):
        raise ValueError(f"Adapters and finite weights are needed to combine them; there are {len(parts)} with weights {list(weights)}.")
    for part in parts:
        if extra := [name for name in part.own if not added(name)]:
            raise ValueError(f"An adapter brings along {tree.listing(extra)}, which cannot be combined. Use each adapter by itself.")
    found: dict[tuple[str, str], list[tuple[Adapted, dict[str, float], kernels.Leaves, float]]] = {}
    for part, weight in zip(parts, weights, strict=True):
        scale_of = combine.scales(build.outline(part.model.source), **part.method) if _plain(part) else {}
        for place, role, leaves in kernels.adapters(part.own):
            found.setdefault((place, role), []).append((part, scale_of, leaves, weight))
    rank = recipe.svd_rank or (_rank(parts) if recipe.kind.of == "change" else 0)
    own, rank_of = {}, {}
    for (place, role), having in found.items():
        changes = [
            Low(leaves["a"].astype(jnp.float32), leaves["b"].astype(jnp.float32), scale_of[role])
            if scale_of
            else _whole(part, place, leaves, base)
            for part, scale_of, leaves, _ in having
        ]
        pair = combine.combine(place, changes, [weight for *_, weight in having], recipe, rank)
        own |= {f"{place}/adapter/{name}": x for name, x in zip("ab", pair, strict=True)}
        rank_of[role] = pair[0].shape[-1]
    most = max(rank_of.values())
    unlike = tuple(f"{role}={rank}" for role, rank in rank_of.items() if rank != most)  # the scale is 1 everywhere
    method = dict(
        name="lora", rank=most, alpha=float(most), dropout=0.0, rank_stabilized=False, dora=False, targets=tuple(rank_of), ranks=unlike,
        alphas=unlike,
    )  # fmt: skip
    m = _model(source, method, parts[0].model.mesh, like)
    layout = tree.flatten(m.layout)
    own = {name: jax.device_put(x.astype(layout[name].dtype), layout[name].sharding) for name, x in own.items()}
    return Adapted(m, method, own, source.fresh)


def combined_directories(path_or_id: str, directories: Sequence[str | Path], weights: Sequence[float], recipe: Recipe) -> Adapted:
    """The same of PEFT directories over a published checkpoint, on one device in float32; of the base only what is needed is read."""
    if len(weights) != len(directories):
        raise ValueError(f"There are {len(directories)} adapters and {len(weights)} weights. Give a weight for each adapter.")
    source, where = pretrained(path=path_or_id), mesh.over(jax.devices()[:1])
    with jax.set_mesh(where):
        parts = [read(source, files.resolve(directory), where) for directory in directories]
        return combined(source, parts, weights, recipe, {})


def _plain(part: Adapted) -> bool:
    """Whether all changes are products of the leaves a and b alone."""
    return part.method["name"] == "lora" and {name.rpartition("/")[2] for name in part.own} == {"a", "b"}


def _rank(parts: Sequence[Adapted]) -> int:
    """The largest of the adapters' ranks."""
    if not all(map(_plain, parts)):
        raise ValueError("An adapter that is more than A B has no rank that the result could take. Give svd_rank.")
    return max(x.shape[-1] for part in parts for name, x in part.own.items() if name.endswith("/a"))


def _whole(part: Adapted, place: str, leaves: kernels.Leaves, base: Leaves) -> jax.Array:
    """The change of a place's kernel. ValueError if the adapter changes something else."""
    m, kernel = part.model, kernels.kernel_of(place)
    of_base = [name for name in tree.flatten(m.layout) if name.startswith(f"{place}/") and not added(name)]
    if m.method.fold is not None and kernel in of_base:
        _fill(part, base, of_base)
        before = {name: base[name] for name in of_base} | {kernel: value(base[kernel]).astype(jnp.float32)}
        after = tree.flatten(m.method.fold(tree.unflatten({**before, **{f"{place}/adapter/{name}": x for name, x in leaves.items()}})))
        if all(after[name] is before[name] for name in of_base if name != kernel):
            return after[kernel] - before[kernel]
    raise ValueError(
        f"An adapter of method {part.method['name']!r} at {place} changes more than a kernel, and cannot be combined. Use it by itself."
    )
