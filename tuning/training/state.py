"""The birth of a train state: every array is created in its shards, tuned leaves in float32, frozen ones as the model computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from tuning.core import keys, mesh, tree
from tuning.core.types import TrainState, Tree
from tuning.nn import quantised
from tuning.nn.storage import Storage
from tuning.training import optimizer as optimizers


def layout(
    abstract: Tree, axes: Tree, dtype_of: Callable[[str], Any], where: Mesh,
    storage: Callable[[str], Storage | None] = lambda name: None,
) -> Tree:  # fmt: skip
    """Shape, dtype and sharding of every leaf, as ShapeDtypeStructs: what a checkpoint is read into. A leaf with a storage is Quantised."""

    def leaf(name, shape, names):
        kept = jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype_of(name)))
        if (chosen := storage(name)) is not None:
            kept = _stored(chosen, kept)
            names = quantised.axes(kept, names)
        place = lambda x, names: NamedSharding(where, mesh.spec(x.shape, names, where))  # noqa: E731
        return jax.tree.map(lambda x, names: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x, names)), kept, names)

    return tree.map_named(leaf, abstract, axes)


@functools.cache  # a plan lays one network out on many meshes
def _stored(storage: Storage, kernel: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(storage.quantise, kernel)


def fresh(init: Callable[[jax.Array], Tree], wanted: Tree, seed: int) -> Tree:
    """The leaves of `wanted` out of `init(key)`; what is not wanted is never computed."""
    names = tree.flatten(wanted)
    return _creation(init, tuple(names.items()))(keys.at(seed, 0, "init")) if names else {}


@functools.lru_cache(maxsize=4)  # runs that differ by seed share one program
def _creation(init: Callable[[jax.Array], Tree], wanted: tuple[tuple[str, Any], ...]) -> Callable[[jax.Array], Tree]:
    def create(key):
        leaves = tree.flatten(init(key))
        return tree.unflatten({name: leaves[name].astype(leaf.dtype) for name, leaf in wanted})

    return jax.jit(create, out_shardings=tree.unflatten({name: leaf.sharding for name, leaf in wanted}))


def optimizer_layout(transform: optax.GradientTransformation, tuned: Tree, where: Mesh) -> Tree:
    """The optax state as ShapeDtypeStructs, sharded as the leaves it belongs to."""
    abstract = jax.eval_shape(transform.init, tuned)
    places = optimizers.shardings(abstract, tuned, jax.tree.map(lambda x: x.sharding, tuned), mesh.replicated(where))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)


def start(params: Tree, tuned: Callable[[str], bool], transform: optax.GradientTransformation, where: Mesh) -> TrainState:
    """The state before the first step."""
    learns, rests = tree.split(params, tuned)
    places = jax.tree.map(lambda x: x.sharding, optimizer_layout(transform, learns, where))
    return TrainState(at(0, where), learns, rests, jax.jit(transform.init, out_shardings=places)(learns))


def abstract(layout: Tree, tuned: Callable[[str], bool], transform: optax.GradientTransformation, where: Mesh) -> TrainState:
    """The state of a run as ShapeDtypeStructs in their shards, from the layout of its parameters."""
    learns, rests = tree.split(layout, tuned)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=mesh.replicated(where))
    return TrainState(step, learns, rests, optimizer_layout(transform, learns, where))


def at(step: int, where: Mesh) -> jax.Array:
    """A step counter on the mesh."""
    return jax.make_array_from_callback((), mesh.replicated(where), lambda _: np.int32(step))
