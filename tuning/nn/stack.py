"""A stack of like layers: a row of segments, each stored stacked and run as one scan.

A stacked leaf cannot learn in some of its layers only, so the stack is cut where a method asks; one segment is the normal case. The
leaves of layers 12 to 15 stand under `blocks/12-15/`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tuning.core import mesh
from tuning.nn.attention import Context
from tuning.nn.cache import Cache, write

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def segments(layers: int, cuts: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """{name: [start, stop)} of the segments between the cuts; a segment's name gives its first and last layer."""
    bad = [cut for cut in cuts if not 0 <= cut <= layers]
    if bad:
        raise ValueError(f"Cannot cut a stack of {layers} layers at {bad}; a cut lies between 0 and {layers}.")
    edges = sorted({0, layers, *cuts})
    return {f"{start}-{stop - 1}": (start, stop) for start, stop in itertools.pairwise(edges)}


def layer_range(name: str) -> tuple[int, int] | None:
    """[start, stop) of the layers that a leaf holds, from its name; None for a leaf outside the stack."""
    parts = name.split("/")
    if len(parts) < 2 or parts[0] != "blocks":
        return None
    first, last = parts[1].split("-")
    return int(first), int(last) + 1


class Stack(nnx.Module):
    """`make(layers, rngs)` builds one layer for a segment; a layer is called with (x, context, key, store)."""

    def __init__(
        self, make: Callable[[tuple[int, int], nnx.Rngs], nnx.Module], layers: int, cuts: tuple[int, ...], remat: str, rngs: nnx.Rngs
    ):
        self.remat = remat
        self.ranges = tuple(segments(layers, cuts).items())
        for name, span in self.ranges:
            build = nnx.vmap(functools.partial(make, span), transform_metadata={nnx.PARTITION_NAME: "layers"})
            setattr(self, name, nnx.split_rngs(splits=span[1] - span[0])(build)(rngs))

    def __call__(self, x_BTD: jax.Array, context: Context, key: jax.Array | None, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        keys, values = ({}, {}) if cache is None else (dict(cache.keys), dict(cache.values))
        for name, (start, stop) in self.ranges:
            graph, weights = nnx.split(getattr(self, name))
            layer_keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(start, stop))

            def body(carry, layer, graph=graph):
                x_BTD, kv = carry
                index, weights, layer_key = layer

                def store(k, v):
                    nonlocal kv
                    assert cache is not None and kv is not None
                    kv = write(kv[0], k, index, cache.length), write(kv[1], v, index, cache.length)
                    return kv[0][index], kv[1][index]

                block = nnx.merge(graph, weights)
                x_BTD = block(x_BTD, context, layer_key, None if cache is None else store)
                return (mesh.constrain(x_BTD, "batch", None, None), kv), None

            if self.remat != "none" and cache is None:
                body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
            kv = None if cache is None else (keys[name], values[name])
            (x_BTD, kv), _ = jax.lax.scan(body, (x_BTD, kv), (jnp.arange(stop - start), weights, layer_keys))
            if kv is not None:
                keys[name], values[name] = kv
        if cache is None:
            return x_BTD, None
        return x_BTD, Cache(keys, values, cache.segments, cache.positions, cache.length + context.cos.shape[1])
