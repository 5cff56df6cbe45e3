"""Model FLOPs per trained token, counted from the shapes of the leaves, and what a device can do at most (tuning.core.chips).

The rule (Kaplan et al., 2020, arXiv:2001.08361, section 2.1, with attention counted as causal and frozen leaves taken into account):
a multiply-add is 2 FLOPs; every matrix that multiplies a token is read once forward, once backward for the gradient of its input if
anything below it learns, and once more for its own gradient if it learns itself. Embedding lookups, norms, softmax and what
rematerialisation computes again count nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tuning.core import chips, tree
from tuning.nn.stack import counted_layers

MATRIX = r"(^|/)kernel$|(?<!^embed/)adapter/(a|b)$"
INPUTS = r"^encoder/|(^|/)cross/(k|v)/"  # what the tokens of an encoder pass through, and those of its decoder do not
EMBEDDING, HEAD = r"^embed/(table|added|adapter/(a|b))$", r"^head/(kernel|added)$"


def flops_per_token(
    leaves: Mapping[str, tuple[int, ...]], tuned: Callable[[str], bool], attention_flops: float,
    passes: Callable[[str], float] = lambda name: 1.0,
) -> float:  # fmt: skip
    """FLOPs per token of one training step; of a forward pass, if no leaf is tuned.

    leaves           {name: shape} of all parameters, layers stacked on the first axis
    tuned            whether the leaf of that name learns
    attention_flops  forward FLOPs per token of the attention scores and their use, in all layers
    passes           how many times a token passes through a leaf: the share of experts that it is routed to; for those that match INPUTS,
                     the encoder's tokens for each of the decoder's

    Full tuning gives 6 P + 3 A, adapters in every layer 4 P + 6 N + 3 A, with P elements in matrices, N in adapters and A for attention.
    """
    layers = max((span.stop for name in leaves if (span := counted_layers(name))), default=0)
    lowest = min((_place(name, layers) for name in leaves if tuned(name)), default=layers + 2)
    head = HEAD if any(tree.matches(HEAD, name) for name in leaves) else EMBEDDING  # tied: the embedding is the head's matrix
    total = attention_flops * (1 + 2 * (layers - min(max(lowest, 0), layers)) / max(layers, 1))
    for name, shape in leaves.items():
        if tree.matches(head, name):
            through = lowest < layers + 1
        elif tree.matches(MATRIX, name):
            through = lowest <= min(_place(name, layers), layers)
        else:
            continue
        total += 2 * math.prod(shape) * passes(name) * (1 + through + tuned(name))
    return float(total)


def _place(name: str, layers: int) -> int:
    """Where a leaf stands: -1 before the layers, its first layer, `layers` for the norm after them, `layers + 1` for the head."""
    span = counted_layers(name)
    if span:
        return span.start
    return layers + 1 if name.startswith("head/") else layers if name.startswith(("norm/", "decoder/norm/")) else -1


def peak_flops(device: Any) -> float | None:
    """bf16 FLOP/s of a jax.Device at its best; None if it is not known, and then there is no utilisation to report."""
    chip = chips.of(device.device_kind)
    return chip.peak_flops if chip else None
