"""A network as a value: a static graph, the shapes and axes of its parameters, and pure functions over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import mesh, tree
from tuning.core.types import Batch, Head, Inputs, Mean, Tree
from tuning.nn.cache import Cache
from tuning.nn.sites import Outline, Site, Sites


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity: a static argument of jit
class Network:
    """Built abstractly: no parameter exists until `init`, or until a checkpoint is read into `abstract`.

    abstract  nested dict of float32 ShapeDtypeStructs
    axes      nested dict of the logical axis names of each leaf
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    graph: Any
    structure: Any
    abstract: Tree
    axes: Tree

    def init(self, key: jax.Array) -> Tree:
        """Fresh parameters, float32; call it under jit with shardings, so that they are born in place."""
        with nnx.use_eager_sharding(False):
            return nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(key)), nnx.Param))

    def apply(self, params: Tree, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, Head, dict[str, Mean]]:
        """hidden_BTD, the head and the model's own measures. `key` turns on dropout."""
        hidden, head, aux, _ = self._call("__call__", params, batch, None, key)
        return hidden, head, aux

    def extend(self, params: Tree, tokens_BT, positions_BT, segments_BT, cache: Cache) -> tuple[jax.Array, Head, Cache]:
        """The same for tokens that follow those in the cache; returns the cache with them."""
        batch = Batch(tokens_BT, None, None, segments_BT, positions_BT)
        hidden, head, _, cache = self._call("__call__", params, batch, cache, None)
        return hidden, head, cache

    def remember(self, params: Tree, inputs: Inputs, cache: Cache) -> Cache:
        """The cache of an encoder-decoder, before its first tokens: with what the encoder makes of its inputs."""
        return self._call("remember", params, inputs, cache)

    def _call(self, method: str, params: Tree, *inputs):
        # nnx.merge fills leaves by position, so a renamed leaf would land silently in another's place. A device's own are parts of leaves.
        if wrong := tree.difference(self.abstract, params, shapes=not mesh.inside()):
            raise ValueError(f"These parameters are not this network's: {wrong}.")
        with nnx.use_eager_sharding(False):
            state = jax.tree.map(lambda x: x, self.structure)
            nnx.replace_by_pure_dict(state, params)
            return getattr(nnx.merge(self.graph, state), method)(*inputs)


def build(make: Callable[[nnx.Rngs], nnx.Module]) -> Network:
    """The network that `make` constructs, without allocating it."""
    graphs = []

    def leaves():
        graph, leaves = nnx.split(make(nnx.Rngs(0)), nnx.Param)
        graphs.append(graph)
        return leaves

    with nnx.use_eager_sharding(False):
        structure, (graph,) = jax.eval_shape(leaves), graphs
        axes = nnx.to_pure_dict(
            jax.tree.map(lambda p: p.get_metadata("out_sharding"), structure, is_leaf=lambda x: isinstance(x, nnx.Variable))
        )
    abstract = nnx.to_pure_dict(structure)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), abstract)
    return Network(make, graph, structure, abstract, axes)


def outline(
    make: Callable[[Sites], Callable[[nnx.Rngs], nnx.Module]], layers: int, encode: Callable[[str], list[int]] | None = None
) -> Outline:
    """What a method may choose from: every place that the network offers, and its leaves, gathered by building it abstractly."""
    offered: list[list[Site]] = [[], [], [], [], []]  # as Sites has them
    weight, branch, memory, embed, head = (lambda site, rngs, kind=kind: kind.append(site) for kind in offered)
    network = build(make(Sites(weight, branch, memory, embed, head)))
    weights, branches, memories, embeds, heads = (tuple(dict.fromkeys(kind)) for kind in offered)
    return Outline(layers, weights, tuple(tree.flatten(network.abstract)), branches, memories, embeds, heads, encode)
