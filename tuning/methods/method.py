"""What a tuning method is: a value made of functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from tuning.core.types import Tree
from tuning.nn.sites import NOTHING, Sites

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def added(name: str) -> bool:
    """Whether the leaf of this name is one that a method added."""
    return "/adapter/" in name


class Pace(NamedTuple):
    """How fast a leaf learns.

    rate   multiplies the learning rate
    begin  the step from which on it learns; it and its optimiser state stand still before
    Either is a number or, for a stacked leaf, may be a tuple with one number for each of its layers.
    """

    rate: float | tuple[float, ...] = 1.0
    begin: int | tuple[int, ...] = 0

    def times(self, factor: float) -> Pace:
        """The same with another rate."""
        return self._replace(rate=tuple(factor * rate for rate in self.rate) if isinstance(self.rate, tuple) else factor * self.rate)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a network is tuned.

    tuned   whether the leaf of this name ever learns
    sites   what is added to the network, and where
    cuts    layers before which the stack must be cut, because leaves on the two sides are treated differently
    start   parameters as loaded -> parameters to start from
    residual  (role, a kernel as published less what it is quantised to, [..., D, F] float32) -> {leaf of its adapter, by the last part of
              its name: what it starts from}; None where nothing starts from that
    fold    parameters -> the base network's parameters that give the same outputs, nothing added (computed in float32); None where there
            are no such parameters
    bare    parameters -> the same without what only training needs
    pace    how fast the leaf of this name learns
    rates   (regular expression, factor of the rates of leaves that it matches): for each leaf the first counts; each is to match one that
            learns
    slots   positions that are kept free before the tokens of every example, for what the method puts there
    penalty tuned leaves -> a scalar that is added to the loss that is lowered; None where nothing is
    gain    what the leaf of this name is multiplied by where it is used: c times the leaf does what gain c would
    loose   keys of its config that change nothing in the network besides gains, paces, what leaves start from, and ranks, which zeros may
            fill up: runs that differ in them alone can be one program
    around  train.steps -> (the optimizer's whole transformation -> the one to train with). ValueError for a run that is too short
    """

    tuned: Callable[[str], bool]
    sites: Sites = NOTHING
    cuts: tuple[int, ...] = ()
    start: Callable[[Tree], Tree] = lambda params: params
    residual: Callable[[str, jax.Array], dict[str, jax.Array]] | None = None
    fold: Callable[[Tree], Tree] | None = lambda params: params
    bare: Callable[[Tree], Tree] = lambda params: params
    pace: Callable[[str], Pace] = lambda name: Pace()
    rates: tuple[tuple[str, float], ...] = ()
    slots: int = 0
    penalty: Callable[[Tree], jax.Array] | None = None
    gain: Callable[[str], float] = lambda name: 1.0
    loose: tuple[str, ...] = ()
    around: Callable[[int], Wrap] = lambda steps: lambda transform: transform
