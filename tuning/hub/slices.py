"""One leaf of a published checkpoint, read straight into its shards, with memory for no more than two of the file's tensors besides.

A leaf of several tensors is born as zeros where it belongs and filled tensor by tensor: on each device its first, then its second, and so
on. Where tensors are split over devices along a leading axis, one round therefore reads several of them, each for its own devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tuning.hub import names
from tuning.hub.files import Tensors
from tuning.hub.names import Place

# A leaf below this size is put together on the host: to compile a program that fills it would take longer than all the rest.
SMALL_BYTES = 2**20

Index = tuple[slice, ...]
Store = Callable[[jax.Array], Any]  # a part of a leaf -> a tree of what is kept, its arrays with the same leading axes, in their shards


def read(
    tensors: Tensors, place: Place, shape: Sequence[int], sharding: NamedSharding, dtype: np.dtype, store: Store | None = None
) -> Any:  # fmt: skip
    """The leaf at `place`, cast to `dtype`. Each process reads only the slices of its own devices, and each of them once.

    store  what to keep of it in its place: it is given some of the file's tensors at a time, [1, ..., D, F]

    In a run of several processes all must call it, in the same order. ValueError if a tensor in the file has another shape than the leaf.
    """
    shape, dtype, lead = tuple(shape), np.dtype(dtype), len(place.lead)
    expected = names.file_shape(shape, place)
    if wrong := [name for name in place.tensors if tensors.shape(name) != expected]:
        raise ValueError(f"{wrong[0]} has the shape {tensors.shape(wrong[0])} in {tensors.directory}, and its leaf needs {expected}.")
    if math.prod(shape) * dtype.itemsize < SMALL_BYTES:
        leaf = _array(shape, sharding, lambda index: _values(tensors.read, place, index, dtype))
        return leaf if store is None else store(leaf)
    # To widen is exact everywhere, so it is left to the devices and fewer bytes travel; what rounds is done by numpy, slice by slice.
    held, *others = {tensors.dtype(name) for name in place.tensors}
    sent = held if not others and np.can_cast(held, dtype) else dtype
    local = sharding.shard_shape(shape)[:lead]  # how many tensors a device holds, along each leading axis
    pieces = tuple(size // mine for size, mine in zip(place.lead, local, strict=True))

    def part(at: tuple[int, ...]) -> jax.Array:
        def values(index: Index) -> np.ndarray:
            own = [piece.start * mine + i for piece, mine, i in zip(index, local, at, strict=False)]
            return _values(tensors.view, place, (*(slice(i, i + 1) for i in own), *index[lead:]), sent)

        return _array((*pieces, *shape[lead:]), sharding, values)

    leaf = None
    for at in np.ndindex(*local):
        new = part(at) if store is None else store(part(at).astype(dtype))
        if leaf is None:  # zeros, and never a part itself: on a CPU that could be the file's own memory
            leaf = jax.tree.map(lambda x: _zeros((*shape[:lead], *x.shape[lead:]), dtype if store is None else x.dtype, x.sharding), new)
        leaf = jax.tree.map(lambda whole, x: _put(whole, x, np.array(at, np.int32), whole.sharding), leaf, new)  # noqa: B023
        del new
        jax.block_until_ready(leaf)  # so that this tensor's memory is free before the next one is read
    return leaf


def _array(shape: tuple[int, ...], sharding: NamedSharding, values: Callable[[Index], np.ndarray]) -> jax.Array:
    """The global array with these values. Devices that hold the same slice share one reading of it."""
    done: dict[tuple, np.ndarray] = {}

    def once(index: Index | None) -> np.ndarray:
        assert index is not None
        spans = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        if spans not in done:
            done[spans] = values(tuple(slice(*span) for span in spans))
        return done[spans]

    return jax.make_array_from_callback(shape, sharding, once)


def _values(read: Callable[..., np.ndarray], place: Place, index: Index, dtype: np.dtype) -> np.ndarray:
    """The values of a leaf at `index`, in our layout; those of a single tensor without another copy than `read` makes."""
    lead = len(place.lead)
    inner = index[lead:]

    def one(name: str) -> np.ndarray:
        values = read(name, inner[::-1]).T if place.transposed else read(name, inner)
        return values.astype(dtype, copy=False)

    chosen = np.array(place.tensors, object).reshape(place.lead)[(*index[:lead], ...)]
    if chosen.size == 1:
        return one(chosen.item())[(None,) * lead]
    out = np.empty([part.stop - part.start for part in index], dtype)
    for at, name in np.ndenumerate(chosen):
        out[at] = one(name)
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    local = sharding.shard_shape(shape)
    return jax.shard_map(lambda: jnp.zeros(local, dtype), mesh=sharding.mesh, in_specs=(), out_specs=sharding.spec)()


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _put(leaf: jax.Array, part: jax.Array, at: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Each device puts its shard of `part` at `at` of its shard of `leaf`, along the leading axes, and knows nothing of the others."""

    def body(mine, values, at):
        return jax.lax.dynamic_update_slice(mine, values.astype(mine.dtype), (*at, *[0] * (mine.ndim - len(at))))

    specs = (sharding.spec, sharding.spec, PartitionSpec())
    return jax.shard_map(body, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(leaf, part, at)
