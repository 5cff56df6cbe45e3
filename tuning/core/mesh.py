"""The device mesh, and the rules that say where arrays live on it.

A parameter declares the *logical* name of each of its axes; RULES give each logical axis the mesh axes it is split over. An axis that
its mesh axes do not divide stays whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tuning.core import tree
from tuning.core.types import Tree


class Absent(NamedTuple):
    """So many devices that are not here, all like one."""

    count: int
    like: AbstractDevice


Devices = Sequence[Any] | Absent

AXES = ("dcn", "data", "fsdp", "expert", "context", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("dcn", "data", "fsdp", "expert"),  # outside the experts, the expert axis is one more axis of copies
    "copies": ("dcn", "data"),  # rows that are looked up together
    "members": ("dcn", "data"),  # runs in one program
    "sequence": ("context",),  # the time of activations; whoever looks along it gathers
    "embed": ("fsdp",),  # the width of the residual stream, in parameters
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "router": (),  # the router's outputs: every device routes its own tokens
    "layers": (),
    "rank": (),
    "gates": (),
    "norm": (),
}


def mesh(
    devices: Devices | None = None, /, *, dcn: int = 1, data: int = -1, fsdp: int = 1, expert: int = 1, context: int = 1, tensor: int = 1
) -> Mesh:
    """All devices as a mesh with the axes AXES; one size may be -1, which takes the devices that are left. `devices` is as `over` has it.

    dcn: copies of the model on slices of TPUs, between which the network is slow. data: copies of the model. fsdp: parameters and batch
    split alike (ZeRO-3). expert: routed experts and batch split; a model without experts is copied. context: each sequence split; keys and
    values are gathered. tensor: heads, feed-forward and vocabulary split.
    """
    here = jax.devices() if devices is None else devices
    return over(here, dcn=dcn, data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)


def over(devices: Devices, **sizes: int) -> Mesh:
    """A mesh of the given devices; axes that are not named have size 1. ValueError if the sizes do not fit the devices.

    Of absent devices the mesh is abstract: enough to say where arrays would live.
    """
    count = devices.count if isinstance(devices, Absent) else len(devices)
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    wish = {axis: size for axis, size in shape.items() if size != 1} or {"data": 1}
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f"Mesh {wish}: sizes are positive, and at most one of them is -1 (all devices that are left).")
    if count % fixed or (not free and fixed != count):
        raise ValueError(
            f"Mesh {wish} needs {'a multiple of ' if free else ''}{fixed} devices; there are {count}. "
            "Set config.mesh.data=-1 to take all that are left."
        )
    if free:
        shape[free[0]] = count // fixed
    types = (AxisType.Auto,) * len(AXES)
    if isinstance(devices, Absent):
        return AbstractMesh(tuple(shape.values()), AXES, axis_types=types, abstract_device=devices.like)  # pyright: ignore[reportReturnType]
    if all(device.platform == "tpu" for device in devices):
        return Mesh(_placed(devices, shape), AXES, axis_types=types)
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=types, devices=list(devices))


def _placed(devices: Sequence[Any], shape: dict[str, int]) -> np.ndarray:
    """TPUs in order: neighbours in an axis are near one another, and of several slices the first axis goes over these."""
    # A device that only says what it would be (for compiling ahead of time) knows of no slice where there is only one.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(shape.values()), devices, allow_split_physical_axes=True)
    if shape["dcn"] != slices:
        raise ValueError(f"mesh.dcn={shape['dcn']}, and the devices are {slices} slices, between which it must split. Set it to {slices}.")
    inside = (1, *(size for axis, size in shape.items() if axis != "dcn"))
    outside = (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)


def device(where: Mesh | AbstractMesh) -> Any:
    """One of the mesh's devices, which are all alike; `platform` and `device_kind` are known of absent ones too."""
    return where.abstract_device if isinstance(where, AbstractMesh) else where.devices.flat[0]


def spec(shape: Sequence[int], axes: Sequence[str | None], where: Mesh | jax.sharding.AbstractMesh) -> PartitionSpec:
    """How an array with these logical axes is split. KeyError for a logical axis without a rule."""
    found: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        split: list[str] = [a for a in (RULES[axis] if axis else ()) if where.shape.get(a, 1) > 1]
        divides = size % math.prod(where.shape[a] for a in split) == 0
        found.append((tuple(split) if len(split) > 1 else split[0]) if split and divides else None)
    return PartitionSpec(*found)


def names(split: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec splits over."""
    return tuple(axis for part in split for axis in ([part] if isinstance(part, str) else part or ()))


def shardings(abstract: Tree, axes: Tree, where: Mesh) -> Tree:
    """A NamedSharding for every leaf, from its shape and its logical axes."""
    return tree.map_named(lambda _, leaf, names: NamedSharding(where, spec(leaf.shape, names, where)), abstract, axes)


def replicated(where: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(where, PartitionSpec())


def rows(where: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis over every batch axis of the mesh."""
    return NamedSharding(where, PartitionSpec(RULES["batch"]))


def members(count: int, where: Mesh) -> PartitionSpec:
    """How so many runs in one program are split: over the copies of the model, where these divide them."""
    return spec((count,), ("members",), where)


def member_rows(count: int, where: Mesh) -> NamedSharding:
    """The sharding of so many runs' batches [count, B, ...]: each over the batch axes that do not split the runs."""
    split = members(count, where)
    return NamedSharding(where, PartitionSpec(*split, tuple(axis for axis in RULES["batch"] if axis not in names(split))))


def row_count(where: Mesh) -> int:
    """Into how many pieces a batch is split; batch sizes must be a multiple of it."""
    return math.prod(where.shape[axis] for axis in RULES["batch"])


def inside() -> bool:
    """Whether what is traced is one device's part of a program (`jax.shard_map`), where arrays are parts of arrays."""
    found = jax.sharding.get_abstract_mesh()
    return found.are_all_axes_manual and not found.empty


def here() -> AbstractMesh:
    """The mesh of `jax.set_mesh`, less the axes of whose parts what is traced is one; an empty one without any."""
    found = jax.sharding.get_abstract_mesh()
    if not found.manual_axes:
        return found
    left = {axis: size for axis, size in found.shape.items() if axis not in found.manual_axes}
    return AbstractMesh(tuple(left.values()), tuple(left), axis_types=(AxisType.Auto,) * len(left))


def pieces(size: int, axis: str) -> int:
    """Into how many pieces the mesh of `jax.set_mesh` splits a logical axis of this size."""
    where = here()
    return 1 if where.empty else math.prod(where.shape[name] for name in names(spec((size,), (axis,), where)))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Keep an activation where its logical axes say, on the mesh of `jax.set_mesh`; without a mesh, x itself."""
    where = here()
    if where.empty or where.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, where))


def gather(x: jax.Array) -> np.ndarray:
    """The whole of a global array on this process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def by_rows(function: Callable[..., tuple[Tree, Tree]]) -> Callable[..., tuple[Tree, Tree]]:
    """Runs `function(weights, *batch)` -> (sums, rows) on each device's own part of the batch; sums are added over devices once.

    The batch is arrays [B, T, ...], and so are the rows that come out; a part is some of the sequences, or a piece of each.
    Inside, a loop can add up gradients of whole weights without a reduction over devices in every turn.
    """
    where = here()

    def run(weights, *batch):
        split = PartitionSpec() if where.empty else spec(batch[0].shape[:2], ("batch", "sequence"), where)
        axes = names(split)
        if not axes:
            return function(weights, *batch)

        def local(weights, *batch):
            sums, rows = function(weights, *batch)
            return jax.lax.psum(sums, axes), rows

        specs = (PartitionSpec(), *([split] * len(batch)))
        # Unchecked: gradients taken inside stay per device until the one sum above.
        mapped = jax.shard_map(local, in_specs=specs, out_specs=(PartitionSpec(), split), axis_names=set(axes), check_vma=False)
        return mapped(weights, *batch)

    return run
