"""The values that pass between the rooms: batches, measures, train states.

Shapes: B sequences, T tokens per sequence, S tokens of an encoder's sequence, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

Tree = Any  # a nested dict whose leaves are arrays (or ShapeDtypeStructs, shardings, ...)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the encoder of an encoder-decoder reads, all int32 [B, S]; tokens, segments and positions as in Batch."""

    tokens: Any
    segments: Any
    positions: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Token rows, all arrays [B, T]; global arrays are sharded over their first axis.

    tokens     int32, what the model reads
    targets    int32, what it should say at each position (the token that follows, or a class)
    weights    float32, how much each target counts; 0 where nothing is learned
    segments   int32, the example a position belongs to, from 1; 0 is padding. Attention stays inside a segment, whose
               tokens are neighbours
    positions  int32, the position inside the segment; it rises by 1 from token to token
    types      int32, which of two texts a token belongs to (BERT's token types); None means the first everywhere
    inputs     of an encoder-decoder, whose decoder reads `tokens`: what stands in the encoder, segment for segment; None elsewhere
    """

    tokens: Any
    targets: Any
    weights: Any
    segments: Any
    positions: Any
    types: Any = None
    inputs: Inputs | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean that can still be added up: `total / weight`, divided once, by whoever writes it down."""

    total: Any
    weight: Any

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> Any:
        """total / weight, or 0 where the weight is 0 (then total is 0 too)."""
        return self.total / (self.weight + (self.weight == 0))


Means = Mapping[str, Mean]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a train step changes. Only `tuned` is differentiated, optimised and saved.

    step       int32 scalar, how many updates were made
    tuned      the leaves that learn
    frozen     the leaves that do not
    optimizer  the optax state, over `tuned` alone
    """

    step: Any
    tuned: Tree
    frozen: Tree
    optimizer: Any


Head = Callable[[jax.Array], jax.Array]  # hidden [..., D] -> logits [..., V] in float32; a jax.tree_util.Partial


class Forward(Protocol):
    """A model bound to its parameters (and to a random key while training)."""

    def __call__(self, batch: Batch, /) -> tuple[jax.Array, Head, dict[str, Mean]]:
        """Returns hidden_BTD, the head that turns it into logits, and measures of its own (a router's balance)."""
        ...


class Loss(Protocol):
    """An objective: the entry `loss` is lowered, the others are watched."""

    def __call__(self, forward: Forward, batch: Batch, base: Forward | None = None, /) -> dict[str, Mean]:
        """`base` is the model as it was before it was tuned; an objective that does not compare with it never calls it."""
        ...
