"""Full tuning: every leaf learns."""

from __future__ import annotations

from tuning.methods import depth
from tuning.methods.method import Method
from tuning.nn.sites import Outline


def full(outline: Outline, *, layer_decay: float = 1.0, unfreeze_every: int = 0) -> Method:
    """Nothing is added and nothing is frozen.

    layer_decay     what the learning rate is multiplied with from the head down, layer by layer
    unfreeze_every  steps after which one layer more begins to learn, from the top; 0 lets all learn from the start
    """
    every = [leaf for name in outline.leaves for leaf in depth.by_layer(name)]
    return Method(tuned=lambda name: True, pace=depth.paces(outline, every, layer_decay, unfreeze_every))
