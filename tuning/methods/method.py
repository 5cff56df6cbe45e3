"""What a tuning method is: a value made of functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tuning.core.types import Tree
from tuning.nn.sites import NOTHING, Sites


@dataclasses.dataclass(frozen=True)
class Method:
    """How a network is tuned.

    tuned   whether the leaf of this name learns
    sites   what is added to the network, and where
    cuts    layers before which the stack must be cut, because leaves on the two sides are treated differently
    start   parameters as loaded -> parameters to start from
    fold    parameters -> the base network's parameters that give the same outputs, nothing added (computed in float32)
    """

    tuned: Callable[[str], bool]
    sites: Sites = NOTHING
    cuts: tuple[int, ...] = ()
    start: Callable[[Tree], Tree] = lambda params: params
    fold: Callable[[Tree], Tree] = lambda params: params
