"""Tables of names: which published tensors a leaf of ours is made of.

A family's table has one row for each kind of leaf. `{layer}` in a tensor's name means one tensor for each layer, stacked in our leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tuning.nn import stack


class Row(NamedTuple):
    """leaf: its name, without `blocks/0-15/` if it is stacked. transposed: whether the file holds [out, in] where we hold [in, out]."""

    leaf: str
    tensor: str
    transposed: bool = False


Table = Sequence[Row]


class Place(NamedTuple):
    """Where a leaf's values stand. A stacked leaf has one tensor per layer along its first axis, another leaf has just one."""

    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool


# The rows of added tokens stand in no file under a name of their own: they are put into these leaves when a checkpoint is written.
ADDED = {"embed/added": "embed/table", "head/added": "head/kernel"}


def place(leaf: str, table: Table) -> Place:
    """Where the published checkpoint keeps a leaf. ValueError for a leaf that the family has no tensor for."""
    span = stack.layer_range(leaf)
    kind = leaf if span is None else leaf.split("/", 2)[2]
    for row in table:
        if row.leaf == kind and ("{layer}" in row.tensor) == (span is not None):
            layers = range(*span) if span else [0]
            return Place(tuple(row.tensor.format(layer=i) for i in layers), span is not None, row.transposed)
    raise ValueError(f"The leaf {leaf} has no place in this family's published checkpoints.")


def file_shape(leaf_shape: Sequence[int], where: Place) -> tuple[int, ...]:
    """The shape of each tensor in the file, from our leaf's."""
    shape = tuple(leaf_shape[1:] if where.stacked else leaf_shape)
    return shape[::-1] if where.transposed else shape
