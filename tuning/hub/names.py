"""Tables of names: which published tensors a leaf of ours is made of.

A family's table has one row for each kind of leaf. `{layer}` in a tensor's name means one tensor for each layer, stacked in our leaf;
`{expert}` likewise, inside the layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tuning.nn import stack


class Row(NamedTuple):
    """leaf: its name, without `blocks/0-15/` if it is stacked. transposed: whether the file holds [out, in] where we hold [in, out]."""

    leaf: str
    tensor: str
    transposed: bool = False


Table = Sequence[Row]


class Place(NamedTuple):
    """Where a leaf's values stand.

    tensors     the published tensors, in the order in which they are stacked
    lead        the leading axes of the leaf along which they are stacked: () for a single tensor, (L,) for one per layer, (L, E) for one
                per layer and expert
    transposed  whether each holds [out, in]
    """

    tensors: tuple[str, ...]
    lead: tuple[int, ...]
    transposed: bool


# The rows of added tokens stand in no file under a name of their own: they are put into these leaves when a checkpoint is written.
ADDED = {"embed/added": "embed/table", "head/added": "head/kernel"}


def place(leaf: str, shape: Sequence[int], table: Table) -> Place:
    """Where the published checkpoint keeps a leaf of this shape. ValueError for a leaf that the family has no tensor for."""
    kind, layers = stack.apart(leaf)
    for row in table:
        # Where some layers are routed and others are not, both have a leaf of this name; that of experts has an axis more.
        per_layer, per_expert = "{layer}" in row.tensor, "{expert}" in row.tensor
        if row.leaf == kind and per_layer == (layers is not None) and per_expert == (len(shape) == 4):
            experts = range(shape[1]) if per_expert else None
            lead = tuple(len(axis) for axis in (layers, experts) if axis is not None)
            numbers = itertools.product(layers or [0], experts or [0])
            return Place(tuple(row.tensor.format(layer=i, expert=e) for i, e in numbers), lead, row.transposed)
    raise ValueError(f"The leaf {leaf} has no place in this family's published checkpoints.")


def file_shape(leaf_shape: Sequence[int], where: Place) -> tuple[int, ...]:
    """The shape of each tensor in the file, from our leaf's."""
    shape = tuple(leaf_shape[len(where.lead) :])
    return shape[::-1] if where.transposed else shape


# What TensorFlow called the parameters of a LayerNorm, as old files still do.
OLDER = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def respell(wanted: Iterable[str], there: Iterable[str], prefix: str, within: Sequence[str] = ()) -> dict[str, str]:
    """{name in the file: name in the table} for wanted tensors that the file spells otherwise: without or with the prefix of the family's
    body, with that of a larger model that it is a part of, or in the older way."""
    present, found = set(there), {}
    for name in wanted:
        if name not in present:
            bare = name.removeprefix(prefix)
            forms = [name, bare, prefix + name, *(outer + bare for outer in within)]
            forms += [form.removesuffix(new) + old for form in forms for new, old in OLDER if form.endswith(new)]
            found.update({form: name for form in forms[1:] if form in present})
    return found
